"""What a benchmark is: a named function that yields tables of rows and bounds, in one registry.

    @case("loss", "The loss at a vocabulary of 151,936", minutes=1)
    def loss(bench: Bench) -> Iterator[Table | Check]:
        '''How each figure is measured; printed above the tables.'''

A row is a dictionary of what its columns say; the unit of a column is in its name. All figures of a comparison come from one run in
which both sides alternate. `__main__` runs cases, `page` prints them.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .record import load, provenance

# Each holds the case of its name, and others of its kind. In the order of the page.
MODULES = (
    "works",
    "works_training",
    "ceilings",
    "conversion",
    "training",
    "supervision",
    "loss",
    "decoding",
    "decoding_static",
    "speculation_and_early_exit",
    "training_growth",
    "prototype",
    "profile",
    "serving",
)


@dataclass(frozen=True)
class Bench:
    """Where and how large.

    Args:
        size: "cpu" and "cuda", the real shapes on that device; "quick", toy sizes on a CPU, which show that a case runs.
    """

    size: str

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.size == "cuda" else "cpu")

    @property
    def on_gpu(self) -> bool:
        return self.size == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """In which a model writes: what a GPU is made for, and what a CPU is fastest in."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    def pick(self, quick: Any, cpu: Any, cuda: Any) -> Any:
        """Of three values the one for this size."""
        return {"quick": quick, "cpu": cpu, "cuda": cuda}[self.size]


@dataclass(frozen=True)
class Table:
    """Rows under one heading. Missing columns stay empty; "limit" is the last one, and says what limits the row."""

    title: str
    rows: list[dict[str, Any]]
    note: str = ""


@dataclass(frozen=True)
class Check:
    """A bound and what was measured of it.

    Args:
        most, least: The bound; one of the two.
        must: Whether missing it fails the run; else it is a target.
    """

    what: str
    value: float
    most: float | None = None
    least: float | None = None
    must: bool = True

    @property
    def holds(self) -> bool:
        return (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)


@dataclass(frozen=True)
class Case:
    """A registered benchmark.

    Args:
        about: How its figures are taken.
        sizes: Where it is measured. At toy size every case runs.
        asked: Runs only when it is named: it takes long, or needs what the suite lacks.
    """

    name: str
    title: str
    about: str
    run: Callable[[Bench], Iterator[Table | Check]]
    sizes: tuple[str, ...]
    asked: bool

    def measure(self, bench: Bench, keep: Callable[[dict[str, Any]], Any] = lambda found: None) -> dict[str, Any]:
        """What it says and finds (`title`, `about`, `tables`, `checks`) and where, when and how long that was measured (`machine`), in JSON
        types.

        Args:
            keep: Called with the partial results after every table and bound.
        """
        machine, start = provenance(bench.device), time.perf_counter()
        found: dict[str, Any] = {"title": self.title, "about": self.about, "machine": machine, "tables": [], "checks": []}
        for one in self.run(bench):
            found["tables" if isinstance(one, Table) else "checks"].append(
                asdict(one) | ({} if isinstance(one, Table) else {"holds": one.holds})
            )
            found["machine"] = machine | {"load_after": load(), "seconds": round(time.perf_counter() - start, 1)}
            keep(found)
        gc.collect()
        if bench.on_gpu:
            torch.cuda.empty_cache()
        return found


def missed(found: dict[str, Any]) -> list[str]:
    """Mandatory bounds that the results of a case miss."""
    return [check["what"] for check in found["checks"] if check["must"] and not check["holds"]]


@dataclass
class Registry:
    """All cases by name; those of a module that cannot be imported here are missing, and why is in `missing`."""

    cases: dict[str, Case] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


_REGISTRY = Registry()


def case(
    name: str, title: str, *, sizes: tuple[str, ...] = ("cpu", "cuda"), asked: bool = False
) -> Callable[[Callable[[Bench], Iterator[Table | Check]]], Callable[[Bench], Iterator[Table | Check]]]:
    """Register a function as a case; its docstring is printed above its tables."""

    def register(run: Callable[[Bench], Iterator[Table | Check]]) -> Callable[[Bench], Iterator[Table | Check]]:
        _REGISTRY.cases[name] = Case(name, title, inspect.cleandoc(run.__doc__ or ""), run, sizes, asked)
        return run

    return register


def registry() -> Registry:
    """All cases. A module whose library is missing raises only when its case is run."""
    for module in MODULES:
        if module in _REGISTRY.cases or module in _REGISTRY.missing:
            continue
        try:
            importlib.import_module(f"benchmarks.{module}")
        except ModuleNotFoundError as error:
            _REGISTRY.missing[module] = str(error)
    # modules import each other, and cases come in the order of the page
    _REGISTRY.cases = dict(sorted(_REGISTRY.cases.items(), key=lambda item: MODULES.index(item[1].run.__module__.rpartition(".")[2])))
    return _REGISTRY
