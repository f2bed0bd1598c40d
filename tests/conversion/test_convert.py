"""Conversion: exact for every family and plan, with a correct report; a failed conversion writes nothing."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from recursify import ConversionPlan, RecursiveLLM, convert
from recursify.checkpoints import checkpoint
from recursify.checkpoints import donor as donors_module
from recursify.cli import main as cli
from recursify.conversion import convert as conversion
from recursify.conversion import probe, self_check
from recursify.conversion.convert import convert_tensors, open_donor, resolve_plan, run
from recursify.conversion.mapping import TensorMapping
from recursify.conversion.self_check import SelfCheck, compare_logits, compare_tensors
from recursify.conversion.settings import ConvertSettings
from recursify.data.calibration import calibration_windows
from recursify.errors import UserError
from recursify.network.modeling_recursive_llm import FAMILIES as CLASSES
from recursify.training.settings import TrainSettings
from tests.support.tiny import FAMILIES, make_tiny_tokenizer, sentences, tiny_donor, tiny_model

LAYERS = 8
PLANS: dict[str, dict[str, Any]] = {
    "compact": {"L_layers": 3},
    "keep_donor": {"L_layers": 3, "keep_donor": True},
    "between": {"L_layers": 2, "prelude_layers": 2, "coda_layers": 1, "layer_selection": "stride"},
}
INDICES = {"compact": [0, 4, 7], "keep_donor": list(range(LAYERS)), "between": [0, 1, 2, 4, 7]}


@pytest.fixture(scope="module")
def donors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny donor of 8 layers of every family. Read only."""
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        tiny_donor(family, folder, num_hidden_layers=LAYERS)
    return folders


@pytest.fixture(scope="module")
def donor(donors: dict[str, Path]) -> str:
    return str(donors["qwen2"])


@pytest.fixture
def nothing_written(tmp_path: Path) -> Iterator[Path]:
    """A folder whose contents must not change during the test."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    (folder / "old.pt").write_bytes(b"old")
    yield folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"mine.txt": b"mine", "old.pt": b"old"}


def plain(donor: Any, indices: list[int]) -> Any:
    """Reference: transformers' own class with the donor's tensors of these layers."""
    config = copy.deepcopy(donor.config)
    config.num_hidden_layers = len(indices)
    for name in ("layer_types", "no_rope_layers"):
        if getattr(config, name, None) is not None:
            setattr(config, name, [getattr(donor.config, name)[i] for i in indices])
    state = {}
    for name, tensor in donor.state_dict().items():
        parts = name.split(".")
        if parts[1] != "layers":
            state[name] = tensor
        for ours in [k for k, i in enumerate(indices) if parts[1] == "layers" and i == int(parts[2])]:
            state[".".join([*parts[:2], str(ours), *parts[3:]])] = tensor
    model = AutoModelForCausalLM.from_config(config, dtype=donor.dtype)
    model.load_state_dict(state)
    return model.eval()


def token_ids(seed: int = 0, shape: tuple[int, int] = (2, 17)) -> torch.Tensor:
    return torch.randint(384, shape, generator=torch.Generator().manual_seed(seed))


def lines_of(**flags: Any) -> list[str]:
    lines: list[str] = []
    run(ConvertSettings(**flags), say=lines.append)
    return lines


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_conversion_is_exact(family: str, plan: str, dtype: torch.dtype, donors: dict[str, Path], tmp_path: Path) -> None:
    folder = donors[family]
    if dtype != torch.float32:
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder := tmp_path)
    donor = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert donor.dtype == dtype
    model = convert(str(folder), H_cycles=2, L_cycles=1, **PLANS[plan])
    assert isinstance(model, RecursiveLLM) and type(model) is CLASSES[f"recursive_{family}"]
    assert model.dtype == dtype and not model.training
    reference = donor if plan == "keep_donor" else plain(donor, INDICES[plan])
    ids = token_ids()
    with torch.no_grad():
        expected = reference(ids, use_cache=False).logits
        for H in (0, 1, 3):
            out = model(ids, H_cycles=H, output_cycle_logits=True, use_cache=False)
            assert len(out.cycle_logits) == max(1, H)
            assert all(torch.equal(logits, expected) for logits in out.cycle_logits)


def test_self_check_is_part_of_the_result(donor: str) -> None:
    found = open_donor(donor)
    settings = ConvertSettings(qwen_model=donor, keep_donor=True, L_layers=3)
    done = convert_tensors(found, resolve_plan(found, settings), settings)
    assert done.check.reference == "the donor itself"
    assert done.check.plain_difference == 0.0 and done.check.cycle_differences == (0.0, 0.0, 0.0)
    assert done.check.tensors_compared == len(done.mapping.copied) == len(found.tensor_names)
    assert json.loads(json.dumps(done.check.to_dict()))["cycle_differences"] == [0.0, 0.0, 0.0]


def test_self_check_detects_conversion_faults(donor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor in the wrong place and a wrong layer output both stop the conversion."""
    found, settings = open_donor(donor), ConvertSettings(qwen_model=donor)
    plan = resolve_plan(found, settings)
    build = checkpoint.build

    def swapped(config: Any, state: dict[str, torch.Tensor], *rest: Any) -> RecursiveLLM:
        one, other = (f"model.layers.{i}.input_layernorm.weight" for i in (0, 1))
        return build(config, {**state, one: state[other], other: state[one]}, *rest)

    monkeypatch.setattr(checkpoint, "build", swapped)
    with pytest.raises(RuntimeError, match=r"model.layers.0.input_layernorm.weight differs from model.layers.0.input_layernorm.weight of"):
        convert_tensors(found, plan, settings)

    def written_over(*args: Any) -> RecursiveLLM:
        model = build(*args)
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1  # in memory that is shared with the donor's tensors
        return model

    monkeypatch.setattr(checkpoint, "build", written_over)
    with pytest.raises(RuntimeError, match=r"model.layers.1.mlp.up_proj.weight differs from model.layers.3.mlp.up_proj.weight of"):
        convert_tensors(open_donor(donor), plan, settings)

    def bent(*args: Any) -> RecursiveLLM:
        model = build(*args)
        model.model.layers[2].mlp.register_forward_hook(lambda module, args, output: output * 1.01)
        return model

    monkeypatch.setattr(checkpoint, "build", bent)
    with pytest.raises(RuntimeError, match=r"a plain pass differs from Qwen2ForCausalLM over layers \[0, 3, 5, 7\] by \d"):
        convert_tensors(found, plan, settings)


