"""Several processes on tiny models: started by torchrun, they communicate over gloo, and give the results of one process.

This file is a test and, started by `launch`, the program that the processes run: `work` writes down what it finds, the tests judge it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from recursify.checkpoints import checkpoint
from recursify.errors import UserError
from recursify.network import losses
from recursify.training.fitting import checkpoint_layers
from recursify.training.loss_module import LossModule, Supervision
from recursify.training.parallel import (
    check_launch,
    check_sharding,
    describe_launch,
    full_optimizer_state,
    full_state,
    gathered,
    load_full_optimizer_state,
    load_full_state,
    shard,
)
from tests.support.parallel_runs import PATIENCE, SAVED, SEQ_LEN, STEPS, launch, recursive, run, settings
from tests.support.tiny import VOCAB_SIZE, tiny_model

CPU = torch.device("cpu")
ROWS = 12  # half of them have more than 64 tokens, the smallest chunk


# The program of the processes


def batch() -> torch.Tensor:
    return torch.randint(1, VOCAB_SIZE, (ROWS, SEQ_LEN), generator=torch.Generator().manual_seed(1))


def share(rows: torch.Tensor) -> torch.Tensor:
    """Of this process, of two."""
    return rows.chunk(2)[distributed.get_rank()]


class Communication(TorchDispatchMode):
    """Counts the communication."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts["gathered" if "gather" in func.__name__ else "reduced" if "reduce" in func.__name__ else func.__name__] += 1
        return func(*args, **(kwargs or {}))


def loss_module(model: Any, every_cycle: bool) -> LossModule:
    return LossModule(model, Supervision(every_cycle=every_cycle))


def gradients(model: LossModule, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return counted_gradients(model, rows)[0]


def counted_gradients(model: LossModule, rows: torch.Tensor) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """Whole gradients, and what both ways through the model have sent."""
    with Communication() as sent:
        model(rows, rows)["loss"].backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    whole = {name: gradient.full_tensor() if isinstance(gradient, DTensor) else gradient for name, gradient in found.items()}
    return whole, sent.counts


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest, relative to the largest number of each tensor."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9)) for name, wanted in expected.items())


def sharded_gradients(every_cycle: bool, checkpointing: bool, H_cycles: int) -> dict[str, Any]:
    rows = batch()
    alone, ours = (loss_module(recursive(H_cycles=H_cycles), every_cycle) for _ in range(2))
    expected = gradients(alone, rows)
    shard(ours, CPU, reads_every_cycle=every_cycle)
    if checkpointing:
        checkpoint_layers(ours.model)
    ours.train()
    found, sent = counted_gradients(ours, share(rows))
    return {"difference": difference(found, expected), **sent}


def plain_gradients() -> dict[str, Any]:
    rows = batch()
    alone, ours = (loss_module(tiny_model("llama", num_hidden_layers=3), False) for _ in range(2))
    expected = gradients(alone, rows)
    shard(ours, CPU, reads_every_cycle=False)
    found, sent = counted_gradients(ours, share(rows))
    units = [type(module).__name__ for module in ours.modules() if isinstance(module, FSDPModule)]
    return {"difference": difference(found, expected), "units": units, **sent}


def used_alone() -> dict[str, Any]:
    """A sharded model before its first pass and between two steps: one process generates and takes the weights, the others wait."""
    rows, rank = batch(), distributed.get_rank()
    alone, ours = loss_module(recursive(), True), loss_module(recursive(), True)
    shard(ours, CPU, reads_every_cycle=True)
    found: dict[str, Any] = {}
    for moment in ("before", "after"):
        with gathered(ours):
            if rank == 0:
                write = {"max_new_tokens": 4, "do_sample": False}
                same = torch.equal(ours.model.generate(rows[:1], **write), alone.model.generate(rows[:1], **write))
                state = ours.model.state_dict()
                plain = all(type(tensor) is torch.Tensor for tensor in state.values())
                found[moment] = same and plain and difference(state, alone.model.state_dict()) == 0.0
        expected = gradients(alone, rows)
        found["difference " + moment] = difference(gradients(ours, share(rows)), expected)
        ours.zero_grad(), alone.zero_grad()
    ours.eval(), alone.eval()
    whole, part = alone.row_sums(rows, rows), ours.row_sums(rows, rows)
    found["scores"] = float((whole - part).abs().max())
    found["freed"] = all(isinstance(parameter, DTensor) for parameter in ours.parameters())
    return found


def states_there_and_back() -> dict[str, Any]:
    """A whole state of one process in a sharded model and its optimizer, and out again."""
    alone, ours = loss_module(recursive(1), False), loss_module(recursive(2), False)
    shard(ours, CPU, reads_every_cycle=False)
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-3) for model in (alone, ours)]
    gradients(alone, batch())
    optimizers[0].step()
    wanted = optimizers[0].state_dict()
    load_full_state(ours, alone.state_dict())
    load_full_optimizer_state(optimizers[1], wanted)
    weights, moments = full_state(ours), full_optimizer_state(optimizers[1])
    parts = [entry["exp_avg"].to_local().numel() for entry in optimizers[1].state.values()]
    wholes = [entry["exp_avg"].numel() for entry in wanted["state"].values()]
    if distributed.get_rank() > 0:
        return {"empty": not weights and not moments}
    same = [torch.equal(moments["state"][i][name], value) for i, entry in wanted["state"].items() for name, value in entry.items()]
    tied = weights["model.lm_head.weight"] is weights["model.model.embed_tokens.weight"]
    return {
        "weights": difference(weights, alone.state_dict()), "moments": all(same), "tied": tied, "share": sum(parts) / sum(wholes),
    }  # fmt: skip


