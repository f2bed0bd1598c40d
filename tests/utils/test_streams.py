"""Every command works on terminals that cannot show every character, and without the modules of Unix."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recursify.utils.streams import replace_unencodable
from tests.support import tiny

# `resource` and `os.fork` do not exist on Windows.
WINDOWS = """
import os, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ("resource", "fcntl", "pwd", "grp", "termios", "readline"):
            raise ImportError(name)
for name in ("resource", "fcntl", "readline"):
    sys.modules.pop(name, None)
import torch, transformers, accelerate, datasets, tqdm, psutil  # they are allowed theirs
sys.meta_path.insert(0, Absent()); sys.modules.pop("resource", None)
from recursify.cli.main import main
main(sys.argv[1:])
"""


def test_characters_outside_the_encoding_are_replaced() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    replace_unencodable(stream)
    print("🦞", file=stream, flush=True)
    assert stream.buffer.getvalue() == b"?\n"  # type: ignore[attr-defined]
    replace_unencodable(io.StringIO())
    replace_unencodable(None)


@pytest.mark.parametrize("encoding", ["ascii"])
def test_convert_train_and_export_on_a_limited_terminal(encoding: str, tmp_path: Path) -> None:
    tiny.tiny_donor("qwen2", tmp_path / "donor", num_hidden_layers=4)
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(tiny.sentences(1, 60)), encoding="utf-8")
    train = "train --checkpoint m.pt --dataset_name text.txt --seq_len 16 --batch_size 2 --max_steps 2 --save_every 0"
    for words in (
        "convert --qwen_model donor --output_path m.pt --L_layers 2 --seq_len 32",
        f"{train} --start_gain 0.1 --device cpu",
        "export out --checkpoint m.pt",
    ):
        done = subprocess.run(
            [sys.executable, "-c", WINDOWS, *words.split()], cwd=tmp_path, capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode(encoding, "replace")[-2000:]
        assert b"? " in done.stdout and b"Traceback" not in done.stderr
