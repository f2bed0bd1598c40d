"""The evidence: its page matches its results, its baselines loop as published, and a study runs from scratch to a table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.evidence import __main__ as evidence
from recipes.evidence import tables
from recipes.evidence.rivals import RIVALS, replace_loop
from recursify import RecursiveLLM
from recursify.network.configuration_recursive_llm import from_donor
from tests.support.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = tables.PAGES[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_pages_equal_the_rendered_results(page: Path) -> None:
    written = page.read_text(encoding="utf-8")
    assert "<!-- table " in written
    assert tables.render(written) == written, f"docs/{page.name} is out of date: python -m recipes.evidence tables"


def test_every_table_of_the_page_is_of_a_study() -> None:
    named = re.findall(r"<!-- table (\S+) (\S+)", PAGE)
    assert {study for study, _ in named} == set(evidence.STUDIES)
    assert {kind for _, kind in named} <= set(tables.KINDS)


def test_a_changed_figure_is_noticed(tmp_path: Path) -> None:
    results = ROOT / "recipes" / "evidence" / "results"
    for file in results.glob("*.json"):
        found = json.loads(file.read_text())
        for run in found["runs"]:
            for figures in run["figures"].values():
                figures.update({key: value / 2 if isinstance(value, float) else value for key, value in figures.items()})
        (tmp_path / file.name).write_text(json.dumps(found))
    assert tables.render(PAGE, tmp_path) != PAGE


# Baselines


def looped(rival: str) -> Any:
    torch.manual_seed(0)
    shape = {"prelude_layers": 1, "L_layers": 1, "coda_layers": 1, "H_cycles": 2, "L_cycles": 1}
    model = RecursiveLLM(from_donor(tiny_config("qwen2", num_hidden_layers=3), [0, 1, 2], **shape)).eval()
    return replace_loop(model, rival)


def states(model: Any, monkey: dict[int, Tensor]) -> list[Tensor]:
    """Of a recursion whose block adds another number at every application."""

    def block(z: Tensor, n: int) -> Tensor:
        monkey[n] = z
        return z + n + 1

    e = torch.arange(model.config.hidden_size).float()[None, None]
    with torch.no_grad():
        return list(model.model.recursion.steps(e, block, 2, 1))


def test_naive_loop_repeats_the_block() -> None:
    seen: dict[int, Tensor] = {}
    first, second = states(looped("naive"), seen)
    assert sorted(seen) == [0, 1, 2, 3]
    assert torch.equal(first, seen[0] + 1 + 2) and torch.equal(second, seen[0] + 1 + 2 + 3 + 4)


def test_the_adapter_reads_state_and_prelude() -> None:
    model, seen = looped("concat"), {}
    adapter = model.model.recursion.adapter
    first, _ = states(model, seen)
    e = torch.arange(model.config.hidden_size).float()[None, None]
    torch.testing.assert_close(seen[1], adapter(torch.cat([seen[0] + 1, e], dim=-1)).detach())
    torch.testing.assert_close(first, seen[1] + 2)


def test_the_gate_lies_between_old_and_new() -> None:
    seen: dict[int, Tensor] = {}
    states(looped("gate"), seen)
    moved = seen[1] - seen[0]
    assert (moved > 0).all() and (moved < 1).all()


@pytest.mark.parametrize("rival", RIVALS)
def test_rival_loops_are_trainable_at_every_cycle(rival: str) -> None:
    model = looped(rival)
    x = torch.arange(12)[None]
    out = model(x, labels=x, output_cycle_logits=True, use_cache=False)
    assert len(out.cycle_logits) == 2
    out.loss.backward()
    own = [p for name, p in model.model.recursion.named_parameters() if name.split(".")[0] not in ("q_head", "H_init", "L_init")]
    assert all(p.grad is not None and p.grad.any() for p in own)


# Studies


def test_study_runs_and_resumes(tmp_path: Path) -> None:
    run = ["state_tracking", "--size", "test", "--device", "cpu", "--processes", "1", "--output", str(tmp_path), "--work", str(tmp_path)]
    names = ["donor as it is", "donor, fine-tuned on the same tokens", "donor, fine-tuned for the same FLOPs", "ours: keep_donor, H 3, L 1"]
    evidence.main([*run, "--rows", *names[:2]])
    evidence.main([*run, "--rows", *names[2:]])
    found = json.loads((tmp_path / "state_tracking-test.json").read_text())
    assert [entry["name"] for entry in found["runs"]] == names
    as_is, tuned, longer, ours = found["runs"]
    assert (as_is["steps"], as_is["flops"]) == (0, 0)
    assert longer["steps"] > tuned["steps"] == ours["steps"] == 2
    assert longer["flops"] == pytest.approx(ours["flops"], rel=0.1) and ours["flops"] > tuned["flops"]
    assert list(ours["figures"]) == ["1", "2", "3", "4", "5", "6"] and list(tuned["figures"]) == ["donor"]
    with pytest.raises(SystemExit):
        evidence.main([*run, "--rows", "no such row"])


def test_scan_without_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RECURSIFY_SCAN", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        evidence.main(["scan", "--size", "test", "--device", "cpu", "--output", str(tmp_path), "--work", str(tmp_path)])
    assert ended.value.code == 2
    assert "RECURSIFY_SCAN: expected a folder with tasks_train_length.txt and tasks_test_length.txt" in capsys.readouterr().err


def test_names_of_rows_are_their_own() -> None:
    for make, sizes in evidence.STUDIES.values():
        names = [row.name for row in make(sizes["test"]).rows]
        assert len(set(names)) == len(names)
