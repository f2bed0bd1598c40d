"""Writes docs/api.md: every public name of recursify, from its docstring. `make docs`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from griffe2md import render_object_docs

PAGE = Path(__file__).with_name("api.md")
HEAD = """# API

Everything that `from recursify import ...` gives, made from the docstrings by `make docs`. The flags of the settings classes are those of
the command line; `recursify COMMAND --help` shows them in groups.

"""
# Names that are grouped by what one does with them; a name that is missing here is an error.
GROUPS = {
    "Conversion": ("convert", "as_adapter", "ConversionPlan"),
    "Models on disk and on the hub": ("load_model", "load", "save", "Checkpoint"),
    "The model": ("RecursiveLLM", "RecursiveLLMConfig", "RecursiveCache"),
    "Training": (
        "RecursiveTrainer",
        "fit",
        "train",
        "FitSettings",
        "TrainSettings",
        "HybridSettings",
        "EmbeddingSettings",
        "FitResult",
        "load_blocks",
    ),
    "Generation": ("generate_text", "generate_batch", "Sampling", "Generated"),
    "Evaluation": ("evaluate", "EvaluateSettings", "MeasureSettings", "measure"),
    "Errors": ("UserError",),
}


def page() -> str:
    """The text of docs/api.md.

    Raises:
        ValueError: A public name that stands in no group, or the other way round.
    """
    package = griffe.load("recursify", docstring_parser="google", resolve_aliases=True)
    public = {str(name).strip("'\"") for name in package.exports or ()}
    if public != (grouped := {name for names in GROUPS.values() for name in names}):
        raise ValueError(f"GROUPS of {__file__}: expected the names in recursify.__all__, differs in {sorted(public ^ grouped)}")
    anchors = {name: name.lower() for name in public}
    parts = [HEAD]
    for title, names in GROUPS.items():
        parts.append(f"## {title}\n\n")
        parts += [_entry(package[name], anchors) for name in names]
    return "".join(parts).rstrip() + "\n"


def _entry(found: griffe.Object | griffe.Alias, anchors: dict[str, str]) -> str:
    target = found.final_target if isinstance(found, griffe.Alias) else found
    if target.docstring is not None:
        target.docstring.value = _TOGETHER.sub(_one_by_one, target.docstring.value)
    settings = target.is_class and target.name.endswith(("Settings", "Sampling"))
    text = render_object_docs(target, _OPTIONS).rstrip()
    if settings:  # the fields say it
        text = re.sub(r"```python\n.*?```\n\n", "", text, count=1, flags=re.DOTALL)

    def link(match: re.Match[str]) -> str:
        """To an entry of this page, or no link."""
        anchor = anchors.get(match[2].rpartition(".")[2]) if match[2].startswith("recursify.") else None
        return f"[{match[1]}](#{anchor})" if anchor else match[1]

    text = re.sub(r"\[([^\]\n]+)\]\(#([^)\n]*)\)", link, text)
    if settings:
        text += "\n\n**Fields:**\n\n" + "\n".join(_fields(target))
    return text + "\n\n"


# Arguments that a docstring explains in one entry, with the lines that belong to it.
_TOGETHER = re.compile(r"^( {4})((?:\w+, )+\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


def _one_by_one(match: re.Match[str]) -> str:
    return "\n".join(f"{match[1]}{name}: {match[3]}" for name in match[2].split(", "))


def _fields(target: griffe.Object) -> list[str]:
    """One line for each field of a settings class, those of its bases first."""
    classes = [*reversed(target.mro()), target]  # type: ignore[attr-defined]
    lines = {}
    for owner in classes:
        for name, member in owner.members.items():
            if member.is_attribute and member.docstring and member.annotation is not None:
                default = "" if member.value is None else f", default `{member.value}`"
                lines[name] = f"- **{name}** (<code>{member.annotation}</code>{default}) – {' '.join(member.docstring.value.split())}"
    return list(lines.values())


_OPTIONS: dict[str, Any] = {
    "docstring_section_style": "list",
    "filters": ["!^_"],
    "heading_level": 3,
    "inherited_members": False,
    "members": False,
    "merge_init_into_class": True,
    "show_root_full_path": False,
    "separate_signature": True,
    "signature_crossrefs": False,
    "show_signature_annotations": True,
    "summary": False,
}


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
