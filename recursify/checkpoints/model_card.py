"""Model cards: the README.md of a model on the hub or in a folder.

    recursive_card   for a recursive model
    donor_card       for a plain model made of the layers of a recursive one
    pictures         .svg files for a card

A card states what was measured or recorded, or that nothing was. Names and notes are escaped, so they are never markup. Only the last part
of a local path is shown. Losses are in nats per token.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..network.losses import perplexity_text
from ..network.plan import ConversionPlan
from ..network.size import parameters_by_part
from ..reports.charts import Axes, Level, Line, Size, architecture_picture, line_chart, standalone
from .checkpoint import EMBEDDING, LOSS_PICTURE, PLAN_PICTURE
from .repository import HUB_ID

_CHART = Size(820, 390)
_TITLE = "Loss by cycles"

# Fields of the training summary -> label in the card, in this order. Other fields are shown under their own names.
_TRAINING = {
    "step": "optimizer steps", "epoch": "epochs", "tokens": "tokens read", "dataset_name": "text",
    "dataset_config_name": "configuration of the text", "mix": "mixed with", "seq_len": "tokens per sequence",
    "batch_size": "sequences per forward pass", "grad_accum_steps": "forward passes per step", "processes": "processes",
    "lr": "learning rate", "gain_lr": "learning rate of the recursion", "lr_schedule": "schedule", "warmup_steps": "warm-up steps",
    "optimizer": "optimizer", "eval_loss": "validation loss", "eval_loss_cycles": "validation loss of each cycle",
    "eval_step": "validated at step",
}  # fmt: skip


_UNLISTED = ("training", "donor_folder", "donor_fields")  # notes that the list at the end of a card leaves out


@dataclass(frozen=True)
class Row:
    """Loss at one depth. H_cycles None is a plain model of this name, such as the donor. `standard_error` None is unknown."""

    H_cycles: int | None
    loss: float
    standard_error: float | None
    layer_applications: int
    name: str = ""


@dataclass(frozen=True)
class Evaluation:
    """Losses on one text: `windows` windows of `seq_len` tokens, with a stride of `stride` tokens."""

    dataset: str
    windows: int
    seq_len: int
    stride: int
    rows: tuple[Row, ...]

    @property
    def text(self) -> str:
        """A description of the text."""
        apart = "" if self.stride == self.seq_len else f", {self.stride} apart"
        return f"{public(self.dataset)}, {self.windows:,} windows of {self.seq_len} tokens{apart}"

    @property
    def depths(self) -> list[Row]:
        """The rows of the recursive model, shallowest first."""
        return sorted((row for row in self.rows if row.H_cycles is not None), key=lambda row: row.H_cycles or 0)

    @property
    def donors(self) -> list[Row]:
        """The rows of plain models (baselines) on the same text."""
        return [row for row in self.rows if row.H_cycles is None]


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What a card shows beyond the contents of the checkpoint.

    Args:
        name: Hub id or folder of the model.
        license: Identifier of the license on the hub.
        base_model: Hub id of the donor; that of the plan where None.
        evaluation: The results; None without an evaluation.
        evaluation_note: A sentence on the evaluation, such as another dtype of the weights than that of the files.
        illustrated: Whether `pictures` are beside the card.
        chat: Whether the tokenizer has a chat template, which the example then uses.
        adapter: Whether the folder holds an adapter without its donor, which recursify alone reads.
    """

    name: str = "THIS_FOLDER"
    license: str | None = None
    base_model: str | None = None
    evaluation: Evaluation | None = None
    evaluation_note: str = ""
    illustrated: bool = False
    chat: bool = False
    adapter: bool = False


def recursive_card(model: Any, plan: ConversionPlan | None, notes: Mapping[str, Any], extras: Extras | None = None) -> str:
    """The card of a `RecursiveLLM`: description, use, plan, training and evaluation."""
    extras = extras or Extras()
    generates = notes.get("approach") != EMBEDDING
    base = base_model(plan, notes, extras)
    parts = [
        _front(extras, base, "text-generation" if generates else "feature-extraction", ["recursify", "recursive-reasoning"]),
        f"# {_donor_name(plan, notes) if plan else model.config.model_type}, made recursive",
        _what(model, plan, notes, base),
        *_use(model.config, extras, generates),
        *_plan(plan, extras),
        *_training(model, notes, generates),
        *_evaluation(extras, model.config.H_cycles),
        *_license(extras, base),
        *_notes(notes),
    ]
    return "\n\n".join(parts) + "\n"


