"""The table of approaches, row by row: only what it trains changes, everything else equals the donor, bit by bit."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from recursify.checkpoints import checkpoint
from recursify.checkpoints.loading import load_model
from recursify.cli import main as cli
from recursify.errors import UserError
from recursify.inference.generation import generate_text
from recursify.inference.session import load as load_to_write
from recursify.inference.settings import GenerateSettings
from recursify.training import EmbeddingSettings, HybridSettings, TrainSettings, fit, train
from recursify.training import gains as gains_module
from recursify.training.approaches import APPROACHES, freeze_rest, from_donor, untied
from recursify.training.gains import injections
from recursify.training.loss_module import LossModule, Supervision
from recursify.training.saving import BEST, best_name
from recursify.training.settings import Adapter, DonorSettings
from tests.support.tiny import FAMILIES, make_tiny_tokenizer, sentences, tiny_donor

EMBEDDINGS, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
SETTINGS: dict[str, type[DonorSettings]] = {"embedding": EmbeddingSettings, "hybrid": HybridSettings}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied donor, an untied one, and text: 12 sequences of 32 tokens, 2 for validation."""
    folder = tmp_path_factory.mktemp("approaches")
    tiny_donor("qwen2", folder / "tied", num_hidden_layers=3)
    tiny_donor("llama", folder / "own_head", num_hidden_layers=3)
    tokenizer: Any = make_tiny_tokenizer()
    (folder / "text").mkdir()
    for name, seed, sequences in (("train", 5, 12), ("validation", 6, 2)):
        text = tokenizer.decode(tokenizer(" ".join(sentences(seed, 50))).input_ids[: 32 * sequences])
        (folder / "text" / f"{name}.txt").write_text(text)
    return folder


def settings(approach: str, workdir: Path, out: Path | None = None, donor: str = "tied", **changes: Any) -> Any:
    """Of a run of 3 steps per epoch, one epoch."""
    common: dict[str, Any] = {
        "model_name": str(workdir / donor), "L_layers": 2, "H_cycles": 2, "L_cycles": 1, "dataset_name": str(workdir / "text"),
        "seq_len": 32, "num_epochs": 1, "lr": 3e-3, "warmup_steps": 0, "generate_every": 0, "device": "cpu", "output_dir": str(out or "."),
        "enable_deep_supervision": True,
    }  # fmt: skip
    return SETTINGS[approach](**(common | changes))


def load(path: Path) -> Any:
    return checkpoint.load(path).model


def differing(one: Any, other: Any) -> set[str]:
    """Names of the tensors that are not the same, bit by bit."""
    theirs = other.state_dict()
    return {name for name, tensor in one.state_dict().items() if name not in theirs or not torch.equal(tensor, theirs[name])}


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def loop_of(model: Any) -> set[str]:
    """Names of what is called the loop: the looped layers, gains and initial states."""
    own = {"H_init", "L_init", *(f"inject_{state}.theta_{gain}" for state in "HL" for gain in "AB")}
    layers = {name for name, _ in model.named_parameters() if name.startswith("model.layers.")}
    return layers | {f"model.recursion.{name}" for name in own}


# Initialisation


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("approach", SETTINGS)
def test_parts_taken_from_the_donor(approach: str, family: str, tmp_path: Path) -> None:
    """Of every family; the loop of the embedding approach is fresh, and its norm only rescales."""
    tiny_donor(family, tmp_path, num_hidden_layers=2)
    donor: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = from_donor(SETTINGS[approach](model_name=str(tmp_path), L_layers=2, H_cycles=2, L_cycles=1))
    model: Any = found.model
    assert model.config.gain_init == 0 and (model.config.H_cycles, model.config.L_cycles) == (2, 1)
    fresh = {name for name in donor.state_dict() if name.startswith("model.layers.")} | {NORM} if approach == "embedding" else set()
    assert differing(donor, model) == fresh
    assert (found.plan is None) == (approach == "embedding")
    loop = "fresh" if approach == "embedding" else "donor"
    assert found.notes == {"donor": str(tmp_path), "donor_folder": str(tmp_path), "seq_len": 128, "loop": loop}


