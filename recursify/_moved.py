"""The module and function names of 0.1.0, for one release: each use finds the new name and gives a DeprecationWarning.

    from recursify.checkpoint import load        # recursify.checkpoints.checkpoint
    from recursify.conversion import run         # now a package; the name is looked up in recursify.conversion.convert

To remove it, delete this file, its call in `__init__.py`, and the last lines of the packages that were modules.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

# Old module -> modules that have its names now, in the order of the search.
MOVED = {
    "accuracy_chart": ("reports.accuracy_chart",),
    "answers": ("evaluation.accuracy", "evaluation.settings"),
    "blocks": ("data.blocks",),
    "charts": ("reports.charts",),
    "chat": ("inference.chat",),
    "checkpoint": ("checkpoints.checkpoint", "utils.atomic"),
    "comparison": ("evaluation.compare", "evaluation.settings"),
    "configuration_recursive_llm": ("network.configuration_recursive_llm",),
    "console": ("inference.console",),
    "cost": ("training.cost", "network.size"),
    "decoding_recursive_llm": ("network.decoding_recursive_llm",),
    "demo_text": ("demo.prose",),
    "demo_tracking": ("demo.state_tracking",),
    "device": ("utils.device",),
    "dialogue": ("inference.chat_prompt",),
    "documents": ("data.documents", "data.settings"),
    "donor": ("checkpoints.donor", "checkpoints.tokenizer", "checkpoints.configs", "utils.files", "errors"),
    "effort": ("inference.options", "utils.models"),
    "evaluation_page": ("evaluation.page",),
    "export": ("hub.export",),
    "generation": ("inference.generation", "inference.options", "inference.settings", "inference.session", "inference.prompt"),
    "halting": ("inference.early_exit",),
    "harness": ("evaluation.lm_eval_harness",),
    "inspection": ("conversion.inspection", "network.size"),
    "interactive": ("inference.interactive",),
    "machine": ("utils.machine",),
    "memory": ("inference.prefix_cache",),
    "model_card": ("checkpoints.model_card", "checkpoints.checkpoint", "checkpoints.repository"),
    "modeling_recursive_llm": ("network.modeling_recursive_llm",),
    "objective": ("network.losses",),
    "page": ("reports.html",),
    "passages": ("evaluation.token_view",),
    "plan": ("conversion.layer_selection", "network.plan"),
    "prompts": ("inference.prompt_file",),
    "publishing": ("hub.upload",),
    "question_tokens": ("data.question_rows",),
    "questions": ("data.question_sets", "data.settings"),
    "recipe": ("cli.recipe", "utils.typed"),
    "report": ("demo.report", "network.losses"),
    "report_tracking": ("demo.report_tracking",),
    "sharing": ("utils.distributed",),
    "significance": ("evaluation.statistics",),
    "sources": ("data.settings",),
    "stages": ("demo.stages",),
    "steps": ("inference.cycle_table",),
    "streaming": ("inference.streaming",),
    "tables": ("data.cached_dataset",),
    "tasks": ("data.tasks",),
    "tasks.drawing": ("data.tasks.random_items",),
    "tasks.formats": ("data.tasks.formats",),
    "tasks.generated": ("data.tasks.generated",),
    "tasks.item": ("data.tasks.item",),
    "tasks.scoring": ("data.tasks.scoring",),
    "telemetry": ("evaluation.cycle_stats", "network.losses"),
    "text_losses": ("evaluation.text_loss", "evaluation.statistics"),
    "transcript": ("inference.transcript",),
    "weights": ("checkpoints.guide_names", "conversion.mapping"),
    "windows": ("evaluation.windows", "evaluation.statistics", "evaluation.token_bytes"),
}
# Modules that are packages now, under the same name.
PACKAGES = {
    "cli": ("cli.main",),
    "conversion": ("conversion.convert", "conversion.settings", "conversion.build", "conversion.self_check"),
    "data": ("data.loading", "data.settings", "data.documents"),
    "demo": ("demo.run",),
    "evaluation": ("evaluation.evaluate", "evaluation.settings", "checkpoints.loading"),
}
# Old name of a class or function -> new name.
RENAMED = {
    "Ask": "BaseRequest",
    "ChatAsk": "ChatRequest",
    "CompletionAsk": "CompletionRequest",
    "Effort": "DecodingOptions",
    "Fates": "TensorMapping",
    "Memory": "PrefixCache",
    "SpreadTraining": "ShardedTrainerMixin",
    "Supervised": "LossModule",
    "Telemetry": "CycleStats",
    "ask": "evaluate_questions",
    "carry_out": "convert_tensors",
    "check": "validate",
    "check_spread": "check_sharding",
    "forgiving": "replace_unencodable",
    "in_turns": "map_jobs",
    "load_any": "load_model",
    "need_head": "require_head",
    "need_packages": "require_packages",
    "need_tokenizer": "require_tokenizer",
    "of_a_donor": "baseline_settings",
    "settle": "match_tensors",
    "spent": "decoding_stats",
    "tell_after": "print_stats",
    "told": "accuracy_by_length",
    "whole": "raise_if_interrupted",
    "write_whole": "write_atomic",
    "written": "format_p",
}


def lookup(old: str, places: Sequence[str]) -> Callable[[str], Any]:
    """A `__getattr__` for a module that looks names up in other modules."""

    def find(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        for place in places:
            module = importlib.import_module(f"recursify.{place}")
            new = name if hasattr(module, name) else RENAMED.get(name, name)
            if hasattr(module, new):
                found = getattr(module, new)
                own = getattr(found, "__module__", None)  # constants have no __module__
                where = own if isinstance(own, str) and own.startswith("recursify") else module.__name__
                warnings.warn(f"recursify.{old}.{name} is {where}.{new} now", DeprecationWarning, stacklevel=2)
                return found
        raise AttributeError(f"module 'recursify.{old}' has no attribute {name!r}")

    return find


def names_of_package(package: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package that was a module; submodules take precedence over old names."""
    here = Path(__file__).parent / package
    find = lookup(package, PACKAGES[package])

    def find_unless_module(name: str) -> Any:
        if (here / f"{name}.py").exists() or (here / name).exists():
            raise AttributeError(name)
        return find(name)

    return find_unless_module


class _OldModules:
    """An import finder for the modules in `MOVED`."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, old = name.partition(".")
        if package != "recursify" or old not in MOVED:
            return None
        return ModuleSpec(name, cls, is_package=old == "tasks")  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType | None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        old = module.__name__.partition(".")[2]
        vars(module)["__getattr__"] = lookup(old, MOVED[old])


def install() -> None:
    """Install the finder once, when the package is imported."""
    if _OldModules not in sys.meta_path:
        sys.meta_path.insert(0, _OldModules)  # before the path finder, which would find an empty folder of an old package
