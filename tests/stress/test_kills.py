"""The kills of the stress tests for half a minute, and whether they notice what must not be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recursify.training.lock import LOCK
from stress import same
from stress.child import KILLED, Ended
from stress.kills import _after
from stress.part import Outcome, next_case, record
from stress.scenarios import SCENARIOS

ROOT = Path(__file__).resolve().parents[2]
# Run before the cases: a fault in recursify that they have to find.
PLANTED = {
    "a flipped bit is not looked for": "import recursify.training.saving as s; s.first_damaged = lambda folder: None",
    "a write is not atomic": "import recursify.reports.html as h; h.write_text = lambda path, text: in_halves(path, text)",
    "leftovers stay": "import recursify.utils.atomic as a; a.clear_leftovers = lambda folder: None",
}


IN_HALVES = """
def in_halves(path, text):
    path.write_text(text[:99])
    with path.open("a") as file:
        file.write(text[99:])
"""


def cases(before: str, folder: Path, name: str, count: int) -> subprocess.CompletedProcess[str]:
    """So many cases of one scenario, in a process of their own, which forks."""
    program = (
        f"{IN_HALVES}\nimport json, time; from stress import kills, scenarios; {before}\n"
        f"kills.SCENARIOS = {{{name!r}: scenarios.SCENARIOS[{name!r}]}}\n"
        "found, first = [], 0\n"
        f"while not found and first < {count}:\n"
        "    found, first = kills.run(0, 0, first, 1).faults, first + 1\n"
        f"open({str(folder / 'found.json')!r}, 'w').write(json.dumps(found))\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", program], cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "scenario", "said"),
    [
        ("a flipped bit is not looked for", "train, mixed", "a flipped bit in"),
        ("leftovers stay", "convert", "files: "),
        ("a write is not atomic", "evaluate", "page.html"),
    ],
)
def test_a_planted_fault_is_found(planted: str, scenario: str, said: str, tmp_path: Path) -> None:
    done = cases(PLANTED[planted], tmp_path, scenario, 12)
    assert done.returncode == 0, done.stderr[-2000:]
    faults = json.loads((tmp_path / "found.json").read_text())
    assert faults and any(said in fault["found"] for fault in faults), faults


@pytest.mark.slow
def test_half_a_minute_of_kills(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["--parts", "kills", "--minutes", "0.5", "--results", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "stress", *words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    (run,) = json.loads((tmp_path / "kills.json").read_text())["runs"]
    assert run["cases"] >= 2 and not run["faults"] and {"seed", "first", "minutes", "counts", "machine"} <= set(run)


# Whether two folders are the same


@pytest.fixture
def twins(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        torch.save({"weights": torch.arange(3.0), "step": 1}, tmp_path / name / "model.pt")
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"loss": 1.0, "seconds": float(ord(name))}) + "\n")
        (tmp_path / name / "sub" / "page.html").write_text("<p>")
    (tmp_path / "a" / LOCK).touch()
    (tmp_path / "a" / ".recursify-empty").mkdir()
    return tmp_path / "a", tmp_path / "b"


def test_twins_are_the_same(twins: tuple[Path, Path]) -> None:
    assert same.difference(*twins) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: torch.save({"weights": torch.arange(3.0) + 1e-6, "step": 1}, a / "model.pt"), "model.pt: /weights"),
        (lambda a: torch.save({"weights": torch.arange(3), "step": 1}, a / "model.pt"), "model.pt: /weights"),
        (lambda a: torch.save({"weights": torch.arange(3.0), "step": 2}, a / "model.pt"), "model.pt: /step"),
        (lambda a: (a / "metrics.jsonl").write_text('{"loss": 2.0, "seconds": 1}\n'), "metrics.jsonl: /0/loss"),
        (lambda a: (a / "metrics.jsonl").write_text('{"loss": 1.0, "more": 1}\n'), "metrics.jsonl: /0"),
        (lambda a: (a / "metrics.jsonl").write_text('{"loss": 1.0'), "metrics.jsonl: "),
        (lambda a: (a / "sub" / "page.html").write_text("<p"), "sub/page.html: other contents"),
        (lambda a: (a / "sub" / "page.html").unlink(), "files: [] too many, ['sub/page.html'] missing"),
        (lambda a: (a / ".recursify-empty" / "x").touch(), "files: ['.recursify-empty/x'] too many"),
    ],
)
def test_a_difference_is_found(change: object, said: str, twins: tuple[Path, Path]) -> None:
    change(twins[0])  # type: ignore[operator]
    found = same.difference(*twins)
    assert found is not None and found.startswith(said)


@pytest.mark.parametrize(
    ("status", "output", "fine"),
    [
        (KILLED, "", True), (0, "", True), (2, "error: full\n", True),
        (2, "", False), (2, "error: a\nerror: b\n", False), (1, "error: a\n", False),
        (2, "error: a\nTraceback (most recent call last):\n", False),
    ],
)  # fmt: skip
def test_how_a_command_may_end(status: int, output: str, fine: bool, tmp_path: Path) -> None:
    assert (_after(Ended(status, output, 1.0), tmp_path, SCENARIOS["convert"]) is None) == fine


def test_a_broken_file_under_a_final_name_is_found(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"PK")
    assert "model.pt" in (_after(Ended(KILLED, "", 1.0), tmp_path, SCENARIOS["convert"]) or "")


def test_results_name_no_place_of_this_machine(tmp_path: Path) -> None:
    outcome = Outcome(5)
    outcome.add("convert", {"found": f"{ROOT / 'stress'} {sys.prefix} {tmp_path} {sys.base_prefix}"})
    outcome.add("convert")
    record(tmp_path / "kills.json", outcome, 0, 60.0)
    text = (tmp_path / "kills.json").read_text()
    assert "CHECKOUT/stress" in text and not any(place in text for place in (str(ROOT), sys.prefix, sys.base_prefix))
    assert next_case(tmp_path / "kills.json", 0) == 7 and next_case(tmp_path / "kills.json", 1) == 0
