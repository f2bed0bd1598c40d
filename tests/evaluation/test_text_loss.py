"""Loss at every depth, against hand-made sums and plain runs at each depth."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from recursify import MeasureSettings, RecursiveLLM, UserError, convert, evaluate
from recursify.data.documents import measured_documents
from recursify.data.settings import DataSettings, TextSource
from recursify.evaluation.statistics import mean_and_error, standard_error
from recursify.evaluation.text_loss import PairedText, Text, TextReport, measure, measure_text, open_text, window_losses
from recursify.evaluation.windows import Windows
from recursify.inference.options import DecodingOptions
from tests.support.tiny import make_tiny_tokenizer, sentences, tiny_model


@pytest.fixture(scope="module")
def model(donor_folder: Path) -> RecursiveLLM:
    """Keep-donor, gains and states well away from 0, so that the depths differ."""
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
    losses = window_losses(model, blocks, cycles=(1, 2))
    for row, values, H in zip(measure(model, blocks, (1, 2), batch_size=2), losses, (1, 2), strict=True):
        assert row.H_cycles == H
        assert row.loss == pytest.approx(values.mean().item())
        assert row.standard_error == pytest.approx(values.std().item() / math.sqrt(7))
        assert row.perplexity == pytest.approx(math.exp(row.loss))
        assert row.layer_applications == 22 + 2 * H * 2


def test_batch_size_does_not_change_the_loss(model: RecursiveLLM, blocks: Dataset) -> None:
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
    assert standard_error(torch.tensor([1.0, 3.0])) == pytest.approx(1.0)  # n - 1 in the variance, n in the mean


def test_default_cycles_are_the_models_own(model: RecursiveLLM, blocks: Dataset) -> None:
    assert measure(model, blocks.select([0])) == measure(model, blocks.select([0]), (2,))


def test_dropout_is_off_for_losses(blocks: Dataset, text: Path) -> None:
    donor = tiny_model("llama", num_hidden_layers=2, attention_dropout=0.5)
    losses, report = window_losses(donor, blocks), read(donor, text, None)
    donor.train()
    assert torch.equal(window_losses(donor, blocks), losses) and read(donor, text, None).rows == report.rows and donor.training


def test_training_mode_is_restored(model: RecursiveLLM, blocks: Dataset) -> None:
    model.train()
    measure(model, blocks.select([0]), (1,))
    assert model.training
    model.eval()


# --- Text, in windows that may overlap ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A validation file of some hundred tokens, with characters of more bytes than one."""
    folder = tmp_path_factory.mktemp("text")
    for name, seed in (("train", 3), ("validation", 4)):
        (folder / f"{name}.txt").write_text(
            "\n<|endoftext|>\n".join([" ".join(sentences(seed, 2)), "北方的船 🦞", *sentences(seed + 1, 1)])
        )
    return folder


def opened(text: Path, **changes: Any) -> Text:
    return open_text(DataSettings(dataset_name=str(text)), make_tiny_tokenizer(), **({"seq_len": 16} | changes))


def read(
    model: Any, text: Path, *depths: int | None, halting: DecodingOptions | None = None, batch_size: int = 8, **windows: Any
) -> TextReport:
    return measure_text(model, opened(text, **windows), depths, halting, batch_size=batch_size)[0]


def stream(text: Path) -> tuple[list[int], list[str]]:
    """All ids as they are read, and the documents."""
    tokenizer, documents = make_tiny_tokenizer(), (text / "validation.txt").read_text().split("\n<|endoftext|>\n")
    return [i for document in documents for i in [*tokenizer(document)["input_ids"], 0]], documents


