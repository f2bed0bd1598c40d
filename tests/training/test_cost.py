"""The cost of training: operations equal those that torch counts, activations those that autograd keeps, and a run adds up."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config

from recursify.network import size
from recursify.network.configuration_recursive_llm import from_donor
from recursify.network.losses import CHUNK_ELEMENTS, Reference, losses_and_divergences, next_token_loss
from recursify.network.modeling_recursive_llm import FAMILIES as CLASSES
from recursify.training import cost
from recursify.training.depth import DepthSchedule
from recursify.training.fitting import checkpoint_layers
from tests.support.tiny import FAMILIES, tiny_config, tiny_model

B, T = 2, 48
EMBEDDINGS = {"embeddings", "lm_head"}  # of a tied head


def config_of(family: str = "qwen2", *, prelude: int = 1, loop: int = 2, coda: int = 1, H: int = 2, L: int = 1, **overrides: Any) -> Any:
    count = prelude + loop + coda
    donor = tiny_config(family, num_hidden_layers=count, **overrides)
    return from_donor(
        donor, list(range(count)), prelude_layers=prelude, L_layers=loop, coda_layers=coda, H_cycles=H, L_cycles=L, gain_init=0.2
    )


def build(config: Any, checkpointing: bool = False, frozen: set[str] = frozenset()) -> Any:
    """A model in training, whose attention is matrix products that torch's counter sees."""
    config._attn_implementation = "eager"
    model = CLASSES[config.model_type](config).train()
    for name, part in size._recursive_parts(model, config).items():
        part.requires_grad_(name not in frozen)
    if checkpointing:
        checkpoint_layers(model)
    return model


def learn(model: Any, supervised: int, backprop: str = "full", loss: Callable[..., Any] | None = None) -> None:
    """One forward and backward pass with a readout of the last `supervised` cycles."""
    ids = torch.randint(0, 100, (B, T))
    e, block, read = model.model.begin_pass(ids)
    cycles = list(model.model.recursion.steps(e, block, model.config.H_cycles, model.config.L_cycles, backprop))
    states = [read(z) for z in cycles[-supervised:]]
    score = loss or (lambda states, ids, head: sum(F.cross_entropy(head(state).flatten(0, 1), ids.flatten()) for state in states))
    score(states, ids, model.lm_head).backward()


def flops_of(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


# Not 1 to 2 % apart but equal: what the counter leaves out, we do.


@pytest.mark.parametrize("L", [0, 1, 2])
@pytest.mark.parametrize("H", [1, 2, 3])
def test_flops_count_every_application(H: int, L: int) -> None:
    config = config_of(H=H, L=L)
    for supervised in {1, H}:
        counted = flops_of(lambda supervised=supervised: learn(build(config), supervised))
        assert cost.step_flops(config, B * T, T, supervised=supervised) == counted


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    config = config_of(family)
    assert cost.step_flops(config, B * T, T, supervised=2) == flops_of(lambda: learn(build(config), 2))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("backprop", "supervised"), [("full", 3), ("full", 1), ("cycle", 3), ("last", 1)])
def test_flops_by_backprop_mode(backprop: str, supervised: int, checkpointing: bool) -> None:
    config = config_of(H=3)
    counted = flops_of(lambda: learn(build(config, checkpointing), supervised, backprop))
    options: dict[str, Any] = {"backprop": backprop, "gradient_checkpointing": checkpointing, "supervised": supervised}
    assert cost.step_flops(config, B * T, T, **options) == counted


def test_backprop_modes_differ_in_flops() -> None:
    config = config_of(H=3)
    costs = [cost.step_flops(config, B * T, T, backprop=way) for way in ("full", "cycle", "last")]
    assert costs[0] > costs[1] == costs[2]  # one cycle is read out
    assert cost.step_flops(config, B * T, T, backprop="cycle", supervised=3) == cost.step_flops(config, B * T, T, supervised=3)


@pytest.mark.parametrize("frozen", [EMBEDDINGS, EMBEDDINGS | {"prelude", "coda", "norm"}])
def test_frozen_parts_cost_less(frozen: set[str]) -> None:
    config = config_of(H=2)
    trained = cost.everything(config) - frozen
    counted = flops_of(lambda: learn(build(config, frozen=frozen), 2))
    assert cost.step_flops(config, B * T, T, supervised=2, trained=trained) == counted
    assert counted < cost.step_flops(config, B * T, T, supervised=2)


