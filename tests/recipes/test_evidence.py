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
from recipes.evidence import compact, hops, tables
from recipes.evidence.anchors import ANCHORS
from recipes.evidence.exits import between, every_exit
from recipes.evidence.rivals import RIVALS, replace_loop
from recipes.evidence.starts import average_neighbours
from recipes.evidence.study import is_made, make_donor
from recursify import RecursiveLLM, convert
from recursify.errors import UserError
from recursify.network.configuration_recursive_llm import from_donor
from recursify.training.gains import set_gains
from tests.support.tiny import tiny_config, tiny_donor, tiny_model

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


@pytest.mark.parametrize("rival", [*RIVALS, *ANCHORS])
def test_rival_loops_are_trainable_at_every_cycle(rival: str) -> None:
    model = looped(rival)
    x = torch.arange(12)[None]
    out = model(x, labels=x, output_cycle_logits=True, use_cache=False)
    assert len(out.cycle_logits) == 2
    if rival in ANCHORS:
        set_gains(model, 0.45)
        out = model(x, labels=x, output_cycle_logits=True, use_cache=False)
    out.loss.backward()
    own = [p for name, p in model.model.recursion.named_parameters() if name.split(".")[0] not in ("q_head", "H_init", "L_init")]
    assert all(p.grad is not None and p.grad.any() for p in own)


# Anchors


def mixed(anchor: str, gain: float = 0.3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the loop's second application reads, and e, z_L and z_H of that moment; the block adds noise."""
    model = looped(anchor)
    set_gains(model, gain)
    seen: dict[int, Tensor] = {}
    torch.manual_seed(1)
    e, noise = torch.randn(1, 1, model.config.hidden_size), torch.randn(1, 1, model.config.hidden_size)

    def block(x: Tensor, n: int) -> Tensor:
        seen[n] = x
        return x + noise

    with torch.no_grad():
        _, z_H = model.model.recursion.start(e)
        list(model.model.recursion.steps(e, block, 1, 1))
    torch.testing.assert_close(seen[0], e)  # as converted, and at any gain, the first application is the donor's own
    return seen[1], e, seen[0] + noise, z_H


def test_fixed_sums_stretch_the_gains() -> None:
    for name, each in (("fixed 0.9", 0.45), ("fixed 1.0", 0.5)):
        x, e, z_L, z_H = mixed(name)
        torch.testing.assert_close(x, e + each * (z_H - e) + each * (z_L - e))


def test_the_orthogonal_anchor_adds_nothing_along_the_states() -> None:
    x, e, z_L, z_H = mixed("orthogonal")
    mean = (z_L + z_H) / 2
    injected = x - 0.3 * (z_L + z_H) - 0.4 * mean
    assert abs((injected * mean).sum()) < 1e-4 < injected.norm()
    assert ((e - injected / 0.4) * mean).sum() == pytest.approx((e * mean).sum().item(), abs=1e-4)


def test_history_takes_the_place_of_the_prelude() -> None:
    model, seen = looped("history"), {}
    set_gains(model, 0.3)

    def block(x: Tensor, n: int) -> Tensor:
        seen[n] = x
        return x + n + 1

    e = torch.zeros(1, 1, model.config.hidden_size)
    with torch.no_grad():
        first, _ = model.model.recursion.steps(e, block, 2, 1)
    z_L = seen[0] + 1
    torch.testing.assert_close(seen[2], first + 0.3 * (z_L - first))


# Starts and exits


def test_looped_layers_start_as_averages_of_their_neighbours() -> None:
    donor: Any = tiny_model("qwen2", num_hidden_layers=4)
    model = RecursiveLLM(from_donor(donor.config, [0, 2], L_layers=2, H_cycles=2, L_cycles=1))
    average_neighbours(model, donor)
    for number, own in enumerate(model.model.layers):
        pair = donor.model.layers[2 * number : 2 * number + 2]
        torch.testing.assert_close(own.mlp.up_proj.weight, (pair[0].mlp.up_proj.weight + pair[1].mlp.up_proj.weight) / 2)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, donor.model.layers[0].mlp.up_proj.weight)


