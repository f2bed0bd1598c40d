"""Mutation testing: the possible faults, the sample, and a run on a toy whose tests detect one fault and miss another."""

from __future__ import annotations

import random
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from mutants.__main__ import HERE, ROOT, excuses, judge, page
from mutants.planting import changed, draw, possible

TOY = '''
"""A toy of 1 function."""

def clipped(x: int, most: int) -> int:
    """At most 3."""
    if x > most:
        return most
    return x + 0
'''
TOY_TEST = """
import toy

def test_clipped():
    assert toy.clipped(1, 3) == 1 and toy.clipped(9, 3) == 3
"""

SMALL_GREATER = ("if x > most:", "if x >= most:")
EXCUSED = ("return x + 0", "return x - 0")


def planted(source: str) -> set[tuple[str, str]]:
    texts = [mutant.plant(source) for mutant in possible("any.py", source)]
    return {changed(source, text) for text in texts if text is not None}


def test_caught_survived_and_excused_on_a_toy(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "toy.py").write_text(TOY, encoding="utf-8")
    (tmp_path / "tests" / "test_toy.py").write_text(TOY_TEST, encoding="utf-8")
    area = {"files": ["toy.py"], "tests": ["tests/test_toy.py"]}

    record = judge(tmp_path, "toy", area, {("toy.py", "clipped", *EXCUSED): "adds nothing"}, sample=0)

    outcomes = {(one["before"], one["after"]): one["outcome"] for one in record["mutants"]}
    assert outcomes == {SMALL_GREATER: "survived", EXCUSED: "excused"}
    assert (record["planted"], record["caught"], record["survived"], record["excused"]) == (5, 3, 1, 1)
    assert record["share"] == 1 / 4 and record["interval"] is None
    assert (tmp_path / "toy.py").read_text(encoding="utf-8") == TOY
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == [".mutants", "test_toy.py", "toy.json", "toy.py"]


@pytest.mark.parametrize(
    "line, faults",
    [
        ("x.sum(dim=1, keepdim=y)", {"x.sum(keepdim=y)", "x.sum(dim=1)",
                                   "x.mean(dim=1, keepdim=y)", "x.sum(dim=2, keepdim=y)", "x.sum(dim=0, keepdim=y)", "pass"}),
        ("return x(y, x)", {"return x(y)"}),
        ("return x(dim=y)", {"return x()"}),
        ("return max(x, y)", {"return min(x, y)", "return max(x)"}),
        ("return sum(x)", set()),
        ("y += x", {"pass"}),
    ],
)  # fmt: skip
def test_faults_of_our_own(line: str, faults: set[str]) -> None:
    assert {new.replace("( ", "(").replace("= ", "=") for _, new in planted(f"def f(x, y):\n    {line}\n")} == faults


@pytest.mark.parametrize(
    "source",
    [
        '"""1 + 1"""\n',
        '__all__ = ["a" + "b"]\n',
        "x: int | None\n",
        "def f(x: Literal[1] | None) -> Literal[2]:\n    return x\n",
        'def f(x):\n    raise ValueError(f"expected {x + 1}", x == 2)\n',
        "def f(x):\n    print(x + 1)\n",
        "def f(x):\n    return zip(x, strict=True)\n",
        "class A:\n    @property\n    def x(self):\n        return self\n",
    ],
)
def test_lines_without_mutations(source: str) -> None:
    assert not planted(source)


def test_a_draw_is_spread_over_the_functions() -> None:
    source = "\n".join(f"def f{i}(x):\n    return x + {i + 5}\n" for i in range(10))
    every = possible("any.py", source)
    drawn = draw(every, 10, random.Random(3))
    assert Counter(mutant.function for mutant in drawn) == dict.fromkeys((f"f{i}" for i in range(10)), 1)
    assert drawn == draw(every, 10, random.Random(3)) != draw(every, 10, random.Random(4))
    assert sorted(map(repr, draw(every, 0, random.Random(3)))) == sorted(map(repr, every))


def test_the_tables_name_what_there_is() -> None:
    areas = tomllib.loads((HERE / "areas.toml").read_text(encoding="utf-8"))
    paths = [path for area in areas.values() for path in area["files"] + area["tests"]]
    assert not [path for path in paths if not (ROOT / path).exists()]
    files = {file for area in areas.values() for file in area["files"]}
    for file, function, before, new in excuses():
        source = (ROOT / file).read_text(encoding="utf-8")
        assert file in files and {line.strip() for line in before.splitlines()} <= {line.strip() for line in source.splitlines()}, before
        assert any(mutant.function == function for mutant in possible(file, source)), (function, new)


def test_report_states_its_sample() -> None:
    counts = {"possible": 300, "drawn": 15, "no_program": 1, "not_run": 2, "planted": 12, "caught": 11, "timeouts": 0, "excused": 0}
    made = {"seconds": 9, "seconds_each": 1.5, "seed": 4, "jobs": 2, "date": "", "commit": "", "versions": ""}
    survivor = {"file": "a.py", "function": "f", "line": 1, "before": "x", "after": "y", "outcome": "survived"}
    record = counts | made | {"survived": 1, "share": 1 / 12, "interval": [0.015, 0.354], "mutants": [survivor]}
    text = page({"toy": record})
    assert "12, of 300" in text and "8%, 2% to 35%" in text and "A sample of 15, seed 4" in text and "for want of time: 2" in text
    assert "- x\n+ y" in text
