"""Write donors in the files of transformers 4, their exports, and what both must compute: python -m tests.compat.write FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from recursify.checkpoints import checkpoint
from recursify.conversion import convert
from recursify.conversion.settings import ConvertSettings
from recursify.hub import export
from tests.support.old_donors import CONFIGS, old_donor

LENGTHS = (24, 200)  # the longer one is beyond the original context of longrope


def exported(name: str, folder: Path) -> Any:
    """The donor, converted with all layers kept and exported as a plain model; returns the donor's model."""
    model = old_donor(name, folder / "donor")
    settings = ConvertSettings(
        qwen_model=str(folder / "donor"), output_path=str(folder / "recursive"), keep_donor=True, L_layers=2, H_cycles=2, L_cycles=1,
        seq_len=64,
    )  # fmt: skip
    convert.run(settings, say=lambda _: None)
    export.run(export.ExportSettings(checkpoint=settings.output_path, out=str(folder / "export"), donor=True), say=lambda _: None)
    return model


def main(out: Path) -> None:
    for name in CONFIGS:
        folder = out / name
        model = exported(name, folder)
        tensors = {}
        for length in LENGTHS:
            ids = torch.randint(2, 300, (1, length), generator=torch.Generator().manual_seed(length))
            with torch.no_grad():
                tensors |= {f"ids_{length}": ids, f"logits_{length}": model(ids, use_cache=False).logits.contiguous()}
        tokenizer = checkpoint.load_tokenizer(str(folder / "donor"))
        tensors["text"] = torch.tensor(tokenizer("The old tower <|im_start|> stood still.").input_ids)
        save_file(tensors, folder / "expected.safetensors")
        print(f"wrote {folder}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