def test_every_exit_is_read() -> None:
    torch.manual_seed(0)
    shape = {"prelude_layers": 1, "L_layers": 1, "coda_layers": 1, "H_cycles": 3, "L_cycles": 1}
    model = RecursiveLLM(from_donor(tiny_config("qwen2", num_hidden_layers=3), [0, 1, 2], **shape)).eval()
    set_gains(model, 0.45)
    for layer in model.model.layers:  # cycles that change guesses
        layer.mlp.down_proj.weight.data *= 300
    ids = torch.randint(0, model.config.vocab_size, (6, 12))
    found = every_exit(model, ids, ids, torch.ones_like(ids[:, 1:], dtype=torch.bool), ids, 3, ("entropy",))
    fixed = [row for row in found if row["exit"] == "fixed"]
    assert [row["applications"] for row in fixed] == [4, 6, 8]
    for row in fixed:
        loss = model(ids, labels=ids, H_cycles=row["cycles"], use_cache=False).loss.item()
        assert row["loss"] == pytest.approx(loss, abs=1e-4)
        assert row["right"] == pytest.approx(right_tokens(model, ids, row["cycles"]), abs=1e-4)
    assert fixed[0]["mended"] == fixed[0]["worse"] == 0
    assert fixed[2]["right"] == pytest.approx(fixed[1]["right"] + fixed[2]["mended"] - fixed[2]["spoiled"], abs=2e-4)
    halted = [row for row in found if row["exit"] == "entropy"]
    assert fixed[1]["mended"] + fixed[2]["mended"] > 0 and fixed[1]["worse"] > 0
    assert halted and all(row["applications"] <= 8 * row["budget"] for row in halted)
    curve = [(row["applications"], row["right"], row["loss"]) for row in fixed]
    for row in halted:
        assert row["fixed_loss"] == pytest.approx(between(curve, row["applications"], 2), abs=1e-4)
        assert sum(row["at"].values()) == pytest.approx(1, abs=1e-3)


def test_fixed_depth_of_the_same_compute() -> None:
    curve = [(4.0, 0.5, 2.0), (6.0, 0.9, 1.0), (8.0, 0.9, 0.8)]
    assert [between(curve, cost, 1) for cost in (3, 4, 4.5, 6, 7, 9)] == pytest.approx([0.5, 0.5, 0.6, 0.9, 0.9, 0.9])
    assert between(curve, 7, 2) == pytest.approx(0.9)


def right_tokens(model: Any, ids: Tensor, cycles: int) -> float:
    with torch.no_grad():
        guesses = model(ids, H_cycles=cycles, use_cache=False).logits.argmax(-1)
    return (guesses[:, :-1] == ids[:, 1:]).float().mean().item()


def test_rows_with_exits_have_tables_of_them(tmp_path: Path) -> None:
    run = ["state_tracking", "--size", "test", "--device", "cpu", "--processes", "1", "--output", str(tmp_path), "--work", str(tmp_path)]
    evidence.main([*run, "--rows", "keep_donor, H 4, L 1, with a halting head"])
    found = json.loads((tmp_path / "state_tracking-test.json").read_text())
    table = tables.exits(found, ["exits"])
    assert "| 4 cycles |" in table and "| q_head, 40% of the compute |" in table
    assert "| 3 to 4 |" in tables.changes(found, ["exits"])
    assert tables.exits(found, ["main"]) == "(No such row has been run yet.)"


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


@pytest.mark.parametrize("module", [hops, compact])
def test_any_folder_may_be_the_real_donor(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, folder = tmp_path / "given", tmp_path / "work" / "donor"
    tiny_donor("qwen2", given, num_hidden_layers=9)
    monkeypatch.setenv("RECURSIFY_DONOR", str(given))
    before = {file.name for file in given.iterdir()}
    study = module.study(module.SIZES["cpu"])
    make_donor(study, folder)
    assert {file.name for file in given.iterdir()} == before and is_made(folder)  # what is somebody's stays as it was
    plans = [convert(str(folder), **row.shape).config for row in study.rows if row.shape is not None]
    assert len(plans) > 4
    if module is hops:  # all layers kept
        assert {config.prelude_layers + config.L_layers + config.coda_layers for config in plans} == {9}

    monkeypatch.setenv("RECURSIFY_DONOR", str(tmp_path))
    with pytest.raises(UserError, match="RECURSIFY_DONOR: expected a folder with config.json"):
        module.study(module.SIZES["cpu"])


def test_compact_plans_of_a_real_donor_run(tmp_path: Path) -> None:
    run = ["compact", "--size", "test", "--device", "cpu", "--processes", "1", "--output", str(tmp_path), "--work", str(tmp_path)]
    names = ["donor as it is", "donor, fine-tuned on the same tokens", "4 layers, H 3, L 1", "4 layers, H 3, L 1, matched and distilled"]
    evidence.main([*run, "--rows", *names])
    table = tables.losses(json.loads((tmp_path / "compact-test.json").read_text()), [])
    assert all(f"| {name} | 1 |" in table for name in names)


def test_names_of_rows_are_their_own() -> None:
    for make, sizes in evidence.STUDIES.values():
        names = [row.name for row in make(sizes["test"]).rows]
        assert len(set(names)) == len(names)