@pytest.mark.parametrize(
    "trained",
    [cost.LOOP, cost.LOOP | cost.READOUT, {"recursion"}, {"prelude"}, {"coda"}, {"embeddings"}, cost.READOUT],
    ids=lambda parts: "+".join(sorted(parts)),
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_of_single_trained_parts(trained: set[str], checkpointing: bool) -> None:
    config = config_of("llama", H=2)
    frozen = set(cost.parameters_by_part(config)) - trained
    model = build(config, checkpointing, frozen)
    model.lm_head.requires_grad_("lm_head" in trained)
    if checkpointing:
        model.disable_input_require_grads()  # which transformers switches on beside checkpointing
    counted = flops_of(lambda: learn(model, 2))
    assert cost.step_flops(config, B * T, T, supervised=2, trained=trained, gradient_checkpointing=checkpointing) == counted


def test_one_plain_pass_costs_one_cycle_of_one_step() -> None:
    config = config_of()
    assert cost.step_flops(config, B * T, T, H_cycles=0) == cost.step_flops(config, B * T, T, H_cycles=1, L_cycles=0)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
def test_a_plain_donor(family: str) -> None:
    tiny_gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64, "attn_pdrop": 0.0}
    config = GPT2Config(**tiny_gpt2) if family == "gpt2" else tiny_config(family, num_hidden_layers=3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.randint(0, 100, (B, T))
    assert cost.step_flops(config, B * T, T) == flops_of(lambda: model(ids, use_cache=False).logits.sum().backward())
    assert sum(size.parameters_by_part(config).values()) == sum(p.numel() for p in model.parameters())


def test_flops_equal_the_palm_formula() -> None:
    config = tiny_config("llama", num_hidden_layers=3)
    matrices = sum(size.shape_of(config).matrices.values())
    assert cost.step_flops(config, 1, T) == 6 * matrices + 12 * 3 * config.hidden_size * T


def test_chunked_logits_are_recomputed_in_the_backward_pass() -> None:
    config = config_of()
    once = flops_of(lambda: learn(build(config), 2, loss=lambda *a: next_token_loss(*a, [1.0] * 2, num_items=1, chunk=2 * B * T)[0]))
    twice = flops_of(
        lambda: learn(
            build(config),
            2,
            loss=lambda states, ids, head: sum(losses_and_divergences(s, ids, head, (), chunk=16)[0].sum() for s in states),
        )
    )
    ours = [cost.step_flops(config, B * T, T, supervised=2, recomputes_logits=again) for again in (False, True)]
    assert twice - once == pytest.approx(ours[1] - ours[0], rel=1.5 / T)  # the last position of a sequence has nothing to predict
    rows = CHUNK_ELEMENTS // config.vocab_size
    with_terms: dict[str, Any] = {"by_token": True}
    wants = [(rows, with_terms, False), (rows + 1, with_terms, True), (rows + 1, {}, False), (rows, with_terms | {"references": 1}, True)]
    for tokens, options, again in wants:
        assert cost.recomputes_logits(config, tokens, **options) == again


@pytest.mark.parametrize("chunk", [None, 16])
def test_flops_of_a_teacher(chunk: int | None) -> None:
    config, donor = config_of(), tiny_config("qwen2", num_hidden_layers=5)
    teacher = AutoModelForCausalLM.from_config(donor, attn_implementation="eager").requires_grad_(False)

    def loss(states: Any, ids: torch.Tensor, head: Any) -> Any:
        reference = Reference(teacher.model(ids, use_cache=False).last_hidden_state, teacher.lm_head)
        return sum(torch.stack(losses_and_divergences(state, ids, head, [reference], chunk)).sum() for state in states)

    counted = flops_of(lambda: learn(build(config), 2, loss=loss))
    ours = cost.step_flops(config, B * T, T, supervised=2, teacher_config=donor, recomputes_logits=chunk is not None)
    assert ours == pytest.approx(counted, rel=0.01)


def test_flops_of_self_distillation() -> None:
    config = config_of(H=3)
    shape = size.shape_of(config)
    plain, full = (cost.step_flops(config, 1, T, supervised=3, self_distills=on) for on in (False, True))
    assert full - plain == 2 * 2 * shape.matrices["lm_head"]
    cycle = cost.step_flops(config, 1, T, supervised=3, self_distills=True, backprop="cycle")
    attention = 4 * shape.heads * T
    loop_and_coda = 6 * (2 * shape.matrices["L_level"] + 2 * attention) + 2 * shape.matrices["coda"] + attention
    assert cycle - full == loop_and_coda


def test_recomputed_logits_count_per_reference() -> None:
    config, donor = config_of(H=3), tiny_config("qwen2", num_hidden_layers=5)
    head, teacher = cost.shape_of(config).matrices["lm_head"], cost.shape_of(donor)
    options: dict[str, Any] = {"supervised": 3, "recomputes_logits": True}
    plain = cost.step_flops(config, 1, T, **options)
    assert plain - cost.step_flops(config, 1, T, supervised=3) == 3 * 2 * head
    assert cost.step_flops(config, 1, T, **options, self_distills=True) - plain == 2 * 2 * 2 * head
    layers = 2 * teacher.matrices["layers"] + 4 * 5 * teacher.heads * T
    assert cost.step_flops(config, 1, T, **options, teacher_config=donor) - plain == layers + 3 * 2 * 2 * teacher.matrices["lm_head"]


def test_embedding_objective_costs_no_head() -> None:
    config = config_of(H=2)
    head = 2 * 3 * 2 * cost.shape_of(config).matrices["lm_head"]  # of two readouts, forward and twice backward
    both = [cost.step_flops(config, 7, T, supervised=2, reads_logits=reads) for reads in (True, False)]
    assert both[0] - both[1] == 7 * head


def kept_per_token(model: Any, bf16: bool) -> float:
    """Bytes per token that autograd keeps of one layer, without the weights: those of three layers less those of two."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    copies = 2 * sum(p.numel() for name, p in model.layers[0].named_parameters() if "norm" not in name) if bf16 else 0
    kept = []
    for layers in (3, 2):
        model.config.num_hidden_layers, seen, alive = layers, {}, []

        def note(tensor: torch.Tensor, seen: dict[int, int] = seen, alive: list[Any] = alive) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(torch.randint(0, 100, (B, T)), use_cache=False)
        kept.append(sum(size for pointer, size in seen.items() if pointer not in weights))
    return (kept[0] - kept[1] - copies) / (B * T)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_bytes_of_a_layer(family: str, bf16: bool) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 8, "num_hidden_layers": 3, "sliding_window": None}
    wide |= {"head_dim": 64} if family == "qwen3" else {"no_rope_layers": [1] * 3} if family == "smollm3" else {}
    model = tiny_model(family, **wide).train()
    within = {"phi3": 0.15, "olmo2": 0.08}.get(family, 0.02)  # fused projections; norms behind the blocks
    assert cost.layer_bytes(model.config, bf16) == pytest.approx(kept_per_token(model.model, bf16), rel=within)


def test_activations_by_backprop_mode() -> None:
    config = config_of(H=3, L=1, prelude=1, loop=2, coda=1)
    layer = cost.layer_bytes(config, False)

    def kept(**options: Any) -> float:
        return cost.memory_by_part(config, 1, bf16=False, **options)["activations"] / layer

    assert kept(supervised=3) == pytest.approx(1 + 12 + 3, rel=0.25)
    assert kept(supervised=3, backprop="cycle") == kept(supervised=1, backprop="last") == pytest.approx(1 + 4 + 1, rel=0.25)
    assert kept(supervised=3, gradient_checkpointing=True) < 0.5 * kept(supervised=3)
    assert kept(supervised=1, trained=cost.LOOP) == pytest.approx(kept(supervised=1) - 1)


def test_activations_by_hand() -> None:
    config = config_of("llama", H=3, L=1, prelude=1, loop=2, coda=1)
    layer, state = cost.layer_bytes(config, False), 4 * 32

    def kept(**options: Any) -> float:
        return cost.memory_by_part(config, 5, bf16=False, **options)["activations"] / 5

    # 1 of the prelude, 2 layers in 3 * 2 applications, 1 of the coda at each readout; 2 states of each mix, 3 of each readout
    assert kept(supervised=3) == (1 + 12 + 3) * layer + (2 * 6 + 3 * 3) * state
    assert kept(supervised=1) == (1 + 12 + 1) * layer + (2 * 6 + 3 * 1) * state
    assert kept(supervised=3, backprop="cycle") == (1 + 4 + 1) * layer + (2 * 2 + 3 * 1) * state
    assert kept(supervised=3, trained=cost.LOOP) == (12 + 3) * layer + (2 * 6 + 3 * 3) * state
    assert kept(supervised=3, trained=cost.LOOP | {"prelude"}) == kept(supervised=3, trained={"embeddings"}) == kept(supervised=3)
    assert kept(supervised=3, gradient_checkpointing=True) == (1 + 12 + 3) * state + layer + (2 * 6 + 3 * 3) * state
    assert kept(supervised=2, H_cycles=2, L_cycles=0) == (1 + 4 + 2) * layer + (2 * 2 + 3 * 2) * state


def test_bytes_by_hand() -> None:
    config = config_of("llama", prelude=1, loop=2, coda=1)
    parts, matrices = cost.parameters_by_part(config), cost.shape_of(config).matrices
    learn_count = parts["L_level"] + parts["recursion"]

    def memory(**options: Any) -> dict[str, float]:
        return cost.memory_by_part(config, B * T, **options)

    assert memory()["autocast"] == 2 * sum(matrices.values())
    assert memory(reads_logits=False)["autocast"] == 2 * (sum(matrices.values()) - matrices["lm_head"])
    loop = memory(trained=cost.LOOP, ema=True)
    assert (loop["weights"], loop["gradients"], loop["optimizer"], loop["ema"]) == (
        4 * sum(parts.values()), 4 * learn_count, 8 * learn_count, 4 * learn_count
    )  # fmt: skip
    assert memory(trained=cost.LOOP, optimizer="muon")["optimizer"] == 8 * learn_count - 4 * matrices["L_level"]
    for way, accumulates, times in (("full", True, 1), ("cycle", False, 1), ("cycle", True, 2)):
        spread = cost.Parallelism(accumulates=accumulates)
        assert memory(backprop=way, parallelism=spread)["gradients"] == times * 4 * sum(parts.values())
    donor = tiny_config("qwen2")
    teacher = sum(cost.parameters_by_part(donor).values())
    assert [memory(teacher_config=donor, bf16=bf16)["teacher"] for bf16 in (True, False)] == [2 * teacher, 4 * teacher]
    spread = memory(parallelism=cost.Parallelism(devices=4, fsdp=True), ema=True, optimizer="adamw_8bit")
    assert (spread["ema"], spread["optimizer"]) == (sum(parts.values()), 2 * sum(parts.values()) / 4)
    assert "exchange" not in memory(parallelism=cost.Parallelism(devices=1, fsdp=True))
    assert memory(trained=cost.LOOP, parallelism=cost.Parallelism(devices=2))["exchange"] == 4 * learn_count


def test_shard_bytes_by_hand() -> None:
    config = config_of("llama")  # 2 key and value heads of 8
    assert (size.slot_bytes(config), size.slot_bytes(config, 4)) == (2 * 16 * 2, 2 * 16 * 4)
    assert size.slot_bytes(GPT2Config(n_embd=32, n_layer=2, n_head=4)) == 2 * 32 * 2  # no fewer of these than of queries
    assert size.slot_bytes(config_of("qwen3")) == 2 * 2 * 16 * 2  # heads of 16 in a hidden size of 32


def test_memory_by_part() -> None:
    config = config_of()
    count = sum(size.parameters_by_part(config).values())
    layers = sum(size.shape_of(config).matrices[part] for part in ("prelude", "L_level", "coda"))

    def memory(**options: Any) -> dict[str, float]:
        return cost.memory_by_part(config, B * T, **options)

    assert memory()["weights"] == memory()["gradients"] == memory(ema=True)["ema"] == 4 * count
    assert "ema" not in memory() and "autocast" not in memory(bf16=False) and "teacher" not in memory()
    states = [memory(optimizer=optimizer)["optimizer"] for optimizer in ("adamw", "muon", "adamw_8bit")]
    assert states == [8 * count, 8 * count - 4 * layers, 2 * count]
    assert memory(supervised=2, backprop="cycle")["gradients"] == 4 * count
    assert memory(teacher_config=tiny_config("qwen2"))["teacher"] == 2 * sum(size.parameters_by_part(tiny_config("qwen2")).values())
    assert memory()["logits"] == 16 * B * T * config.vocab_size
    assert memory(supervised=2)["logits"] == 24 * B * T * config.vocab_size  # a single chunk is kept, the first readout's beside the last
    assert memory(supervised=2, backprop="cycle")["logits"] == memory()["logits"]
    most = CHUNK_ELEMENTS // config.vocab_size
    one, other = (cost.memory_by_part(config, most, supervised=2, by_token=by_token)["logits"] for by_token in (False, True))
    assert one * 24 == other * 16  # one readout is a chunk: two together are more, and are computed in chunks, but not token by token
    assert cost.memory_by_part(config, 10**6, supervised=2)["logits"] == 16 * CHUNK_ELEMENTS
    assert "logits" not in memory(reads_logits=False)


def test_memory_of_several_devices() -> None:
    config = config_of("llama", prelude=2, coda=2)
    alone = cost.memory_by_part(config, B * T)
    ddp = cost.memory_by_part(config, B * T, parallelism=cost.Parallelism(devices=4))
    assert ddp == alone | {"exchange": alone["gradients"]}
    last, every, whole = (
        cost.memory_by_part(
            config, B * T, supervised=supervised, parallelism=cost.Parallelism(devices=4, fsdp=True, accumulates=accumulates)
        )
        for supervised, accumulates in ((1, False), (2, False), (1, True))
    )
    for part in ("weights", "gradients", "optimizer"):
        assert last[part] == alone[part] / 4
    parts, layer = size.parameters_by_part(config), size.shape_of(config).matrices["L_level"] / 2
    root = sum(parts[part] for part in ("embeddings", "L_level", "norm", "recursion", "lm_head"))
    assert last["exchange"] == 4 * (2 * root + 3 * layer)
    assert every["exchange"] - last["exchange"] == 4 * 2 * parts["coda"]  # in the root where every cycle is read out
    assert whole["exchange"] == 4 * (root + 2 * layer + sum(parts.values()))


SETTINGS: dict[str, Any] = {
    "approach": "full", "batch_size": 2, "seq_len": 32, "grad_accum_steps": 3, "backprop": "full", "gradient_checkpointing": False,
    "enable_deep_supervision": True, "cycle_choices": (), "cycle_weights": (), "depth_curriculum": 0.0, "optimizer": "adamw",
    "ema_decay": 0.0, "bf16": False, "fsdp": False, "self_distill_weight": 0.0, "monotone_weight": 0.0, "halting_weight": 0.0,
    "distill_weight": 0.5, "match_hidden_weight": 0.0,
}  # fmt: skip


def settings(**changed: Any) -> Any:
    """Of a run; distill_weight matters with a teacher alone."""
    return SimpleNamespace(**({"save_every": 0, "keep_last": 2} | SETTINGS | changed))


def test_cost_of_a_run_is_the_sum_of_its_steps() -> None:
    config = config_of(H=3)
    found = cost.estimate(config, settings(), steps=10, world_size=2)
    assert found.tokens == 10 * 3 * 2 * 2 * 32
    assert found.flops == found.tokens * cost.step_flops(config, 1, 32, supervised=3)
    assert found.parameters == found.trained_parameters == sum(size.parameters_by_part(config).values())
    assert found.memory_total == sum(found.memory.values()) == found.to_dict()["memory_total"]
    assert json.loads(json.dumps(found.to_dict()))["devices"] == 2
    text = found.render()
    for word in (f"{found.tokens:,}", f"{found.flops:.2e}", "activations", "optimizer", "2 devices"):
        assert word in text


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        ({"gradient_checkpointing": True}, {"gradient_checkpointing": True}),
        ({"backprop": "cycle"}, {"backprop": "cycle", "parallelism": cost.Parallelism(accumulates=True)}),
        ({"backprop": "last", "enable_deep_supervision": False}, {"backprop": "last", "supervised": 1}),
        ({"enable_deep_supervision": False}, {"supervised": 1}),
        ({"optimizer": "muon"}, {"optimizer": "muon"}),
        ({"ema_decay": 0.9}, {"ema": True}),
        ({"bf16": True}, {"bf16": True}),
        ({"bf16": None}, {"bf16": True}),
        ({"approach": "embedding"}, {"trained": cost.LOOP, "reads_logits": False}),
        ({"approach": "hybrid"}, {"trained": cost.LOOP}),
        ({"cycle_choices": (1, 2)}, {"H_cycles": 2, "supervised": 2}),
    ],
)
def test_every_setting_affects_the_estimate(changed: dict[str, Any], options: dict[str, Any]) -> None:
    config = config_of("llama", H=3)
    found, plain = cost.estimate(config, settings(**changed), steps=1), cost.estimate(config, settings(), steps=1)
    expected: dict[str, Any] = {"supervised": 3, "bf16": False, **options}
    assert found.memory == cost.memory_by_part(config, 2 * 32, **expected) != plain.memory
    if not changed.keys() & {"cycle_choices"}:
        of_memory = {"optimizer", "ema", "bf16", "parallelism"}
        per_token = cost.step_flops(config, 1, 32, **{name: value for name, value in expected.items() if name not in of_memory})
        assert found.flops == found.tokens * per_token


def test_devices_and_teachers_affect_the_estimate() -> None:
    config, donor = config_of("llama", H=3), tiny_config("qwen2", num_hidden_layers=5)
    for fsdp in (False, True):
        for micro_batches in (1, 3):
            found = cost.estimate(config, settings(fsdp=fsdp, grad_accum_steps=micro_batches), steps=1, world_size=4)
            spread = cost.Parallelism(devices=4, fsdp=fsdp, accumulates=micro_batches > 1)
            assert found.memory == cost.memory_by_part(config, 64, supervised=3, bf16=False, parallelism=spread)
            assert (found.tokens, found.devices) == (64 * 4 * micro_batches, 4)
    taught = cost.estimate(config, settings(), 1, teacher_config=donor)
    assert taught.memory == cost.memory_by_part(config, 64, supervised=3, bf16=False, by_token=True, teacher_config=donor)
    assert taught.flops == taught.tokens * cost.step_flops(config, 1, 32, supervised=3, teacher_config=donor)


@pytest.mark.parametrize("changed", [{"monotone_weight": 0.1}, {"halting_weight": 0.1}, {"self_distill_weight": 0.1}, {}])
@pytest.mark.parametrize("teacher", [False, True])
def test_per_token_terms_are_chunked(changed: dict[str, float], teacher: bool) -> None:
    config, donor = config_of("llama", H=2), tiny_config("llama", num_hidden_layers=3)
    distills = "self_distill_weight" in changed
    references = teacher + distills
    options: dict[str, Any] = {"supervised": 2, "self_distills": distills, "teacher_config": donor if teacher else None}
    chunk = CHUNK_ELEMENTS // (config.vocab_size * (1 + references))  # tokens whose logits are one chunk
    for tokens, over in ((chunk, False), (chunk + 1, True)):
        run = settings(batch_size=1, seq_len=tokens, **changed)
        again = over and bool(changed or teacher)
        assert cost.pass_flops(config, run, tokens, 2, options["teacher_config"]) == cost.step_flops(
            config, tokens, tokens, H_cycles=2, recomputes_logits=again, **options
        )
    run = settings(batch_size=1, seq_len=CHUNK_ELEMENTS // config.vocab_size, **changed)
    found = cost.estimate(config, run, 1, teacher_config=options["teacher_config"]).memory["logits"]
    assert found == (24 if changed or teacher else 16) * run.seq_len * config.vocab_size  # two readouts: more than one chunk together


def test_exactly_one_chunk_is_one_chunk() -> None:
    config = config_of("llama", vocab_size=256)
    assert CHUNK_ELEMENTS % (4 * 256) == 0
    for references in (0, 1, 3):
        tokens = CHUNK_ELEMENTS // (256 * (1 + references))
        chunked = [cost.recomputes_logits(config, tokens + more, by_token=True, references=references) for more in (0, 1)]
        assert chunked == [False, True] and not cost.recomputes_logits(config, tokens + 1, references=references)
    whole = CHUNK_ELEMENTS // 256
    for tokens, readouts, by_token, bytes_each in (
        (whole, 1, False, 16), (whole // 2, 2, False, 24), (whole, 2, True, 24), (whole // 4, 2, False, 24)
    ):  # fmt: skip
        found = cost.memory_by_part(config, tokens, supervised=readouts, by_token=by_token)["logits"]
        assert found == bytes_each * tokens * 256
    for tokens, readouts, by_token in ((whole + 1, 1, False), (whole // 2 + 1, 2, False), (whole + 1, 2, True)):
        found = cost.memory_by_part(config, tokens, supervised=readouts, by_token=by_token)["logits"]
        assert found == 16 * min(tokens * 256, CHUNK_ELEMENTS)


def test_scored_cycles_are_at_most_H_cycles() -> None:
    config = config_of(H=2)
    for H in (0, 1, 2):
        most, asked = (cost.step_flops(config, 1, T, H_cycles=H, supervised=count) for count in (max(1, H), 5))
        assert most == asked == cost.step_flops(config, 1, T, H_cycles=H, supervised=max(H, 0))
        assert cost.memory_by_part(config, 1, H_cycles=H, supervised=5) == cost.memory_by_part(config, 1, H_cycles=H, supervised=max(1, H))


def test_shares_of_depths_by_hand() -> None:
    mixed = settings(cycle_choices=(1, 2, 4), cycle_weights=(1.0, 1.0, 2.0), depth_curriculum=0.6)
    expected = {1: 0.2 + 0.1 + 0.05 + 0.1, 2: 0.1 + 0.05 + 0.1, 4: 0.1 + 0.2}
    assert cost.depth_shares(config_of(), mixed) == pytest.approx(expected)
    assert cost.depth_shares(config_of(), settings(cycle_choices=(1, 2))) == {1: 0.5, 2: 0.5}
    assert cost.depth_shares(config_of(H=5), settings()) == {5: 1.0}
    assert cost.depth_shares(tiny_config("qwen2"), settings()) == {1: 1.0}


def test_rendered_estimate() -> None:
    memory = {"weights": 1.5e9, "activations": 2.25e9}
    found = cost.TrainingCost(
        steps=1200, tokens=4000, flops=8e12, parameters=5000, trained_parameters=300, memory=memory, kept=2, disk=7.5e9
    )
    lines = [line.split() for line in found.render().splitlines() if line]
    assert lines == [
        ["steps", "1,200"],
        ["tokens", "4,000"],
        ["FLOPs", "8.00e+12", "2.00e+09", "per", "token"],
        ["parameters", "5,000", "300", "trainable"],
        ["memory", "in", "GB", "(estimated)"],
        ["weights", "1.50"],
        ["activations", "2.25"],
        ["total", "3.75", "plus", "1", "to", "2", "GB", "for", "the", "device", "context", "and", "libraries"],
        ["disk", "in", "GB", "7.50", "2", "step", "checkpoints", "(--save_every,", "--keep_last)", "and", "the", "best", "model"],
    ]
    assert found.memory_total == found.to_dict()["memory_total"] == 3.75e9


@pytest.mark.parametrize(
    ("count", "shown"), [(1e9, "GB 1.00"), (999e6, "MB 999.00"), (4.5e6, "MB 4.50"), (123456.0, "MB 0.12"), (0.0, "MB 0.00")]
)
def test_units_fit_the_size(count: float, shown: str) -> None:
    """One for all lines of memory, by their sum, and one for the disk."""
    unit, figure = shown.split()
    parts = {"weights": count / 4, "logits": count * 3 / 4}
    common: dict[str, Any] = {"steps": 1, "tokens": 1, "flops": 1.0, "parameters": 1, "trained_parameters": 1}
    for memory, disk in ((parts, 5e9), ({"weights": 5e9}, count)):
        lines = [line.split() for line in cost.TrainingCost(**common, memory=memory, disk=disk).render().splitlines() if line]
        units = {line[0]: line[2] for line in lines if line[0] in ("memory", "disk")}
        figures = {line[0]: line[3] if line[0] == "disk" else line[1] for line in lines if line[0] in ("total", "disk")}
        assert units == ({"memory": unit, "disk": "GB"} if memory is parts else {"memory": "GB", "disk": unit})
        assert figures == ({"total": figure, "disk": "5.00"} if memory is parts else {"total": "5.00", "disk": figure})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ema", [0.0, 0.99])
@pytest.mark.parametrize(("keep", "kept"), [(0, 4), (1, 1), (2, 2), (9, 4)])
def test_disk_by_hand(dtype: torch.dtype, ema: float, keep: int, kept: int) -> None:
    """Weights of each kept checkpoint and of the best model; moments, float32 weights and averages of the two newest."""
    config = config_of(H=2)
    config.dtype = dtype
    found = cost.estimate(config, settings(save_every=10, keep_last=keep, ema_decay=ema), steps=45)
    state = 8 + (4 if dtype is torch.bfloat16 or ema else 0) + (4 if ema else 0)
    assert found.kept == kept and found.trained_parameters == found.parameters
    assert found.disk == found.parameters * ((kept + 1) * dtype.itemsize + min(kept, 2) * state)


def test_a_run_at_several_depths() -> None:
    config = config_of(H=3)
    mixed = settings(cycle_choices=(1, 3), cycle_weights=(3.0, 1.0))
    by_depth = [cost.step_flops(config, 1, 32, H_cycles=H, supervised=H) for H in (1, 3)]
    found = cost.estimate(config, mixed, steps=1)
    assert found.flops == pytest.approx(found.tokens * (0.75 * by_depth[0] + 0.25 * by_depth[1]))
    assert found.memory == cost.estimate(config, settings(), steps=1).memory  # that of the deepest


def test_depth_shares_equal_the_trainers_draws() -> None:
    steps, curriculum = 3000, 0.5
    mixed = settings(cycle_choices=(1, 2, 4), cycle_weights=(1.0, 1.0, 2.0), depth_curriculum=curriculum)
    schedule = DepthSchedule((1, 2, 4), (1.0, 1.0, 2.0), curriculum_steps=int(curriculum * steps))
    drawn = [schedule.at(step) for step in range(steps)]
    for H, share in cost.depth_shares(config_of(), mixed).items():
        assert drawn.count(H) / steps == pytest.approx(share, abs=0.03)


def test_approaches_train_their_parts() -> None:
    config = config_of("llama")
    parts = size.parameters_by_part(config)
    loop = parts["L_level"] + parts["recursion"]
    rows: list[tuple[dict[str, Any], int]] = [
        ({"approach": "full"}, sum(parts.values())),
        ({"approach": "hybrid", "tune_lm_head": False}, loop),
        ({"approach": "hybrid", "tune_lm_head": True}, loop + parts["norm"] + parts["lm_head"]),
        ({"approach": "embedding"}, loop),
    ]
    flops = []
    for changed, learn_count in rows:
        found = cost.estimate(config, settings(**changed), steps=1)
        assert found.trained_parameters == learn_count and found.memory["gradients"] == 4 * learn_count
        flops.append(found.flops)
    assert flops[0] > flops[2] > flops[1] > flops[3]  # in embedding space nothing is read through the head


def test_frozen_embeddings_are_not_trained() -> None:
    for family, frozen in (("qwen2", EMBEDDINGS), ("llama", {"embeddings"})):  # tied, and not
        config = config_of(family)
        everything = cost.everything(config)
        config.freeze_embeddings = True
        assert everything - cost.everything(config) == frozen


def test_the_table_in_the_documentation_is_what_its_script_prints() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (table,) = re.findall(r"<!-- table -->\n\n(.*?)\n<!-- end of table -->", text, re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(script, {})
    assert printed.getvalue() == table


def test_a_teacher_whose_states_alone_are_read_costs_no_head() -> None:
    config, donor = config_of(H=3), tiny_config("qwen2", num_hidden_layers=5)
    matched, distilled = (
        cost.pass_flops(config, settings(match_hidden_weight=0.1, distill_weight=weight), 32, 3, donor) for weight in (0.0, 0.5)
    )
    assert distilled - matched == 32 * 3 * 2 * size.shape_of(donor).matrices["lm_head"]
    assert matched > cost.pass_flops(config, settings(), 32, 3)