def test_fresh_loop_uses_the_donor_class_initialisation(workdir: Path) -> None:
    """Weights of the width that its configuration asks for, norms of ones, no biases; the same for the same seed."""
    model: Any = from_donor(settings("hybrid", workdir, fresh_loop=True)).model
    layer = model.model.layers[0]
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
    assert torch.equal(layer.input_layernorm.weight, torch.ones(32)) and layer.self_attn.q_proj.bias.abs().max() == 0
    assert not torch.equal(layer.mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    assert not differing(model, from_donor(settings("hybrid", workdir, fresh_loop=True)).model)
    other = differing(model, from_donor(settings("hybrid", workdir, fresh_loop=True, seed=7)).model)
    assert {"model.layers.0.mlp.up_proj.weight", "model.recursion.H_init"} <= other and EMBEDDINGS not in other and NORM not in other


def test_a_donor_loop_for_the_embedding_approach(workdir: Path) -> None:
    donor: Any = AutoModelForCausalLM.from_pretrained(workdir / "tied")
    found = from_donor(settings("embedding", workdir, donor_loop=True, L_layers=3))
    assert differing(donor, found.model) == {NORM} and found.plan is not None and found.notes["loop"] == "donor"
    assert torch.equal(found.model.state_dict()[NORM], torch.ones(32))


def test_untied(workdir: Path) -> None:
    tied: Any = from_donor(settings("hybrid", workdir)).model
    own: Any = untied(tied)
    ids = torch.arange(12).unsqueeze(0)
    assert not differing(tied, own) and torch.equal(tied(ids).logits, own(ids).logits)
    assert own.lm_head.weight.data_ptr() != own.model.embed_tokens.weight.data_ptr() and not own.config.tie_word_embeddings
    assert tied.config.tie_word_embeddings and own.generation_config is tied.generation_config
    assert trainable(own) == trainable(tied) | {HEAD}
    assert untied(tied.bfloat16()).dtype == torch.bfloat16


def test_another_tokenizer_and_length(workdir: Path, tmp_path: Path) -> None:
    other = make_tiny_tokenizer()
    other.add_tokens(["<extra>"])
    other.save_pretrained(tmp_path)
    found = from_donor(settings("hybrid", workdir, tokenizer_path=str(tmp_path), seq_len=24))
    assert len(found.tokenizer) == len(other) == len(from_donor(settings("hybrid", workdir)).tokenizer) + 1
    assert found.notes["seq_len"] == 24


# Trained parameters


@pytest.mark.parametrize(
    ("approach", "donor", "flags", "more"),
    [
        ("embedding", "tied", {}, set()),
        ("embedding", "own_head", {"donor_loop": True}, set()),
        ("hybrid", "tied", {}, set()),
        ("hybrid", "own_head", {"fresh_loop": True}, set()),
        ("hybrid", "own_head", {"tune_lm_head": True}, {NORM, HEAD}),
        ("hybrid", "tied", {"tune_lm_head": True}, {NORM, HEAD}),
    ],
)
def test_only_trained_parts_change(
    approach: str, donor: str, flags: dict[str, Any], more: set[str], workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compared between the initial model and the saved one."""
    wanted = settings(approach, workdir, tmp_path, donor, **flags)
    before = from_donor(wanted).model
    result = train(wanted)
    assert result.best is not None and result.best == tmp_path / best_name(before.config)
    assert (tmp_path / f"{result.best.stem}_tokenizer" / "tokenizer.json").is_file()
    found = checkpoint.load(result.best)
    assert differing(before, found.model) == loop_of(found.model) | more
    assert found.plan == from_donor(wanted).plan and (found.plan is None) == wanted.starts_fresh
    assert found.notes["approach"] == approach and found.notes["donor"] == str(workdir / donor) and "eval_loss" in found.notes["training"]
    err = capsys.readouterr().err
    start = "randomly initialised" if wanted.starts_fresh else "layers [0, 2]"
    assert f"{approach} approach: 2 looped layers ({start}) are trained on the frozen embeddings of {workdir / donor}" in err
    assert ("the head was tied to the embeddings and is now a separate matrix of 12,288 parameters" in err) == (
        donor == "tied" and bool(more)
    )


def test_without_L_cycles_their_injection_is_untrained(workdir: Path) -> None:
    wanted = settings("hybrid", workdir, L_cycles=0)
    model = from_donor(wanted).model
    freeze_rest(model, wanted)
    assert trainable(model) == {name for name in loop_of(model) if "inject_L" not in name}


@pytest.mark.parametrize("weight", [0.0, 0.01, 2.0])
def test_halting_head_is_trained_only_with_halting_weight(weight: float, workdir: Path) -> None:
    model: Any = from_donor(settings("hybrid", workdir)).model
    freeze_rest(model, settings("hybrid", workdir, halting_weight=weight))
    heads = {"model.recursion.q_head.weight", "model.recursion.q_head.bias"}
    assert trainable(model) == loop_of(model) | (heads if weight else set())


@pytest.mark.parametrize(
    ("H_cycles", "choices", "trained"), [(2, (), False), (1, (), True), (2, (1,), True), (1, (1, 2), False), (2, (1, 3), False)]
)
def test_initial_states_are_trained_if_the_only_cycle_has_gradients(
    H_cycles: int, choices: tuple[int, ...], trained: bool, workdir: Path
) -> None:
    """The last of several cycles starts from states that have none."""
    for backprop in ("last", "full"):
        wanted = settings("hybrid", workdir, H_cycles=H_cycles, cycle_choices=choices, backprop=backprop, enable_deep_supervision=False)
        model: Any = from_donor(wanted).model
        freeze_rest(model, wanted)
        states = {"model.recursion.H_init", "model.recursion.L_init"}
        assert trainable(model) & states == (states if trained or backprop == "full" else set())


@pytest.mark.parametrize(("approach", "flags"), [("hybrid", {}), ("embedding", {"donor_loop": True})])
def test_pretrained_loop_starts_from_the_calibrated_gain(
    approach: str, flags: dict[str, Any], workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the loss that the approach trains; a fresh loop, which has nothing to lose, starts from the largest."""
    seen: list[float] = []

    def calibrated(model: Any, loss: Any) -> Any:
        seen.append(loss())
        return 0.2, [(0.2, 0.0)]

    monkeypatch.setattr(gains_module, "calibrate", calibrated)
    held = blocks(workdir, "validation")
    ids = torch.tensor([row["input_ids"] for row in held])
    for fresh in (False, True):
        own = {"fresh_loop": fresh} if approach == "hybrid" else {"donor_loop": not fresh}
        wanted = settings(approach, workdir, lr=1e-12, gain_lr=1e-12, max_steps=1, enable_deep_supervision=False, **(flags | own))
        found: Any = from_donor(wanted)
        objective = APPROACHES[approach].objective
        expected = LossModule(found.model, objective=objective)(ids, ids)["loss"].item()
        fit(found.model, found.tokenizer, held, held, wanted, console=False)
        gains = {round(gain, 4) for module in injections(found.model) for part in module.gains(torch.float32) for gain in part.tolist()}
        assert gains == {0.45 if fresh else 0.2}
        assert fresh or seen == [pytest.approx(expected, rel=1e-5)]
    assert len(seen) == 1


def test_the_full_approach_trains_everything(workdir: Path, tmp_path: Path) -> None:
    """Also what another approach has begun: its model is an ordinary checkpoint, and writes once head and loop were trained together."""
    first = train(settings("embedding", workdir, tmp_path)).best
    assert first is not None
    shared = {name: value for name, value in vars(settings("hybrid", workdir, tmp_path / "full")).items() if hasattr(TrainSettings, name)}
    wanted = TrainSettings(checkpoint=str(first), **shared)
    before, best = load(first), train(wanted).best
    assert best is not None
    idle = {"model.recursion.q_head.weight", "model.recursion.q_head.bias"}
    assert differing(before, load(best)) == set(before.state_dict()) - idle
    assert checkpoint.load(best).notes["approach"] == "full"
    load_to_write(GenerateSettings(checkpoint=str(best)))


# Objectives


def blocks(workdir: Path, name: str) -> list[dict[str, Any]]:
    ids = make_tiny_tokenizer()((workdir / "text" / f"{name}.txt").read_text()).input_ids
    return [{"input_ids": ids[i : i + 32]} for i in range(0, len(ids) - 31, 32)]


def test_the_embedding_loss_is_the_cosine_of_the_state_itself(workdir: Path) -> None:
    """Of `z_H` as the loop leaves it, taken here before the final norm, at every cycle."""
    wanted = settings("embedding", workdir)
    model: Any = from_donor(wanted).model
    batch, seen = torch.tensor([row["input_ids"] for row in blocks(workdir, "train")[:3]]), []
    model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    outputs = LossModule(model, Supervision(every_cycle=True, schedule="constant"), APPROACHES["embedding"].objective)(batch, batch)
    targets = model.model.embed_tokens(batch[:, 1:])
    expected = [(1 - F.cosine_similarity(z_H[:, :-1], targets, dim=-1)).mean().item() for z_H in seen]
    assert outputs["cycle_losses"].tolist() == pytest.approx(expected, rel=1e-5) and len(expected) == 2
    assert outputs["loss"].item() == pytest.approx((0.5 * expected[0] + expected[1]) / 1.5, rel=1e-5)


@pytest.mark.parametrize("approach", SETTINGS)
def test_loss_falls_at_every_cycle(approach: str, workdir: Path) -> None:
    """As far as it can: the frozen matrices are random, so even a state that points straight at a token is not sure of it."""
    wanted = settings(approach, workdir, num_epochs=10, log_every=1, **({"fresh_loop": True} if approach == "hybrid" else {}))
    found: Any = from_donor(wanted)
    result = fit(found.model, found.tokenizer, blocks(workdir, "train"), blocks(workdir, "validation"), wanted, console=False)
    steps, validations = ([entry for entry in result.history if name in entry] for name in ("loss", "eval_loss"))
    for cycle in (1, 2):
        assert steps[-1][f"loss_cycle_{cycle}"] < 0.9 * steps[0][f"loss_cycle_{cycle}"]
        assert validations[-1][f"eval_loss_cycle_{cycle}"] < validations[0][f"eval_loss_cycle_{cycle}"]
    if approach == "embedding":
        assert 0 <= validations[0]["eval_nearest_right"] < validations[-1]["eval_nearest_right"] <= 1
        assert "eval_perplexity" not in validations[-1]
    else:
        assert "eval_nearest_right" not in validations[-1]


def test_nearest_embedding_accuracy(workdir: Path) -> None:
    """Against the plain search through the vocabulary, over batches of unequal size."""
    wanted = settings("embedding", workdir, lr=1e-12, eval_batch_size=2, num_epochs=1)
    found: Any = from_donor(wanted)
    model = found.model
    held = blocks(workdir, "train")[:5]
    # an embedding that is made to be found: the most frequent token, in the direction of the first state
    ids = torch.tensor([row["input_ids"] for row in held])
    frequent = ids.flatten().mode().values
    with torch.no_grad():
        model.model.embed_tokens.weight[frequent] = model.model(ids, use_cache=False).last_hidden_state.mean(dim=(0, 1))
    result = fit(model, found.tokenizer, held, held, wanted, console=False)
    with torch.no_grad():
        states = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
        nearest = F.cosine_similarity(states[:, :, None], model.model.embed_tokens.weight, dim=-1).argmax(dim=-1)
    expected = (nearest == ids[:, 1:]).float().mean().item()
    share = next(entry["eval_nearest_right"] for entry in result.history if "eval_loss" in entry)
    assert share == pytest.approx(expected, abs=1e-6) and 0 < share < 1


def test_summary_lists_the_metrics(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No perplexity of a cosine, and no samples of a model that cannot write."""
    result = train(settings("embedding", workdir, tmp_path, generate_every=1))
    captured = capsys.readouterr()
    entry = result.fit.history[-1]
    expected = f"  Train Loss: {entry['train_loss']:.4f}\n  Val Loss: {entry['eval_loss']:.4f}\n"
    assert f"{expected}  Nearest Embedding Right: {entry['eval_nearest_right']:.2%}\n  ✓ New best model saved" in captured.out
    assert "Perplexity" not in captured.out and "Generating sample" not in captured.out
    assert "It predicts embeddings and has no head, so it cannot generate" in captured.err
    again = train(settings("hybrid", workdir, tmp_path, generate_every=1))
    captured = capsys.readouterr()
    assert f"  Perplexity: {again.fit.history[-1]['eval_perplexity']:.2f}\n" in captured.out and "Generating sample" in captured.out


@pytest.mark.parametrize("resume", [False, True])
def test_best_model_of_an_earlier_run_is_kept(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], resume: bool) -> None:
    """Also by a run with --resume that finds no checkpoint. Of several runs, that of the last one before."""
    previous = tmp_path / "qwen_recursive_finetuned_best_previous.pt"
    train(settings("hybrid", workdir, tmp_path, seed=1))
    assert not previous.exists()
    for seed in (2, 3):
        before = (tmp_path / BEST).read_bytes()
        train(settings("hybrid", workdir, tmp_path, seed=seed, lr=1e-3 * seed, resume=resume))
        assert previous.read_bytes() == before != (tmp_path / BEST).read_bytes()
        assert checkpoint.load(previous).tokenizer is not None and checkpoint.load(tmp_path / BEST).tokenizer is not None
    assert f"{tmp_path / BEST} is of an earlier run; it is kept as {previous.name}" in capsys.readouterr().err


def test_resumed_run_replaces_its_own_best_model(workdir: Path, tmp_path: Path) -> None:
    train(settings("hybrid", workdir, tmp_path, save_every=1, max_steps=2))
    train(settings("hybrid", workdir, tmp_path, save_every=1, max_steps=4, resume=True))
    assert not list(tmp_path.glob("*previous*"))


# Abilities of the trained model


def test_embedding_models_refuse_to_generate(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In both forms; and to be measured by the loss of a head that was not trained with them."""
    path = train(settings("embedding", workdir, tmp_path)).best
    assert path is not None
    message = r"was trained in embedding space.*has no head.*recursify train and recursify train --approach hybrid make models that do"
    found = checkpoint.load(path)
    checkpoint.save(tmp_path / "folder", found.model, found.tokenizer, found.plan, found.notes)
    for form in (path, tmp_path / "folder"):
        with pytest.raises(UserError, match=rf"^{re.escape(str(form))}: {message}"):
            load_to_write(GenerateSettings(checkpoint=str(form)))
        with pytest.raises(UserError, match=message):
            load_model(str(form))
    for flags in (["--prompt", "The ship"], []):  # once, and interactively
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.generate(["--checkpoint", str(path), *flags])
        captured = capsys.readouterr()
        assert stop.value.code == 2 and captured.out == "" and re.match(f"error: .*{message}\n$", captured.err)


@pytest.mark.parametrize("tune", [False, True])
def test_hybrid_models_generate(tune: bool, workdir: Path, tmp_path: Path) -> None:
    best = train(settings("hybrid", workdir, tmp_path, tune_lm_head=tune)).best
    model, tokenizer = load_to_write(GenerateSettings(checkpoint=str(best), device="cpu"))
    assert generate_text(model, tokenizer, "The old ship", seed=0).text
    assert model.config.tie_word_embeddings is not tune
    assert load_model(str(best))[0].config.H_cycles == 2


# Resuming


def test_resumed_equals_uninterrupted(workdir: Path, tmp_path: Path) -> None:
    """From the head that was untied and the layers that were frozen: neither is done again, nor forgotten."""
    wanted = settings("hybrid", workdir, tmp_path / "whole", tune_lm_head=True, fresh_loop=True, save_every=2)
    whole = train(wanted).best
    cut = replace(wanted, output_dir=str(tmp_path / "cut"))
    train(replace(cut, max_steps=2))
    resumed = train(replace(cut, resume=True, num_epochs=1))
    assert whole is not None and resumed.best is not None and resumed.fit.steps == 3
    before = from_donor(wanted).model
    assert differing(before, load(resumed.best)) == differing(before, load(whole))
    notes = checkpoint.load(resumed.best).notes
    assert (notes["approach"], notes["loop"], notes["donor"]) == ("hybrid", "fresh", str(workdir / "tied"))


def test_resume_refuses_another_approach(workdir: Path, tmp_path: Path) -> None:
    wanted = settings("hybrid", workdir, tmp_path, save_every=2)
    train(wanted)
    with pytest.raises(UserError, match=r"step_2.pt comes from another run: --H_cycles was 2, is 3; --fresh_loop was False, is True"):
        train(replace(wanted, resume=True, H_cycles=3, fresh_loop=True))
    with pytest.raises(UserError, match=r"step_2.pt comes from a run of the hybrid approach, this is one of the embedding approach"):
        train(settings("embedding", workdir, tmp_path, resume=True))
    assert json.loads((tmp_path / "checkpoint_step_2_state" / "run.json").read_text())["approach"] == "hybrid"


# Bad input


@pytest.mark.parametrize("approach", SETTINGS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name": "/nowhere/donor"}, r"/nowhere/donor"),
        ({"L_layers": 0}, r"--L_layers: expected at least 1, got 0"),
        ({"L_layers": 4}, r"--L_layers: expected 1 to 3 \(the donor has 3 layers\), got 4"),
        ({"H_cycles": 0}, r"--H_cycles: expected at least 1, got 0"),
        ({"L_cycles": -1}, r"--L_cycles: expected at least 0, got -1"),
        ({"seq_len": 1000}, r"--seq_len: expected 1 to 512 \(the donor's positions\), got 1000"),
        ({"lr": 0.0}, r"--lr: expected a number above 0"),
        ({"tokenizer_path": "/nowhere/tokenizer"}, r"/nowhere/tokenizer"),
        ({"dataset_name": "/nowhere/text.txt"}, r"/nowhere/text.txt"),
    ],
)
def test_bad_flags(approach: str, changes: dict[str, Any], message: str, workdir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train(settings(approach, workdir, tmp_path, **changes))
    assert not any(tmp_path.glob("*.pt"))


def test_tied_head_cannot_be_tuned_alone(workdir: Path) -> None:
    wanted = settings("hybrid", workdir)
    found: Any = from_donor(wanted)
    with pytest.raises(UserError, match=r"--tune_lm_head: the head is tied to the embeddings, which this approach freezes; untie them"):
        fit(found.model, found.tokenizer, [], [], replace(wanted, tune_lm_head=True))


def test_the_flags_of_both_scripts() -> None:
    for kind in SETTINGS.values():
        made = kind()
        assert (made.model_name, made.L_layers, made.H_cycles, made.L_cycles) == ("Qwen/Qwen2-0.5B", 4, 3, 3)
        adapter = {field.name for field in fields(Adapter)} | {"donor"}
        shared = set(vars(TrainSettings(checkpoint="x"))) - {"checkpoint"} - adapter
        assert shared <= set(vars(made)) and all(vars(made)[name] == vars(TrainSettings(checkpoint="x"))[name] for name in shared)
    assert EmbeddingSettings().starts_fresh and not HybridSettings().starts_fresh
    assert not HybridSettings().tune_lm_head


@pytest.mark.parametrize("approach", ["hybrid", "embedding"])
def test_one_command_has_the_approaches_of_the_scripts(approach: str, workdir: Path, tmp_path: Path) -> None:
    """`train --approach`, a recipe that names it, and the guides' script write the same weights, bit for bit."""
    flags = (
        f"--model_name {workdir / 'tied'} --L_layers 1 --H_cycles 2 --L_cycles 1 --dataset_name {workdir / 'text'} --seq_len 32 "
        "--device cpu --max_steps 2 --generate_every 0 --save_every 0 --output_dir"
    )
    script = {"hybrid": cli.train_trm_hybrid, "embedding": cli.train_trm}[approach]
    (tmp_path / "recipe.yaml").write_text(f"train: {{approach: {approach}, lr: 1e-3}}", encoding="utf-8")
    runs = (
        (script, ["--lr", "1e-3"]),
        (cli.train, ["--approach", approach, "--lr", "1e-3"]),
        (cli.train, [f"--approach={approach}", "--learning_rate", "1e-3"]),
        (cli.train, ["--config", str(tmp_path / "recipe.yaml")]),
    )
    found = []
    for number, (command, words) in enumerate(runs):
        command([*words, *flags.split(), str(tmp_path / str(number))])
        found.append(torch.load(tmp_path / str(number) / BEST, weights_only=True)["model_state_dict"])
    for other in found[1:]:
        assert other.keys() == found[0].keys() and all(torch.equal(other[name], found[0][name]) for name in other)
    assert torch.load(tmp_path / "1" / BEST, weights_only=True)["notes"]["approach"] == approach


def test_flags_of_another_approach_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def printed(*words: str) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.train(list(words))
        assert stop.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    assert "--tune_lm_head" in printed("--checkpoint", "x.pt", "--tune_lm_head")
    assert "--checkpoint" in printed("--approach", "hybrid", "--checkpoint", "x.pt")
    assert "--approach: expected one of full, hybrid, embedding, got 'half'" in printed("--approach", "half")
    (tmp_path / "recipe.yaml").write_text("train: {approach: half}", encoding="utf-8")
    assert "train: approach: expected one of full, hybrid, embedding, got 'half'" in printed("--config", str(tmp_path / "recipe.yaml"))