def work(folder: Path) -> None:
    """What each process runs; each saves its results."""
    found: dict[str, Any] = {}
    for name, changes in RUNS.items():
        (folder / name).mkdir(exist_ok=True)
        found[name] = run(folder / name, save_every=SAVED, **changes)
        found[name]["launch"] = describe_launch(settings(**changes), CPU)
    resumed = checkpoint.load(folder / "one" / f"checkpoint_step_{SAVED}.pt")
    found["from one to two"] = run(None, folder / "one" / f"checkpoint_step_{SAVED}.pt", resumed.model, batch_size=2, fsdp=True)
    losses.CHUNK_ELEMENTS = 1  # from here on the head is read in chunks of 64 tokens, in its own weights
    for every_cycle, checkpointing, H_cycles in SHARDED:
        found[f"gradients {every_cycle} {checkpointing} {H_cycles}"] = sharded_gradients(every_cycle, checkpointing, H_cycles)
    found |= {"plain": plain_gradients(), "alone": used_alone(), "states": states_there_and_back()}
    torch.save(found, folder / f"found_{distributed.get_rank()}.pt")


RUNS: dict[str, dict[str, Any]] = {
    "DDP": {"batch_size": 2},
    "FSDP2": {"batch_size": 1, "grad_accum_steps": 2, "fsdp": True, "gradient_checkpointing": True},
    "Muon": {"batch_size": 2, "fsdp": True, "optimizer": "muon", "ema_decay": 0.5},
}
SHARDED = [(every_cycle, checkpointing, H) for every_cycle in (False, True) for checkpointing in (False, True) for H in (1, 3)]