def donor_card(
    donor: Any, plan: ConversionPlan | None, notes: Mapping[str, Any], lost: Mapping[str, int], extras: Extras | None = None
) -> str:
    """The card of a plain model made of the layers of a recursive one.

    Args:
        donor: The plain model.
        lost: Name -> number of parameters, of the tensors that were left out.
    """
    extras = extras or Extras()
    base = base_model(plan, notes, extras)
    name, place, count = type(donor).__name__, json.dumps(extras.name), donor.config.num_hidden_layers
    # this model is the recursive one at H_cycles = 0
    measured = None if extras.evaluation is None else [row for row in extras.evaluation.rows if not row.H_cycles]
    kept = "all layers of its donor" if plan and plan.keeps_donor else f"the {count} layers that the recursive model has"
    parts = [
        _front(extras, base, "text-generation", ["recursify"]),
        f"# {_donor_name(plan, notes) if plan else donor.config.model_type}, from a recursive model",
        f"A plain `{name}` of {count} layers and {donor.num_parameters():,} parameters, exported by recursify from a recursive model: it "
        f"equals that model at 0 cycles. It has {kept}, each applied once.",
        f"The recursion is left out: {len(lost)} tensors, {sum(lost.values()):,} parameters ({', '.join(f'`{key}`' for key in lost)}). "
        "A recursive model is trained for the outputs of its cycles; its evaluation at 0 cycles shows the quality of this model.",
        "## Use",
        _code(
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({place})",
            f"tokenizer = AutoTokenizer.from_pretrained({place})",
            *_example(extras),
        ),
        *_plan(plan, Extras()),
        *_training(None, notes, True),
        "## Evaluation",
        _table_of_losses(extras, measured, None) if measured else "Not measured.",
        *_license(extras, base),
    ]
    return "\n\n".join(parts) + "\n"


def pictures(model: Any, plan: ConversionPlan | None, evaluation: Evaluation | None) -> dict[str, str]:
    """File name -> contents of the pictures for which there is data."""
    found = {}
    if plan is not None:
        found[PLAN_PICTURE] = architecture_picture(
            prelude=plan.prelude, loop=plan.loop, coda=plan.coda, donor_layers=plan.donor_layers, H_cycles=model.config.H_cycles,
            L_cycles=model.config.L_cycles, narrow=False,
        )  # fmt: skip
    if evaluation is not None and len(evaluation.depths) > 1:
        found[LOSS_PICTURE] = _loss_chart(evaluation, model.config.H_cycles)
    return {name: standalone(svg) for name, svg in found.items()}


def base_model(plan: ConversionPlan | None, notes: Mapping[str, Any], extras: Extras) -> str | None:
    """Hub id of the donor; None for a local folder. Which of the two it was is decided at conversion; records of version 0.1.0 do not
    say it, so there the name has to."""
    if extras.base_model is not None or plan is None:
        return extras.base_model
    if notes.get("donor_folder") or notes.get("revision"):
        return None if notes.get("donor_folder") else plan.donor
    return plan.donor if HUB_ID.fullmatch(plan.donor) and not os.path.exists(plan.donor) else None


def public_record(plan: ConversionPlan | None, notes: Mapping[str, Any]) -> tuple[ConversionPlan | None, dict[str, Any]]:
    """Plan and notes without local paths: a donor's folder is named by its last part."""
    notes = dict(notes)
    if plan is not None and notes.get("donor_folder"):
        plan = replace(plan, donor=Path(plan.donor).name)
        notes["donor"] = plan.donor
    return None if plan is None else ConversionPlan.from_dict(public(plan.to_dict())), public(notes)


