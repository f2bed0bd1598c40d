"""All references in README, docs, docstrings and comments exist: files, links, dotted names of Python, recipes."""

from __future__ import annotations

import ast
import importlib
import re
import tokenize
from pathlib import Path

import pytest

from recursify._moved import MOVED

ROOT = Path(__file__).resolve().parents[2]
# The log and the changelog use the names of their time.
PAGES = sorted(
    path
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/**/README.md")]
    if not {".venv", ".venv-oldest", ".venv-vllm"} & set(path.parts)
)
FOLDERS = ("recursify", "recursify_vllm", "recipes", "benchmarks", "models", "mutants")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path.name != "_moved.py")  # which lists old names
FILE = re.compile(r"(?<![\w/.-])((?:[\w.-]+/)*[\w-]+\.(?:py|md|css))\b(?!\()")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
DOTTED = re.compile(r"(?<![\w./-])((?:recursify|recipes|benchmarks)(?:\.[A-Za-z_]\w*)+)")


def names_of_files(text: str) -> set[str]:
    return set(FILE.findall(text))


def exists(name: str, beside: Path) -> bool:
    """From the root, from the file that speaks of it, or, of a bare name, anywhere in the checkout."""
    if (ROOT / name).exists() or (beside.parent / name).exists():
        return True
    return any(path.as_posix().endswith("/" + name) for path in tracked())


def tracked(kept: list[Path] = []) -> list[Path]:  # noqa: B006 - remembered on purpose
    if not kept:
        kept += [path for path in ROOT.rglob("*") if not {".git", ".venv", ".venv-oldest", "runs"} & set(path.relative_to(ROOT).parts)]
    return kept


def prose(path: Path) -> str:
    """Docstrings and comments of a Python file."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
    with tokenize.open(path) as lines:
        docstrings += [token.string for token in tokenize.generate_tokens(lines.readline) if token.type == tokenize.COMMENT]
    return "\n".join(docstrings)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_links_of_the_pages_exist(page: Path) -> None:
    outside_code = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL).replace("\\", "")
    local = [target.split("#")[0] for target in LINK.findall(outside_code) if not re.match(r"[a-z]+:", target)]
    assert not [target for target in local if target and not (page.parent / target).exists()]
    assert not [name for name in names_of_files(outside_code) if not exists(name, page)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_named_in_docstrings_and_comments_exist(path: Path) -> None:
    assert not [name for name in names_of_files(prose(path)) if not exists(name, path)]


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_dotted_names_can_be_imported(path: Path) -> None:
    text = path.read_text(encoding="utf-8") if path.suffix == ".md" else prose(path)
    assert not [name for name in set(DOTTED.findall(text)) if not is_importable(name)]


def is_importable(name: str) -> bool:
    """A module, or an attribute of one; a name that only `_moved.py` still knows is none."""
    parts = name.split(".")
    if len(parts) > 1 and parts[1] in MOVED:
        return False
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_missing_paths_are_detected() -> None:
    page = ROOT / "README.md"
    assert names_of_files("see `recursify/plan.py`, memory.py and docs/nothing.md") == {"recursify/plan.py", "memory.py", "docs/nothing.md"}
    assert not any(exists(name, page) for name in ("recursify/plan.py", "memory.py", "docs/nothing.md"))
    assert exists("checkpoints/checkpoint.py", page) and exists("docs/evidence.md", page)
    assert is_importable("recursify.network.losses.next_token_loss") and not is_importable("recursify.objective")