if __name__ == "__main__":
    work(Path(sys.argv[1]))
    distributed.destroy_process_group()
    sys.exit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the results, with those of one process."""
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "one").mkdir()
    torch.save(run(folder / "one", save_every=SAVED), folder / "one.pt")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """Results of two processes, by rank."""
    done = launch([__file__, folder])
    assert done.returncode == 0, done.stdout[-8000:]
    return [torch.load(folder / f"found_{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "one.pt", weights_only=False)


def logged(run: dict[str, Any], key: str) -> list[float]:
    return [entry[key] for entry in run["history"] if key in entry]


# Two processes equal one


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DDP", "FSDP2"])
def test_two_processes_train_as_one(name: str, found: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """With half the batch each: the same losses, norms and validation; the same weights and moments, up to the rounding of the sums."""
    ours = found[0][name]
    assert len(logged(one, "loss")) == STEPS and ours["sharded"] is (name == "FSDP2")
    for key in ("loss", "grad_norm", "loss_cycle_1", "loss_cycle_3", "eval_loss"):
        assert logged(ours, key) == pytest.approx(logged(one, key), rel=1e-5), key
    same_end(ours, one)
    assert not found[1][name]["weights"] and not found[1][name]["moments"]


def same_weights(ours: dict[str, torch.Tensor], one: dict[str, torch.Tensor]) -> None:
    """To a tenth of a step: one of AdamW is of the size of the rate, 1e-3, however small the gradient and however much of it rounding."""
    assert ours.keys() == one.keys()
    for name, wanted in one.items():
        assert torch.allclose(ours[name], wanted, rtol=0, atol=1e-4), name


def same_end(ours: dict[str, Any], one: dict[str, Any]) -> None:
    same_weights(ours["weights"], one["weights"])
    assert ours["moments"]["state"].keys() == one["moments"]["state"].keys()
    for i, entry in one["moments"]["state"].items():
        for name, wanted in entry.items():
            value = ours["moments"]["state"][i][name]
            assert type(value) is torch.Tensor and torch.allclose(value, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())), name


@pytest.mark.slow
def test_muon_and_ema_work_on_unsharded_matrices(found: list[dict[str, Any]]) -> None:
    """Muon computes in bfloat16, so the rounding of a sum may show."""
    ours, one = found[0]["Muon"], run(optimizer="muon", ema_decay=0.5)
    for key in ("loss", "eval_loss"):
        assert logged(ours, key) == pytest.approx(logged(one, key), rel=1e-4), key
    assert logged(ours, "loss")[-1] != pytest.approx(logged(found[0]["DDP"], "loss")[-1], rel=2e-4)
    own = abs(logged(run(optimizer="muon"), "eval_loss")[0] / logged(ours, "eval_loss")[0] - 1)
    assert own > 1e-4  # the weights themselves, and not their averages, would have given this


@pytest.mark.slow
def test_resume_with_another_world_size(folder: Path, found: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """From step 3 of two processes with sharded weights in one, and the other way round."""
    same_end(found[0]["from one to two"], one)
    point = folder / "FSDP2" / f"checkpoint_step_{SAVED}.pt"
    resumed = run(None, point, checkpoint.load(point).model)
    assert len(logged(resumed, "loss")) == STEPS
    same_end(resumed, one)


@pytest.mark.slow
def test_sharded_run_writes_the_files_of_one_process(folder: Path, found: list[dict[str, Any]]) -> None:
    def written(name: str) -> set[str]:
        return {str(path.relative_to(folder / name)) for path in (folder / name).rglob("*") if not path.name.startswith("rng_state")}

    saved = f"checkpoint_step_{SAVED}.pt"
    state = {name: checkpoint.load(folder / name / saved).model.state_dict() for name in ("one", "DDP", "FSDP2")}
    for name in ("DDP", "FSDP2"):
        assert written(name) == written("one")
        same_weights(state[name], state["one"])


# Sharding


@pytest.mark.slow
def test_sharded_gradients_equal_unsharded(found: list[dict[str, Any]]) -> None:
    for case in SHARDED:
        every_cycle, checkpointing, H_cycles = case
        assert all(each[f"gradients {every_cycle} {checkpointing} {H_cycles}"]["difference"] < 1e-5 for each in found), case


@pytest.mark.slow
@pytest.mark.parametrize("every_cycle", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_communication_is_independent_of_depth(every_cycle: bool, checkpointing: bool, found: list[dict[str, Any]]) -> None:
    """Prelude (and coda, where it is applied once) are gathered for both ways, the rest once; the gradients of each are reduced once."""
    units = 1 if every_cycle else 2
    for H_cycles in (1, 3):
        sent = found[0][f"gradients {every_cycle} {checkpointing} {H_cycles}"]
        assert (sent["gathered"], sent["reduced"]) == (2 * units + 1, units + 1)


@pytest.mark.slow
def test_each_layer_of_a_plain_donor_is_an_fsdp_unit(found: list[dict[str, Any]]) -> None:
    plain = found[0]["plain"]
    assert plain["difference"] < 1e-5 and plain["reduced"] == 4
    assert plain["units"] == ["FSDPLossModule"] + ["FSDPLlamaDecoderLayer"] * 3


@pytest.mark.slow
def test_gathered_model_is_usable_by_one_rank(found: list[dict[str, Any]]) -> None:
    """Before the first pass and between two; what the other one does next still fits, and validation leaves nothing gathered."""
    for each in found:
        assert max(each["alone"]["difference before"], each["alone"]["difference after"]) < 1e-5
        assert each["alone"]["scores"] < 1e-4 and each["alone"]["freed"]
    assert found[0]["alone"]["before"] and found[0]["alone"]["after"]


@pytest.mark.slow
def test_unsharded_states_round_trip(found: list[dict[str, Any]]) -> None:
    states = found[0]["states"]
    assert states["weights"] == 0.0 and states["moments"] and states["tied"]
    assert 0.4 < states["share"] < 0.6  # what the first process holds of it in between
    assert found[1]["states"] == {"empty": True}


# The launch


@pytest.mark.slow
def test_the_launch_is_described(found: list[dict[str, Any]]) -> None:
    assert found[0]["DDP"]["launch"] == "cpu, 2 processes (DDP over gloo)"
    assert found[0]["FSDP2"]["launch"] == "cpu, 2 processes (FSDP2 over gloo)"


def test_one_process_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_CPU", "MASTER_ADDR", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert describe_launch(settings(), CPU) == "cpu, 1 process"


def test_launcher_that_starts_one_process_on_cpu_is_reported(tmp_path: Path) -> None:
    """`accelerate launch` with two processes on a CPU, for real, on a script that looks at its environment."""
    script = tmp_path / "environment.py"
    script.write_text("import json, os\nprint('found', json.dumps(dict(os.environ)))\n", encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes"]
    for count, pointed_out in (("2", True), ("1", False)):
        done = subprocess.run([*command, count, str(script)], capture_output=True, text=True, timeout=PATIENCE, check=True)
        left = [line for line in done.stdout.splitlines() if line.startswith("found ")]
        assert len(left) == 1
        with pytest.MonkeyPatch.context() as environment:
            for name, value in json.loads(left[0].removeprefix("found ")).items():
                environment.setenv(name, value)
            assert ("torchrun --nproc_per_node N" in describe_launch(settings(), CPU)) is pointed_out


@pytest.mark.parametrize(
    ("count", "changes", "message"),
    [
        ("1", {"fsdp": True}, "got 1; start with torchrun --nproc_per_node N"),
        ("2", {"fsdp": True, "backprop": "cycle"}, "--fsdp: expected --backprop full or last, got cycle"),
        ("2", {"fsdp": True, "optimizer": "adamw_8bit"}, "expected --optimizer adamw or muon, got adamw_8bit"),
        ("2", {"fsdp": True, "deepspeed": "ds.json"}, "expected one of the two, got both"),
    ],
)
def test_what_cannot_be_sharded_is_refused(count: str, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(UserError, match=message):
        check_launch(settings(**changes), CPU)


def test_valid_launches_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    check_launch(settings(backprop="cycle"), CPU)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launch(settings(backprop="cycle"), CPU)
    check_launch(settings(fsdp=True, backprop="last", gradient_checkpointing=True), CPU)


# DeepSpeed


def deepspeed_file(folder: Path, stage: int) -> str:
    file = folder / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}), encoding="utf-8")
    return str(file)


def test_deepspeed_is_refused_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recursify.training.parallel.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install deepspeed"):
        check_launch(settings(deepspeed=deepspeed_file(tmp_path, 2)), CPU)


def test_unsupported_flags_with_deepspeed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recursify.training.parallel.find_spec", lambda name: SimpleNamespace(name=name))
    good = deepspeed_file(tmp_path, 2)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="torchrun"):
        check_launch(settings(deepspeed=good), CPU)
    monkeypatch.setenv("RANK", "0")
    check_launch(settings(deepspeed=good, backprop="cycle"), CPU)
    with pytest.raises(UserError, match="expected --device cpu or cuda, got mps"):
        check_launch(settings(deepspeed=good), torch.device("mps"))
    for changes, message in (
        ({"gradient_checkpointing": True}, "issue 2103"),
        ({"optimizer": "muon"}, "expected --optimizer adamw, got muon"),
        ({"resume": True}, "expected no --resume"),
        ({"deepspeed": str(tmp_path / "none.json")}, "No such file"),
    ):
        with pytest.raises(UserError, match=message):
            check_launch(settings(**({"deepspeed": good} | changes)), CPU)


@pytest.mark.parametrize(("content", "message"), [("[", "which is not one"), ("[]", "which is not one"), ("", "which is not one")])
def test_invalid_deepspeed_configuration_is_refused(content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recursify.training.parallel.find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setenv("RANK", "0")
    file = tmp_path / "broken.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        check_launch(settings(deepspeed=str(file)), CPU)
    with pytest.raises(UserError, match="expected ZeRO stage 0, 1 or 2, got 3"):
        check_launch(settings(deepspeed=deepspeed_file(tmp_path, 3)), CPU)


def test_unwrapped_model_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(1, 1)
    check_sharding(model, settings())
    with pytest.raises(RuntimeError, match="the model is not sharded: Linear"):
        check_sharding(model, settings(fsdp=True))
    with pytest.raises(RuntimeError, match="the model is not a DeepSpeedEngine: Linear"):
        check_sharding(model, settings(deepspeed="ds.json"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes would each train their own model, without synchronisation: Linear"):
        check_sharding(model, settings())
