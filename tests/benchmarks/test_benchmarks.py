"""The benchmarks and the recipe of the shipped donor: they run, and their conclusions follow from their measurements."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks import __main__ as runner
from benchmarks import ceilings as bounds
from benchmarks import decoding_static, page
from benchmarks import training as steps
from benchmarks.case import Bench, Case, Check, Registry, Table, registry
from benchmarks.measure import alternate, ratio
from recursify.network.configuration_recursive_llm import from_donor
from recursify.training.cost import step_flops
from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = sorted({page.PAGE, *(file for file in DOCS if "<!-- bench " in file.read_text(encoding="utf-8"))})
Found = Callable[[Bench], Iterator[Table | Check]]


# Every case


# test_gpu.py runs `works`; the others are `decoding_static` again, at other points, each with a capture of half a minute.
ELSEWHERE = {"works", "decoding_static_batches", "decoding_static_long"}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # five minutes on two idle cores without bfloat16 of their own: it starts some twenty processes
def test_every_case_runs_and_fills_its_page(tmp_path: Path) -> None:
    """All in one process, whose libraries take longer to load than most cases to run."""
    names = [name for name in registry().cases if name not in ELSEWHERE]
    command = [sys.executable, "-m", "benchmarks", *names, "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "quick.json").read_text(encoding="utf-8"))
    assert list(results) == names
    for name, found in results.items():
        assert {"cpu", "gpu", "versions", "commit", "changed", "load", "load_after", "seconds", "date"} <= set(found["machine"])
        assert {"torch", "transformers", "accelerate", "recursify"} <= set(found["machine"]["versions"])
        assert found["about"] and found["tables"] and all(one["rows"] for one in found["tables"])
        assert page.tables_of(name, results).strip() in done.stdout
        assert all(check["what"] in done.stdout for check in found["checks"])


@pytest.mark.parametrize("name", sorted(ELSEWHERE - {"works"}))
def test_other_points_of_decoding_static(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def one_token(models: Any, rows: int, context: int, bench: Bench) -> list[dict[str, Any]]:
        asked.append((rows, context))
        return [{"rows": rows, "graphs": len(asked)}]

    monkeypatch.setattr(decoding_static, "one_token", one_token)
    table, check = registry().cases[name].run(Bench("quick"))
    assert isinstance(table, Table) and [row["rows"] for row in table.rows] == [rows for rows, _ in asked] and asked
    assert isinstance(check, Check) and (check.value, check.most) == (len(asked), 1)


def test_every_module_is_here_and_is_a_case() -> None:
    assert registry().missing == {}
    assert all(one.about and set(one.sizes) <= {"cpu", "cuda"} for one in registry().cases.values())


# The runner


def named(name: str, run: Found, sizes: tuple[str, ...] = ("cpu", "cuda"), asked: bool = False) -> Case:
    return Case(name, name.title(), f"How {name} is measured.", run, sizes, asked)


def one_row(value: float, *checks: Check) -> Found:
    def run(bench: Bench) -> Iterator[Table | Check]:
        yield Table("Rows", [{"what": bench.size, "seconds": value}])
        yield from checks

    return run


Use = Callable[..., None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Replaces the registered cases."""

    def put(*cases: Case, missing: dict[str, str] | None = None) -> None:
        known = Registry({one.name: one for one in cases}, missing or {})
        monkeypatch.setattr(runner, "registry", lambda: known)

    return put


MISSED = Check("seconds of a step", 2.5, most=2)
TOO_FEW = Check("steps per second", 0.4, least=0.5)
AIM = Check("what would be nice", 2.5, most=2, must=False)
KEPT = Check("what holds", 2, most=2)


