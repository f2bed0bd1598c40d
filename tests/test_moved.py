"""Modules under their names of 0.1.0: every one still gives every name that its new places have, and names the new place."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from recursify import _moved

# What documentation and notebooks of 0.1.0 imported: old module, a name in it, its place now.
PRINTED = (
    ("checkpoint", "load", "checkpoints.checkpoint"),
    ("checkpoint", "write_atomic", "utils.atomic"),
    ("conversion", "run", "conversion.convert"),
    ("conversion", "ConvertSettings", "conversion.settings"),
    ("cost", "memory_by_part", "training.cost"),
    ("cost", "slot_bytes", "network.size"),
    ("data", "DataSettings", "data.settings"),
    ("data", "load_blocks", "data.loading"),
    ("donor", "load_tokenizer", "checkpoints.tokenizer"),
    ("donor", "open_donor", "checkpoints.donor"),
    ("evaluation", "EvaluateSettings", "evaluation.settings"),
    ("generation", "Sampling", "inference.options"),
    ("generation", "generate_text", "inference.generation"),
    ("halting", "applications", "inference.early_exit"),
    ("objective", "next_token_loss", "network.losses"),
    ("plan", "ConversionPlan", "network.plan"),
    ("plan", "make_plan", "conversion.layer_selection"),
    ("tasks", "generate", "data.tasks"),
    ("tasks.scoring", "is_right", "data.tasks.scoring"),
    ("text_losses", "measure", "evaluation.text_loss"),
    ("weights", "copy_attention_weights", "conversion.mapping"),
)


@pytest.mark.parametrize(("old", "name", "place"), PRINTED)
def test_old_name_resolves_with_a_deprecation_warning(old: str, name: str, place: str) -> None:
    new = getattr(importlib.import_module(f"recursify.{place}"), name)
    module = importlib.import_module(f"recursify.{old}")
    with pytest.warns(DeprecationWarning, match=rf"recursify\.{old}\.{name} is recursify\.{place}.*\.{name} now"):
        assert getattr(module, name) is new


@pytest.mark.parametrize(
    ("old", "name", "place", "new"),
    [
        ("effort", "Effort", "inference.options", "DecodingOptions"),
        ("memory", "Memory", "inference.prefix_cache", "PrefixCache"),
        ("answers", "Judge", "evaluation.settings", "Judge"),
        ("answers", "ask", "evaluation.accuracy", "evaluate_questions"),
        ("sharing", "in_turns", "utils.distributed", "map_jobs"),
        ("evaluation", "load_any", "checkpoints.loading", "load_model"),
    ],
)
def test_renamed_object_resolves_by_its_old_name(old: str, name: str, place: str, new: str) -> None:
    module = importlib.import_module(f"recursify.{old}")
    with pytest.warns(DeprecationWarning, match=rf"recursify\.{old}\.{name} is recursify\.{place}\.{new} now"):
        assert getattr(module, name) is getattr(importlib.import_module(f"recursify.{place}"), new)


@pytest.mark.parametrize("place", sorted({place for places in (_moved.MOVED | _moved.PACKAGES).values() for place in places}))
def test_every_new_module_exists(place: str) -> None:
    importlib.import_module(f"recursify.{place}")


def test_names_that_never_were_are_not_found() -> None:
    with pytest.raises(ImportError):
        importlib.import_module("recursify.nothing")
    with pytest.raises(AttributeError, match=r"module 'recursify.objective' has no attribute 'nothing'"):
        _ = importlib.import_module("recursify.objective").nothing
    with pytest.raises(AttributeError, match=r"module 'recursify.data' has no attribute 'nothing'"):
        _ = importlib.import_module("recursify.data").nothing


def test_old_modules_work_in_import_statements() -> None:
    program = (
        "from recursify.checkpoint import load\nfrom recursify.tasks.item import Item\nfrom recursify.cli import main, parse\n"
        "import recursify.cost\nprint(recursify.cost.GB, load.__module__, Item.__module__, parse.__module__)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1000000000.0", "recursify.checkpoints.checkpoint", "recursify.data.tasks.item", "recursify.cli.main"]
