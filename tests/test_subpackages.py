"""Imports only go down from subpackage to subpackage, read from the source; and `network` needs only torch and transformers."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import recursify

PACKAGE = Path(recursify.__file__).resolve().parent
# Lowest first. A subpackage imports from those in rows below its own, never from one beside it. Outside of all
# are `errors.py`, which all may import, `_moved.py`, the old names of modules, and `__init__.py` and `__main__.py`, which none may.
ROWS = (
    ("network", "utils"),
    ("reports",),
    ("checkpoints", "data"),
    ("conversion", "inference"),
    ("training", "evaluation"),
    ("hub", "demo", "serving"),
    ("cli",),
)
SUBPACKAGES = {subpackage: number for number, row in enumerate(ROWS) for subpackage in row}
SAVED_BESIDE_WEIGHTS = {"configuration_recursive_llm", "decoding_recursive_llm", "modeling_recursive_llm"}


def package_of(path: Path) -> list[str]:
    return ["recursify", *path.relative_to(PACKAGE).parts[:-1]]


def imports_of(path: Path) -> set[str]:
    """Dotted names of the modules of ours that a file imports, or imports something from, wherever in it the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            package = package_of(path)
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] == "recursify"}


def subpackage_of(name: str) -> str:
    """The subpackage of a dotted name; `errors` and the names of `recursify` itself are in none."""
    first = name.split(".")[1] if "." in name else "__init__"
    return first if first in SUBPACKAGES or first in ("errors", "_moved") else "__init__"


def cross_imports() -> set[tuple[str, str, str]]:
    """(file, its subpackage, the subpackage that it imports from), without those within one subpackage."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        here = subpackage_of(".".join([*package_of(path), path.stem]))
        found |= {(str(path.relative_to(PACKAGE)), here, there) for there in map(subpackage_of, imports_of(path)) if there != here}
    return found


def test_every_module_is_in_a_subpackage() -> None:
    inside = {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))}
    assert inside == set(SUBPACKAGES)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", "_moved", "_registered", "errors"}


@pytest.mark.parametrize("subpackage", sorted(SUBPACKAGES))
def test_a_subpackage_says_what_it_is_for(subpackage: str) -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / subpackage / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert len(docstring) > 150, (
        f"recursify/{subpackage}/__init__.py: what the subpackage is for, what it may import, where to start reading"
    )
    named = [word.strip("`.,:;()") for word in docstring.split() if word.strip("`.,:;()").endswith(".py")]
    assert named and all((PACKAGE / subpackage / name).is_file() or (PACKAGE / name).is_file() for name in named), named


@pytest.mark.parametrize("subpackage", sorted(SUBPACKAGES))
def test_imports_only_go_down(subpackage: str) -> None:
    up = [
        (file, there)
        for file, here, there in cross_imports()
        if here == subpackage and there in SUBPACKAGES and SUBPACKAGES[there] >= SUBPACKAGES[here]
    ]
    assert not up, f"{subpackage} imports from subpackages beside it or above it: {sorted(up)}"


def test_import_parser_finds_imports() -> None:
    found = {(here, there) for _, here, there in cross_imports()}
    assert {("conversion", "checkpoints"), ("cli", "training"), ("evaluation", "data"), ("training", "errors")} <= found
    assert "recursify.data.tasks.item.Item" in imports_of(PACKAGE / "data" / "tasks" / "generated.py")
    assert len(found) > 40


@pytest.mark.parametrize("path", sorted((PACKAGE / "network").glob("*.py")), ids=lambda path: path.stem)
def test_the_network_needs_only_torch_and_transformers(path: Path) -> None:
    """Files saved beside the weights import nothing of ours but each other, so that they load where recursify is not installed."""
    own = SAVED_BESIDE_WEIGHTS if path.stem in SAVED_BESIDE_WEIGHTS else {other.stem for other in path.parent.glob("*.py")}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            outside = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module in own, ast.unparse(node)
            continue
        elif isinstance(node, ast.ImportFrom):
            outside = [(node.module or "").split(".")[0]]
        else:
            continue
        assert set(outside) <= sys.stdlib_module_names | {"torch", "transformers"}, ast.unparse(node)


def test_tests_are_in_their_subpackages_folder_and_share_only_support() -> None:
    tests = Path(__file__).resolve().parent
    folders = {path.name for path in tests.iterdir() if any(path.glob("*.py"))}
    assert folders == {*SUBPACKAGES, "support", "docs", "recipes", "benchmarks", "mutants", "stress", "compat", "public_reports", "vllm"}
    for path in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests"):
                assert (node.module or "").startswith("tests.support"), f"{path.relative_to(tests)}: {ast.unparse(node)}"