class Planted:
    """Replaces transformers' model: returns the logits of a plain pass, changed at one place, and stores its input."""

    def __init__(self, model: RecursiveLLM, place: tuple[int, int] = (0, 0), by: float = 0.0):
        self.model, self.place, self.by = model, place, by

    def __call__(self, ids: torch.Tensor, **options: Any) -> Any:
        self.ids, logits = ids, self.model(ids, H_cycles=0, use_cache=False).logits.clone()
        logits[0, self.place[0], self.place[1]] += self.by
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def done(donor: str) -> Any:
    """A conversion with a nonzero start gain, so that the logits differ between cycles. Read only."""
    found, settings = open_donor(donor), ConvertSettings(qwen_model=donor, gain=0.3)
    return found, convert_tensors(found, resolve_plan(found, settings), settings)


@pytest.mark.parametrize("by", [0.25, -0.25])
@pytest.mark.parametrize("place", [(0, 0), (1, 200), (-1, -1)])
def test_one_different_logit_stops_the_conversion(place: tuple[int, int], by: float, done: Any) -> None:
    donor, result = done
    with pytest.raises(RuntimeError, match="a plain pass differs from Planted over layers") as raised:
        compare_logits(donor, result.plan, result.mapping, result.model, Planted(result.model, place, by))
    assert float(str(raised.value).rsplit(" ", 1)[1]) == pytest.approx(0.25, rel=1e-3)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="logits that are not finite"):
            compare_logits(donor, result.plan, result.mapping, result.model, Planted(result.model, place, bad))


