"""Every field of every settings class changes what it says that it changes: one case for each field of each class.

A case is a method named after its field. It sets another value than the default and looks at what has become of it, as deep as that is
cheap: at the batches, the optimizer's groups, the arguments of `generate`, the rows that were scored, the files. Classes that inherit
fields inherit cases. One test fails for a field without a case, and for a case without a field.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import io
import json
import math
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from datasets import IterableDataset
from fastapi.testclient import TestClient
from safetensors import safe_open
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from recursify import (
    RecursiveLLM,  # fmt: skip
    as_adapter,
    serving,
)
from recursify.checkpoints import checkpoint
from recursify.cli import main as cli
from recursify.conversion import convert, inspection, probe
from recursify.conversion.settings import ConvertSettings, ProbeSettings
from recursify.data.loading import DataSettings, load_blocks
from recursify.demo import prose, state_tracking
from recursify.demo import run as demo
from recursify.errors import UserError
from recursify.evaluation import compare, lm_eval_harness
from recursify.evaluation import evaluate as evaluation
from recursify.evaluation.settings import CompareSettings, EvaluateSettings
from recursify.hub import export, upload
from recursify.inference import chat, early_exit, generation, session
from recursify.inference import prompt_file as prompts
from recursify.inference import settings as write_settings
from recursify.inference.options import Sampling
from recursify.inference.settings import GenerateSettings
from recursify.network import losses
from recursify.serving import app, engine, running
from recursify.serving import settings as serve_settings
from recursify.serving.protocol import ApiError, ChatRequest, CompletionRequest, read
from recursify.training import EmbeddingSettings, HybridSettings, TrainSettings, fit, fitting
from recursify.training import arguments as training_arguments
from recursify.training import optimizers as optimizing
from recursify.training import run as training_run
from recursify.training import settings as training_settings
from recursify.training.approaches import from_donor
from recursify.training.fitting import RecursiveTrainer
from recursify.training.gains import injections
from recursify.training.saving import BEST
from tests.support.tiny import END_OF_TEXT, make_tiny_tokenizer, sentences, tiny_donor
from tests.support.tokenizers import with_template

SEQ_LEN, MARK = 16, "<|mark|>"
PROMPT = "The old lobster"


class Enough(Exception):
    """What the test wanted to see has been seen."""


@dataclass(frozen=True)
class World:
    """Files that all cases read and none writes."""

    folder: Path
    model: Any
    tokenizer: Any

    def path(self, name: str) -> str:
        """donor, other_donor; model.pt, other.pt (of the other donor); marked (a tokenizer with `MARK`); text, text.txt, rows.jsonl."""
        return str(self.folder / name)

    def blocks(self, count: int, seed: int = 1) -> list[dict[str, Any]]:
        ids = self.tokenizer(" ".join(sentences(seed, 2 * count))).input_ids
        return [{"input_ids": ids[i * SEQ_LEN : (i + 1) * SEQ_LEN]} for i in range(count)]


@pytest.fixture(scope="module", autouse=True)
def _quick_to_collect() -> Iterator[None]:
    """Trainers and comparisons collect garbage again and again: not among what was there before."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    tokenizer, marked = make_tiny_tokenizer(), make_tiny_tokenizer()
    marked.add_special_tokens({"additional_special_tokens": [MARK]})
    marked.save_pretrained(folder / "marked")
    for name, seed in (("donor", 3), ("other_donor", 4)):
        tiny_donor("qwen2", folder / name, seed, num_hidden_layers=6)
    models = []
    for name, donor in (("model.pt", "donor"), ("other.pt", "other_donor")):
        torch.manual_seed(5)
        model = convert.convert(
            str(folder / donor), L_layers=2, prelude_layers=1, coda_layers=1, H_cycles=2, L_cycles=1, gain=0.3, layer_selection="first"
        )
        with torch.no_grad():
            for parameter in model.model.recursion.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        checkpoint.save(folder / name, model, tokenizer, None, {"donor": str(folder / donor)})
        models.append(model)
    (folder / "text").mkdir()
    (folder / "text" / "train.txt").write_text(" ".join(sentences(6, 240)))
    (folder / "text" / "validation.txt").write_text(" ".join(sentences(7, 12)))
    (folder / "text.txt").write_text("\n\n".join(sentences(8, 60)))
    rows = [{"text": "no", "body": sentence} for sentence in sentences(9, 60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return World(folder, models[0].eval(), tokenizer)


class Cases:
    """Cases of one settings class: every public method that is not `make` is named after a field."""

    settings: type[Any]
    required: ClassVar[dict[str, str]] = {}  # field -> what of the world it names
    usual: ClassVar[dict[str, Any]] = {}
    # Inherited cases that are run for this class, too, because the way from the flag to its effect is another; None is all of them.
    again: ClassVar[tuple[str, ...] | None] = ()

    def __init__(self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
        self._world, self._tmp, self._patch, self._request = world, tmp_path, monkeypatch, request

    def _make(self, **given: Any) -> Any:
        needed = {name: self._world.path(file) for name, file in self.required.items()}
        return self.settings(**{**needed, **self.usual, **given})

    def _spy(self, where: Any, name: str, stop: bool = False, answer: Any = None) -> list[tuple[tuple[Any, ...], dict[str, Any], Any]]:
        """Calls of a function, with what they returned: itself called, or, with `stop`, not, or `answer` in its place."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
        real = getattr(where, name)

        def seen(*args: Any, **kwargs: Any) -> Any:
            if stop:
                calls.append((args, kwargs, None))
                raise Enough
            found = real(*args, **kwargs) if answer is None else answer
            calls.append((args, kwargs, found))
            return found

        self._patch.setattr(where, name, seen)
        return calls

    def _refuses_a_revision(self, run: Callable[..., Any]) -> None:
        """Of a path; what a revision of a hub id gives is in tests/checkpoints/test_loading.py."""
        with pytest.raises(UserError, match="--revision: expected a hub id, got 'v1' for .*, a path"):
            run(revision="v1")

    def _adapter(self, folder: Path) -> Any:
        """An adapter of a donor in a folder, a copy of `donor`."""
        shutil.copytree(self._world.path("donor"), folder)
        return as_adapter(convert.convert(str(folder), L_layers=2, keep_donor=True, H_cycles=2, L_cycles=1), lora_rank=2)

    def _reads_the_donor(self, run: Callable[..., Any]) -> None:
        """Of an adapter, whose donor was moved."""
        adapter, moved = self._tmp / "adapter", self._tmp / "moved"
        checkpoint.save(adapter, self._adapter(self._tmp / "first"), self._world.tokenizer)
        (self._tmp / "first").rename(moved)
        with pytest.raises(UserError, match="its donor was the folder .*, which is not there; name another place with --donor"):
            run(checkpoint=str(adapter))
        run(checkpoint=str(adapter), donor=str(moved))

    def _pretend_a_better_device(self) -> list[str | None]:
        """Where no device is named, everything is to go to one that cannot compute; gives the names that were asked for."""
        asked: list[str | None] = []

        def choose(name: str | None = None) -> torch.device:
            asked.append(name)
            return torch.device(name or "meta")

        for module in (training_run, fitting, training_settings, session, write_settings, evaluation, running, serve_settings, probe):
            self._patch.setattr(module, "choose_device", choose)
        return asked

    def _hub(self) -> str:
        self._request.getfixturevalue("hub")
        return "wikitext"

    def _said(self, action: Callable[[], object]) -> tuple[str, str]:
        """What it wrote to stdout and stderr."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            action()
        return out.getvalue(), err.getvalue()


def embeddings(model: Any) -> torch.Tensor:
    return model.get_input_embeddings().weight.float()


def of_donor(world: World, name: str) -> dict[str, torch.Tensor]:
    with safe_open(Path(world.path(name)) / "model.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a safetensors handle, not a dict


# Conversion


class Converting(Cases):
    settings = ConvertSettings
    required: ClassVar = {"qwen_model": "donor"}
    usual: ClassVar = {"L_layers": 2, "H_cycles": 2, "L_cycles": 1}

    def _converted(self, **given: Any) -> checkpoint.Checkpoint:
        """What has been written, read again."""
        settings = self._make(**{"output_path": str(self._tmp / "out.pt"), **given})
        convert.run(settings, say=lambda _: None)
        return checkpoint.load(settings.output_path)

    def L_layers(self) -> None:
        found = self._converted(L_layers=3)
        assert found.model.config.L_layers == len(found.model.model.layers) == len(found.plan.loop) == 3

    def H_cycles(self) -> None:
        assert self._converted(H_cycles=5).model.config.H_cycles == 5

    def L_cycles(self) -> None:
        assert self._converted(L_cycles=4).model.config.L_cycles == 4

    def qwen_model(self) -> None:
        found = self._converted(qwen_model=self._world.path("other_donor"))
        assert torch.equal(embeddings(found.model), of_donor(self._world, "other_donor")["model.embed_tokens.weight"])

    def seq_len(self) -> None:
        assert self._converted(seq_len=77).notes["seq_len"] == 77
        with pytest.raises(UserError, match=r"--seq_len: expected 1 to 512 .*, got 513"):
            self._converted(seq_len=513)

    def layer_selection(self) -> None:
        found, donor = self._converted(layer_selection="last"), of_donor(self._world, "donor")
        assert found.plan.loop == (4, 5) and found.plan.layer_selection == "last"
        for ours, theirs in enumerate((4, 5)):
            weight = found.model.model.layers[ours].mlp.up_proj.weight
            assert torch.equal(weight, donor[f"model.layers.{theirs}.mlp.up_proj.weight"])

    def calibration_file(self) -> None:
        file = self._tmp / "calibration.txt"
        file.write_text(" ".join(sentences(11, 30)))
        expected = min(8, len(self._world.tokenizer(file.read_text()).input_ids) // 128)
        windows = self._spy(probe, "calibration_windows")
        said: list[str] = []
        settings = self._make(layer_selection="auto", calibration_file=str(file), output_path=str(self._tmp / "out.pt"))
        convert.run(settings, say=said.append)
        [(_, _, ids)] = windows
        assert 0 < len(ids) == expected and file.read_text().startswith(self._world.tokenizer.decode(ids[0]))
        assert any(f"over {128 * expected} tokens" in line for line in said)

    def freeze_embeddings(self) -> None:
        for freeze in (True, False):
            model = self._converted(freeze_embeddings=freeze).model
            assert model.config.freeze_embeddings is freeze and model.get_input_embeddings().weight.requires_grad is not freeze
            (self._tmp / "out.pt").unlink()

    def keep_donor(self) -> None:
        plan = self._converted(keep_donor=True).plan
        assert (*plan.prelude, *plan.loop, *plan.coda) == tuple(range(6)) and plan.prelude and plan.coda

    def prelude_layers(self) -> None:
        found = self._converted(prelude_layers=2)
        assert (found.plan.prelude, found.plan.coda) == ((0, 1), ()) and found.model.config.prelude_layers == 2

    def coda_layers(self) -> None:
        found = self._converted(coda_layers=2)
        assert (found.plan.prelude, found.plan.coda) == ((), (4, 5)) and found.model.config.coda_layers == 2

    def gain(self) -> None:
        found = [gain for each in injections(self._converted(gain=0.25).model) for gain in each.gains(torch.float32)]
        assert len(found) >= 2 and all(torch.allclose(gain, torch.tensor(0.25)) for gain in found)

    def injection(self) -> None:
        model = self._converted(injection="sum_norm").model
        assert model.config.injection == "sum_norm" and injections(model) == []

    def dry_run(self) -> None:
        said: list[str] = []
        report = convert.run(self._make(dry_run=True, output_path=str(self._tmp / "out.pt")), say=said.append)
        assert report.check is None and report.output_path is None and "L_layers=2" in "\n".join(said)
        assert list(self._tmp.iterdir()) == []

    def revision(self) -> None:
        self._refuses_a_revision(self._converted)

    def tokenizer_path(self) -> None:
        assert MARK in self._converted(tokenizer_path=self._world.path("marked")).tokenizer.get_vocab()

    def output_path(self) -> None:
        self._converted(output_path=str(self._tmp / "elsewhere.pt"))
        assert {path.name for path in self._tmp.iterdir()} == {"elsewhere.pt", "elsewhere_tokenizer"}

    def json(self) -> None:
        flags = ["--qwen_model", self._world.path("donor"), "--L_layers", "2", "--output_path", str(self._tmp / "out.pt")]
        out, err = self._said(lambda: cli.convert([*flags, "--json"]))
        assert json.loads(out)["output_path"] == str(self._tmp / "out.pt") and "✓ Saved to" in err
        out, err = self._said(lambda: cli.convert([*flags[:-1], str(self._tmp / "two.pt")]))
        assert "✓ Saved to" in out and not out.startswith("{")


# Training


@dataclass(frozen=True)
class Finished:
    """A run from files to files, for all fields whose effect is in what such a run leaves."""

    folder: Path
    said: str
    result: Any

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def steps(self, key: str) -> list[int]:
        return [entry["step"] for entry in self.log if key in entry]


RUN: dict[str, Any] = {
    "seq_len": SEQ_LEN, "batch_size": 3, "grad_accum_steps": 2, "max_steps": 17, "log_every": 4, "eval_every": 6, "save_every": 5,
    "keep_last": 2, "generate_every": 7, "generation_prompt": "the river", "lr": 2e-3, "warmup_steps": 4, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[type], Finished]:
    """The run of a settings class, made when it is first asked for."""
    made: dict[type, Finished] = {}

    def of(settings_class: type[Any]) -> Finished:
        if settings_class not in made:
            folder, cases = tmp_path_factory.mktemp("run") / "out", CASES[settings_class]
            needed = {name: world.path(file) for name, file in cases.required.items()}
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
                shape = {name: value for name, value in cases.usual.items() if name.endswith(("cycles", "layers"))}
                done = training_run.train(settings_class(**needed, **shape, **RUN, dataset_name=world.path("text"), output_dir=str(folder)))
            made[settings_class] = Finished(folder, out.getvalue(), done.fit)
        return made[settings_class]

    return of


class Training(Cases):
    """Of every run, whatever it trains."""

    usual: ClassVar = {
        "seq_len": SEQ_LEN, "batch_size": 4, "lr": 1e-3, "warmup_steps": 0, "num_epochs": 1, "log_every": 1, "generate_every": 0,
        "device": "cpu",
    }  # fmt: skip

    def _launched(self, **given: Any) -> SimpleNamespace:
        """What `train` has ready when the loop is about to begin."""
        caught: list[Any] = []
        names = ("model", "tokenizer", "train", "held", "settings")

        def caught_fit(*args: Any, **kwargs: Any) -> Any:
            caught.append(SimpleNamespace(**dict(zip(names, args, strict=True)), **kwargs))
            raise Enough

        settings = self._make(**{"dataset_name": self._world.path("text"), "output_dir": str(self._tmp / "out"), **given})
        with self._patch.context() as patch, contextlib.redirect_stderr(io.StringIO()), pytest.raises(Enough):
            patch.setattr(training_run, "fit", caught_fit)
            training_run.train(settings)
        return caught[0]

    def _text(self, rows: Any) -> str:
        return self._world.tokenizer.decode([token for row in rows for token in row["input_ids"]])

    def _model(self) -> Any:
        config = self._world.model.config
        return checkpoint.build(
            config, {name: value.clone() for name, value in self._world.model.state_dict().items()}, "copy", torch.float32
        )

    def _trainer(self, **given: Any) -> Any:
        """The trainer that `fit` has made, before it begins."""
        caught: list[Any] = []

        class Waiting(RecursiveTrainer):
            def train(self, *args: Any, **kwargs: Any) -> Any:
                layers = self.model.model.model.layers
                self.recomputes = [getattr(layer, "gradient_checkpointing", False) for layer in layers]
                self.compiled = [layer._compiled_call_impl is not None for layer in layers]
                caught.append(self)

        with self._patch.context() as patch:
            patch.setattr(fitting, "RecursiveTrainer", Waiting)
            self._fitted(**given)
        return caught[0]

    def _fitted(self, teacher: Any = None, count: int = 4, watch: tuple[TrainerCallback, ...] = (), **given: Any) -> Any:
        model, blocks = self._model(), self._world.blocks
        return fit(
            model, self._world.tokenizer, blocks(count), blocks(3, 2), self._make(**given), teacher=teacher, console=False, callbacks=watch
        )

    def _logged(self, **given: Any) -> dict[str, Any]:
        """The first entry of a run."""
        return self._fitted(max_steps=1, **given).history[0]

    def _factors(self, steps: tuple[int, ...], total: int = 20, **given: Any) -> list[float]:
        """Of the learning rate, in these steps, from 0."""
        trainer = self._trainer(**given)
        [factor, *_] = trainer.create_scheduler(total, trainer.create_optimizer()).lr_lambdas
        return [factor(step) for step in steps]

    @property
    def _finished(self) -> Finished:
        return self._request.getfixturevalue("finished")(self.settings)

    # Data

    def revision(self) -> None:
        self._refuses_a_revision(self._launched)

    def tokenizer_path(self) -> None:
        assert MARK in self._launched(tokenizer_path=self._world.path("marked")).tokenizer.get_vocab()

    def dataset_name(self) -> None:
        found = self._launched(dataset_name=self._world.path("text.txt"))
        written = Path(self._world.path("text.txt")).read_text()
        assert self._text(found.train)[:60] == written[:60] and self._text(found.held)[20:60] in written

    def dataset_config_name(self) -> None:
        found = self._launched(dataset_name=self._hub(), dataset_config_name="wikitext-103-raw-v1")
        assert "Article 10 " in self._text(found.train) and "Article 11 " in self._text(found.held)

    def text_column(self) -> None:
        found = self._launched(dataset_name=self._world.path("rows.jsonl"), text_column="body")
        assert self._text(found.train).split(END_OF_TEXT)[1] in Path(self._world.path("rows.jsonl")).read_text()

    def mix(self) -> None:
        alone, other = self._launched().train, self._world.path("text.txt")
        mixed = self._launched(mix=(f"{other}=0.5",)).train
        assert len(mixed) == len(alone) + round(0.5 * len(alone))
        assert self._text(mixed.select([len(alone)])).split(END_OF_TEXT)[0] in Path(other).read_text()

    def train_on(self) -> None:
        rows = self._tmp / "chats.jsonl"
        rows.write_text("".join(json.dumps({"prompt": f"The {i}", "completion": f" ship {i}"}) + "\n" for i in range(4)))
        found = {name: self._launched(dataset_name=str(rows), train_on=name).train[0] for name in ("assistant", "all")}
        text = {name: self._world.tokenizer.decode([i for i in row["labels"] if i != -100]) for name, row in found.items()}
        assert "The" in text["all"] and "The" not in text["assistant"] and "ship" in text["assistant"]

    def streaming(self) -> None:
        found = self._launched(streaming=True, max_steps=2, dataset_name=self._world.path("text"))
        assert isinstance(found.train, IterableDataset) and len(next(iter(found.train))["input_ids"]) == SEQ_LEN
        assert not isinstance(self._launched(max_steps=2).train, IterableDataset)

    def seq_len(self) -> None:
        found = self._launched(seq_len=24)
        assert {len(row["input_ids"]) for rows in (found.train, found.held) for row in rows} == {24}

    def separate_documents(self) -> None:
        end = self._world.tokenizer.eos_token_id
        row = {"input_ids": [5, 6, end, 7, 8, 9]}
        collated = self._trainer(separate_documents=True).data_collator([row])
        assert collated["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]] and collated["labels"].tolist() == [[5, 6, end, -100, 8, 9]]
        assert "position_ids" not in self._trainer().data_collator([row])

    def batch_size(self) -> None:
        assert next(iter(self._trainer(batch_size=3).get_train_dataloader()))["input_ids"].shape == (3, SEQ_LEN)

    def grad_accum_steps(self) -> None:
        assert (
            self._finished.log[0]["tokens"] == RUN["batch_size"] * RUN["grad_accum_steps"] * SEQ_LEN and self._finished.log[0]["step"] == 1
        )

    def eval_batch_size(self) -> None:
        assert next(iter(self._trainer(eval_batch_size=2).get_eval_dataloader()))["input_ids"].shape[0] == 2
        assert next(iter(self._trainer(batch_size=1).get_eval_dataloader()))["input_ids"].shape[0] == 1

    # The length of the run

    def num_epochs(self) -> None:
        done = self._fitted(num_epochs=2)
        assert done.steps == 2 and [entry["epoch"] for entry in done.history if "eval_loss" in entry] == [1.0, 2.0]

    def max_steps(self) -> None:
        assert self._finished.result.steps == 17 == self._finished.log[-1]["step"]

    def max_tokens(self) -> None:
        assert self._fitted(max_tokens=4 * SEQ_LEN + 1).steps == 2

    def eval_every(self) -> None:
        assert self._finished.steps("eval_loss") == [6, 12, 17]

    def early_stopping_patience(self) -> None:
        never = {"max_steps": 6, "eval_every": 1, "lr": 1e-30, "gain_lr": 1e-30}
        assert self._fitted(early_stopping_patience=2, **never).steps == 3
        assert self._fitted(**never).steps == 6

    # Depth

    def cycle_choices(self) -> None:
        logged = self._logged(cycle_choices=(3,))
        assert [key for key in logged if key.startswith("loss_cycle_")] == ["loss_cycle_3"]
        assert self._trainer(cycle_choices=(1, 3)).depths.choices == (1, 3)

    def cycle_weights(self) -> None:
        depths = self._trainer(cycle_choices=(1, 3), cycle_weights=(1.0, 9.0)).depths
        assert 0.85 < sum(depths.at(step) == 3 for step in range(400)) / 400 < 0.95

    def depth_curriculum(self) -> None:
        depths = self._trainer(cycle_choices=(1, 3), depth_curriculum=0.5, max_steps=40).depths
        assert depths.curriculum_steps == 20 and {depths.at(step) for step in range(10)} == {1} != {
            depths.at(step) for step in range(20, 40)
        }

    def backprop(self) -> None:
        for kind, more in (("last", {}), ("cycle", {"enable_deep_supervision": True}), ("full", {})):
            calls = self._spy(type(self._world.model.model.recursion), "steps")
            trained = self._trained_after(backprop=kind, **more)
            assert {args[5] for args, _, _ in calls if len(args) == 6} == {kind}
            assert trained["model.recursion.H_init"] is (kind != "last")

    def _trained_after(self, **given: Any) -> dict[str, bool]:
        """Which parameters a step has trained, by name."""
        found: dict[str, bool] = {}

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                found.update({name: p.grad is not None for name, p in kwargs["model"].model.named_parameters()})

        self._fitted(max_steps=1, watch=(Look(),), **given)
        return found

    def start_gain(self) -> None:
        for injection in injections(self._trainer(start_gain=0.15).model.model):
            assert all(torch.allclose(gain, torch.tensor(0.15)) for gain in injection.gains(torch.float32))

    # The optimizer

    def lr(self) -> None:
        matrices, vectors, own = self._trainer(lr=3e-4).create_optimizer().param_groups
        assert (matrices["lr"], vectors["lr"], own["lr"]) == (3e-4, 3e-4, 10 * 3e-4) and len(own["params"]) > 0
        rates = {entry["step"]: entry["learning_rate"] for entry in self._finished.log if "learning_rate" in entry}
        assert rates[1] == pytest.approx(RUN["lr"] / 5) and rates[8] == pytest.approx(RUN["lr"] * (17 - 7) / (17 - 4))

    def gain_lr(self) -> None:
        matrices, vectors, own = self._trainer(gain_lr=7e-5).create_optimizer().param_groups
        assert (matrices["lr"], vectors["lr"], own["lr"]) == (1e-3, 1e-3, 7e-5)

    def lr_schedule(self) -> None:
        steps = (0, 5, 10, 15, 19)
        linear, cosine, wsd = (self._factors(steps, lr_schedule=name) for name in ("linear", "cosine", "wsd"))
        assert linear == pytest.approx([(20 - step) / 20 for step in steps])
        assert cosine == pytest.approx([0.5 + 0.5 * math.cos(math.pi * step / 20) for step in steps])
        assert wsd == pytest.approx([min(1.0, (20 - step) / 4) for step in steps])

    def decay_share(self) -> None:
        assert self._factors((5, 10, 15), lr_schedule="wsd", decay_share=0.5) == pytest.approx([1.0, 1.0, 0.5])

    def warmup_steps(self) -> None:
        assert self._factors((0, 2, 5), warmup_steps=5) == pytest.approx([1 / 6, 3 / 6, 1.0])

    def optimizer(self) -> None:
        assert isinstance(self._trainer(optimizer="muon").create_optimizer(), optimizing.MuonAdamW)
        assert type(self._trainer(optimizer="adamw_8bit").create_optimizer()).__name__ == "AdamW8bit"
        assert type(self._trainer().create_optimizer()) is torch.optim.AdamW

    def weight_decay(self) -> None:
        groups = self._trainer(weight_decay=0.3).create_optimizer().param_groups
        assert [group["weight_decay"] for group in groups] == [0.3, 0.0, 0.0]

    def max_grad_norm(self) -> None:
        norms: list[float] = []

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
                norms.append(torch.stack([g.norm() for g in gradients]).norm().item())

        for most in (1e-4, 2e-4, 0.0):
            self._fitted(max_steps=1, max_grad_norm=most, watch=(Look(),))
        assert norms[:2] == pytest.approx([1e-4, 2e-4], rel=1e-3) and norms[2] > 1e-2

    def ema_decay(self) -> None:
        trainers: list[Any] = []

        class Kept(RecursiveTrainer):
            def train(self, *args: Any, **kwargs: Any) -> Any:
                trainers.append(self)
                before = [p.detach().clone() for p in self.model.parameters() if p.requires_grad]
                done = super().train(*args, **kwargs)
                after = [p.detach() for p in self.model.parameters() if p.requires_grad]
                self.expected = [0.05 * one + 0.95 * other for one, other in zip(before, after, strict=True)]
                assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
                return done

        self._patch.setattr(fitting, "RecursiveTrainer", Kept)
        self._fitted(max_steps=1, ema_decay=0.05)  # the first average is at most a tenth of what was before
        for average, expected in zip(trainers[0].ema.averages, trainers[0].expected, strict=True):
            torch.testing.assert_close(average, expected)

    # The loss

    def _explained(self, teacher: Any = None, **given: Any) -> dict[str, Any]:
        """The first entry of a run with every cycle scored: its loss is the mean over cycles by shares, and each term by its weight."""
        logged = self._logged(enable_deep_supervision=True, deep_supervision_weight=0.8, teacher=teacher, **given)
        shares = losses.cycle_shares("linear_decay", 0.8, 2)
        terms = [name.removesuffix("_weight") for name in given if name.endswith("_weight")]
        expected = sum(share * logged[f"loss_cycle_{i}"] for i, share in enumerate(shares, start=1))
        assert logged["loss"] == pytest.approx(expected + sum(given[f"{name}_weight"] * logged[f"loss_{name}"] for name in terms), rel=1e-5)
        assert all(abs(logged[f"loss_{name}"]) > 1e-6 for name in terms)
        return logged

    def _refused(self, message: str, **given: Any) -> None:
        with pytest.raises(UserError, match=message):
            self._make(**given).validate()

    def enable_deep_supervision(self) -> None:
        assert {key for key in self._explained() if key.startswith("loss_")} == {"loss_cycle_1", "loss_cycle_2"}
        assert {key for key in self._logged() if key.startswith("loss_")} == {"loss_cycle_2"}

    def deep_supervision_weight(self) -> None:
        supervision = self._trainer(enable_deep_supervision=True, deep_supervision_weight=0.25).model.supervision
        assert supervision.shares(2) == losses.cycle_shares("linear_decay", 0.25, 2) == pytest.approx([1 / 9, 8 / 9])
        logged = self._logged(enable_deep_supervision=True, deep_supervision_weight=0.25)
        assert logged["loss"] == pytest.approx((logged["loss_cycle_1"] + 8 * logged["loss_cycle_2"]) / 9, rel=1e-5)

    def deep_supervision_schedule(self) -> None:
        for name in losses.SCHEDULES:
            trainer = self._trainer(enable_deep_supervision=True, deep_supervision_schedule=name, cycle_choices=(4,))
            assert trainer.model.supervision.shares(4) == losses.cycle_shares(name, 0.5, 4)

    def distill_weight(self) -> None:
        teacher = tiny_donor("qwen2", seed=8, num_hidden_layers=2)
        self._explained(teacher=teacher, distill_weight=0.7)

    def distill_temperature(self) -> None:
        teacher = tiny_donor("qwen2", seed=8, num_hidden_layers=2)
        trainer = self._trainer(teacher=teacher, distill_weight=0.7, distill_temperature=3.0)
        [view], _ = trainer.model._read_teacher(torch.tensor([[5, 6, 7]]), None, 2)
        assert view.temperature == 3.0
        warm, plain = (self._explained(teacher=teacher, distill_weight=0.7, distill_temperature=T)["loss_distill"] for T in (3.0, 1.0))
        assert abs(warm - plain) > 1e-3

    def match_hidden_weight(self) -> None:
        teacher = tiny_donor("qwen2", seed=8, num_hidden_layers=4)
        self._explained(teacher=teacher, match_hidden_weight=0.7)

    def teacher(self) -> None:
        found = self._launched(teacher=self._world.path("other_donor"), distill_weight=0.1).teacher
        assert torch.equal(embeddings(found), of_donor(self._world, "other_donor")["model.embed_tokens.weight"])

    def self_distill_weight(self) -> None:
        self._explained(self_distill_weight=0.7)

    def monotone_weight(self) -> None:
        self._explained(monotone_weight=0.7)

    def halting_weight(self) -> None:
        self._explained(halting_weight=0.7)

    def cycle_targets(self) -> None:
        asked = {"dataset_name": "permutations:difficulty=2,count=60", "seq_len": 32, "enable_deep_supervision": True}
        assert "step_counts" not in self._launched(**asked).train.column_names
        assert "step_counts" in self._launched(**asked, cycle_targets="steps").train.column_names

    def steps_per_cycle(self) -> None:
        steps = {"cycle_targets": "steps", "enable_deep_supervision": True, "dataset_name": "permutations"}
        assert [self._trainer(**steps, steps_per_cycle=n).data_collator.steps_per_cycle for n in (1, 3)] == [1, 3]

    # What a run shows and leaves

    def generate_every(self) -> None:
        assert [int(step) for step in re.findall(r"Step (\d+) - Generating sample", self._finished.said)] == [7, 14]

    def generation_prompt(self) -> None:
        assert self._finished.said.count("Prompt: the river\nOutput: the river") == 2

    def save_every(self) -> None:
        """Every 5 steps; the oldest of three is gone."""
        assert {path.name for path in self._finished.folder.glob("checkpoint_step_*.pt")} == {
            "checkpoint_step_10.pt",
            "checkpoint_step_15.pt",
        }

    def keep_last(self) -> None:
        kept = sorted(path.name for path in self._finished.folder.glob("checkpoint_step_*.pt"))
        assert kept == ["checkpoint_step_10.pt", "checkpoint_step_15.pt"]

    def log_every(self) -> None:
        assert self._finished.steps("loss") == [
            1,
            4,
            5,
            6,
            8,
            10,
            12,
            15,
            16,
            17,
        ]  # with the first, and where it saved, validated and ended

    def report_to(self) -> None:
        trainer = self._trainer(report_to=("tensorboard",))
        assert any(isinstance(callback, TensorBoardCallback) for callback in trainer.callback_handler.callbacks)
        assert not any(isinstance(callback, TensorBoardCallback) for callback in self._trainer().callback_handler.callbacks)

    def output_dir(self) -> None:
        assert {"metrics.jsonl", BEST, "checkpoint_step_15.pt"} <= {path.name for path in self._finished.folder.iterdir()}

    def resume(self) -> None:
        shape = {**RUN, "max_steps": 30, "output_dir": str(self._finished.folder)}
        assert self._launched(**shape, resume=True).resume_from == self._finished.folder / "checkpoint_step_15.pt"
        assert self._launched(**shape).resume_from is None

    # How it computes

    def seed(self) -> None:
        trainer = self._trainer(seed=7)
        assert trainer.args.seed == trainer.depths.seed == 7
        mix = (f"{self._world.path('text.txt')}=0.5",)
        found = {seed: list(self._launched(seed=seed, mix=mix).train["input_ids"]) for seed in (7, 42)}
        source = DataSettings(dataset_name=self._world.path("text"), mix=mix)
        assert found[7] == list(load_blocks(source, self._world.tokenizer, SEQ_LEN, 7).train["input_ids"]) != found[42]

    def device(self) -> None:
        asked = self._pretend_a_better_device()
        trainer = self._trainer(device="cpu")
        assert set(asked) == {"cpu"} and trainer.args.use_cpu and embeddings(trainer.model.model).device.type == "cpu"

    def bf16(self) -> None:
        trainer = self._trainer(bf16=True)
        assert trainer.args.bf16 and trainer.accelerator.mixed_precision == "bf16" and not self._trainer().args.bf16

    def tf32(self) -> None:
        with pytest.raises(UserError, match="--tf32: expected an NVIDIA GPU"):
            self._fitted(tf32=True)
        self._patch.setattr(fitting, "check_tf32", lambda *args: None)
        asked = self._spy(torch, "set_float32_matmul_precision", answer=0)
        self._fitted(max_steps=1, tf32=True)
        assert [args for args, *_ in asked] == [("high",), ("highest",)]

    def gradient_checkpointing(self) -> None:
        assert all(self._trainer(gradient_checkpointing=True).recomputes) and not any(self._trainer().recomputes)

    def compile(self) -> None:
        assert all(self._trainer(compile=True).compiled) and not any(self._trainer().compiled)

    def fsdp(self) -> None:
        with pytest.raises(UserError, match="--fsdp: expected several processes"):
            self._fitted(fsdp=True)
        self._patch.setattr(fitting, "check_launch", lambda *args: None)
        sharded = self._spy(fitting, "shard", answer=0)
        self._trainer(fsdp=True, enable_deep_supervision=True)
        assert [kwargs for _, kwargs, _ in sharded] == [{"reads_every_cycle": True}]
        self._trainer()
        assert len(sharded) == 1

    def deepspeed(self) -> None:
        with pytest.raises(UserError, match="--deepspeed"):
            self._fitted(deepspeed="zero.json")
        self._patch.setattr(fitting, "check_launch", lambda *args: None)
        arguments = self._spy(training_arguments, "TrainingArguments", stop=True)
        with pytest.raises(Enough):
            self._fitted(deepspeed="zero.json")
        assert arguments[0][1]["deepspeed"] == "zero.json"

    def dry_run(self) -> None:
        settings = self._make(dry_run=True, dataset_name=self._world.path("text"), output_dir=str(self._tmp / "out"), max_steps=3)
        results: list[Any] = []
        out, _ = self._said(lambda: results.append(training_run.train(settings)))
        assert results[0].fit is None and re.search(r"steps +3\n", out) and not (self._tmp / "out").exists()


class FineTuning(Training):
    settings = TrainSettings
    required: ClassVar = {"checkpoint": "model.pt"}

    def checkpoint(self) -> None:
        found = self._launched(checkpoint=self._world.path("other.pt"))
        assert torch.equal(embeddings(found.model), of_donor(self._world, "other_donor")["model.embed_tokens.weight"])

    def donor(self) -> None:
        self._reads_the_donor(self._launched)

    # The adapter

    def _adapted(self, **given: Any) -> Any:
        """The model that a run with --adapter starts from."""
        folder = self._tmp / "donor"
        shutil.copytree(self._world.path("donor"), folder)
        plain = convert.convert(str(folder), L_layers=2, keep_donor=True, H_cycles=2, L_cycles=1)
        checkpoint.save(self._tmp / "init.pt", plain, self._world.tokenizer)
        return self._launched(checkpoint=str(self._tmp / "init.pt"), adapter=True, **given).model

    def adapter(self) -> None:
        model = self._adapted()
        assert {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad} == {"recursion"}
        assert model.config.lora_rank == 16 and model.config.lora_alpha == 32.0 and model.config.lora_pairs == 1

    def lora_rank(self) -> None:
        lora = self._adapted(lora_rank=3).model.recursion.lora[0]
        assert set(lora) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert lora["q_proj"].A.shape == (1, 3, 32)

    def lora_alpha(self) -> None:
        assert self._adapted(lora_alpha=8.0).model.recursion.lora[0]["q_proj"].scale == 8.0 / 16

    def lora_targets(self) -> None:
        assert set(self._adapted(lora_targets="mlp").model.recursion.lora[1]) == {"gate_proj", "up_proj", "down_proj"}

    def lora_per(self) -> None:
        assert self._adapted(lora_per="cycle").model.recursion.lora[0]["q_proj"].A.shape == (2, 16, 32)

    def load_in_4bit(self) -> None:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
        model = self._adapted(load_in_4bit=True)
        RecursiveTrainer(model, self._make(load_in_4bit=True, output_dir=str(self._tmp / "run")), self._world.blocks(4), console=False)
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8


class FromDonor(Training):
    required: ClassVar = {"model_name": "donor"}
    usual: ClassVar = {**Training.usual, "L_layers": 2, "H_cycles": 2, "L_cycles": 1}
    again: ClassVar = ("tokenizer_path", "revision", "seq_len", "seed", "max_steps")

    def model_name(self) -> None:
        found = self._launched(model_name=self._world.path("other_donor"))
        assert torch.equal(embeddings(found.model), of_donor(self._world, "other_donor")["model.embed_tokens.weight"])

    def L_layers(self) -> None:
        found = self._launched(L_layers=3)
        assert found.model.config.L_layers == len(found.model.model.layers) == 3

    def H_cycles(self) -> None:
        assert self._launched(H_cycles=4).model.config.H_cycles == 4

    def L_cycles(self) -> None:
        assert self._launched(L_cycles=3).model.config.L_cycles == 3

    def seq_len(self) -> None:
        super().seq_len()
        assert from_donor(self._make(seq_len=24)).notes["seq_len"] == 24
        with pytest.raises(UserError, match=r"--seq_len: expected 1 to 512 \(the donor's positions\), got 513"):
            from_donor(self._make(seq_len=513))

    def seed(self) -> None:
        super().seed()
        fresh = {"fresh_loop": True} if self.settings is HybridSettings else {}
        first, again, other = (from_donor(self._make(seed=seed, **fresh)).model.model.layers[0].mlp.up_proj.weight for seed in (7, 7, 8))
        assert torch.equal(first, again) and not torch.equal(first, other)

    def _starts_as_the_donor(self, **given: Any) -> bool:
        donor, layers = of_donor(self._world, "donor"), self._launched(**given).model.model.layers
        return torch.equal(layers[0].mlp.up_proj.weight, donor["model.layers.0.mlp.up_proj.weight"])


class Embedding(FromDonor):
    settings = EmbeddingSettings

    def donor_loop(self) -> None:
        assert self._starts_as_the_donor(donor_loop=True) and not self._starts_as_the_donor()

    # It predicts no words: terms over predictions are refused, and there is nothing to show.

    def distill_weight(self) -> None:
        self._refused("--distill_weight: needs next-token predictions", distill_weight=0.1)

    def distill_temperature(self) -> None:
        assert self._trainer(distill_temperature=3.0).model.supervision.temperature == 3.0

    def teacher(self) -> None:
        self._refused("--teacher: other has no effect without --distill_weight", teacher="other")

    def self_distill_weight(self) -> None:
        self._refused("--self_distill_weight: needs next-token predictions", self_distill_weight=0.1, enable_deep_supervision=True)

    def monotone_weight(self) -> None:
        self._refused("--monotone_weight: needs next-token predictions", monotone_weight=0.1, enable_deep_supervision=True)

    def match_hidden_weight(self) -> None:
        self._refused("--match_hidden_weight: needs next-token predictions", match_hidden_weight=0.1, enable_deep_supervision=True)

    def halting_weight(self) -> None:
        self._refused("--halting_weight: needs next-token predictions", halting_weight=0.1, enable_deep_supervision=True)

    def generate_every(self) -> None:
        assert "Generating sample" not in self._finished.said and "Summary" in self._finished.said

    def generation_prompt(self) -> None:
        self._refused("--generation_prompt: expected some text", generation_prompt=" ", generate_every=1)
        assert "the river" not in self._finished.said


class Hybrid(FromDonor):
    settings = HybridSettings
    again: ClassVar = ("tokenizer_path", "seq_len", "seed")

    def fresh_loop(self) -> None:
        assert self._starts_as_the_donor() and not self._starts_as_the_donor(fresh_loop=True)

    def tune_lm_head(self) -> None:
        head = self._launched(tune_lm_head=True).model
        assert head.lm_head.weight is not head.model.embed_tokens.weight and not head.config.tie_word_embeddings
        fitting.freeze_rest(head, self._make(tune_lm_head=True))
        assert head.lm_head.weight.requires_grad and head.model.norm.weight.requires_grad and not embeddings(head).requires_grad
        tied = self._launched().model
        fitting.freeze_rest(tied, self._make())
        assert tied.lm_head.weight is tied.model.embed_tokens.weight and not tied.model.norm.weight.requires_grad


# Writing


class Writing(Cases):
    """Of `generate` and of `chat`."""

    required: ClassVar = {"checkpoint": "model.pt"}
    usual: ClassVar = {"device": "cpu", "max_new_tokens": 6, "temperature": 0.0}

    def _wrote(self, said: str = PROMPT, **given: Any) -> SimpleNamespace:
        """One text: what `generate` of the model was given, and what came out on stdout and stderr."""
        calls = self._spy(RecursiveLLM, "generate")
        out, err = self._said(lambda: self._write(said, self._make(**given)))
        (model, batch), kwargs, output = calls[-1]
        kwargs = dict(kwargs)
        config, [rows] = kwargs.pop("generation_config"), kwargs.pop("stopping_criteria")
        kwargs = {name: value for name, value in kwargs.items() if name not in ("attention_mask", "past_key_values")}
        return SimpleNamespace(model=model, ids=batch, config=config, row=rows.rows[0], effort=kwargs, out=out, err=err, output=output)

    def _write(self, said: str, settings: Any) -> None:
        raise NotImplementedError

    def checkpoint(self) -> None:
        found = self._wrote(checkpoint=self._world.path("other.pt"))
        assert torch.equal(embeddings(found.model), of_donor(self._world, "other_donor")["model.embed_tokens.weight"])

    def max_new_tokens(self) -> None:
        found = self._wrote(max_new_tokens=9)
        assert found.config.max_new_tokens == 9 and len(found.row.token_ids) == 9

    def temperature(self) -> None:
        found = self._wrote(temperature=1.7)
        assert found.config.do_sample and found.config.temperature == 1.7
        assert not self._wrote(temperature=0.0).config.do_sample

    def top_p(self) -> None:
        assert self._wrote(temperature=1.0, top_p=0.6).config.top_p == 0.6

    def top_k(self) -> None:
        assert self._wrote(temperature=1.0, top_k=5).config.top_k == 5

    def stop(self) -> None:
        whole = self._wrote(max_new_tokens=24).row.text
        ending = whole[len(whole) // 2 :][:2]
        found = self._wrote(max_new_tokens=24, stop=(ending,))
        assert ending and found.row.text == whole[: whole.index(ending)] != whole and found.row.finish == "stop"

    def revision(self) -> None:
        self._refuses_a_revision(self._wrote)

    def donor(self) -> None:
        self._reads_the_donor(self._wrote)

    def tokenizer_path(self) -> None:
        found = self._wrote(said=f"The {MARK}", tokenizer_path=self._world.path("marked"))
        mark = len(self._world.tokenizer)
        assert mark in found.ids and mark not in self._wrote(said=f"The {MARK}").ids

    def H_cycles(self) -> None:
        assert self._wrote(H_cycles=4).effort == {"H_cycles": 4} and self._wrote().effort == {}

    def cache_policy(self) -> None:
        assert self._wrote(cache_policy="last").effort == {"cache_policy": "last"}

    def static_cache(self) -> None:
        assert self._wrote(static_cache=True).config.cache_implementation == "static"
        assert self._wrote().config.cache_implementation is None and self._wrote(static_cache=True).effort == {}

    def halt(self) -> None:
        assert self._wrote(halt="entropy").effort == {"halt": "entropy"}

    def halt_threshold(self) -> None:
        assert self._wrote(halt="kl", halt_threshold=0.25).effort == {"halt": "kl", "halt_threshold": 0.25}

    def _calibrated(self, budget: float, text: str, **given: Any) -> tuple[SimpleNamespace, Any]:
        """With a calibration that finds the budget over the number of tokens; and the blocks that it was given."""
        file, blocks = self._tmp / "calibration.txt", []
        file.write_text(text)

        def found(model: Any, ids: torch.Tensor, criterion: str, budget: float, H_cycles: int | None) -> early_exit.Calibration:
            blocks.append(ids)
            return SimpleNamespace(threshold=budget / ids.numel(), render=lambda: f"{criterion} at {H_cycles}")  # type: ignore[return-value]

        self._patch.setattr(session, "calibrate", found)
        wrote = self._wrote(halt="kl", compute_budget=budget, calibration_file=str(file), H_cycles=3, **given)
        assert "kl at 3" in wrote.err
        return wrote, blocks[0]

    def compute_budget(self) -> None:
        wrote, ids = self._calibrated(0.7, " ".join(sentences(12, 3)))
        assert wrote.effort == {"H_cycles": 3, "halt": "kl", "halt_threshold": 0.7 / ids.numel()}

    def calibration_file(self) -> None:
        text = " ".join(sentences(13, 4))
        _, ids = self._calibrated(0.7, text)
        assert text.startswith(self._world.tokenizer.decode(ids.flatten())) and ids.numel() > 20

    def draft_cycles(self) -> None:
        assert self._wrote(draft_cycles=1).effort == {"draft_cycles": 1, "draft_tokens": 16}

    def draft_tokens(self) -> None:
        assert self._wrote(draft_cycles=1, draft_tokens=5).effort == {"draft_cycles": 1, "draft_tokens": 5}

    def verbose(self) -> None:
        line = r"^speed: 4 tokens, [\d.]+ tokens per second, the first after [\d.]+ s$"
        said = [self._wrote(verbose=on, max_new_tokens=4).err for on in (True, False)]
        assert [len(re.findall(line, err, re.MULTILINE)) for err in said] == [1, 0]

    def show_recursive_steps(self) -> None:
        assert "cycle 2" in self._wrote(show_recursive_steps=True).out.lower() and "cycle 2" not in self._wrote().out.lower()

    def seed(self) -> None:
        first, other, again = (self._wrote(temperature=1.5, max_new_tokens=12, seed=seed).row for seed in (3, 4, 3))
        assert first.token_ids == again.token_ids != other.token_ids
        sampling = Sampling(temperature=1.5, max_new_tokens=12, stop=tuple(first._until.stop))
        drawn = generation.generate_text(self._world.model, self._world.tokenizer, first.prompt_ids, sampling, seed=3)
        assert drawn.token_ids == first.token_ids

    def device(self) -> None:
        asked = self._pretend_a_better_device()
        assert self._wrote(device="cpu").ids.device.type == "cpu" and set(asked) == {"cpu"}

    def dtype(self) -> None:
        assert self._wrote().model.dtype == torch.float32 and self._wrote(dtype="bfloat16").model.dtype == torch.bfloat16


class Generating(Writing):
    settings = GenerateSettings

    def _write(self, said: str, settings: Any) -> None:
        session.run(replace(settings, prompt=said))

    def _flags(self, **given: Any) -> list[str]:
        values = {"checkpoint": self._world.path("model.pt"), "device": "cpu", "max_new_tokens": 4, "temperature": 0, **given}
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    def prompt(self) -> None:
        out, _ = self._said(lambda: cli.generate(self._flags(prompt="A famous ship")))
        assert out.startswith("A famous ship") and out.count("\n") == 1

    def _prompts(self) -> Path:
        file = self._tmp / "prompts.txt"
        file.write_text("The old\nA river\nThe castle\n")
        return file

    def prompt_file(self) -> None:
        file = self._prompts()
        self._said(lambda: cli.generate(self._flags(prompt_file=file)))
        lines = [json.loads(line) for line in (self._tmp / "prompts.out.jsonl").read_text().splitlines()]
        assert [line["prompt"] for line in lines] == ["The old", "A river", "The castle"] and all(line["tokens"] for line in lines)

    def output_file(self) -> None:
        self._said(lambda: cli.generate(self._flags(prompt_file=self._prompts(), output_file=self._tmp / "there.jsonl")))
        assert len((self._tmp / "there.jsonl").read_text().splitlines()) == 3 and not (self._tmp / "prompts.out.jsonl").exists()

    def batch_size(self) -> None:
        batches = self._spy(prompts, "generate_batch")
        self._said(lambda: cli.generate(self._flags(prompt_file=self._prompts(), batch_size=2)))
        assert [len(args[2]) for args, _, _ in batches] == [2, 1]

    def _chatted(self, **given: Any) -> str:
        """The prompt that the model read, by a tokenizer with a chat template."""
        tokenizer = with_template()
        tokenizer.save_pretrained(self._tmp / "chatty")
        return str(tokenizer.decode(self._wrote(tokenizer_path=str(self._tmp / "chatty"), chat=True, **given).ids[0]))

    def chat(self) -> None:
        assert self._chatted() == f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
        with pytest.raises(UserError, match="--chat: the tokenizer has no chat template"):
            self._wrote(chat=True)

    def system(self) -> None:
        assert self._chatted(system="Be brief.").startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
        with pytest.raises(UserError, match="--system: expected --chat with it"):
            self._wrote(system="Be brief.")


class Chatting(Writing):
    settings = chat.ChatSettings
    again: ClassVar = None

    def _write(self, said: str, settings: Any) -> None:
        self._patch.setattr("sys.stdin", io.StringIO(f"{said}\n"))
        chat.run(settings)

    def _read(self, found: SimpleNamespace) -> str:
        return self._world.tokenizer.decode(found.ids[0])

    def static_cache(self) -> None:
        with pytest.raises(UserError, match="--static_cache: a conversation goes on with its cache"):
            self._wrote(static_cache=True)
        assert self._wrote(static_cache=False).config.cache_implementation is None

    def system(self) -> None:
        assert self._read(self._wrote(system="Be brief.")) == f"Be brief.\n\nUser: {PROMPT}\nAssistant:"
        assert self._read(self._wrote()) == f"User: {PROMPT}\nAssistant:"

    def forget_oldest(self) -> None:
        """Of a talk that is longer than the model's 512 positions."""
        long = "\n".join(f"{turn} " + " ".join(sentences(turn, 9)) for turn in range(6))
        found = self._wrote(said=long, forget_oldest=True)
        assert "User: 0 " not in self._read(found) and "User: 5 " in self._read(found)
        assert "the conversation has" in self._wrote(said=long).err


# Serving


class Serving(Cases):
    settings = serving.ServeSettings
    required: ClassVar = {"checkpoint": "model.pt"}
    usual: ClassVar = {"device": "cpu", "cache_tokens": 256, "batch_tokens": 64, "port": 0}

    @contextlib.contextmanager
    def _service(self, **given: Any) -> Iterator[Any]:
        service = running.load(self._make(**given))
        try:
            yield service
        finally:
            service.engine.abandon()  # nothing runs here: what was asked for would wait for ever
            service.close()

    @contextlib.contextmanager
    def _client(self, **given: Any) -> Iterator[tuple[TestClient, Any]]:
        """Of a service that says it is up, though its threads do not run."""
        self._patch.setattr(engine.Engine, "obstacle", None)
        with self._service(**given) as service:
            yield TestClient(app.make_app(service)), service

    def _bound(self, **given: Any) -> tuple[str, int]:
        """Where `run` listens."""
        seen: list[tuple[str, int]] = []

        async def serve(service: Any, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
            seen.append(sock.getsockname())

        self._patch.setattr(running, "serve", serve)
        self._patch.setattr(running, "load", lambda settings: SimpleNamespace())
        self._patch.setattr(running, "described", lambda service: [])
        running.run(self._make(**given), say=lambda line: None)
        return seen[0]

    def checkpoint(self) -> None:
        with self._service(checkpoint=self._world.path("other.pt")) as service:
            assert torch.equal(embeddings(service.model), of_donor(self._world, "other_donor")["model.embed_tokens.weight"])
            assert service.name == "other"

    def depths(self) -> None:
        with self._service(depths=(1, 4)) as service:
            assert service.depths == [1, 4] and [b.manager.model.config.H_cycles for b in service.engine.batchers.values()] == [1, 4]

    def host(self) -> None:
        assert self._bound(host="127.0.0.2")[0] == "127.0.0.2" and self._bound()[0] == "127.0.0.1"

    def port(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        assert self._bound(port=port)[1] == port

    def api_key(self) -> None:
        with self._client(api_key="open") as (client, _):
            assert client.get("/v1/models").status_code == 401
            assert client.get("/v1/models", headers={"authorization": "Bearer shut"}).status_code == 401
            assert client.get("/v1/models", headers={"authorization": "Bearer open"}).status_code == 200

    def model_name(self) -> None:
        with self._client(model_name="thinker") as (client, _):
            assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["thinker"]

    def revision(self) -> None:
        def start(**given: Any) -> None:
            with self._service(**given):
                pass

        self._refuses_a_revision(start)

    def donor(self) -> None:
        def start(**given: Any) -> None:
            with self._service(**given):
                pass

        self._reads_the_donor(start)

    def tokenizer_path(self) -> None:
        with self._service(tokenizer_path=self._world.path("marked")) as service:
            assert MARK in service.tokenizer.get_vocab()

    def device(self) -> None:
        asked = self._pretend_a_better_device()
        with self._service(device="cpu") as service:
            assert embeddings(service.model).device.type == "cpu" and set(asked) == {"cpu"}

    def dtype(self) -> None:
        with self._service(dtype="bfloat16") as service:
            assert {parameter.dtype for parameter in service.model.parameters()} == {torch.bfloat16}
            assert all(batcher.cache.dtype == torch.bfloat16 for batcher in service.engine.batchers.values())

    def cache_tokens(self) -> None:
        with self._service(cache_tokens=320) as service:
            assert [batcher.blocks * batcher.page for batcher in service.engine.batchers.values()] == [320]

    def batch_tokens(self) -> None:
        with self._service(batch_tokens=48) as service:
            assert [b.manager.continuous_batching_config.max_batch_tokens for b in service.engine.batchers.values()] == [48]

    def max_running(self) -> None:
        with self._service(max_running=3) as service:
            [batcher] = service.engine.batchers.values()
            job = engine.Job([5, 6], 4, None)  # type: ignore[arg-type]
            assert [batcher.would_wait([job] * count) for count in (3, 4, 5)] == [0, 1, 2]

    def max_queue(self) -> None:
        with self._client(max_running=1, max_queue=2) as (_, service):
            job, told = engine.Job([5, 6], 4, None), []  # type: ignore[arg-type]
            service.engine.batchers[2].manager.add_request = lambda *args, **kwargs: "taken"
            service.engine.submit(2, [job] * 3, lambda number, event: told.append(number))
            with pytest.raises(engine.QueueFull):
                service.engine.submit(2, [job], lambda number, event: None)

    def _refused(self, ask: Any, **given: Any) -> str:
        with self._service(**given) as service, pytest.raises(ApiError) as caught:
            asyncio.run(service.answer(ask))
        return str(caught.value.body["error"]["message"])

    def max_completion_tokens(self) -> None:
        ask = read(CompletionRequest, b'{"prompt": "a", "max_tokens": 8}')
        with self._service(max_completion_tokens=7) as service:
            assert service._limit(ask, 3) == 7
            assert service._limit(read(ChatRequest, b'{"messages": [{"role": "user", "content": "a"}]}'), 3) == 7

    def max_choices(self) -> None:
        ask = read(CompletionRequest, b'{"prompt": ["a", "b"], "n": 2}')
        assert "4 texts are asked for; this server writes at most 3" in self._refused(ask, max_choices=3)

    def cors_origins(self) -> None:
        asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
        with self._client(cors_origins=("https://a.example",)) as (client, _):
            assert client.options("/v1/completions", headers=asked).headers["access-control-allow-origin"] == "https://a.example"

    def max_body_bytes(self) -> None:
        with self._client(max_body_bytes=40) as (client, _):
            posted = {length: client.post("/v1/completions", content=b"{" + b" " * (length - 1)) for length in (40, 41)}
        assert {length: found.status_code for length, found in posted.items()} == {40: 400, 41: 413}
        assert "longer than 40 bytes" in posted[41].json()["error"]["message"]

    def request_timeout(self) -> None:
        with self._client(request_timeout=0.02) as (client, service):

            async def never(ask: Any) -> None:
                await asyncio.sleep(5)

            service.answer = never
            found = client.post("/v1/completions", json={"prompt": "a"})
        assert found.status_code == 504 and "no answer within 0.02 seconds" in found.json()["error"]["message"]

    def shutdown_timeout(self) -> None:
        seconds: list[float] = []

        async def until_idle(service: Any, given: float) -> None:
            seconds.append(given)

        self._patch.setattr(running, "_until_idle", until_idle)
        stop = running.Stop()
        stop.ask()
        service = running.load(self._make(shutdown_timeout=3.5))
        with running.bound("127.0.0.1", 0) as sock:
            asyncio.run(running.serve(service, sock, stop))
        assert seconds == [3.5]


# Measuring


class Measuring(Cases):
    """Of `evaluate` and of `compare`."""

    required: ClassVar = {"checkpoint": "model.pt"}
    usual: ClassVar = {"device": "cpu", "seq_len": SEQ_LEN, "cycles": (1,), "max_windows": 3}
    made = "pointers:difficulty=1-2,count=6"

    def _measured(self, **given: Any) -> evaluation.EvaluateReport:
        """Of the first model."""
        return self._run(self._make(**{"dataset_name": self._world.path("text"), **given}))

    def _evaluate_questions(self, **given: Any) -> evaluation.EvaluateReport:
        """With questions and no text."""
        return self._run(self._make(**{"max_windows": None, "questions": (self.made,), **given}))

    def _run(self, settings: Any) -> evaluation.EvaluateReport:
        return evaluation.run(settings)

    def _text(self, **given: Any) -> str:
        """What the first windows are of."""
        opened = self._spy(evaluation, "open_text")
        self._measured(**given)
        return self._world.tokenizer.decode(opened[0][2].windows.ids(0, 3).flatten())

    def dataset_name(self) -> None:
        file = Path(self._world.path("text.txt"))
        assert self._text(dataset_name=str(file)).split(END_OF_TEXT)[0] in file.read_text()
        assert self._measured(dataset_name=str(file)).text.dataset == str(file)

    def dataset_config_name(self) -> None:
        assert "Article 11 " in self._text(dataset_name=self._hub(), dataset_config_name="wikitext-103-raw-v1", max_windows=None)

    def split(self) -> None:
        whole, held_out = (self._measured(dataset_name=self._world.path("text.txt"), split=split).text for split in (None, "validation"))
        assert (whole.part, held_out.part) == ("all of it", "validation split")

    def text_column(self) -> None:
        file = Path(self._world.path("rows.jsonl"))
        assert self._text(dataset_name=str(file), text_column="body").split(END_OF_TEXT)[0] in file.read_text()

    def cycles(self) -> None:
        assert [row.H_cycles for row in self._measured(cycles=(0, 3)).text.rows][:2] == [0, 3]

    def seq_len(self) -> None:
        text = self._measured(seq_len=24).text
        assert text.seq_len == text.stride == 24 and text.scored_tokens == 3 * 23

    def stride(self) -> None:
        text = self._measured(stride=5).text
        assert text.stride == 5 and text.scored_tokens == SEQ_LEN - 1 + 2 * 5

    def batch_size(self) -> None:
        sizes: list[int] = []
        hook = torch.nn.Embedding.forward
        self._patch.setattr(torch.nn.Embedding, "forward", lambda table, ids: sizes.append(len(ids)) or hook(table, ids))
        self._measured(batch_size=2)
        assert set(sizes) == {2, 1}
        batches = self._spy(evaluation, "evaluate_questions")
        self._evaluate_questions(batch_size=3)
        assert batches[0][1]["batch_size"] == 3
        assert self._tasks(batch_size=3)[1]["batch_size"] == 3

    def max_windows(self) -> None:
        assert self._measured(max_windows=2).text.windows == 2 and self._measured(max_windows=None).text.windows > 3

    def questions(self) -> None:
        [asked] = self._evaluate_questions().questions
        assert (asked.name, asked.items) == (self.made, 12) and {row.difficulty for row in asked.rows} == {None, 1, 2}

    def judge(self) -> None:
        [asked] = self._evaluate_questions(judge="labels").questions
        assert asked.judge == "labels" and next(row.count for row in asked.rows) == 6 * 1 + 6 * 2

    def _tasks(self, **given: Any) -> tuple[tuple[Any, ...], dict[str, Any], list[Any]]:
        """What the harness is asked for, and what it is asked to check."""
        checked = self._spy(lm_eval_harness, "check", answer=0)
        asked = self._spy(evaluation, "run_tasks", answer=[])
        self._run(self._make(**{"max_windows": None, "tasks": ("one", "two", "three"), **given}))
        args, kwargs, _ = asked[0]
        return args, kwargs, checked[0][0]

    def tasks(self) -> None:
        args, _, checked = self._tasks()
        assert args[2] == checked[0] == ("one", "two", "three")

    def tasks_folder(self) -> None:
        _, kwargs, checked = self._tasks(tasks_folder=str(self._tmp))
        assert kwargs["folder"] == checked[1] == str(self._tmp)

    def max_items(self) -> None:
        assert self._evaluate_questions(max_items=5).questions[0].items == 5
        assert self._tasks(max_items=7)[1]["max_items"] == 7

    def halt(self) -> None:
        own = self._measured(halt="entropy", cycles=(1, 9)).text.telemetry.halting
        assert own.criterion == "entropy" and own.H_cycles < 9

    def halt_threshold(self) -> None:
        assert self._measured(halt="kl", halt_threshold=0.25).text.telemetry.halting.threshold == 0.25

    def device(self) -> None:
        asked = self._pretend_a_better_device()
        assert self._measured(device="cpu").text.rows and set(asked) == {"cpu"}

    def dtype(self) -> None:
        measured = self._spy(evaluation, "measure_text")
        self._measured(dtype="bfloat16")
        assert measured[0][0][0].dtype == torch.bfloat16

    def _flags(self, *more: str) -> list[str]:
        flags = ["--dataset_name", self._world.path("text"), "--seq_len", "16", "--cycles", "1", "--max_windows", "2", "--device", "cpu"]
        return [*self._models(), *flags, *more]

    def _models(self) -> list[str]:
        return ["--checkpoint", self._world.path("model.pt")]

    def _job(self, words: list[str]) -> tuple[str, str]:
        return self._said(lambda: cli.evaluate(words))

    def json(self) -> None:
        out, _ = self._job(self._flags("--json"))
        assert '"rows"' in out and isinstance(json.loads(out), dict)
        assert "windows of 16 tokens" in self._job(self._flags())[0]

    def report(self) -> None:
        page = self._tmp / "page.html"
        _, err = self._job(self._flags("--report", str(page)))
        assert "<svg" in page.read_text() and str(page) in err


class Evaluating(Measuring):
    settings = EvaluateSettings

    def checkpoint(self) -> None:
        loaded = self._spy(evaluation, "load_model")
        assert self._measured(checkpoint=self._world.path("other.pt")).checkpoint == self._world.path("other.pt")
        assert torch.equal(embeddings(loaded[0][2][0]), of_donor(self._world, "other_donor")["model.embed_tokens.weight"])

    def revision(self) -> None:
        self._refuses_a_revision(self._measured)

    def donor(self) -> None:
        self._reads_the_donor(self._measured)

    def tokenizer_path(self) -> None:
        opened = self._spy(evaluation, "open_text")
        self._measured(tokenizer_path=self._world.path("marked"))
        assert MARK in opened[0][0][1].get_vocab()


class Comparing(Measuring):
    settings = CompareSettings
    required: ClassVar = {}
    again: ClassVar = ("halt", "halt_threshold", "json")

    def _make(self, **given: Any) -> Any:
        return super()._make(**{"checkpoints": tuple(map(self._world.path, ("model.pt", "other.pt"))), **given})

    def _run(self, settings: Any) -> evaluation.EvaluateReport:
        self.compared = compare.run(settings)
        assert len(self.compared.reports) == 2
        return self.compared.reports[0]

    def _models(self) -> list[str]:
        return [self._world.path("model.pt"), self._world.path("other.pt")]

    def _job(self, words: list[str]) -> tuple[str, str]:
        return self._said(lambda: cli.compare(words))

    def checkpoints(self) -> None:
        loaded = self._spy(compare, "load_model")
        self._measured(checkpoints=(self._world.path("donor"), self._world.path("other.pt")))
        assert [report.checkpoint for report in self.compared.reports] == ["donor", "other.pt"]
        for (_, _, (model, _)), name in zip(loaded, ("donor", "other_donor"), strict=True):
            assert torch.equal(embeddings(model), of_donor(self._world, name)["model.embed_tokens.weight"])

    def cycles(self) -> None:
        """And each model's own, at which they are compared."""
        assert [row.H_cycles for row in self._measured(cycles=(0, 3)).text.rows] == [0, 3, 2]
        assert self.compared.text_differences[0].H_cycles == 2

    def tokenizer_path(self) -> None:
        opened = self._spy(evaluation, "open_text")
        self._measured(tokenizer_path=self._world.path("marked"))
        assert len(opened) == 2 and all(MARK in args[1].get_vocab() for args, _, _ in opened)


class Probing(Cases):
    settings = ProbeSettings

    def _probed(self, **given: Any) -> probe.ProbeReport:
        common = {"checkpoint": self._world.path("donor"), "text": self._world.path("text.txt"), "lengths": (1,), "gains": (0.3,)}
        return probe.run(self._make(**common | {"seq_len": 8, "max_windows": 2, "device": "cpu"} | given))

    def checkpoint(self) -> None:
        assert self._probed().loss != self._probed(checkpoint=self._world.path("other_donor")).loss

    def text(self) -> None:
        (self._tmp / "other.txt").write_text("the river runs " * 40)
        assert self._probed().loss != self._probed(text=str(self._tmp / "other.txt")).loss

    def lengths(self) -> None:
        assert [block.length for block in self._probed(lengths=(2,)).blocks] == [2] * 5

    def gains(self) -> None:
        found = self._probed(gains=(0.6, 0.2))
        assert found.gains == (0.2, 0.6) and set(found.blocks[0].increase) == {0.2, 0.6}

    def H_cycles(self) -> None:
        once, twice = self._probed(H_cycles=1), self._probed(H_cycles=2)
        assert (once.H_cycles, twice.H_cycles) == (1, 2) and once.blocks[0].increase != twice.blocks[0].increase
        assert "--H_cycles 2" in twice.command(twice.blocks[0])

    def L_cycles(self) -> None:
        none, two = self._probed(L_cycles=0), self._probed(L_cycles=2)
        assert (none.L_cycles, two.L_cycles) == (0, 2) and none.blocks[0].increase != two.blocks[0].increase
        assert "--L_cycles 2" in two.command(two.blocks[0])

    def seq_len(self) -> None:
        assert (self._probed().tokens, self._probed(seq_len=12).tokens) == (2 * 7, 2 * 11)

    def max_windows(self) -> None:
        assert self._probed(max_windows=5).tokens == 5 * 7

    def batch_size(self) -> None:
        looped = self._spy(probe.LoopedBlocks, "twice")
        few, many = self._probed(batch_size=1, max_windows=4), self._probed(batch_size=4, max_windows=4)
        assert [len(args[1]) for args, _, _ in looped] == [1] * (6 * 4) + [4] * 6
        assert few.loss == pytest.approx(many.loss, abs=1e-5)

    def report(self) -> None:
        words = ["--checkpoint", self._world.path("donor"), "--text", self._world.path("text.txt"), "--lengths", "1", "--seq_len", "8"]
        self._said(lambda: cli.probe([*words, "--report", str(self._tmp / "page.html")]))
        assert "<rect" in (self._tmp / "page.html").read_text()

    def json(self) -> None:
        words = ["--checkpoint", self._world.path("donor"), "--text", self._world.path("text.txt"), "--lengths", "1", "--seq_len", "8"]
        assert json.loads(self._said(lambda: cli.probe([*words, "--json"]))[0])["layers"] == 6
        assert "nats per token" in self._said(lambda: cli.probe(words))[0]

    def tokenizer_path(self) -> None:
        opened = self._spy(probe, "calibration_windows")
        self._probed(tokenizer_path=self._world.path("marked"))
        assert MARK in opened[0][0][1].get_vocab()

    def revision(self) -> None:
        self._refuses_a_revision(lambda **given: self._probed(**given))

    def device(self) -> None:
        asked = self._pretend_a_better_device()
        assert self._probed(device="cpu").blocks and set(asked) == {"cpu"}


class Inspecting(Cases):
    settings = inspection.InspectSettings

    def checkpoint(self) -> None:
        deep = self._tmp / "deep.pt"
        model = checkpoint.load(self._world.path("model.pt")).model
        model.config.H_cycles = 9
        checkpoint.save(deep, model, self._world.tokenizer)
        assert "H_cycles=9," in self._said(lambda: cli.inspect(["--checkpoint", str(deep)]))[0]

    def revision(self) -> None:
        self._refuses_a_revision(lambda **given: inspection.run(self._make(checkpoint=self._world.path("model.pt"), **given)))

    def donor(self) -> None:
        self._reads_the_donor(lambda **given: inspection.run(self._make(**given)))

    def json(self) -> None:
        flags = ["--checkpoint", self._world.path("model.pt")]
        out, _ = self._said(lambda: cli.inspect([*flags, "--json"]))
        assert json.loads(out)["config"]["H_cycles"] == 2 and "layer_applications_per_token" in json.loads(out)
        assert self._said(lambda: cli.inspect(flags))[0].startswith("recursive_qwen2")


# Export


class Exporting(Cases):
    settings = export.ExportSettings
    required: ClassVar = {"checkpoint": "model.pt"}

    def _exported(self, **given: Any) -> tuple[Path, str, str]:
        """The folder, its card, and what was said."""
        out, said = self._tmp / "out", []
        export.run(self._make(**{"out": str(out), **given}), say=said.append)
        folder = Path(given.get("out", out))
        return folder, (folder / "README.md").read_text(), "\n".join(said)

    def _measured(self, **given: Any) -> tuple[EvaluateSettings, Any]:
        """With a text: what was asked of `evaluate`, and what the card is given of it."""
        asked, cards = self._spy(export, "evaluate"), self._spy(export, "recursive_card")
        shape = {"seq_len": SEQ_LEN, "cycles": (1,), "max_windows": 2, "device": "cpu"}
        self._exported(**{"dataset_name": self._world.path("text"), **shape, **given})
        return asked[0][0][2], cards[0][0][3].evaluation

    def out(self) -> None:
        self._exported(out=str(self._tmp / "there"))
        assert (self._tmp / "there" / "model.safetensors").is_file() and not (self._tmp / "out").exists()

    def check(self) -> None:
        folder, _, _ = self._exported()
        asked = self._spy(export.engine_check, "compare", answer=[])
        export.run(self._make(checkpoint=str(folder), check="http://engine", cycles=(1,)), say=print)
        assert asked[0][0][:3] == (str(folder), "http://engine", (1,))

    def checkpoint(self) -> None:
        folder, _, _ = self._exported(checkpoint=self._world.path("other.pt"))
        found = checkpoint.load(folder).model
        assert torch.equal(embeddings(found), of_donor(self._world, "other_donor")["model.embed_tokens.weight"])

    def revision(self) -> None:
        self._refuses_a_revision(self._exported)

    def tokenizer_path(self) -> None:
        folder, _, _ = self._exported(tokenizer_path=self._world.path("marked"))
        assert MARK in (folder / "tokenizer.json").read_text()

    def donor(self) -> None:
        folder, _, said = self._exported(donor=True)
        assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2" and "Left out the recursion" in said

    def adapter_only(self) -> None:
        checkpoint.save(self._tmp / "adapter", self._adapter(self._tmp / "donor"), self._world.tokenizer)
        folder, _, _ = self._exported(checkpoint=str(self._tmp / "adapter"), adapter_only=True, base_model="Qwen/Qwen2-0.5B")
        assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()

    def dtype(self) -> None:
        folder, _, said = self._exported(dtype="float16")
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118 - a safetensors handle
        assert "float16" in said

    def max_shard_size(self) -> None:
        for donor in (False, True):
            folder, _, _ = self._exported(max_shard_size="60KB", donor=donor, out=str(self._tmp / f"donor {donor}"))
            sizes = [path.stat().st_size for path in folder.glob("model-*.safetensors")]
            assert len(sizes) > 1 and max(sizes) < 80_000

    def license(self) -> None:
        assert "\nlicense: apache-2.0\n" in self._exported(license="apache-2.0")[1]

    def base_model(self) -> None:
        assert "\nbase_model: some/body\n" in self._exported(base_model="some/body")[1]

    def evaluation(self) -> None:
        file, cost = self._tmp / "evaluation.json", self._world.model.config.depth(2)
        row = {"H_cycles": 2, "loss": 1.2345, "standard_error": 0.01, "layer_applications": cost}
        file.write_text(json.dumps({"checkpoint": "x", "dataset": "book.txt", "windows": 40, "seq_len": 16, "stride": 16, "rows": [row]}))
        card = self._exported(evaluation=(str(file),))[1]
        assert "1.2345" in card and "book.txt" in card

    def dataset_name(self) -> None:
        asked, shown = self._measured(dataset_name=self._world.path("text.txt"))
        assert asked.dataset_name == shown.dataset == self._world.path("text.txt")

    def dataset_config_name(self) -> None:
        opened = self._spy(evaluation, "open_text")
        self._measured(dataset_name=self._hub(), dataset_config_name="wikitext-103-raw-v1")
        assert "Article 11 " in opened[0][2].documents["text"][0]

    def split(self) -> None:
        opened = self._spy(evaluation, "open_text")
        self._measured(dataset_name=self._world.path("text.txt"), split="validation")
        assert opened[0][2].part == "validation split"

    def text_column(self) -> None:
        opened = self._spy(evaluation, "open_text")
        self._measured(dataset_name=self._world.path("rows.jsonl"), text_column="body")
        assert opened[0][2].documents["text"][0] in Path(self._world.path("rows.jsonl")).read_text()

    def cycles(self) -> None:
        assert [row.H_cycles for row in self._measured(cycles=(0, 3))[1].rows] == [0, 3]

    def seq_len(self) -> None:
        assert self._measured(seq_len=24)[1].seq_len == 24

    def batch_size(self) -> None:
        measured = self._spy(evaluation, "measure_text")
        self._measured(batch_size=5)
        assert measured[0][1]["batch_size"] == 5

    def max_windows(self) -> None:
        assert self._measured(max_windows=3)[1].windows == 3

    def device(self) -> None:
        asked = self._pretend_a_better_device()
        assert self._measured(device="cpu")[1].rows and set(asked) == {"cpu"}

    def _pushed(self, **given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._spy(upload, "check", answer=0)
        pushed = self._spy(upload, "push", answer="https://hub/you/model")
        folder, _, said = self._exported(**{"push": "you/model", **given})
        args, kwargs, _ = pushed[0]
        assert args[0] == folder and set(args[1]) >= {"README.md", "model.safetensors"} and "Uploaded to https://hub/you/model" in said
        return args, kwargs

    def push(self) -> None:
        assert self._pushed(push="me/other")[0][2] == "me/other"

    def private(self) -> None:
        assert self._pushed(private=True)[1]["private"] is True and self._pushed(private=False)[1]["private"] is False

    def commit_message(self) -> None:
        assert self._pushed(commit_message="A better one")[1]["message"] == "A better one"


class Showing(Cases):
    """The demo: what its fine-tunings are asked for. From end to end it is run in test_demo.py."""

    settings = demo.DemoSettings

    def _prose(self, **given: Any) -> TrainSettings:
        self._patch.setattr(prose, "load_documents", lambda source: SimpleNamespace(train=[], validation=[]))
        self._patch.setattr(prose, "tokenize", lambda *args: [])
        self._patch.setattr(prose.text_loss, "measure", lambda *args: [None])
        return self._fine_tuning(prose, **given)

    def _tracking(self, **given: Any) -> TrainSettings:
        self._patch.setattr(prose, "run", lambda *args: None)
        self._patch.setattr(state_tracking, "accuracy_by_length", lambda *args: [()])
        return self._fine_tuning(state_tracking, **{"tracking_steps": 2, **given})

    def _fine_tuning(self, module: Any, **given: Any) -> TrainSettings:
        fits = self._spy(module, "fit", stop=True)
        with pytest.raises(Enough):
            self._said(lambda: demo.run(self._make(**{"output_dir": str(self._tmp / "out"), **given})))
        return fits[0][0][4]

    def output_dir(self) -> None:
        assert self._tracking(output_dir=str(self._tmp / "there")).checkpoint == str(self._tmp / "there" / "tracker_init.pt")
        assert (self._tmp / "there" / "tracker_init.pt").is_file() and not (self._tmp / "out").exists()

    def steps(self) -> None:
        assert self._prose(steps=7).max_steps == 7

    def tracking_steps(self) -> None:
        assert self._tracking(tracking_steps=9).max_steps == 9

    def seed(self) -> None:
        train = self._tracking(seed=3)
        assert train.seed == 3 and train.dataset_name.endswith(",seed=3")
        self._patch.undo()
        assert self._prose(seed=3).seed == 3


CASES: dict[type, type[Cases]] = {
    each.settings: each
    for each in (
        Converting, FineTuning, Embedding, Hybrid, Generating, Chatting, Serving, Evaluating, Comparing, Probing, Inspecting,
        Exporting, Showing,
    )
}  # fmt: skip


def named(cases: type[Cases]) -> set[str]:
    """The fields that have a case."""
    return {name for name, _ in inspect.getmembers(cases, inspect.isfunction) if not name.startswith("_")}


def test_every_field_has_a_case_and_every_case_a_field() -> None:
    for settings_class, cases in CASES.items():
        assert named(cases) == {field.name for field in fields(settings_class)}, settings_class.__name__


def test_every_job_has_its_settings_here() -> None:
    """As the annotations of the command line say it: whoever adds a job adds cases."""
    source = inspect.getsource(cli)
    written = set(re.findall(r'_(?:command|train)\("\w+", (?:\w+\.)?(\w+Settings)\b', source))
    assert written == {settings_class.__name__ for settings_class in CASES}


def to_run() -> list[tuple[type, str]]:
    """Every case once; what a class has inherited is run again for that class where it says so in `again`."""
    seen: set[Any] = set()
    found: list[tuple[type, str]] = []
    for settings_class, cases in CASES.items():
        for field in fields(settings_class):
            case = getattr(cases, field.name)
            if case not in seen or cases.again is None or field.name in cases.again:
                found.append((settings_class, field.name))
            seen.add(case)
    return found


ALL = to_run()


@pytest.mark.parametrize(("settings_class", "field"), ALL, ids=[f"{each.__name__}-{field}" for each, field in ALL])
def test_a_field_changes_what_it_says(
    settings_class: type, field: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    getattr(CASES[settings_class](world, tmp_path, monkeypatch, request), field)()
