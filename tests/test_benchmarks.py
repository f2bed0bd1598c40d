"""The benchmarks and the recipe of the shipped donor: that they run, and that what they conclude follows from what they measured."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny

from recursify import checkpoint, convert
from recursify.configuration_recursive_llm import from_donor
from recursify.cost import step_flops
from recursify.demo_text import donor_folder, write_text
from recursify.donor import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def load_script(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script as a module; what lies beside it can be imported, as when it is run."""
    file = ROOT / path
    monkeypatch.syspath_prepend(str(file.parent))
    spec = importlib.util.spec_from_file_location(f"script_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("benchmarks/training.py", monkeypatch)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("recipes/shipped_donor.py", monkeypatch)


@pytest.mark.slow
def test_the_benchmark_of_training_runs_and_fills_its_page(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/training.py"), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "training-quick.json").read_text(encoding="utf-8"))
    assert {"cpu", "gpu", "versions", "commit", "changed", "load", "date"} <= set(found["machine"])
    assert {"torch", "transformers", "recursify"} <= set(found["machine"]["versions"])
    assert len(found["memory"]) == 6 and all(row["peak"] >= row["before"] > 0 for row in found["memory"])
    assert found["loss"]["recursify"]["loss"] == pytest.approx(found["loss"]["plain"]["loss"], rel=1e-5)
    assert found["loss"]["time_ratio"]["median"] > 0
    assert {(row["plan"], row["backprop"].split(",")[0]) for row in found["throughput"]} == {
        (plan, mode) for plan in ("compact", "keep_donor") for mode in ("full", "cycle", "last")
    }
    assert all(row["per_work"][f"{kind}_by_flops"]["median"] > 0 for row in found["throughput"] for kind in ("wall", "cpu"))
    page = (tmp_path / "training-quick.md").read_text(encoding="utf-8")
    assert all(check["what"] in page for check in found["checks"]) and len(found["checks"]) > 3
    assert done.stdout.strip() == page.strip()


def test_layer_applications_are_counted_as_the_work_is(benchmark: ModuleType) -> None:
    """Where there is nothing but layers, the two countings of work agree."""
    donor = tiny.tiny_config(vocab_size=1, num_hidden_layers=4)
    config = from_donor(donor, [0, 1, 2, 3], prelude_layers=1, L_layers=2, coda_layers=1, H_cycles=3, L_cycles=1)
    for changes, readouts in (
        ({"backprop": "last"}, 1),
        ({"backprop": "full"}, 1),
        ({"backprop": "cycle", "enable_deep_supervision": True}, 3),
    ):
        settings = benchmark.settings_for(benchmark.Batch(1, 1, 8), "cpu", 1, **changes)
        counted = benchmark.layer_applications(config, settings) / 4
        flops = step_flops(config, 8, 8, supervised=readouts, backprop=settings.backprop) / step_flops(donor, 8, 8)
        assert counted == pytest.approx(flops, rel=0.02), changes


def memory_row(benchmark: ModuleType, ratio: float) -> dict[str, Any]:
    batch = {"vocabulary": 8, "rows": 1, "seq_len": 8}
    return {"backprop": benchmark.BOUNDED, "batch": batch, "gradient_checkpointing": False, "peak_ratio": ratio}


def test_a_missed_bound_is_said(benchmark: ModuleType) -> None:
    assert [check["holds"] for check in benchmark.judge({"memory": [memory_row(benchmark, 1.24)]})] == [True]
    assert [check["holds"] for check in benchmark.judge({"memory": [memory_row(benchmark, 1.26)]})] == [False]
    assert [check["holds"] for check in benchmark.judge({"loss": {"above_ratio": 0.126}})] == [False]


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("benchmarks/decoding.py", monkeypatch)


@pytest.mark.slow
def test_the_benchmark_of_decoding_runs_and_fills_its_page(
    decoding: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = tmp_path / "demo"
    demo.mkdir()
    model = convert(str(donor_folder()), keep_donor=True, L_layers=2, L_cycles=1, gain=0.2)
    checkpoint.save(demo / "recursive.pt", model, load_tokenizer(str(donor_folder())), None, {})
    write_text(demo)
    assert decoding.main(["--quick", "--output", str(tmp_path), "--demo", str(demo)]) == 0
    found = json.loads((tmp_path / "decoding-quick.json").read_text(encoding="utf-8"))
    assert {row["model"] for row in found["context"]} >= {"donor", "recursive, full", "recursive, last"}
    assert all(row["equal_tokens"] in (None, 1.0) and 0 <= row["accepted"] <= 1 for row in found["speculation"])
    assert {row["criterion"] for row in found["halting"]["rows"]} == {"q_head", "kl", "entropy"}
    assert all(row["equal_tokens"] == 1.0 for row in found["agreement"] if row["dtype"] == "float32")
    page = (tmp_path / "decoding-quick.md").read_text(encoding="utf-8")
    assert all(check["what"] in page for check in found["checks"]) and len(found["checks"]) > 8
    assert page.strip() in capsys.readouterr().out


def test_a_missed_bound_of_decoding_is_said_and_an_aim_is_no_bound(decoding: ModuleType) -> None:
    def row(ratio: float) -> dict[str, Any]:
        return {"model": "m", "H_cycles": 3, "per_application": {"median": ratio}}

    assert [check["holds"] for check in decoding.judge({"depth": [row(0.86), row(0.84)]})] == [True, False]
    speculation = {"rows": 1, "draft_cycles": 1, "equal_tokens": 0.99, "speed_up": {"median": 1.2}}
    checks = decoding.judge({"speculation": [speculation]})
    assert [(check["must"], check["holds"]) for check in checks] == [(True, False), (False, False)]
    halting = {"rows": [{"nats": 0.02, "saved": 0.9}, {"nats": 0.005, "saved": 0.2}]}
    assert [(check["value"], check["must"]) for check in decoding.judge({"halting": halting})] == [(0.2, False)]


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
def test_what_the_recipe_concludes(recipe: ModuleType, after: list[float], falls: bool, not_worse: bool) -> None:
    found = recipe.verdict([run_of(recipe, [5.0, 5.0, 5.1], after)], as_is=5.0)
    assert (found["every_cycle_falls"], found["later_cycles_not_worse"]) == (falls, not_worse)
    assert recipe.holds(found) == (falls and not_worse)


def test_without_a_run_the_recipe_concludes_nothing(recipe: ModuleType) -> None:
    assert not recipe.holds(recipe.verdict([], as_is=5.0))


def test_the_recipes_figures_are_those_of_its_json(recipe: ModuleType) -> None:
    folder = ROOT / "recipes/results"
    found = json.loads((folder / "shipped_donor.json").read_text(encoding="utf-8"))
    assert (folder / "shipped_donor.md").read_text(encoding="utf-8") == recipe.render(found)
    assert recipe.holds(recipe.verdict(found["runs"], found["donor_as_is"]))
