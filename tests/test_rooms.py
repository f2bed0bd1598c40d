"""The house rule that imports only go down, read from the source; the model files import nothing of ours but each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "recursify"
FLOORS = {
    "cli": 4, "__main__": 4, "demo": 4, "demo_text": 4, "demo_tracking": 4,
    "training": 3, "console": 3, "interactive": 3, "chat": 3, "prompts": 3, "serving": 3, "export": 3, "report": 3, "report_tracking": 3,
    "evaluation": 3, "harness": 3, "comparison": 3, "evaluation_page": 3,
    "charts": 2, "conversion": 2, "checkpoint": 2, "generation": 2, "steps": 2, "memory": 2, "dialogue": 2, "halting": 2, "telemetry": 2,
    "text_losses": 2, "answers": 2, "passages": 2, "page": 2, "accuracy_chart": 2, "inspection": 2, "model_card": 2,
    "modeling_recursive_llm": 1, "weights": 1, "objective": 1, "data": 1, "windows": 1, "tasks": 1, "donor": 1, "device": 1, "cost": 1,
    "effort": 1, "streaming": 1, "transcript": 1, "publishing": 1, "sharing": 1, "questions": 1, "question_tokens": 1,
    "documents": 1, "blocks": 1, "tables": 1,
    "configuration_recursive_llm": 0, "decoding_recursive_llm": 0, "plan": 0, "recipe": 0, "errors": 0, "significance": 0, "stages": 0,
    "machine": 0, "sources": 0,
}  # fmt: skip
TRAVELLERS = {"configuration_recursive_llm", "decoding_recursive_llm", "modeling_recursive_llm"}


def modules() -> dict[str, list[Path]]:
    """Name of a module or sub-package of ours -> its files; `__init__` is the door above all floors."""
    found = {path.stem: [path] for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    return found | {folder.name: sorted(folder.glob("*.py")) for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file()}


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it the import stands."""
    depth = len(path.relative_to(PACKAGE).parts)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level == depth or (node.module or "").split(".")[0] == "recursify"):
            module = (node.module or "").removeprefix("recursify").strip(".")
            names |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("recursify.")}
    return {name for name in names if name in FLOORS}


def graph() -> dict[str, set[str]]:
    return {name: set().union(*(imports_of(path) for path in paths)) - {name} for name, paths in modules().items()}


def test_every_module_has_a_floor() -> None:
    assert set(modules()) == set(FLOORS)


@pytest.mark.parametrize("name", sorted(FLOORS))
def test_imports_only_go_down(name: str) -> None:
    above = {other for other in graph()[name] if FLOORS[other] > FLOORS[name]}
    assert not above, f"{name} (floor {FLOORS[name]}) imports from above: {above}"


def test_no_cycles() -> None:
    remaining = graph()
    while remaining:
        free = [name for name, needs in remaining.items() if not needs & set(remaining)]
        assert free, f"modules import each other in a circle: {sorted(remaining)}"
        for name in free:
            del remaining[name]


def test_the_reader_of_imports_sees_them() -> None:
    assert {"plan", "weights", "checkpoint", "donor"} <= graph()["conversion"]
    assert "errors" in graph()["training"]


@pytest.mark.parametrize("name", sorted(TRAVELLERS))
def test_files_that_travel_need_only_torch_and_transformers(name: str) -> None:
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    allowed = {"torch", "transformers", "copy", "math", "warnings", "collections", "dataclasses", "functools", "typing"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            own = node.level == 1 and node.module in TRAVELLERS
            assert own or (node.level == 0 and (node.module or "").split(".")[0] in allowed), ast.unparse(node)
