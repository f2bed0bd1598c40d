"""Recursion as an adapter: the donor's weights and files stay as they are, at 0 cycles the model is the donor, and files hold the rest."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import recursify
from recursify import RecursiveLLM, as_adapter, convert
from recursify.checkpoints import adapter as adapter_files
from recursify.checkpoints import checkpoint
from recursify.checkpoints.donor import open_donor
from recursify.cli import main as cli
from recursify.errors import UserError
from recursify.hub import export
from recursify.hub.settings import ExportSettings
from recursify.inference import early_exit
from recursify.inference.cycle_table import recursive_steps
from recursify.network.losses import halting_loss, token_losses
from recursify.training import TrainSettings, fit, train
from recursify.training.cost import estimate
from recursify.training.gains import set_gains
from recursify.training.saving import BEST_ADAPTER
from tests.support.adapters import SHAPE, blocks, donor_and_adapter, settings
from tests.support.early_exit import splitting
from tests.support.tiny import FAMILIES, make_tiny_tokenizer, sentences, tiny_donor

LINEAR = {
    "qwen2": {"attention": {"q_proj", "k_proj", "v_proj", "o_proj"}, "mlp": {"gate_proj", "up_proj", "down_proj"}},
    "phi3": {"attention": {"qkv_proj", "o_proj"}, "mlp": {"gate_up_proj", "down_proj"}},
}


def stirred(model: Any, seed: int = 0) -> Any:
    """Every parameter of the recursion away from its start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.model.recursion.named_parameters():
            parameter.normal_(std=0.2 if "lora" in name else 0.5)
    return model


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def written(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model.generate(ids, do_sample=False, min_new_tokens=10, max_new_tokens=10, pad_token_id=0, **kwargs)


# The donor stays


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_adapter_is_the_donor_at_0_cycles(family: str, tmp_path: Path) -> None:
    donor, model = donor_and_adapter(tmp_path / "donor", family)
    before, ids = files(tmp_path / "donor"), torch.randint(0, 300, (2, 9))
    assert donor.dtype == model.dtype
    fit(model, make_tiny_tokenizer(), blocks(8), blocks(2), settings(max_steps=200 if family == "qwen2" else 50), console=False)
    with torch.no_grad():
        expected = donor(ids).logits
        assert torch.equal(model(ids, H_cycles=0).logits, expected)
        assert (model(ids).logits - expected).abs().max() > 0.1, "the loop was trained"
        assert torch.equal(written(model, ids, draft_cycles=0), written(model, ids))
        assert torch.equal(written(model, ids, use_cache=False), written(model, ids))
        assert torch.equal(written(model, ids, H_cycles=0), written(donor, ids))
    assert files(tmp_path / "donor") == before
    for form in ("file.pt", "folder"):
        checkpoint.save(tmp_path / form, model, make_tiny_tokenizer())
        loaded = checkpoint.load(tmp_path / form).model
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert files(tmp_path / "donor") == before


def test_exported_whole_it_loads_with_transformers_alone(tmp_path: Path) -> None:
    _, model = donor_and_adapter(tmp_path / "donor")
    stirred(model)
    checkpoint.save(tmp_path / "adapter", model, make_tiny_tokenizer())
    cli.main(["export", str(tmp_path / "whole"), "--checkpoint", str(tmp_path / "adapter")])
    assert not (tmp_path / "whole" / "adapter_config.json").exists()
    (tmp_path / "donor").rename(tmp_path / "gone")
    whole, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), torch.randint(0, 300, (1, 7))
    assert isinstance(whole, RecursiveLLM)
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, model(ids).logits)
    cli.main(["export", str(tmp_path / "plain"), "--checkpoint", str(tmp_path / "whole"), "--donor"])
    plain, donor = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("plain", "gone"))
    assert all(torch.equal(plain[name], tensor) for name, tensor in donor.items())


