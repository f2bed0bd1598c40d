"""Read the exports of write.py with the transformers at hand, and compare: python tests/compat/read.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 1e-4  # of logits, in float32: sums run in another order


def differences(folder: Path) -> dict[str, float]:
    """Largest difference of the logits of the donor's own folder and of the export, by their name and length."""
    expected, found = load_file(folder / "expected.safetensors"), {}
    for kind in ("donor", "export"):
        model = AutoModelForCausalLM.from_pretrained(folder / kind).float().eval()
        for name in (name for name in expected if name.startswith("ids_")):
            length = name.removeprefix("ids_")
            with torch.no_grad():
                logits = model(expected[name], use_cache=False).logits
            found[f"{kind} {length}"] = (logits - expected[f"logits_{length}"]).abs().max().item()
        tokenizer = AutoTokenizer.from_pretrained(folder / kind)
        found[f"{kind} tokens"] = float(tokenizer("The old tower <|im_start|> stood still.").input_ids != expected["text"].tolist())
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
        found[f"{kind} template"] = float(rendered != "hello")
    return found


def main(out: Path) -> int:
    print(f"transformers {transformers.__version__}")
    failed = 0
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        found = differences(folder)
        bad = [f"{name}: {value:.3g}" for name, value in found.items() if value > TOLERANCE]
        failed += bool(bad)
        print(f"{folder.name:<16} {'FAILED ' + ', '.join(bad) if bad else 'equal'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
