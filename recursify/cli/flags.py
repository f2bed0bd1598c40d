"""The help of a command from its settings class: every field is one flag, and each class that declares fields is a group, titled by its
docstring up to the colon. The model comes first, then what is the command's own.

The text under a field is its help. Other names of a flag stand beside it (`names.py`). tyro draws the page; `words.py` reads the flags.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from ..utils.typed import without_none
from .names import other_names

CONFIG = Annotated[
    str | None,
    tyro.conf.arg(
        help="A recipe: a YAML file with a section for this command, whose keys are the flags below. Flags given here override it.",
        help_behavior_hint="",
        metavar="FILE",
    ),
]
APPROACH = Annotated[
    Literal["full", "hybrid", "embedding"],
    tyro.conf.arg(
        help="What is trained. full: all of a converted checkpoint. hybrid: the loop alone, between a donor's frozen embeddings and head. "
        "embedding: the loop alone, to predict the embedding of the next token; it cannot generate. Each has flags of its own: recursify "
        "train --approach hybrid --help lists those of hybrid."
    ),
]


def show_help(
    settings_class: type[Any],
    job: str,
    prog: str,
    defaults: Mapping[str, Any],
    extra: Mapping[str, tuple[Any, Any]],
) -> None:
    """Print the flags of a settings class in groups, and exit.

    Args:
        job: The title of the group of what the class itself declares.
        prog: How the command is called.
        defaults: Values that go before the class's own defaults: those of a recipe.
        extra: Flag -> its default and type, of flags that choose the class and its defaults.

    Raises:
        SystemExit: Always, with status 0.
    """
    flags: list[Any] = [(name, hint, default) for name, (default, hint) in extra.items()]
    for title, fields in _groups(settings_class, job, defaults).items():
        group: Any = dataclasses.make_dataclass("Group", fields, kw_only=True)
        group.__doc__ = ""
        flags.append((_key(title), Annotated[group, tyro.conf.arg(name=title, prefix_name=False)]))
    form: Any = dataclasses.make_dataclass("Flags", flags, kw_only=True)
    form.__doc__ = settings_class.__doc__
    tyro.cli(form, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes), prog=prog, args=["--help"], use_underscores=True)


def _key(title: str) -> str:
    return "group_" + "".join(c if c.isalnum() else "_" for c in title)


def _groups(settings_class: type, job: str, defaults: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Title -> fields as `dataclasses.make_dataclass` takes them; the bases' groups first, as their fields are."""
    hints, others_of = get_type_hints(settings_class, include_extras=True), other_names(settings_class)
    groups: dict[str, list[Any]] = {}
    for field in dataclasses.fields(settings_class):
        owner = next(base for base in settings_class.__mro__ if field.name in vars(base).get("__annotations__", {}))
        title = job if owner is settings_class else str(inspect.getdoc(owner)).partition(":")[0]
        text = help_of(owner)[field.name]
        own: Any = dataclasses.field(default=field.default, default_factory=field.default_factory)
        if field.name in defaults:
            own = dataclasses.field(default=defaults[field.name])
        hint = _described(hints[field.name], [field.name, *others_of.get(field.name, ())], text, own.default)
        groups.setdefault(title, []).append((field.name, hint, own))
    first, last = ("Model and tokenizer", job), ("Output", "Compute", "Hardware")
    order = [*first, *(title for title in groups if title not in (*first, *last)), *last]
    return {title: groups[title] for title in order if title in groups}


def _described(kind: Any, names: list[str], text: str, default: Any) -> Any:
    """The type of a field with what its help shows; its own name is the first."""
    *others, last = names[:1] if is_positional(kind) else names  # the other names of what needs no flag are in its text
    silent = "" if "Default:" in text or _says_nothing(default, kind) else None
    flag = tyro.conf.arg(
        name=last, aliases=[f"--{other}" for other in others], help=text, help_behavior_hint=silent, metavar=_metavar(kind, names[0])
    )  # tyro lists aliases first
    described: Any = Annotated[kind, flag]
    return described


def _says_nothing(default: Any, kind: Any) -> bool:
    """Whether a default is not worth a word of help: a switch that is off, or nothing; of several words without a flag it is nothing."""
    return default is None or default is False or default == () or (is_positional(kind) and get_origin(get_args(kind)[0]) is tuple)


def is_positional(kind: Any) -> bool:
    """Whether a field of this type, with its marks, is given without a flag."""
    marker = get_args(tyro.conf.Positional[str])[1]
    return marker in getattr(kind, "__metadata__", ())


def _metavar(kind: Any, name: str) -> str | None:
    """How values are shown: by type, choices in braces, INT ... for several, without a flag by name; None for a switch."""
    plain = without_none(get_args(kind)[0] if get_origin(kind) is Annotated else kind)
    several = " ..." if get_origin(plain) is tuple else ""
    if is_positional(kind):
        return name.upper() + several
    item = get_args(plain)[0] if several else plain
    if get_origin(item) is Literal:
        return "{" + ",".join(map(str, get_args(item))) + "}"
    if item is bool:
        return None if kind is bool else "{True,False}"
    return item.__name__.upper() + several


@functools.cache
def help_of(owner: type) -> dict[str, str]:
    """The texts that stand under the fields which a class itself declares."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    found = {}
    for field, text in itertools.pairwise(tree.body):  # type: ignore[attr-defined]
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found
