"""Loss at every depth, against hand-made sums and plain runs at each depth."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import tiny_model
from torch.nn import functional as F

from recursify import RecursiveLLM, checkpoint, convert
from recursify.errors import UserError
from recursify.evaluation import EvaluateSettings, load_any, measure, run, standard_error, window_losses


@pytest.fixture(scope="module")
def model(donor_folder: Path) -> RecursiveLLM:
    """Keep-donor, gains and states well away from 0, so that every depth says something else."""
    torch.manual_seed(1)
    model = convert(str(donor_folder), L_layers=2, keep_donor=True, H_cycles=2, L_cycles=1)
    with torch.no_grad():
        for parameter in model.model.recursion.parameters():
            parameter.normal_()
    return model


@pytest.fixture(scope="module")
def blocks() -> Dataset:
    ids = torch.randint(300, (7, 12), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist()})


def by_hand(model: Any, ids: torch.Tensor, **depth: int) -> list[float]:
    """Mean loss of each row, from whole logits of one row at a time."""
    with torch.no_grad():
        rows = [model(row.unsqueeze(0), **depth).logits[0] for row in ids]
    return [F.cross_entropy(logits[:-1], row[1:]).item() for logits, row in zip(rows, ids, strict=True)]


def test_every_depth_equals_a_run_at_that_depth(model: RecursiveLLM, blocks: Dataset) -> None:
    cycles, ids = (3, 0, 1, 2), torch.tensor(blocks["input_ids"])
    losses = window_losses(model, blocks, cycles, batch_size=3)
    for row, H in zip(losses.tolist(), cycles, strict=True):
        assert row == pytest.approx(by_hand(model, ids, H_cycles=H), abs=1e-5)
    assert len({round(row.mean().item(), 4) for row in losses}) == 4


def test_means_errors_and_costs(model: RecursiveLLM, blocks: Dataset) -> None:
    losses = window_losses(model, blocks, (1, 2))
    for row, values, H in zip(measure(model, blocks, (1, 2), batch_size=2), losses, (1, 2), strict=True):
        assert row.H_cycles == H
        assert row.loss == pytest.approx(values.mean().item())
        assert row.standard_error == pytest.approx(values.std().item() / math.sqrt(7))
        assert row.perplexity == pytest.approx(math.exp(row.loss))
        assert row.layer_applications == 22 + 2 * H * 2


def test_the_batch_size_changes_nothing(model: RecursiveLLM, blocks: Dataset) -> None:
    one, all_at_once = (measure(model, blocks, (2,), batch_size=size)[0].loss for size in (1, 7))
    assert one == pytest.approx(all_at_once, abs=1e-6)


def test_a_plain_model_has_one_depth(blocks: Dataset) -> None:
    donor = tiny_model("llama").eval()
    [row] = measure(donor, blocks)
    assert row.H_cycles is None and row.layer_applications == donor.config.num_hidden_layers
    assert row.loss == pytest.approx(sum(by_hand(donor, torch.tensor(blocks["input_ids"]))) / 7, abs=1e-5)


def test_a_single_window_has_no_error(model: RecursiveLLM, blocks: Dataset) -> None:
    assert measure(model, blocks.select([0]), (1,))[0].standard_error is None
    assert standard_error(torch.tensor([1.0, 1.0, 1.0])) == 0.0


def test_training_mode_is_put_back(model: RecursiveLLM, blocks: Dataset) -> None:
    model.train()
    measure(model, blocks.select([0]), (1,))
    assert model.training
    model.eval()


@pytest.mark.parametrize("form", ["m.pt", "folder"])
def test_the_command_reads_both_forms(form: str, model: RecursiveLLM, donor_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    checkpoint.save(tmp_path / form, model, AutoTokenizer.from_pretrained(donor_folder))
    rows = [json.dumps({"text": f"The ship number {i} crosses the river . " * 5}) for i in range(40)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    settings = EvaluateSettings(checkpoint=str(tmp_path / form), dataset_name=str(tmp_path / "t.jsonl"), seq_len=16, max_windows=5)
    report = run(settings)
    assert [row.H_cycles for row in report.rows] == [1, 2, 3, 4]  # to twice the checkpoint's own
    assert report.windows == 5
    assert f"{report.rows[1].loss:.4f}" in report.render() and "own" in report.render()


@pytest.mark.parametrize(
    ("wrong", "message"), [({"cycles": (-1,)}, "--cycles"), ({"seq_len": 1}, "--seq_len"), ({"batch_size": 0}, "--batch_size")]
)
def test_settings_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(EvaluateSettings(checkpoint="x.pt", **wrong))


def test_windows_longer_than_the_positions(donor_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("The ship crosses the river . " * 300)
    settings = EvaluateSettings(checkpoint=str(donor_folder), dataset_name=str(tmp_path / "t.txt"), seq_len=513)
    with pytest.raises(UserError, match="--seq_len: expected at most 512"):
        run(settings)


def test_a_donor_that_is_refused_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2", "final_logit_softcapping": 30.0}))
    with pytest.raises(UserError, match="soft-capping"):
        load_any(str(tmp_path))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such"):
        load_any(str(tmp_path / "nothing.pt"))
    with pytest.raises(UserError, match="no such"):
        load_any(str(tmp_path / "nothing"))