def public(value: Any) -> Any:
    """JSON values in which local paths are cut to their last part."""
    if isinstance(value, Mapping):
        return {key: public(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [public(each) for each in value]
    if isinstance(value, str) and (os.path.isabs(value) or (os.sep in value and os.path.exists(value))):
        return Path(value).name
    return value


# Text and markup


_PROMPT = """
inputs = tokenizer("Once upon a time", return_tensors="pt")"""
_MESSAGE = """
messages = [{"role": "user", "content": "Who are you?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""
_GENERATE = """
output = model.generate(**inputs, max_new_tokens=40%s)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""


def _example(extras: Extras, depth: str = "") -> list[str]:
    """Lines of code that generate a text, by the chat template if there is one."""
    return f"{_MESSAGE if extras.chat else _PROMPT}{_GENERATE % depth}".split("\n")


def _front(extras: Extras, base: str | None, task: str, tags: list[str]) -> str:
    named = {"license": extras.license, "base_model": base, "library_name": "transformers", "pipeline_tag": task, "tags": tags}
    fields = {key: value for key, value in named.items() if value is not None}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _donor_name(plan: ConversionPlan, notes: Mapping[str, Any]) -> str:
    return _escaped(Path(plan.donor).name if notes.get("donor_folder") else public(plan.donor))


def _what(model: Any, plan: ConversionPlan | None, notes: Mapping[str, Any], base: str | None) -> str:
    config, count = model.config, sum(parameters_by_part(model.config).values())
    origin = f"[{base}](https://huggingface.co/{base})" if base else _donor_name(plan, notes) if plan else "a pretrained model"
    return (
        f"A recursive language model of {count:,} parameters (`{config.model_type}`), converted from {origin} by recursify. Each "
        f"token passes {config.prelude_layers} prelude layers, then a block of {config.L_layers} layers, H_cycles {config.H_cycles} x "
        f"(L_cycles {config.L_cycles} + 1) times with the same weights, then {config.coda_layers} coda layers: {config.depth()} layer "
        "applications. H_cycles can be set at every call: more cycles cost more compute, and 0 is one plain pass."
    )


def _use(config: Any, extras: Extras, generates: bool) -> list[str]:
    name, deeper = json.dumps(extras.name), config.H_cycles + 2
    load = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({name}, trust_remote_code=True)",
        f"tokenizer = AutoTokenizer.from_pretrained({name}, trust_remote_code=True)",
    ]
    if extras.adapter:
        load = ["import recursify", "", f"found = recursify.load({name})", "model, tokenizer = found.model, found.tokenizer"]
    if not generates:
        run = ["", 'inputs = tokenizer("Once upon a time", return_tensors="pt")', f"states = model.model(**inputs, H_cycles={deeper})[0]"]
        note = "Trained in embedding space: its states predict the embedding of the next token. Its head is the donor's, unused."
        return ["## Use", note, _code(*load, *run)]
    run = _example(extras, f", H_cycles={deeper}")
    prompt = '--chat --prompt "Who are you?"' if extras.chat else '--prompt "Once upon a time"'
    shell = f"recursify generate --checkpoint {shlex.quote(extras.name)} {prompt} --H_cycles {deeper}"
    if extras.adapter:
        how, after = "An adapter: recursify adds it to its donor, whose weights it checks.", "In a shell:"
    else:
        how = "With transformers alone, which runs the Python files in this repository:"
        after = "After `import recursify`, `trust_remote_code` is not needed. In a shell:"
    return [
        "## Use",
        how,
        _code(*load, *run),
        after,
        _code(shell, language="sh"),
    ]


def _plan(plan: ConversionPlan | None, extras: Extras) -> list[str]:
    if plan is None:
        return []
    rows = [("prelude", plan.prelude), ("L_level", plan.loop), ("coda", plan.coda), ("dropped", plan.dropped)]
    table = _table(["part", "donor layers"], [[name, ", ".join(map(str, layers)) or "none"] for name, layers in rows])
    picture = [f"![Donor layers of prelude, loop and coda, and their number of applications]({PLAN_PICTURE})"] if extras.illustrated else []
    return ["## Plan", f"Of the {plan.donor_layers} layers of the donor, numbered from 0:", table, *picture]


def _training(model: Any, notes: Mapping[str, Any], generates: bool) -> list[str]:
    """The training summary in the notes; without one, whether `model` is as converted."""
    record = notes.get("training")
    if isinstance(record, Mapping) and record:
        names = [*(name for name in _TRAINING if name in record), *(name for name in record if name not in _TRAINING)]
        unit = "nats per token" if generates else "1 - cosine"
        rows = [[_label(name, unit), _value(record[name])] for name in names]
        return ["## Training", "Of the last run:", _table(["what", "value"], rows)]
    if model is not None and _at_conversion(model):
        return ["## Training", "**Not trained.** All gains are 0, as at conversion: any number of cycles gives the plain pass."]
    return ["## Training", "**No training is recorded.**"]


def _label(name: str, unit: str) -> str:
    words = _TRAINING.get(name, _escaped(name))
    return f"{words} ({unit})" if name.startswith("eval_loss") else words


def _at_conversion(model: Any) -> bool:
    """Whether the model has gains, and all are 0."""
    gains = [parameter for name, parameter in model.named_parameters() if ".inject_" in name]
    return bool(gains) and not any(parameter.any() for parameter in gains)


def _evaluation(extras: Extras, own: int) -> list[str]:
    found = extras.evaluation
    if found is None or not found.rows:
        return ["## Evaluation", "Not measured. `recursify evaluate` measures the loss on any text at several cycle counts."]
    drawn = extras.illustrated and len(found.depths) > 1
    picture = [f"![{_TITLE}: {_in_escaped(found)}]({LOSS_PICTURE})"] if drawn else []
    return ["## Evaluation", _table_of_losses(extras, [*found.depths, *found.donors], own), *picture]


def _table_of_losses(extras: Extras, rows: Sequence[Row], own: int | None) -> str:
    found = extras.evaluation
    assert found is not None
    head = ["cycles", "loss (nats)", "standard error", "perplexity", "layer applications per token"]
    cells = [
        [
            f"donor ({_escaped(row.name)})"
            if row.H_cycles is None
            else f"{row.H_cycles} (the model's own)"
            if row.H_cycles == own
            else str(row.H_cycles),
            f"{row.loss:.4f}",
            "not known" if row.standard_error is None else f"{row.standard_error:.4f}",
            perplexity_text(row.loss),
            str(row.layer_applications),
        ]
        for row in rows
    ]
    title = f"Loss per token on {_escaped(found.text)}."
    note = f" {extras.evaluation_note}" if extras.evaluation_note else ""
    return f"{title}{note}\n\n{_table(head, cells)}"


def _in_escaped(evaluation: Evaluation) -> str:
    return ", ".join(f"{row.loss:.4f} at {row.H_cycles}" for row in evaluation.depths)


def _loss_chart(evaluation: Evaluation, own: int) -> str:
    depths = evaluation.depths
    xs = [float(row.H_cycles or 0) for row in depths]
    line = Line(
        name="recursive", xs=xs, ys=[row.loss for row in depths], errors=[row.standard_error for row in depths], colour="s1", dots=True,
        valued=True,
    )  # fmt: skip
    axes = Axes(
        title=_TITLE,
        description=_in_escaped(evaluation),
        x_label="cycles, and below them layer applications per token",
        y_label="nats per token",
        x_ticks=[(x, (str(row.H_cycles), str(row.layer_applications))) for x, row in zip(xs, depths, strict=True)],
        x_margin=0.4,
        marked_x=float(own),
        mark="the model's own",
    )
    levels = [
        Level(name=f"donor ({row.name})", y=row.loss, error=row.standard_error, colour=f"s{min(number, 6)}")
        for number, row in enumerate(evaluation.donors, start=2)
    ]
    return line_chart([line], levels, axes, _CHART)


def _license(extras: Extras, base: str | None) -> list[str]:
    donor = f"[{base}](https://huggingface.co/{base})" if base else "the donor"
    own = f"`{extras.license}`." if extras.license else "Not specified at export."
    return ["## License", f"{own} The weights are derived from {donor}, whose license terms apply as well."]


def _notes(notes: Mapping[str, Any]) -> list[str]:
    # the sequence length that a conversion planned says nothing of one that was trained, which its own table has
    rest = {key: value for key, value in notes.items() if key not in _UNLISTED and not (key == "seq_len" and "training" in notes)}
    return ["## Notes", "\n".join(f"- {_escaped(key)}: {_value(value)}" for key, value in rest.items())] if rest else []


def _code(*lines: str, language: str = "python") -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e-3 or abs(value) >= 1e5 else f"{value:.4f}".rstrip("0").rstrip(".")
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{_escaped(key)} {_value(each)}" for key, each in value.items())
    return _escaped(public(value))


def _escaped(value: Any) -> str:
    """Text on one line, with markup escaped."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*\[\]|~]|\b_|_\b)", r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;")
