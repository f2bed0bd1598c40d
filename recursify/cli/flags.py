"""Command-line flags from the settings class of a command: every field is one flag, and each class that declares fields is a group of
`--help`, titled by its docstring up to the colon. The model comes first, then what is the command's own.

The text under a field is its help. transformers' names stand beside ours where they differ (`ALIASES`). What is of another type is
refused in the words that recipes and Python give (`utils.typed`).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from ..utils.options import ALIASES, OTHER_NAMES
from ..utils.typed import WORDS

Settings = TypeVar("Settings")

CONFIG = Annotated[
    str | None,
    tyro.conf.arg(
        help="A recipe: a YAML file with a section for this command, whose keys are the flags below. Flags given here override it.",
        help_behavior_hint="",
    ),
]
APPROACH = Annotated[
    Literal["full", "hybrid", "embedding"],
    tyro.conf.arg(
        help="What is trained. full: all of a converted checkpoint. hybrid: the loop alone, between a donor's frozen embeddings and head. "
        "embedding: the loop alone, to predict the embedding of the next token; it cannot generate. --help after it shows its flags."
    ),
]


def parse(
    settings_class: type[Settings],
    words: Sequence[str],
    job: str,
    prog: str | None,
    defaults: Mapping[str, Any] | None = None,
    extra: Mapping[str, tuple[Any, Any]] | None = None,
) -> Settings:
    """Words of a command line as settings.

    Args:
        job: The title of the group of what the class itself declares.
        prog: How the command is called; None is the name of the program.
        defaults: Values that go before the class's own defaults: those of a recipe.
        extra: Flag -> its default and type, of flags that the caller has read already.

    Raises:
        SystemExit: Help was asked for (status 0), or the words are no flags of this class (status 2, after a message).
    """
    groups = _groups(settings_class, job, defaults or {})
    flags: list[Any] = [(name, hint, default) for name, (default, hint) in (extra or {}).items()]
    for title, fields in groups.items():
        group: Any = dataclasses.make_dataclass("Group", fields, kw_only=True)
        group.__doc__ = ""
        flags.append((_key(title), Annotated[group, tyro.conf.arg(name=title, prefix_name=False)]))
    form: Any = dataclasses.make_dataclass("Flags", flags, kw_only=True)
    form.__doc__ = settings_class.__doc__
    options: dict[str, Any] = {"prog": prog, "args": list(words), "use_underscores": True}
    with _REGISTRY:
        parsed = tyro.cli(form, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes), **options)
    return settings_class(**{name: getattr(getattr(parsed, _key(title)), name) for title, fields in groups.items() for name, *_ in fields})


def _key(title: str) -> str:
    return "group_" + "".join(c if c.isalnum() else "_" for c in title)


def _groups(settings_class: type, job: str, defaults: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Title -> fields as `dataclasses.make_dataclass` takes them; the bases' groups first, as their fields are."""
    hints = get_type_hints(settings_class, include_extras=True)
    groups: dict[str, list[Any]] = {}
    for field in dataclasses.fields(settings_class):
        owner = next(base for base in settings_class.__mro__ if field.name in vars(base).get("__annotations__", {}))
        title = job if owner is settings_class else str(inspect.getdoc(owner)).partition(":")[0]
        text = help_of(owner)[field.name]
        alias = alias_of(owner, field.name)
        own_name = (f"--{field.name}",) if alias else None  # as an alias of its alias it is listed first
        kind: Any = hints[field.name]
        own: Any = dataclasses.field(default=field.default, default_factory=field.default_factory)
        if field.name in defaults:
            own = dataclasses.field(default=defaults[field.name])
        hint_of_default = "" if "Default:" in text or _says_nothing(own.default, kind) else None
        flag = tyro.conf.arg(
            name=alias, aliases=own_name, help=text, help_behavior_hint=hint_of_default, metavar=_metavar(kind, field.name)
        )
        hint: Any = Annotated[kind, flag]
        groups.setdefault(title, []).append((field.name, hint, own))
    first, last = ("Model and tokenizer", job), ("Output", "Compute", "Hardware")
    order = [*first, *(title for title in groups if title not in (*first, *last)), *last]
    return {title: groups[title] for title in order if title in groups}


def _says_nothing(default: Any, kind: Any) -> bool:
    """Whether a default is not worth a word of help: a switch that is off, or nothing; of several words without a flag it is nothing."""
    return default is None or default is False or default == () or (_is_positional(kind) and get_origin(get_args(kind)[0]) is tuple)


def _is_positional(kind: Any) -> bool:
    marker = get_args(tyro.conf.Positional[str])[1]
    return marker in getattr(kind, "__metadata__", ())


def _metavar(kind: Any, name: str) -> str | None:
    """How values are shown where tyro's own way is hard to read: by name without a flag, INT ... for several, choices without None."""
    if _is_positional(kind):
        return name.upper() + (" ..." if get_origin(get_args(kind)[0]) is tuple else "")
    choices = [each for each in get_args(kind) if each is not type(None)]
    if get_origin(kind) is tuple:
        return "|".join(each.__name__.upper() for each in get_args(choices[0]) or (choices[0],)) + " ..."
    if len(choices) == 1 and type(None) in get_args(kind):
        if choices[0] is bool:
            return "{True,False}"
        if get_origin(choices[0]) is Literal:
            return "{" + ",".join(map(str, get_args(choices[0]))) + "}"
    return None


def alias_of(owner: type, field: str) -> str | None:
    """Another name of a flag: what transformers calls it, of a training; elsewhere that of the model alone; or a plainer one."""
    if field in OTHER_NAMES:
        return OTHER_NAMES[field]
    return ALIASES.get(field) if field == "checkpoint" or ".training." in owner.__module__ else None


@functools.cache
def help_of(owner: type) -> dict[str, str]:
    """The texts that stand under the fields which a class itself declares."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    found = {}
    for field, text in itertools.pairwise(tree.body):  # type: ignore[attr-defined]
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


_REGISTRY = ConstructorRegistry()


def _simple(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """int, float and text, each also where it may be None: shown by its own name, and refused in the words of recipes and Python."""
    choices = [each for each in get_args(info.type) or (info.type,) if each is not type(None)]
    if len(choices) != 1 or choices[0] not in (int, float, str) or get_origin(info.type) not in (None, Union, UnionType):
        return None
    kind, optional = choices[0], type(None) in get_args(info.type)

    def read(words: list[str]) -> Any:
        if optional and words[0] == "None":
            return None
        try:
            return kind(words[0])
        except ValueError:
            raise ValueError(f"expected {WORDS[kind]}, got {words[0]!r}") from None

    return PrimitiveConstructorSpec(
        nargs=1, metavar=kind.__name__.upper(), instance_from_str=read, str_from_instance=lambda value: [str(value)],
        is_instance=lambda value: isinstance(value, kind) or (optional and value is None),
    )  # fmt: skip


_REGISTRY.primitive_rule(_simple)