@pytest.mark.parametrize("stride", [16, 5, 1])
def test_the_report_is_of_every_token_with_its_context(stride: int, model: RecursiveLLM, text: Path) -> None:
    report = read(model, text, 2, 0, stride=stride)
    ids, _ = stream(text)
    whole = torch.tensor(ids[: len(ids) // 16 * 16])
    starts = range(0, len(whole) - 15, stride)
    nats = {2: 0.0, 0: 0.0}
    with torch.no_grad():
        for start in starts:
            row = whole[start : start + 16]
            for H in nats:
                losses = F.cross_entropy(model(row[None], H_cycles=H).logits[0, :-1], row[1:], reduction="none")
                nats[H] += losses[0 if start == 0 else -min(stride, 15) :].sum().item()
    tokens = 15 * len(starts) if stride == 16 else starts[-1] + 15
    assert (report.windows, report.stride, report.scored_tokens) == (len(starts), stride, tokens)
    for row in report.rows:
        assert row.H_cycles is not None and row.loss == pytest.approx(nats[row.H_cycles] / tokens, abs=1e-5)
        assert row.bits_per_byte == pytest.approx(row.loss * tokens / math.log(2) / report.scored_bytes)
        assert row.standard_error is not None


def test_bytes_are_those_of_the_text(model: RecursiveLLM, text: Path) -> None:
    """Of all tokens but the first and the few at the end that fill no window."""
    report = read(model, text, 1, stride=1)
    ids, documents = stream(text)
    written = sum(len(document.encode()) for document in documents)
    cut = [ids[0], *ids[len(ids) // 16 * 16 :]]
    assert report.scored_tokens == len(ids) - len(cut)
    assert report.scored_bytes == written - len(make_tiny_tokenizer().decode([i for i in cut if i != 0]))


def test_telemetry_covers_every_cycle(model: RecursiveLLM, text: Path) -> None:
    deep, all_cycles = read(model, text, 3), read(model, text, 1, 2, 3, batch_size=2)
    for report in (deep, all_cycles):
        assert report.telemetry is not None and report.telemetry.H_cycles == 3
        assert report.telemetry.losses == pytest.approx([row.loss for row in all_cycles.rows], abs=1e-5)
        assert report.telemetry.loss_reduction == pytest.approx(all_cycles.rows[0].loss - all_cycles.rows[2].loss, abs=1e-5)
    shown = "\n".join(deep.lines(own=3))
    assert "1 -> 2" in shown and "all cycles" in shown and "own" in shown


def test_no_telemetry_without_cycles(model: RecursiveLLM, text: Path) -> None:
    for report in (read(model, text, 0), read(tiny_model("llama"), text, None)):
        shown = "\n".join(report.lines(own=None))
        assert report.telemetry is None and report.to_dict()["telemetry"] is None and "cycles do" not in shown
        assert report.rows[0].bits_per_byte is not None and f"{report.rows[0].bits_per_byte:.4f}" in shown


@pytest.mark.parametrize("most", [2, 3])
def test_halting_goes_no_deeper_than_asked(most: int, model: RecursiveLLM, text: Path) -> None:
    report = read(model, text, 1, 2, 3, stride=8, halting=DecodingOptions(H_cycles=most, halt="entropy", halt_threshold=1.0))
    assert report.telemetry is not None and report.telemetry.halting is not None
    halting, full = report.telemetry.halting, report.telemetry.losses[most - 1]
    assert halting.H_cycles == most and list(halting.cycles) == list(range(1, most + 1))
    assert sum(halting.cycles.values()) == pytest.approx(1) and halting.extra_loss == pytest.approx(halting.loss - full)
    assert "halting by entropy, threshold 1" in "\n".join(report.lines(own=2))


def test_a_threshold_that_never_halts_is_the_plain_run(model: RecursiveLLM, text: Path) -> None:
    report = read(model, text, 1, 2, stride=8, halting=DecodingOptions(H_cycles=2, halt="entropy", halt_threshold=0.0))
    assert report.telemetry is not None and report.telemetry.halting is not None
    assert report.telemetry.halting.extra_loss == pytest.approx(0, abs=1e-6) and report.telemetry.halting.cycles[2] == 1.0


def test_the_report_as_json(model: RecursiveLLM, text: Path) -> None:
    report = read(model, text, 1, 2, stride=8, halting=DecodingOptions(H_cycles=2, halt="kl"))
    found = json.loads(json.dumps(report.to_dict()))
    assert {"dataset", "windows", "seq_len", "rows", "stride", "scored_tokens", "scored_bytes"} < set(found)
    assert found["rows"][0].keys() == {"H_cycles", "loss", "standard_error", "layer_applications", "bits_per_byte", "perplexity"}
    assert {"loss_reduction", "corrected", "broken", "steps", "halting"} < found["telemetry"].keys()
    assert found["telemetry"]["halting"]["criterion"] == "kl"


# --- For a comparison --------------------------------------------------------------------------------------------------------------------


def paired(model: Any, text: Path, **windows: Any) -> PairedText:
    return measure_text(model, opened(text, **windows), [1, 2], batch_size=3)[1]


def test_paired_results_equal_the_report(model: RecursiveLLM, text: Path) -> None:
    found, report = paired(model, text, stride=5), read(model, text, 1, 2, stride=5)
    assert found.nats.shape == (2, report.windows) and found.per_piece == 4 and round(found.scored_bytes) == report.scored_bytes
    assert (found.nats.sum(dim=1) / found.tokens.sum()).tolist() == pytest.approx([row.loss for row in report.rows])


def test_standard_errors_with_overlapping_windows(model: RecursiveLLM, text: Path) -> None:
    """In every figure: of a depth, of a step, of the whole way, of halting."""
    halting = DecodingOptions(H_cycles=2, halt="entropy", halt_threshold=0.0)  # never halts
    report, found = measure_text(model, opened(text, stride=5), [1, 2], halting)
    assert report.telemetry is not None and report.telemetry.halting is not None
    wanted = [mean_and_error(row, found.tokens, 4)[1] for row in found.nats]
    reduction_error = mean_and_error(found.nats[0] - found.nats[1], found.tokens, 4)[1]
    assert [row.standard_error for row in report.rows] == pytest.approx(wanted)
    assert report.telemetry.loss_reduction_error == pytest.approx(reduction_error) == report.telemetry.steps[0].loss_reduction_error
    assert report.telemetry.halting.standard_error == pytest.approx(wanted[1], abs=1e-6)
    alone = [mean_and_error(row, found.tokens)[1] for row in (*found.nats, found.nats[0] - found.nats[1])]
    assert all(abs(one - other) > 1e-5 for one, other in zip(alone, [*wanted, reduction_error], strict=True))  # type: ignore[operator]


def test_table_marks_the_own_depth_and_the_stride(model: RecursiveLLM, text: Path) -> None:
    lines = read(model, text, 0, 1, 2, stride=5, max_windows=3).lines(own=1)
    assert lines[0].endswith("3 windows of 16 tokens, 5 tokens apart") and lines[1].startswith("scored: 25 tokens, ")
    assert [line.split()[0] for line in lines if "own" in line] == ["1"]
    plain = read(tiny_model("llama"), text, None, max_windows=3).lines(own=None)
    assert plain[0].endswith("3 windows of 16 tokens") and not any("own" in line for line in plain)


def text_of(ids: list[int], seq_len: int = 4, **windows: Any) -> str:
    blocks = [{"input_ids": ids[first : first + seq_len]} for first in range(0, len(ids), seq_len)]
    return Text("t", documents([]), make_tiny_tokenizer(), Windows(blocks, **windows)).key()


def documents(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"text": texts})


def test_key_depends_on_tokens_and_windows() -> None:
    ids = list(range(16))
    read_alone = text_of(ids, stride=3, most=2)  # tokens 0 to 6, of which the last are in the second block
    assert text_of([*ids[:8], *range(90, 98)], stride=3, most=2) == read_alone
    assert text_of([*ids[:6], 99, *ids[7:]], stride=3, most=2) != read_alone
    assert len({read_alone, text_of(ids, stride=2, most=2), text_of(ids, stride=2, most=3), text_of(ids, stride=1, most=2)}) == 4


def test_key_identifies_equal_windows(text: Path) -> None:
    keys = [opened(text, **windows).key() for windows in ({}, {"stride": 5}, {"max_windows": 2}, {"seq_len": 8})]
    assert len(set(keys)) == 4 and opened(text, max_windows=2).key() == keys[2]
    other = make_tiny_tokenizer()
    other.add_tokens(["ship"])
    assert open_text(DataSettings(dataset_name=str(text)), other, seq_len=16, max_windows=2).key() != keys[2]


def test_what_is_measured_of_a_text(tmp_path: Path) -> None:
    """A file whole; of a folder the validation files, else the test files, else all; training's own part where it is asked for."""
    documents = sentences(3, 30)
    whole = tmp_path / "text.txt"
    whole.write_text("\n<|endoftext|>\n".join(documents))

    def measured(name: Path, split: str | None = None) -> tuple[int, str]:
        table, part = measured_documents(TextSource(dataset_name=str(name)), split)
        return len(table), part

    assert measured(whole) == (30, "all of it") and measured(whole, "validation") == (2, "validation split")
    for only in ("test", "validation"):
        (tmp_path / only).mkdir()
        (tmp_path / only / f"{only}.txt").write_text(whole.read_text())
        assert measured(tmp_path / only) == (30, f"{only} files")
    both = tmp_path / "both"
    both.mkdir()
    for name, count in (("train", 20), ("validation", 6), ("test", 4)):
        (both / f"{name}.txt").write_text("\n<|endoftext|>\n".join(documents[:count]))
    assert measured(both) == (6, "validation files") and measured(both, "validation") == (6, "validation split")
    assert measured(both, "test") == (4, "test files") and measured(both, "all") == (30, "all of it")
    with pytest.raises(UserError, match="--split test: .*text.txt has no file with test in its name"):
        measured(whole, "test")
    with pytest.raises(UserError, match="--split test: expected validation for a hub dataset such as wikitext"):
        measured(Path("wikitext"), "test")


def test_the_output_says_what_was_scored(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(sentences(3, 30)))
    settings = MeasureSettings(dataset_name=str(tmp_path / "text.txt"), seq_len=16, device="cpu")
    tokenizer = make_tiny_tokenizer()
    report = evaluate(tiny_model("qwen2", num_hidden_layers=2), tokenizer, settings)
    assert f"{tmp_path / 'text.txt'}, all of it: " in report.render() and report.to_dict()["part"] == "all of it"
    tokens = sum(len(tokenizer(text).input_ids) + 1 for text in sentences(3, 30))
    assert report.text.scored_tokens > 0.9 * tokens - 16 * 2 - tokens / 16  # every window but the tail, and no first token of a window