def test_self_check_reports_the_effect_of_start_gain_per_cycle(done: Any) -> None:
    donor, result = done
    twin = Planted(result.model)
    check = compare_logits(donor, result.plan, result.mapping, result.model, twin)
    assert twin.ids.shape[1] > 1 and len(set(twin.ids[0].tolist())) > 1
    with torch.no_grad():
        plain = result.model(twin.ids, H_cycles=0, use_cache=False).logits
        differences = [logits - plain for logits in result.model(twin.ids, output_cycle_logits=True, use_cache=False).cycle_logits]
    assert check.cycle_differences == tuple(difference.abs().max().item() for difference in differences) == result.check.cycle_differences
    assert len(set(check.cycle_differences)) == 3 and check.plain_difference == 0.0
    assert any(
        difference.max().item() not in check.cycle_differences for difference in differences
    )  # the largest difference may be negative
    lines = conversion._verdict(SelfCheck("x", 0.0, (0.5, 2.0, 1.0), 3), ConvertSettings(gain=0.3))
    assert lines[1] == "! Not exact with cycles: --gain 0.3 changes their logits by up to 2"


@pytest.mark.parametrize("piece", [52, 64, 2**22])  # of 13 numbers, of 16, and whole tensors
def test_one_different_number_stops_the_conversion(piece: int, donor: str, done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(donors_module, "_PIECE", piece)
    found, result = open_donor(donor), done[1]
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.2.self_attn.k_proj.bias"):
        one = TensorMapping(copied={name: result.mapping.copied[name]})
        flat = result.model.state_dict()[name].flatten()
        for place in (0, len(flat) // 2, len(flat) - 1):
            was = flat[place].item()
            flat[place] = -was
            with pytest.raises(RuntimeError, match=f"{name} differs from {result.mapping.copied[name]} of"):
                compare_tensors(found, one, result.model)
            flat[place] = was
    compare_tensors(found, result.mapping, result.model)


def test_shorter_file_is_not_equal() -> None:
    numbers = torch.arange(5.0)
    assert self_check._same_bits(numbers, [numbers[:3], numbers[3:]])
    for pieces in ([numbers[:3]], [], [numbers[:3], numbers[2:4]], [numbers[:4], -numbers[4:]]):
        assert not self_check._same_bits(numbers, pieces)


@pytest.mark.parametrize("name", ["old.pt", "new.pt", "new"])
@pytest.mark.parametrize("fault", ["tensor", "layer"])
def test_failed_self_check_writes_nothing(
    fault: str, name: str, donor: str, nothing_written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = checkpoint.build

    def wrong(*args: Any) -> RecursiveLLM:
        model = build(*args)
        if fault == "tensor":
            model.model.norm.weight.data[3] += 1
        else:
            model.model.layers[2].mlp.register_forward_hook(lambda module, args, output: output * 1.01)
        return model

    monkeypatch.setattr(checkpoint, "build", wrong)
    with pytest.raises(RuntimeError, match="differs from"):
        lines_of(qwen_model=donor, output_path=str(nothing_written / name))


def test_every_setting_reaches_the_model(donor: str) -> None:
    fields = ("L_layers", "H_cycles", "L_cycles", "prelude_layers", "coda_layers", "gain_init", "injection", "freeze_embeddings")
    flags: dict[str, Any] = {"L_layers": 2, "H_cycles": 5, "L_cycles": 1, "prelude_layers": 3, "coda_layers": 1}
    others: dict[str, Any] = {"gain": 0.0, "injection": "sum_norm", "freeze_embeddings": True}
    model = convert(donor, layer_selection="last", **flags, **others)
    assert [getattr(model.config, field) for field in fields] == [*flags.values(), *others.values()]
    assert convert(donor, gain=0.3).config.gain_init == 0.3
    found = open_donor(donor)
    plan = resolve_plan(found, ConvertSettings(layer_selection="last", **flags, **others))
    assert (plan.prelude, plan.loop, plan.coda) == ((0, 1, 2), (5, 6), (7,))
    default = conversion.recursive_config(found, resolve_plan(found, ConvertSettings()), ConvertSettings())
    for config in (convert(donor).config, default):
        assert [getattr(config, field) for field in fields] == [4, 3, 3, 0, 0, 0.0, "anchored", False]
    assert ConvertSettings().seq_len is None and ConvertSettings().output_path == "qwen_recursive_init.pt"


def test_dtype_and_device(donor: str) -> None:
    assert convert(donor, dtype="auto").dtype == convert(donor).dtype == torch.float32
    for dtype in ("bfloat16", torch.bfloat16):
        model: Any = convert(donor, keep_donor=True, dtype=dtype, device="cpu")
        plain = AutoModelForCausalLM.from_pretrained(donor, dtype=torch.bfloat16).eval()
        assert model.dtype == model.config.dtype == torch.bfloat16 and model.device == torch.device("cpu")
        with torch.no_grad():
            assert torch.equal(model(token_ids(), use_cache=False).logits, plain(token_ids(), use_cache=False).logits)
    for wrong in ("int8", torch.int8, "nonsense", "Tensor"):
        with pytest.raises(UserError, match=f"dtype: expected a floating-point dtype of torch .*, got '?{wrong}"):
            convert(donor, dtype=wrong)
    with pytest.raises(UserError, match=r"--device: expected cpu.*, which this machine has; got 'abacus'"):
        convert(donor, device="abacus")


def test_start_gain(donor: str) -> None:
    found, settings = open_donor(donor), ConvertSettings(qwen_model=donor, gain=0.2)
    done = convert_tensors(found, resolve_plan(found, settings), settings)
    A, B = done.model.model.recursion.inject_H.gains(torch.float32)
    assert torch.allclose(A, torch.full_like(A, 0.2)) and torch.allclose(B, A)
    assert done.check.plain_difference == 0.0 and min(done.check.cycle_differences) > 0


def test_sum_norm_and_frozen_embeddings(donor: str) -> None:
    model = convert(donor, injection="sum_norm", freeze_embeddings=True)
    assert model.config.injection == "sum_norm" and not hasattr(model.model.recursion, "inject_H")
    assert not model.model.embed_tokens.weight.requires_grad and not model.lm_head.weight.requires_grad  # tied
    assert model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert convert(donor).model.embed_tokens.weight.requires_grad


def test_new_parameters_are_small_and_nonzero(donor: str) -> None:
    recursion = convert(donor, gain=0.1).model.recursion
    for name, parameter in recursion.named_parameters():
        assert name == "q_head.bias" or parameter.abs().max() > 0, name


def test_tied_embeddings_stay_tied(donor: str, donors: dict[str, Path]) -> None:
    model = convert(donor)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    untied = convert(str(donors["llama"]))
    assert untied.lm_head.weight.data_ptr() != untied.model.embed_tokens.weight.data_ptr()


def test_separate_head_in_the_file_overrides_tie_word_embeddings(tmp_path: Path) -> None:
    """As in transformers, which does not tie different tensors."""
    tiny_donor("qwen2", tmp_path, num_hidden_layers=4)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert convert(str(tmp_path)).config.tie_word_embeddings
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    model, donor = convert(str(tmp_path), keep_donor=True), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model(token_ids()).logits, donor(token_ids()).logits)
    checkpoint.save(tmp_path / "out.pt", model, None)
    assert torch.equal(checkpoint.load(tmp_path / "out.pt").model(token_ids()).logits, model(token_ids()).logits)


def test_the_donors_generation_config_is_kept(tmp_path: Path) -> None:
    tiny_donor("qwen2", tmp_path, num_hidden_layers=4)
    GenerationConfig(eos_token_id=[0, 5], pad_token_id=0, do_sample=True, temperature=0.6, top_k=20).save_pretrained(tmp_path)
    kept = convert(str(tmp_path), L_layers=2).generation_config
    assert (kept.eos_token_id, kept.do_sample, kept.temperature, kept.top_k) == ([0, 5], True, 0.6, 20)


def test_inconsistent_generation_config_can_be_saved(tmp_path: Path) -> None:
    """Published donors have them: a temperature without sampling."""
    tiny_donor("qwen2", tmp_path / "donor", num_hidden_layers=4)
    (tmp_path / "donor" / "generation_config.json").write_text(
        '{"do_sample": false, "temperature": 0.9, "top_p": 0.6, "eos_token_id": [0, 5]}'
    )
    for out in ("out.pt", "out"):
        lines_of(qwen_model=str(tmp_path / "donor"), output_path=str(tmp_path / out))
        assert checkpoint.load(tmp_path / out).model.generation_config.eos_token_id == [0, 5]


def test_the_lines_of_the_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_donor("qwen2", tmp_path / "donor")
    monkeypatch.chdir(tmp_path)
    lines = lines_of(qwen_model="donor")
    assert [line for line in lines if not line.startswith("✓ Checked")] == [
        "✓ Loaded Qwen model: hidden_size=32, num_layers=24, vocab_size=384",
        "✓ Initialized recursive model",
        "✓ Copied embeddings",
        "✓ Copied 4 transformer layers from indices [0, 8, 16, 23]",
        "✓ Copied LM head",
        "! 20 of the donor's 24 layers are dropped: the model is not the donor until it is trained (--keep_donor keeps all)",
        "✓ Saved to qwen_recursive_init.pt",
        "Next: recursify train --checkpoint qwen_recursive_init.pt --dataset_name wikitext --enable_deep_supervision "
        "--output_dir runs/qwen_recursive_init",
    ]
    (checked,) = [line for line in lines if line.startswith("✓ Checked")]
    assert checked == (
        "✓ Checked against Qwen2ForCausalLM over layers [0, 8, 16, 23]: 50 tensors equal, logits equal at every cycle (max difference 0.0)"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["donor", "qwen_recursive_init.pt", "qwen_recursive_init_tokenizer"]


def next_of(lines: list[str]) -> list[str]:
    """The words of the command behind `Next:`, without `recursify` and the name of the job."""
    (command,) = [line.removeprefix("Next: ") for line in lines if line.startswith("Next: ")]
    assert lines[-1].endswith(command)
    return shlex.split(command)


def test_the_next_command_can_be_given(donor: str, tmp_path: Path) -> None:
    for name, run_name in (("my model.pt", "my model"), ("a.folder", "a.folder")):
        path = str(tmp_path / name)
        _, job, *words = next_of(lines_of(qwen_model=donor, output_path=path))
        asked = cli.parse(job, TrainSettings, words)
        assert (job, asked.checkpoint, asked.output_dir) == ("train", path, f"runs/{run_name}")
        assert asked.enable_deep_supervision and asked.dataset_name == "wikitext"


def test_a_model_without_cycles_cannot_be_trained_next(donor: str, tmp_path: Path) -> None:
    lines = lines_of(qwen_model=donor, output_path=str(tmp_path / "m.pt"), H_cycles=0)
    assert next_of(lines)[:4] == ["recursify", "generate", "--checkpoint", str(tmp_path / "m.pt")]


@pytest.mark.parametrize("name", ["out.pt", "out"])
def test_a_replaced_model_is_named_once_it_is_replaced(name: str, donor: str, tmp_path: Path) -> None:
    path = str(tmp_path / name)
    warning = f"! {path} existed and was replaced"
    assert warning not in lines_of(qwen_model=donor, output_path=path)
    refused: list[str] = []
    with pytest.raises(UserError, match="--L_layers"):
        run(ConvertSettings(qwen_model=donor, output_path=path, L_layers=99), say=refused.append)
    assert refused == []
    lines = lines_of(qwen_model=donor, output_path=path)
    assert lines[lines.index(warning) + 1] == f"✓ Saved to {path}"


def test_printed_lines_of_other_plans(donors: dict[str, Path], tmp_path: Path) -> None:
    lines = lines_of(qwen_model=str(donors["llama"]), keep_donor=True, gain=0.2, output_path=str(tmp_path / "out.pt"))
    assert lines[0].startswith("✓ Loaded Llama model: hidden_size=32")
    assert "✓ Copied 2 prelude layers and 2 coda layers" in lines
    (checked,) = [line for line in lines if line.startswith("✓ Checked against the donor itself")]
    assert checked.endswith("logits equal in a plain pass (max difference 0.0)")
    assert lines[lines.index(checked) + 1].startswith("! Not exact with cycles: --gain 0.2 changes their logits by up to ")


def test_written_checkpoint_equals_the_conversion(donor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "time", SimpleNamespace(monotonic=iter((100.0, 101.23456)).__next__))
    report = run(ConvertSettings(qwen_model=donor, L_layers=3, seq_len=64, output_path=str(tmp_path / "out")), say=lambda _: None)
    found = checkpoint.load(tmp_path / "out")
    assert found.plan == ConversionPlan(donor, LAYERS, (), (0, 4, 7), (), "uniform")
    assert found.notes == {"donor": donor, "donor_folder": donor, "seq_len": 64}
    assert found.tokenizer("the old ship")["input_ids"] == make_tiny_tokenizer()("the old ship")["input_ids"]
    assert torch.equal(found.model(token_ids()).logits, convert(donor, L_layers=3)(token_ids()).logits)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["seconds"] == 1.23
    assert data["output_path"] == str(tmp_path / "out") and data["plan"]["loop"] == [0, 4, 7] and data["check"]["plain_difference"] == 0.0
    assert data["parameters"]["total"] == sum(p.numel() for p in found.model.parameters())


def test_tokenizer_path_of_another_tokenizer(tmp_path: Path) -> None:
    tiny_model("qwen2", num_hidden_layers=4).save_pretrained(tmp_path / "donor")
    flags = {"qwen_model": str(tmp_path / "donor"), "output_path": str(tmp_path / "out.pt")}
    with pytest.raises(UserError, match=r"donor: tokenizer.json is not there; .* --tokenizer_path"):
        lines_of(**flags)
    make_tiny_tokenizer(tmp_path / "elsewhere")
    lines_of(**flags, tokenizer_path=str(tmp_path / "elsewhere"))
    assert checkpoint.load(tmp_path / "out.pt").tokenizer is not None


def test_tokenizer_path_overrides_the_donors_tokenizer(donor: str, tmp_path: Path) -> None:
    other = make_tiny_tokenizer()
    other.add_tokens(["lobster"])
    other.save_pretrained(tmp_path / "other")
    lines_of(qwen_model=donor, output_path=str(tmp_path / "out.pt"), tokenizer_path=str(tmp_path / "other"))
    assert len(checkpoint.load(tmp_path / "out.pt").tokenizer) == len(other) == len(make_tiny_tokenizer()) + 1


def test_a_window_narrower_than_the_tokens_compared(tmp_path: Path) -> None:
    """The reference has the windows of the plan's layers, not those of the donor's first layers."""
    donor = tiny_donor("smollm3", tmp_path, num_hidden_layers=LAYERS, sliding_window=2)
    kinds = donor.config.layer_types
    model = convert(str(tmp_path), L_layers=3)  # 0, 4, 7
    assert model.config.block_types == [kinds[i] for i in (0, 4, 7)] != kinds[:3]


def test_a_dry_run_reads_only_the_config(donor: str, nothing_written: Path) -> None:
    alone = nothing_written.parent / "donor"
    alone.mkdir()
    (alone / "config.json").write_text((Path(donor) / "config.json").read_text())
    for flags in PLANS.values():
        lines: list[str] = []
        output = str(nothing_written / "new.pt")
        report = run(ConvertSettings(qwen_model=str(alone), dry_run=True, output_path=output, **flags), say=lines.append)
        plan, text = report.inspection.plan, "\n".join(lines)
        for layer in range(LAYERS):
            assert f"layer {layer:>3}  ->  {plan.place(layer)}" in text
        assert report.inspection.total_parameters == sum(p.numel() for p in convert(donor, **flags).parameters())
        assert f"{report.inspection.total_parameters:,}" in text
        assert report.output_path is None and report.check is None
        json.dumps(report.to_dict())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"L_layers": 0}, r"--L_layers: expected 1 to 8 \(the donor has 8 layers\), got 0"),
        ({"L_layers": 9}, "--L_layers: expected 1 to 8 .*, got 9"),
        ({"keep_donor": True, "layer_selection": "uniform"}, "--keep_donor: the loop must be a contiguous block"),
        ({"prelude_layers": 4, "coda_layers": 4}, "the donor has only 8 layers"),
        ({"H_cycles": -1}, "--H_cycles: expected a whole number of at least 0, got -1"),
        ({"L_cycles": -1}, "--L_cycles: expected a whole number of at least 0, got -1"),
        (
            {"gain": 0.2, "injection": "sum_norm"},
            "--gain: the loop of --injection sum_norm has no gains, got 0.2; leave out",
        ),
        ({"gain": 0.5}, "--gain: expected 0 <= gain <= 0.45"),
        ({"injection": "concat"}, "--injection: expected one of anchored, sum_norm, got 'concat'"),
        ({"seq_len": 513}, r"--seq_len: expected 1 to 512 \(the donor's positions\), got 513"),
        ({"seq_len": 0}, r"--seq_len: expected 1 to 512 .*, got 0"),
        ({"qwen_model": "/missing/donor"}, "'/missing/donor': no such folder"),
        ({"layer_selection": "auto"}, "--layer_selection auto: needs --calibration_file"),
        ({"layer_selection": "auto", "prelude_layers": 1, "calibration_file": "x"}, "it chooses prelude and coda itself"),
        ({"layer_selection": "auto", "calibration_file": "/missing.txt"}, "--calibration_file: /missing.txt cannot be read"),
        ({"output_path": "/missing/out.pt"}, r"/missing/out.pt: the folder /missing does not exist; make it first \(mkdir -p /missing\)"),
        ({"tokenizer_path": "/missing"}, "'/missing': no such folder, and no hub id, .*; expected a folder with a tokenizer"),
    ],
)
def test_bad_input_writes_nothing(flags: dict[str, Any], message: str, donor: str, nothing_written: Path) -> None:
    for dry in (False, True):
        if not (dry and {"output_path", "tokenizer_path"} & set(flags)) and not (dry and flags.get("calibration_file") == "/missing.txt"):
            with pytest.raises(UserError, match=message):
                lines_of(**{"qwen_model": donor, "output_path": str(nothing_written / "old.pt"), "dry_run": dry, **flags})