def test_draft_of_0_cycles_shares_the_slots_of_the_check(tmp_path: Path) -> None:
    """The draft's plain pass is the first application of the check; only its coda has slots of its own."""
    _, model = donor_and_adapter(tmp_path / "donor")
    past = recursify.RecursiveCache(model.config, draft_cycles=0)
    assert len(past.layers) == model.config.depth() + model.config.coda_layers


# The start, and what learns


def test_untrained_adapter_is_the_donor_at_every_depth(tmp_path: Path) -> None:
    donor, model = donor_and_adapter(tmp_path / "donor")
    ids = torch.randint(0, 300, (2, 9))
    with torch.no_grad():
        for H in (0, 1, 2, 3, 5):
            assert torch.equal(model(ids, H_cycles=H).logits, donor(ids).logits)


@pytest.mark.parametrize("lora", [{}, {"lora_targets": "attention"}, {"lora_targets": "mlp", "lora_per": "cycle"}])
@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_every_trained_parameter_gets_a_gradient_within_the_first_steps(tmp_path: Path, family: str, lora: dict[str, str]) -> None:
    _, model = donor_and_adapter(tmp_path / "donor", family, lora)
    before = copy.deepcopy(model.state_dict())
    fit(model, make_tiny_tokenizer(), blocks(8), None, settings(start_gain=0.0), console=False)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved == trained and {name.split(".")[1] for name in trained} == {"recursion"}
    assert {"model.recursion.L_init", "model.recursion.q_head.weight"}.isdisjoint(trained)
    updated = {name.split(".")[-2] for name in trained if ".lora." in name}
    parts = LINEAR[family]
    assert updated == parts.get(lora.get("lora_targets", "all"), parts["attention"] | parts["mlp"])


def test_adapter_made_from_its_configuration_trains_the_recursion_alone(tmp_path: Path) -> None:
    """Not the head of its own, either, which llama's tiny donor has."""
    _, model = donor_and_adapter(tmp_path / "donor", "llama")
    made: Any = RecursiveLLM(model.config)
    assert made.lm_head.weight is not made.model.embed_tokens.weight
    assert {name.split(".")[1] for name, p in made.named_parameters() if p.requires_grad} == {"recursion"}


def test_pairs_per_cycle(tmp_path: Path) -> None:
    """Each cycle has its own updates; deeper cycles have the last."""
    _, model = donor_and_adapter(tmp_path / "donor", lora={"lora_per": "cycle"})
    stirred(model)
    ids = torch.randint(0, 300, (1, 6))

    @torch.no_grad()
    def cycles(changed: int | None = None) -> list[torch.Tensor]:
        other = copy.deepcopy(model)
        for name, parameter in other.model.recursion.lora.named_parameters():
            if changed is not None and name.endswith("B"):
                parameter[changed] += 0.3
        return list(other(ids, H_cycles=5, output_cycle_logits=True, use_cache=False).cycle_logits)

    base = cycles()
    for pair in range(3):
        same = [torch.equal(one, other) for one, other in zip(base, cycles(pair), strict=True)]
        assert same == [cycle < pair for cycle in range(5)]


@pytest.mark.parametrize("backprop", ["full", "cycle"])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, backprop: str) -> None:
    """A layer that is run again in the backward pass has the updates of its own cycle, and none in the first application."""
    _, model = donor_and_adapter(tmp_path / "donor", lora={"lora_per": "cycle"})
    stirred(model)
    results = []
    for recompute in (False, True):
        other = copy.deepcopy(model)
        changes = {"gradient_checkpointing": recompute, "backprop": backprop, "cycle_choices": (1, 3), "max_steps": 4}
        fit(other, make_tiny_tokenizer(), blocks(8), None, settings(**changes), console=False)
        results.append(other.state_dict())
    assert not torch.equal(results[0]["model.recursion.H_init"], model.state_dict()["model.recursion.H_init"])
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=0, atol=1e-6, msg=name)


