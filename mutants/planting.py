"""Which faults can be planted in a file, and the text of the file with one of them.

cosmic-ray finds the places and changes the text. Of its operators we keep those that make plausible slips: it would put any of eleven
operators in the place of a plus, and ten of them fail at once wherever the line runs at all. Three operators of ours are added.
"""

from __future__ import annotations

import ast
import difflib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator
from parso.python.tree import Keyword

BINARY = "Add_Sub Sub_Add Mul_Div Mul_Add Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul BitAnd_BitOr BitOr_BitAnd"
COMPARISON = "Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Is_IsNot IsNot_Is"
PLAIN = """NumberReplacer AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd ReplaceBreakWithContinue
ReplaceContinueWithBreak ReplaceUnaryOperator_USub_UAdd ReplaceUnaryOperator_Delete_Invert ReplaceUnaryOperator_Delete_Not ExceptionReplacer
RemoveDecorator ZeroIterationForLoop"""
SWAPPED = {"amin": "amax", "min": "max", "any": "all", "argmin": "argmax", "floor": "ceil", "sum": "mean"}
SWAPPED |= {new: old for old, new in SWAPPED.items()}
MESSAGES = {"print", "say", "warn", "warning", "warning_once", "info", "debug", "error"}
# Arguments that guard against callers who err, or that matter on other devices than the CPU.
GUARDS = {"strict", "frozen", "kw_only", "device"}
# Without these a program does not start, or is only slower.
DECORATORS = {"property", "setter", "staticmethod", "classmethod", "dataclass", "cache", "lru_cache", "cached_property"}


class _Ours(Operator):
    @classmethod
    def examples(cls) -> Any:
        return ()


