"""Tasks of EleutherAI's lm-evaluation-harness, run by the harness at every cycle count.

    rows = run_tasks(model, tokenizer, ["hellaswag"], [DecodingOptions(H_cycles=H) for H in (1, 2, 3)])

What a task is, and how it is scored, is the harness's; only the depth of each pass is ours. Its package is `recursify[lm_eval]`. A folder
of YAML files adds tasks of one's own; those need no network where their data needs none.

Several processes share the tasks and runs, each of which is one process's alone: that gives the figures of one process, which the
harness's own division does not quite (it batches what each process has).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..inference.options import DecodingOptions
from ..utils.distributed import map_jobs
from ..utils.models import evaluating, without_donor_settings
from ..utils.tables import table
from .accuracy import column

_BESIDE = ("alias", "name", "sample_len", "sample_count")  # entries of a result that are not metrics


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task in one run.

    Args:
        metric: The harness's name, such as `acc`, with its filter if any, such as `exact_match,strict-match`.
        H_cycles: None for a plain donor.
        halt: The halting criterion; None at fixed depth.
        standard_error: The harness's; None if it has none.
    """

    task: str
    metric: str
    H_cycles: int | None
    halt: str | None
    value: float
    standard_error: float | None

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


def lines(scores: Sequence[TaskScore]) -> list[str]:
    """A table for the terminal: one row per task, one column per run."""
    cells = {(score.task, score.metric, column(score.H_cycles, score.halt)): score for score in scores}
    names = list(dict.fromkeys((task, metric) for task, metric, _ in cells))
    runs = list(dict.fromkeys(run for _, _, run in cells))
    rows = [(*name, *(_figure(cells.get((*name, run))) for run in runs)) for name in names]
    return ["tasks of lm-eval, +- standard error", "", *table(("task", "metric", *runs), rows, left=2)]


def _figure(score: TaskScore | None) -> str:
    if score is None:
        return "-"
    return f"{score.value:.4f}" + ("" if score.standard_error is None else f" +-{score.standard_error:.4f}")


def check(tasks: Sequence[str], folder: str | None = None) -> None:
    """Check that the harness is installed and knows the tasks.

    Raises:
        UserError: It is not installed, a task is unknown, or the folder is missing.
    """
    if find_spec("lm_eval") is None:
        raise UserError('--tasks: the package lm_eval is not installed; pip install "recursify[lm_eval]"')
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--tasks_folder: expected a folder of YAML tasks, got {folder}, which is none")
    known = _manager(tuple(tasks), folder).all_tasks
    for name in tasks:
        if name not in known:
            also = "" if folder is None else f" and {folder}"
            raise UserError(f"--tasks: no task {name!r} in lm-eval{also}; `lm_eval ls tasks` lists its own")


@lru_cache(maxsize=1)
def _manager(tasks: tuple[str, ...], folder: str | None) -> Any:
    """The harness's task manager. Skips its own index of more than 10,000 files if the folder has all requested tasks."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=folder)


def run_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    runs: Sequence[DecodingOptions],
    *,
    folder: str | None = None,
    batch_size: int = 8,
    max_items: int | None = None,
) -> list[TaskScore]:
    """Evaluate all tasks in all runs; returns all metrics.

    Where `torch.distributed` has several processes, all of them must call this.

    Args:
        tasks: Names of tasks, groups and tags.
        runs: Cycles and halting of each run; one `DecodingOptions()` for a plain donor.
        folder: A folder with additional YAML tasks.
        max_items: Limit on the documents of each task.

    Raises:
        UserError: As `check`, or a task that the harness cannot load or run.
    """
    check(tasks, folder)
    manager = _manager(tuple(tasks), folder)
    jobs = [(task, run) for task in tasks for run in runs]

    def score(job: tuple[str, DecodingOptions]) -> list[TaskScore]:
        task, run = job
        with _alone(), evaluating(model), contextlib.redirect_stdout(sys.stderr):
            return _scores(_evaluate(_at_depth(model, tokenizer, run, batch_size), task, manager, max_items), run)

    return [found for scores in map_jobs(jobs, score) for found in scores]


def _evaluate(wrapped: Any, task: str, manager: Any, max_items: int | None) -> dict[str, Any]:
    """The harness's results of a task or of all tasks of a group."""
    from lm_eval import simple_evaluate

    try:
        results = simple_evaluate(wrapped, tasks=[task], task_manager=manager, limit=max_items, log_samples=False)
    except Exception as error:  # tasks are third-party code and data, and may raise anything
        raise UserError(f"--tasks {task}: lm-eval could not run it: {type(error).__name__}: {error}") from error
    assert results is not None  # `_alone`
    return results["results"]


def _scores(results: dict[str, Any], run: DecodingOptions) -> list[TaskScore]:
    found = []
    for task, figures in results.items():
        for key, value in figures.items():
            metric, _, chosen = key.partition(",")
            if key in _BESIDE or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{chosen}")
            name = metric if chosen in ("", "none") else key
            found.append(
                TaskScore(task, name, run.H_cycles, run.criterion, float(value), float(error) if isinstance(error, int | float) else None)
            )
    return found


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hide the process group: the harness returns results on rank 0 only, whereas here each rank has tasks of its own."""
    rank = os.environ.pop("LOCAL_RANK", None)
    try:
        yield
    finally:
        if rank is not None:
            os.environ["LOCAL_RANK"] = rank


def _at_depth(model: Any, tokenizer: PreTrainedTokenizerBase, run: DecodingOptions, batch_size: int) -> Any:
    """The harness's wrapper of a transformers model, with each forward pass at the depth of the run."""
    from lm_eval.models.huggingface import HFLM

    logging.getLogger(HFLM.__module__).setLevel(logging.ERROR)  # it warns about an initialised model
    depth = run.generate_kwargs(model)

    class AtDepth(HFLM):
        def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
            with torch.no_grad():
                return model(inps, use_cache=False, **depth).logits

        def _model_generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            with without_donor_settings(model):
                return super()._model_generate(*args, **kwargs, **depth)

    return AtDepth(model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