def test_damaged_donor_writes_nothing(nothing_written: Path, tmp_path: Path) -> None:
    tiny_donor("qwen2", tmp_path / "donor", num_hidden_layers=4)
    file = tmp_path / "donor" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for name in ("old.pt", "new.pt", "new"):
        with pytest.raises(UserError, match=r"truncated or corrupt safetensors"):
            lines_of(qwen_model=str(tmp_path / "donor"), output_path=str(nothing_written / name))


def calibration(folder: Path, count: int = 200) -> str:
    file = folder / "calibration.txt"
    file.write_text(" ".join(sentences(0, count)))
    return str(file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_finds_the_block_with_least_divergence(dtype: torch.dtype, tmp_path: Path) -> None:
    """Two layers in the middle of this donor have almost no effect, so looping them changes it least."""
    model = tiny_donor("qwen2", tmp_path, num_hidden_layers=LAYERS)
    with torch.no_grad():
        for layer in (2, 3):
            model.model.layers[layer].self_attn.o_proj.weight.mul_(1e-3)
            model.model.layers[layer].mlp.down_proj.weight.mul_(1e-3)
    model.to(dtype).save_pretrained(tmp_path)
    lines = lines_of(
        qwen_model=str(tmp_path),
        layer_selection="auto",
        L_layers=2,
        calibration_file=calibration(tmp_path),
        output_path=str(tmp_path / "out.pt"),
    )
    assert lines[0] == "auto: probing 7 starts with 8 passes of the whole donor over 1024 tokens"
    costs = {line.split("KL")[0].strip(): float(line.split()[-2]) for line in lines if "KL" in line}
    assert len(costs) == 7 and costs.pop("loop   2..3") < 0.01 * min(costs.values())
    plan = checkpoint.load(tmp_path / "out.pt").plan
    assert (plan.loop, plan.layer_selection, plan.keeps_donor) == ((2, 3), "auto", True)


def disturbance(donor: Any, ids: torch.Tensor, first: int, count: int) -> float:
    """Reference: a stack with the block twice, the second time applied to the mean of its first input and output."""
    last, layers = first + count, range(donor.config.num_hidden_layers)
    twice = plain(donor, [*layers[:last], *layers[first:]])
    seen: list[torch.Tensor] = []

    def half_way(module: Any, args: Any) -> Any:
        seen.append(args[0])
        return None if len(seen) == 1 else ((seen[0] + args[0]) / 2, *args[1:])

    for layer in (first, last):
        twice.model.layers[layer].register_forward_pre_hook(half_way)
    with torch.no_grad():
        p, q = (model(ids, use_cache=False).logits.double().log_softmax(-1) for model in (donor, twice))
    assert len(seen) == 2
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", ["qwen2", "smollm3"])
def test_auto_equals_a_donor_with_the_block_twice(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "donor"
    donor = tiny_donor(family, folder, seed=4, num_hidden_layers=5, initializer_range=0.08)
    (folder / "tokenizer.json").unlink()
    tokenizer = make_tiny_tokenizer(tmp_path / "elsewhere")
    words, lines = " ".join(sentences(3, 12)), list[str]()
    ids = tokenizer(words)["input_ids"]
    assert 2 * 128 < len(ids) < 3 * 128  # the rest of a window is left out
    (tmp_path / "words.txt").write_text(words)
    settings = ConvertSettings(
        qwen_model=str(folder), L_layers=2, H_cycles=4, L_cycles=2, layer_selection="auto", calibration_file=str(tmp_path / "words.txt"),
        tokenizer_path=str(tmp_path / "elsewhere"), injection="sum_norm",
    )  # fmt: skip
    plan = resolve_plan(open_donor(str(folder)), settings, lines.append)
    assert lines[0] == "auto: probing 4 starts with 5 passes of the whole donor over 256 tokens"
    expected = [disturbance(donor.eval(), torch.tensor(ids[:256]).view(2, 128), first, 2) for first in range(4)]
    assert [float(line.split()[-2]) for line in lines[1:]] == pytest.approx(expected, abs=1e-4)
    assert [line.split()[1] for line in lines[1:]] == ["0..1", "1..2", "2..3", "3..4"] and len(set(expected)) == 4
    best = expected.index(min(expected))
    assert (plan.prelude, plan.loop, plan.coda) == (tuple(range(best)), (best, best + 1), tuple(range(best + 2, 5)))


@pytest.mark.parametrize(("count", "windows"), [(128, 1), (255, 1), (256, 2), (8 * 128, 8), (9 * 128, 8)])
def test_how_much_text_auto_reads(count: int, windows: int, tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    ids = tokenizer(" ".join(sentences(5, 200)))["input_ids"][:count]
    (tmp_path / "words.txt").write_text(text := tokenizer.decode(ids))
    assert tokenizer(text)["input_ids"] == ids
    found = calibration_windows(str(tmp_path / "words.txt"), tokenizer, probe._PROBE_TOKENS, probe._PROBE_WINDOWS)
    assert found.shape == (windows, 128) and found.flatten().tolist() == ids[: windows * 128]


def test_auto_from_python_and_for_every_family(donors: dict[str, Path], tmp_path: Path) -> None:
    for family in ("llama", "smollm3", "phi3"):
        model = convert(
            str(donors[family]), L_layers=6, layer_selection="auto", calibration_file=calibration(tmp_path), injection="sum_norm"
        )
        assert model.config.physical_layers == LAYERS and model.config.L_layers == 6
        assert (model.config.H_cycles, model.config.L_cycles, model.config.injection) == (3, 3, "sum_norm")


def test_auto_with_too_little_text(donor: str, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A few words.")
    with pytest.raises(UserError, match=r"--calibration_file: .*short.txt has \d+ tokens; expected at least 128"):
        convert(donor, layer_selection="auto", calibration_file=str(tmp_path / "short.txt"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"--calibration_file: .*binary.txt: expected UTF-8 text"):
        convert(donor, layer_selection="auto", calibration_file=str(tmp_path / "binary.txt"))


def test_a_dry_run_of_auto_says_what_it_would_cost(donor: str, tmp_path: Path) -> None:
    lines = lines_of(qwen_model=donor, layer_selection="auto", L_layers=2, calibration_file=calibration(tmp_path), dry_run=True)
    assert lines[0] == "auto would probe 7 starts, 0 to 6, with 8 donor passes; shown with the block at 0"
    assert "layer   7  ->  coda 5" in lines[1]


def test_default_seq_len_is_clamped_to_the_donors_positions(tmp_path: Path) -> None:
    """Without the flag there is no warning; the value is printed."""
    tiny_donor("qwen2", tmp_path / "short", num_hidden_layers=4, max_position_embeddings=256)
    lines = lines_of(qwen_model=str(tmp_path / "short"), L_layers=2, seq_len=None, output_path=str(tmp_path / "m.pt"))
    assert checkpoint.load(tmp_path / "m.pt").notes["seq_len"] == 256
    assert any("Sequence length 256" in line for line in lines)
    tiny_donor("qwen2", tmp_path / "long", num_hidden_layers=4, max_position_embeddings=2048)
    lines = lines_of(qwen_model=str(tmp_path / "long"), L_layers=2, seq_len=None, output_path=str(tmp_path / "m.pt"))
    assert checkpoint.load(tmp_path / "m.pt").notes["seq_len"] == 512 and "Sequence length" not in "".join(lines)