class DropArgument(_Ours):
    """`f(a, b, c=1)` without `c=1`, or without `b`: an argument by its name, or the last by its place."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "trailer" and node.children[0] == "(" and len(node.children) == 3:
            inside = node.children[1]
            given = [each for each in inside.children if each != ","] if inside.type == "arglist" else [inside]
            for each in given:
                named = each.type == "argument" and each.children[1] == "="
                last = each is given[-1] and len(given) > 1 and each.type != "argument"
                if named or last:
                    yield each.start_pos, each.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        start, _ = list(self.mutation_positions(node))[index]
        inside = node.children[1]
        if inside.type != "arglist":
            node.children = [node.children[0], node.children[2]]
            return node
        place = next(i for i, each in enumerate(inside.children) if each.start_pos == start)
        del inside.children[max(place - 1, 0) : place + (1 if place else 2)]  # with the comma before it, or the one behind the first
        return node


class SwapReduction(_Ours):
    """A mean for a sum, the largest for the smallest, all for any."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "name" and node.value in SWAPPED and node.get_next_leaf() == "(":
            before = node.get_previous_leaf()
            if before == "." or (before != "def" and node.value not in ("sum", "mean")):
                yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.value = SWAPPED[node.value]
        return node


class DropStatement(_Ours):
    """A call whose result is unused, or a `+=`, left out."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        adds = node.type == "expr_stmt" and getattr(node.children[1], "value", "=") != "="
        if (adds or node.type in ("atom_expr", "power")) and node.parent.type == "simple_stmt":
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        return Keyword("pass", node.start_pos, node.get_first_leaf().prefix)


@cache
def operators() -> dict[str, Any]:
    names = [f"ReplaceBinaryOperator_{pair}" for pair in BINARY.split()]
    names += [f"ReplaceComparisonOperator_{pair}" for pair in COMPARISON.split()] + PLAIN.split()
    ours = {kind.__name__: kind() for kind in (DropArgument, SwapReduction, DropStatement)}
    return {name: get_operator(f"core/{name}")() for name in names} | ours


@dataclass(frozen=True)
class Mutant:
    """One fault. ``lines`` are those of its statement; none where it is no statement of a function, but runs once at import."""

    file: str
    function: str
    line: int
    lines: tuple[int, ...]
    operator: str
    occurrence: int

    def plant(self, source: str) -> str | None:
        """The file with the fault in it; None where that is no Python, or the same program."""
        text = mutate_code(source, operators()[self.operator], self.occurrence)
        try:
            return text if ast.dump(ast.parse(text)) != ast.dump(ast.parse(source)) else None
        except SyntaxError:
            return None


def changed(source: str, text: str) -> tuple[str, str]:
    """The lines before and after, without what is around them: what an excuse is known by."""
    diff = list(difflib.unified_diff(source.splitlines(), text.splitlines(), n=0, lineterm=""))[2:]
    before, after = ("\n".join(line[1:].strip() for line in diff if line.startswith(sign) and line[1:].strip()) for sign in "-+")
    return before, after


def possible(file: str, source: str) -> list[Mutant]:
    """Every fault that can be planted in a file; not in annotations, messages, `__all__` and imports."""
    tree = ast.parse(source)
    closed, places = list(_closed(tree)), list(_places(tree, ""))
    lines, nodes, found = source.splitlines(), list(ast_nodes(get_ast(source))), []
    for name, operator in operators().items():
        positions = (spot for node in nodes for spot in operator.mutation_positions(node))
        for occurrence, (start, end) in enumerate(positions):
            spot = start[0], len(lines[start[0] - 1][: start[1]].encode())  # ast counts bytes
            text = lines[start[0] - 1][start[1] : end[1] if end[0] == start[0] else None]
            if any(first <= spot < last for first, last in closed) or _needless(name, text):
                continue
            function, own = max((place for place in places if place[0] <= start[0] <= place[1]), default=(0, 0, "", ()))[2:]
            found.append(Mutant(file, function, start[0], own, name, occurrence))
    return found


def draw(mutants: list[Mutant], count: int, rng: random.Random) -> list[Mutant]:
    """A sample of `count`, all equally likely, spread over the functions: every k-th of a list that goes through one after another."""
    functions = sorted({(each.file, each.function) for each in mutants})
    turn = dict(zip(rng.sample(functions, len(functions)), range(len(functions)), strict=True))
    mixed = sorted(rng.sample(mutants, len(mutants)), key=lambda each: turn[each.file, each.function])
    count = min(count, len(mixed)) or len(mixed)
    offset = rng.random()
    return [mixed[int((i + offset) * len(mixed) / count)] for i in range(count)]


def _needless(operator: str, text: str) -> bool:
    if operator == "RemoveDecorator":
        return text.lstrip("@ ").split("(")[0].strip().split(".")[-1] in DECORATORS
    if operator == "AddNot":  # a comparison is turned round by its own operator, a `not` by its removal
        try:
            return isinstance(ast.parse(text.strip(), mode="eval").body, ast.Compare | ast.UnaryOp)
        except SyntaxError:
            return False
    return False


def _closed(tree: ast.AST) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Ranges in which nothing is planted."""
    for node in ast.walk(tree):
        match node:
            case ast.Raise() | ast.Import() | ast.ImportFrom() | ast.Assign(targets=[ast.Name(id="__all__")]):
                shut: Any = node
            case ast.Assert(msg=shut) | ast.AnnAssign(annotation=shut) | ast.arg(annotation=shut) | ast.FunctionDef(returns=shut):
                pass
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in MESSAGES:
                shut = node
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                shut = node
            case ast.keyword(arg=name) if name in GUARDS:
                shut = node
            case _:
                continue
        if shut is not None:
            yield (shut.lineno, shut.col_offset), (shut.end_lineno, shut.end_col_offset)


def _places(node: ast.AST, inside: str, body: tuple[int, ...] = ()) -> Iterator[tuple[int, int, str, tuple[int, ...]]]:
    """(first line, last line, function, lines that run) of every statement; the innermost one of a line is the largest."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{inside}.{child.name}".lstrip(".")
            within = () if isinstance(child, ast.ClassDef) else tuple(range(child.body[0].lineno, (child.end_lineno or 0) + 1))
            first = min([child.lineno, *(each.lineno for each in child.decorator_list)])
            yield first, child.end_lineno or first, name, within  # decorators and defaults: the lines of the body
            yield from _places(child, name, within)
        elif isinstance(child, ast.stmt):
            header = getattr(child, "body", None)
            last = header[0].lineno - 1 if header else child.end_lineno or child.lineno
            yield child.lineno, child.end_lineno or 0, inside, tuple(range(child.lineno, max(last, child.lineno) + 1)) if body else ()
            yield from _places(child, inside, body)
        elif not isinstance(child, ast.expr):
            yield from _places(child, inside, body)  # the handlers of a try, the cases of a match
