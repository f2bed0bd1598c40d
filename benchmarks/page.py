"""The tables of docs/performance.md and of the guides, from results/*.json alone.

The text between `<!-- bench SIZE CASE -->` and `<!-- end -->` is regenerated: all tables and bounds of a case. With a table's title after
CASE, that table alone. A test compares, so no figure there is typed in or out of date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
DOCS = FOLDER.parent / "docs"
PAGE = DOCS / "performance.md"
_BLOCK = re.compile(r"(<!-- bench (?P<size>\w+) (?P<case>\w+)(?: (?P<title>[^>]+?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def render(page: str, results: Path = RESULTS) -> str:
    """The page with all of its blocks regenerated."""
    return _BLOCK.sub(lambda block: f"{block[1]}{make(block['size'], block['case'], block['title'], results)}\n{block[5]}", page)


def write() -> None:
    """All pages that have blocks."""
    for page in DOCS.glob("*.md"):
        before = page.read_text(encoding="utf-8")
        if (after := render(before)) != before:
            page.write_text(after, encoding="utf-8")


def make(size: str, case: str, title: str | None, results: Path = RESULTS) -> str:
    """One block.

    Raises:
        KeyError: No such table.
    """
    file = results / f"{size}.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if case not in found:
        how = {"cpu": "benchmarks", "cuda": "benchmarks.gpu"}[size]
        return f"(Not measured yet: `python -m {how} {case}` does.)"
    if title is None:
        return tables_of(case, found)
    return table({one["title"]: one for one in found[case]["tables"]}[title]["rows"])


def tables_of(case: str, results: Mapping[str, Any]) -> str:
    """All tables of a case, its bounds, and where they were measured."""
    found = results[case]
    parts = [_machine(found["machine"]), found["about"]]
    for one in found["tables"]:
        parts += [f"**{one['title']}**", table(one["rows"]), *([one["note"]] if one["note"] else [])]
    if found["checks"]:
        parts += ["**Bounds**", table([_check(check) for check in found["checks"]])]
    return "\n\n".join(parts)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown, with every column that any of them has; "limit" comes last."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "limit"]
    columns += ["limit"] * any("limit" in row for row in rows)
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join(lines + [f"| {' | '.join(_cell(row.get(name)) for name in columns)} |" for row in rows])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):  # a spread
        return f"{_number(value['median'])} ({_number(value['least'])} to {_number(value['most'])})"
    return value if isinstance(value, str) else _number(value)


def _number(value: float) -> str:
    """Three digits that count; whole numbers whole."""
    if isinstance(value, int):
        return f"{value:,}"
    power = int(f"{value:.2e}".partition("e")[2])
    return f"{value:,.{max(0, 2 - power)}f}"


def _check(check: dict[str, Any]) -> dict[str, Any]:
    bound = f"at most {check['most']:g}" if check["most"] is not None else f"at least {check['least']:g}"
    verdict = "holds" if check["holds"] else "MISSED" if check["must"] else "aim missed"
    return {"what": check["what"], "measured": check["value"], "bound": bound, "": verdict}


def _machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    commit = (machine["commit"] or "no repository")[:12] + (" and changes" if machine["changed"] else "")
    where = machine["gpu"] or machine["cpu"]
    return (
        f"{where}; {versions}; commit {commit}; {machine['date'][:10]}, {machine['seconds']:.0f} s; load {machine['load']} before and "
        f"{machine['load_after']} after, this run included."
    )