def test_no_graph_through_the_prelude_and_no_gradient_of_frozen_weights(tmp_path: Path) -> None:
    _, model = donor_and_adapter(tmp_path / "donor")
    set_gains(model, 0.2)
    ids = torch.randint(0, 300, (2, 9))
    e, block, _ = model.model.begin_pass(ids)
    assert not e.requires_grad and not block(e, 0).requires_grad, "the donor's own application has no graph either"
    assert block(e, 1).requires_grad
    model(ids, labels=ids).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


def test_a_model_that_was_copied_or_compiled_keeps_its_updates(tmp_path: Path) -> None:
    _, model = donor_and_adapter(tmp_path / "donor")
    stirred(model)
    ids = torch.randint(0, 300, (1, 6))
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(copy.deepcopy(model)(ids).logits, expected)
        torch.testing.assert_close(torch.compile(model, backend="eager")(ids).logits, expected)
        for layer in model.model.layers:
            layer.compile(backend="eager")
        torch.testing.assert_close(model(ids).logits, expected)


# Early exit before the first cycle


@pytest.mark.parametrize("backprop", ["full", "cycle"])
def test_the_halting_head_learns_the_exit_before_the_first_cycle(tmp_path: Path, backprop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first logit is that of the plain pass, whose token losses are the donor's."""
    donor, model = donor_and_adapter(tmp_path / "donor")
    stirred(model)
    seen: list[tuple[Any, Any]] = []

    def recorded(logits: Any, losses: Any, *rest: Any) -> Any:
        seen.append(([each.detach() for each in logits], losses))
        return halting_loss(logits, losses, *rest)

    monkeypatch.setattr("recursify.training.loss_module.halting_loss", recorded)
    rows = blocks(4)
    ids = torch.tensor([row["input_ids"] for row in rows[:2]])
    before = model.model.recursion.q_head.weight.detach().clone()
    with torch.no_grad():
        expected = token_losses(donor.model(ids).last_hidden_state, ids, donor.lm_head)
        logits = model(ids, use_cache=False, output_cycle_logits=True, halt="q_head", halt_threshold=0.0).halt_logits[0]
    changes = {"halting_weight": 0.5, "backprop": backprop, "max_steps": 1, "start_gain": None}
    fit(model, make_tiny_tokenizer(), rows[:2], None, settings(**changes), console=False)
    found_logits, found_losses = seen[0]
    assert len(found_logits) == len(found_losses) == 4
    order = [0, 1] if torch.allclose(found_losses[0], expected, atol=1e-5) else [1, 0]  # the sampler may swap the rows
    torch.testing.assert_close(found_losses[0], expected[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(found_logits[0], logits[order], rtol=0, atol=1e-5)
    assert not torch.equal(model.model.recursion.q_head.weight, before)


def test_tokens_that_exit_before_the_first_cycle_cost_what_the_donor_costs(tmp_path: Path) -> None:
    donor, model = donor_and_adapter(tmp_path / "donor")
    stirred(model)
    ids = torch.randint(0, 300, (1, 12))
    found = early_exit.measure(model, ids, "q_head", 0.0)
    assert found.cycles == {0: 12, 1: 0, 2: 0, 3: 0} and found.share == model.config.depth(0) / model.config.depth()
    with torch.no_grad():
        assert found.loss == pytest.approx(donor(ids, labels=ids).loss.item(), abs=1e-5)
        threshold = splitting(model, ids, "q_head")
        part = model(ids, use_cache=False, halt="q_head", halt_threshold=threshold).halt_cycles
    assert set(part.flatten().tolist()) > {0}
    steps = recursive_steps(model, ids[0].tolist(), prompt_length=4, halt="q_head", halt_threshold=threshold)
    for step, used in zip(steps, part[0, 3:-1].tolist(), strict=True):
        assert [guess.cycle for guess in step.cycles] == (list(range(1, used + 1)) or [0])


# The command


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    tiny_donor("qwen2", folder / "donor", num_hidden_layers=5)
    (folder / "text.txt").write_text("\n\n".join(" ".join(sentences(seed, 30)) for seed in range(6)))
    cli.main(
        ["convert", "--qwen_model", str(folder / "donor"), "--keep_donor", "--L_layers", "2", "--L_cycles", "1", "--output_path",
         str(folder / "init.pt")]
    )  # fmt: skip
    return folder


def flags(desk: Path, out: Path, **changes: Any) -> TrainSettings:
    given = {"checkpoint": str(desk / "init.pt"), "dataset_name": str(desk / "text.txt"), "output_dir": str(out), "adapter": True}
    return settings(**given | {"lora_rank": 2, "save_every": 2, "eval_every": 2, "max_steps": 4} | changes)


def test_training_writes_adapters(desk: Path, tmp_path: Path) -> None:
    before = files(desk / "donor")
    best = train(flags(desk, tmp_path)).best
    assert best == tmp_path / BEST_ADAPTER
    assert {path.name for path in best.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json", "config.json", "README.md"}
    assert not list(best.glob("model*.safetensors")) and files(desk / "donor") == before
    record = json.loads((best / "adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == str(desk / "donor") and len(record["donor_sha256"]) == 64
    assert (record["lora_rank"], record["H_cycles"], record["prelude_layers"]) == (2, 3, 1)
    assert json.loads((best / "config.json").read_text())["architectures"] == ["RecursiveQwen2ForCausalLM"]  # engines choose by it
    ids = torch.randint(0, 300, (1, 7))
    donor = AutoModelForCausalLM.from_pretrained(desk / "donor")
    for path in (best, tmp_path / "checkpoint_step_4.pt"):
        found = checkpoint.load(path)
        assert found.tokenizer is not None and found.notes["training"]["tokens"] > 0
        with torch.no_grad():
            assert torch.equal(found.model(ids, H_cycles=0).logits, donor(ids).logits)
    assert (tmp_path / "checkpoint_step_4.pt").stat().st_size < 100_000 < (desk / "init.pt").stat().st_size
    again = train(settings(checkpoint=str(best), dataset_name=str(desk / "text.txt"), output_dir=str(tmp_path)))
    assert again.best == best and (tmp_path / f"{BEST_ADAPTER}_previous" / "adapter_config.json").is_file()
    assert checkpoint.load(best).model.config.is_adapter


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.5}, {"backprop": "cycle", "lora_per": "cycle"}])
def test_interrupted_run_resumes_bit_for_bit(desk: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    train(flags(desk, tmp_path / "whole", **changes))
    train(flags(desk, tmp_path / "parts", **changes))
    for path in (tmp_path / "parts").glob("checkpoint_step_4*"):
        path.rename(tmp_path / f"aside_{path.name}")
    train(flags(desk, tmp_path / "parts", resume=True, **changes))
    whole, parts = (checkpoint.load(tmp_path / name / "checkpoint_step_4.pt").model.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_dry_run_counts_the_adapter_alone(desk: Path) -> None:
    model: Any = as_adapter(checkpoint.load(desk / "init.pt").model, lora_rank=2)
    full, adapter = (estimate(config, settings(), 10) for config in (checkpoint.load(desk / "init.pt").model.config, model.config))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    untrained = sum(p.numel() for p in model.model.recursion.parameters()) - trained
    assert adapter.trained_parameters == trained + untrained
    assert adapter.memory["optimizer"] == 8 * adapter.trained_parameters < full.memory["optimizer"] / 5
    assert adapter.flops < full.flops


def test_frozen_donor_stays_in_bfloat16(tmp_path: Path) -> None:
    """Where it is stored so and the run computes in it; what is trained is float32, and so are its files."""
    tiny_donor("qwen2", tmp_path / "donor", num_hidden_layers=5)
    AutoModelForCausalLM.from_pretrained(tmp_path / "donor", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    donor = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    model: Any = as_adapter(convert(str(tmp_path / "half"), **SHAPE), lora_rank=2)
    assert model.dtype == torch.bfloat16
    result = fit(model, make_tiny_tokenizer(), blocks(8), blocks(2), settings(max_steps=30, bf16=True, log_every=5), console=False)
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    kinds = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    ids = torch.randint(0, 300, (1, 7))
    with torch.no_grad():
        assert torch.equal(model(ids, H_cycles=0).logits, donor(ids).logits)
        model(ids, halt="q_head")
    checkpoint.save(tmp_path / "adapter", model, make_tiny_tokenizer())
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    memory = [estimate(model.config, settings(bf16=bf16), 1).memory for bf16 in (True, False)]
    assert memory[0]["weights"] < 0.7 * memory[1]["weights"] and "autocast" not in memory[0]


def test_export_of_the_adapter_alone_names_its_donor_by_hub_id(desk: Path, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "adapter", as_adapter(checkpoint.load(desk / "init.pt").model), make_tiny_tokenizer())
    words = ["export", str(tmp_path / "out"), "--checkpoint", str(tmp_path / "adapter"), "--adapter_only"]
    with pytest.raises(SystemExit):
        cli.main(words)
    assert not (tmp_path / "out").exists()
    cli.main([*words, "--base_model", "Qwen/Qwen2-0.5B"])
    record = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == "Qwen/Qwen2-0.5B" and str(desk) not in (tmp_path / "out" / "config.json").read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: Qwen/Qwen2-0.5B" in card and 'recursify.load("out")' in card and "AutoModelForCausalLM" not in card
    assert checkpoint.load(tmp_path / "out", donor=str(desk / "donor")).model.config.is_adapter
    for more, message in (
        (["--donor"], "--adapter_only: writes no weights of the donor, which --donor is about"),
        (["--dtype", "float32"], "--adapter_only: writes no weights of the donor, which --dtype float32 is about"),
    ):
        with pytest.raises(UserError, match=message):
            ExportSettings(
                out="x", checkpoint="y", adapter_only=True, donor="--donor" in more, dtype=more[1] if more[1:] else None
            ).validate()
    with pytest.raises(UserError, match="--adapter_only: expected an adapter, as recursify train --adapter makes"):
        export.run(ExportSettings(out=str(tmp_path / "whole"), checkpoint=str(desk / "init.pt"), adapter_only=True))


def test_evaluation_and_prompts_take_an_adapter(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path / "adapter", stirred(as_adapter(checkpoint.load(desk / "init.pt").model)), make_tiny_tokenizer())
    adapter, text = str(tmp_path / "adapter"), str(desk / "text.txt")
    words = ["--dataset_name", text, "--max_windows", "2", "--seq_len", "32", "--json"]
    page = tmp_path / "report.html"
    halting = ["--halt", "q_head", "--halt_threshold", "0.5"]
    cli.main(["evaluate", "--checkpoint", adapter, "--cycles", "0", "3", *halting, "--report", str(page), *words])
    found = json.loads(capsys.readouterr().out)
    exits = [cycle for passage in found["passages"] for cycle in passage["exits"]]
    assert len(exits) == 2 * 31 and 0 in exits and len(set(exits)) > 1
    shown = page.read_text(encoding="utf-8")
    assert "Where the model spends its cycles" in shown and f"{sum(exits) / len(exits):.2f} of at most 3 cycles per token" in shown
    assert shown.count("exit before the first cycle") > 0 and "exit after cycle " in shown
    cli.main(["evaluate", "--checkpoint", str(desk / "donor"), *words])
    donor = json.loads(capsys.readouterr().out)
    assert found["rows"][0]["loss"] == donor["rows"][0]["loss"] != found["rows"][1]["loss"]
    cli.main(
        [
            "generate",
            "--checkpoint",
            adapter,
            "--donor",
            str(desk / "donor"),
            "--prompt",
            "The",
            "--max_new_tokens",
            "3",
            "--temperature",
            "0",
        ]
    )
    assert capsys.readouterr().out.startswith("The")
    cli.main(["inspect", "--checkpoint", adapter])
    assert "recursion" in capsys.readouterr().out


# Errors


def test_other_weights_are_refused(desk: Path, tmp_path: Path) -> None:
    model = as_adapter(checkpoint.load(desk / "init.pt").model)
    checkpoint.save(tmp_path / "adapter", model, None)
    other = tmp_path / "other"
    other.mkdir()
    for path in (desk / "donor").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    assert checkpoint.load(tmp_path / "adapter", donor=str(other)).model.config.is_adapter
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"adapter: is an adapter of other weights than those of .*other: their hashes differ; .* --donor"):
        checkpoint.load(tmp_path / "adapter", donor=str(other))
    with pytest.raises(UserError, match=r"adapter: expected the weights of .*other, but 1 tensors differ"):
        as_adapter(checkpoint.load(desk / "init.pt").model, donor=str(other))


def test_files_of_the_hubs_cache_are_known_without_reading_them(desk: Path, tmp_path: Path) -> None:
    """The cache names them by their SHA-256; the same donor in a plain folder has the same hash."""
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in (desk / "donor").iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    weights = snapshot / "model.safetensors"
    blob = tmp_path / "blobs" / hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.rename(blob)
    weights.symlink_to(blob)
    expected = adapter_files.donor_hash(open_donor(str(desk / "donor")))
    assert adapter_files.donor_hash(open_donor(str(snapshot))) == expected
    renamed = blob.rename(blob.with_name("0" * 64))  # so it is the name that is taken
    weights.unlink()
    weights.symlink_to(renamed)
    assert adapter_files.donor_hash(open_donor(str(snapshot))) != expected


def test_missing_donor_and_damaged_adapter_are_named(desk: Path, tmp_path: Path) -> None:
    model = as_adapter(checkpoint.load(desk / "init.pt").model)
    checkpoint.save(tmp_path / "adapter", model, None)
    config = json.loads((tmp_path / "adapter" / "config.json").read_text())
    config["conversion"]["donor_folder"] = str(tmp_path / "moved")
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"its donor was the folder .*moved, which is not there; name another place with --donor"):
        checkpoint.load(tmp_path / "adapter")
    assert checkpoint.load(tmp_path / "adapter", donor=str(desk / "donor")).model.config.is_adapter
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"adapter_model.safetensors is missing, truncated or corrupt"):
        checkpoint.load(tmp_path / "adapter", donor=str(desk / "donor"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": False}, "--lora_rank: expected --adapter with it, got 2; add --adapter, or leave --lora_rank out"),
        ({"lora_rank": 0}, "--lora_rank: expected a number above 0, got 0"),
        ({"lora_alpha": -1.0}, "--lora_alpha: expected a number above 0, got -1.0"),
    ],
)
def test_flags_that_do_not_fit_are_refused(desk: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        train(flags(desk, tmp_path / "out", **changes))
    assert str(refused.value) == message and not (tmp_path / "out").exists()


def test_models_that_are_no_whole_donor_are_refused(tmp_path: Path) -> None:
    tiny_donor("qwen2", tmp_path / "donor", num_hidden_layers=5)
    with pytest.raises(UserError, match="expected a model with all layers of its donor; convert it with --keep_donor"):
        as_adapter(convert(str(tmp_path / "donor"), L_layers=2))
    trained = convert(str(tmp_path / "donor"), **SHAPE)
    fit(trained, make_tiny_tokenizer(), blocks(4), None, settings(max_steps=1), console=False)
    with pytest.raises(UserError, match="tensors differ, .* first: the model was trained"):
        as_adapter(trained)
    with pytest.raises(UserError, match="--L_cycles: expected at least 1 with an adapter"):
        as_adapter(convert(str(tmp_path / "donor"), **SHAPE | {"L_cycles": 0}))
    with pytest.raises(UserError, match="--injection: expected 'anchored' with an adapter, got 'sum_norm'"):
        as_adapter(convert(str(tmp_path / "donor"), **SHAPE, injection="sum_norm"))