@pytest.mark.parametrize(
    ("checks", "quick", "status", "printed"),
    [
        ([KEPT], False, 0, ["| what holds | 2 | at most 2 | holds |"]),
        ([MISSED], False, 1, ["| seconds of a step | 2.50 | at most 2 | MISSED |"]),
        ([TOO_FEW], False, 1, ["| steps per second | 0.400 | at least 0.5 | MISSED |"]),
        ([AIM], False, 0, ["| what would be nice | 2.50 | at most 2 | aim missed |"]),
        ([MISSED, KEPT, AIM], False, 1, ["MISSED", "| holds |", "aim missed"]),
        ([MISSED], True, 0, ["MISSED"]),
    ],
)
def test_missed_bounds_are_reported_and_targets_are_not_bounds(
    checks: list[Check], quick: bool, status: int, printed: list[str], use: Use, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use(named("first", one_row(1, *checks)), named("second", one_row(1)))
    assert runner.main(["first", "second", "--output", str(tmp_path), *(["--quick"] if quick else [])]) == status
    out = capsys.readouterr().out
    assert all(text in out for text in printed)
    assert [check["holds"] for check in stored(tmp_path, "quick" if quick else "cpu")["first"]["checks"]] == [one.holds for one in checks]


def stored(folder: Path, size: str = "cpu") -> Any:
    return json.loads((folder / f"{size}.json").read_text(encoding="utf-8"))


def test_other_results_are_kept(use: Use, tmp_path: Path) -> None:
    use(named("first", one_row(1)), named("second", one_row(2)))
    runner.main(["--output", str(tmp_path)])
    before = stored(tmp_path)
    use(named("first", one_row(1)), named("second", one_row(3)))
    runner.main(["second", "--output", str(tmp_path)])
    after = stored(tmp_path)
    assert after["first"] == before["first"]
    assert [found["second"]["tables"][0]["rows"][0]["seconds"] for found in (before, after)] == [2, 3]


def test_results_before_a_failed_case_are_kept(use: Use, tmp_path: Path) -> None:
    def broken(bench: Bench) -> Iterator[Table | Check]:
        yield Table("Rows", [{"what": "one"}])
        raise RuntimeError("out of memory")

    use(named("first", one_row(1)), named("second", broken))
    with pytest.raises(RuntimeError, match="out of memory"):
        runner.main(["--output", str(tmp_path)])
    assert set(stored(tmp_path)) == {"first"}


def test_what_belongs_to_a_suite(use: Use) -> None:
    cases = named("both", one_row(1)), named("gpu", one_row(1), ("cuda",)), named("long", one_row(1), asked=True)
    use(*cases)
    assert [one.name for one in runner.chosen(runner.parse([]))] == ["both"]
    assert [one.name for one in runner.chosen(runner.parse(["long", "both"]))] == ["long", "both"]


def test_list_of_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(registry().cases)
    assert [line.split()[0] for line in lines if "only when named" in line] == [one.name for one in registry().cases.values() if one.asked]


@pytest.mark.parametrize(("name", "why"), [("nonsense", "nonsense: no such case; there are"), ("served", "no such case here (no httpx)")])
def test_an_unknown_case_is_refused_with_the_list(name: str, why: str, use: Use, capsys: pytest.CaptureFixture[str]) -> None:
    use(named("first", one_row(1)), named("second", one_row(1)), missing={"served": "no httpx"})
    with pytest.raises(SystemExit) as ended:
        runner.main([name])
    printed = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert ended.value.code == 2 and why in printed and "first, second" in printed


def test_a_case_of_a_gpu_alone_is_refused_and_its_command_named(use: Use, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    use(named("graphs", one_row(1), ("cuda",)))
    with pytest.raises(SystemExit):
        runner.main(["graphs", "--output", str(tmp_path)])
    assert "python -m benchmarks.gpu graphs" in capsys.readouterr().err
    assert runner.main(["graphs", "--quick", "--output", str(tmp_path)]) == 0  # at toy size it runs anywhere


# The page


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_pages_equal_the_rendered_results(file: Path) -> None:
    written = file.read_text(encoding="utf-8")
    assert page.render(written) == written, f"{file.name} is out of date: python -m benchmarks --render"


def test_the_page_has_every_case() -> None:
    blocks = set(re.findall(r"<!-- bench (\w+) (\w+) -->", page.PAGE.read_text(encoding="utf-8")))
    assert blocks == {(size, one.name) for one in registry().cases.values() for size in one.sizes}


def test_render_prints_results_anew(use: Use, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = tmp_path / "performance.md"
    written.write_text("# Title\n\n<!-- bench cpu nothing -->\n| 1 |\n<!-- end -->\n\nWords.\n", encoding="utf-8")
    monkeypatch.setattr(page, "DOCS", tmp_path)
    assert runner.main(["--render"]) == 0
    expected = "# Title\n\n<!-- bench cpu nothing -->\n(Not measured yet: `python -m benchmarks nothing` does.)\n<!-- end -->\n\nWords.\n"
    assert written.read_text(encoding="utf-8") == expected


def test_a_block_follows_its_results(use: Use, tmp_path: Path) -> None:
    blank = "<!-- bench cpu first -->\n<!-- end -->\n=====\n<!-- bench cpu first Rows -->\nold\n<!-- end -->"
    pages = []
    for value in (1.5, 2.5):
        use(named("first", one_row(value, KEPT)))
        runner.main(["first", "--output", str(tmp_path)])
        pages.append(page.render(blank, tmp_path))
        assert page.render(pages[-1], tmp_path) == pages[-1]
        whole, alone = pages[-1].split("\n=====\n")
        assert "How first is measured." in whole and "| what holds |" in whole and "**Rows**" in whole
        assert alone == f"<!-- bench cpu first Rows -->\n| what | seconds |\n|---|---|\n| cpu | {value:.2f} |\n<!-- end -->"
    assert pages[0] != pages[1]
    with pytest.raises(KeyError):
        page.make("cpu", "first", "No such table", tmp_path)


def test_a_table_has_all_columns_and_the_limit_last() -> None:
    spread = {"median": 1.25, "least": 1.0, "most": 12.0, "pairs": 5}
    rows: list[dict[str, Any]] = [{"what": "a", "limit": "memory", "ratio": spread}, {"what": "b", "steps": 3, "ratio": None}]
    assert page.table(rows).splitlines() == [
        "| what | ratio | steps | limit |",
        "|---|---|---|---|",
        "| a | 1.25 (1.00 to 12.0) |  | memory |",
        "| b |  | 3 |  |",
    ]


@given(st.floats(1e-6, 999, allow_subnormal=False), st.sampled_from((1, -1)))
@example(9.999, 1)
@example(99.96, 1)
@example(0.9996, -1)
@example(0.00001, 1)
def test_numbers_have_three_significant_digits(size: float, sign: int) -> None:
    written = page._number(sign * size)
    assert float(written) == float(f"{sign * size:.3g}")
    mantissa = written.lower().partition("e")[0]
    assert len(re.sub(r"[-.]", "", mantissa).lstrip("0")) == 3


@pytest.mark.parametrize(
    ("value", "written"),
    [(0, "0"), (7, "7"), (151_936, "151,936"), (0.0, "0.00"), (999.6, "1,000"), (1234.6, "1,235"), (2.5e9, "2,500,000,000")],
)
def test_whole_and_large_numbers(value: float, written: str) -> None:
    assert page._number(value) == written


# Time and memory


def test_sides_alternate_after_a_warm_up_round() -> None:
    turns: list[str] = []
    times = alternate({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 3, torch.device("cpu"))
    assert turns == ["a", "b"] * 4
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_one_of_pairs() -> None:
    assert ratio([2.0, 8.0, 3.0], [1.0, 2.0, 1.0], by=2) == {"median": 1.5, "least": 1.0, "most": 2.0, "pairs": 3}


def test_layer_applications_are_counted_as_the_work_is() -> None:
    """Where there is nothing but layers, the two countings of work agree."""
    donor = tiny.tiny_config(vocab_size=1, num_hidden_layers=4)
    config = from_donor(donor, [0, 1, 2, 3], prelude_layers=1, L_layers=2, coda_layers=1, H_cycles=3, L_cycles=1)
    batch = steps.Batch(1, 8)
    for way in (steps.MAIN, steps.LAST, steps.CYCLE, steps.FULL):
        settings = steps.settings_of(way, batch, torch.device("cpu"), 1)
        supervised = config.H_cycles if settings.enable_deep_supervision else 1
        flops = step_flops(config, 8, 8, supervised=supervised, backprop=settings.backprop) / step_flops(donor, 8, 8)
        assert steps.applications(config, way, donor.num_hidden_layers) == pytest.approx(flops, rel=0.02), way


# The recipe


def load_script(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script as a module; its folder is importable, as when it is run."""
    file = ROOT / path
    monkeypatch.syspath_prepend(str(file.parent))
    spec = importlib.util.spec_from_file_location(f"script_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("recipes/shipped_donor.py", monkeypatch)


def run_of(recipe: ModuleType, before: list[float], after: list[float]) -> dict[str, Any]:
    return {"name": recipe.MAIN, "seed": 0, "before": before, "after": after}


@pytest.mark.parametrize(
    ("after", "falls", "not_worse"),
    [
        ([4.0, 3.9, 3.9], True, True),
        ([4.0, 3.9, 3.904], True, True),
        ([4.0, 3.9, 3.906], True, False),  # worse than the second
        ([4.0, 5.1, 3.9], False, False),
        ([4.0, 4.0, 5.05], False, False),  # below where it began, but not below the donor
    ],
)
def test_conclusion_of_the_recipe(recipe: ModuleType, after: list[float], falls: bool, not_worse: bool) -> None:
    found = recipe.verdict([run_of(recipe, [5.0, 5.0, 5.1], after)], as_is=5.0)
    assert (found["every_cycle_falls"], found["later_cycles_not_worse"]) == (falls, not_worse)
    assert recipe.holds(found) == (falls and not_worse)


def test_without_a_run_the_recipe_concludes_nothing(recipe: ModuleType) -> None:
    assert not recipe.holds(recipe.verdict([], as_is=5.0))


def test_recipe_page_equals_its_json(recipe: ModuleType) -> None:
    folder = ROOT / "recipes/results"
    found = json.loads((folder / "shipped_donor.json").read_text(encoding="utf-8"))
    assert (folder / "shipped_donor.md").read_text(encoding="utf-8") == recipe.render(found)
    assert recipe.holds(recipe.verdict(found["runs"], found["donor_as_is"]))


def test_peak_is_the_maximum_of_its_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([bounds.Ceilings(3.0, 2.0), bounds.Ceilings(1.0, 5.0)])
    monkeypatch.setattr(bounds, "_look", lambda device, dtype: next(looks))
    monkeypatch.setattr(bounds, "_seen", {})
    of = torch.device("cpu"), torch.float32
    assert bounds.ceilings(*of) == bounds.ceilings(*of) == bounds.Ceilings(3.0, 2.0)  # the second time from memory
    monkeypatch.setattr(bounds, "AGE", -1.0)
    assert bounds.ceilings(*of) == bounds.Ceilings(3.0, 5.0)
