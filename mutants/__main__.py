"""Mutation testing of an area: plants faults in its files, runs its tests, and writes report.json and report.md; README.md says how.

    python -m mutants objective --sample 60     `make mutants AREA=objective SAMPLE=60`

Exit status 1 if too many survive.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import platform
import queue
import random
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from .planting import Mutant, changed, draw, possible
from .worker import TIMEOUT, Order, Worker

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
AIM = 0.1  # largest share of the mutants without an excuse that may survive
KEY = ("file", "function", "before", "after")  # what an excuse is known by


def main() -> int:
    areas = tomllib.loads((HERE / "areas.toml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("area", choices=[*areas, "all"], help="area of areas.toml")
    parser.add_argument("--sample", type=int, default=0, help="mutants to draw per area; 0 takes all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument(
        "--minutes", type=float, default=0, help="stop after this many minutes; the remaining mutants count as not run. 0: no limit"
    )
    args, missed = parser.parse_args(), False
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    for name in areas if args.area == "all" else [args.area]:
        record = judge(ROOT, name, areas[name], excuses(), args.sample, args.seed, args.jobs, deadline)
        record |= _where() | {"seed": args.seed, "jobs": args.jobs}
        path = HERE / "report.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        found = {area: (found | {name: record})[area] for area in areas if area == name or area in found}
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (HERE / "report.md").write_text(page(found), encoding="utf-8")
        print(row(name, record), flush=True)
        missed = missed or record["share"] > AIM
    return int(missed)


def excuses(path: Path = HERE / "excused.toml") -> dict[tuple[str, ...], str]:
    return {tuple(one[key] for key in KEY): one["reason"] for one in tomllib.loads(path.read_text(encoding="utf-8")).get("excused", [])}


def judge(
    root: Path, name: str, area: Mapping[str, list[str]], excused: Mapping[tuple[str, ...], str], sample: int, seed: int = 0, jobs: int = 1,
    deadline: float = float("inf"),
) -> dict[str, Any]:  # fmt: skip
    """Run an area's tests against its mutants, in copies of the tree: `root` is only read. Returns the counts and the survivors."""
    sources = {file: (root / file).read_text(encoding="utf-8") for file in area["files"]}
    every = [each for file, source in sources.items() for each in possible(file, source)]
    drawn, idle, start = draw(every, sample, random.Random(f"{seed} {name}")), queue.SimpleQueue[Worker](), time.monotonic()
    with ExitStack() as stack:
        workers = [stack.enter_context(closing(Worker(root, area["tests"]))) for _ in range(jobs)]
        reach = _reach(root, name, area, workers[0])
        print(f"{name}: {len(drawn)} of {len(every)} mutants; {len(reach['seconds'])} tests, {sum(reach['seconds'].values()):.0f} s")

        def warm(worker: Worker) -> None:
            worker.ask(Order(warm=tuple(reach["imports"])))
            idle.put(worker)

        def one(mutant: Mutant) -> dict[str, Any]:
            source, text = sources[mutant.file], mutant.plant(sources[mutant.file])
            before, after = changed(source, text or source)
            found: dict[str, Any] = {
                "file": mutant.file,
                "function": mutant.function,
                "line": mutant.line,
                "before": before,
                "after": after,
            }
            if text is None or time.monotonic() > deadline:
                return found | {"outcome": "no program" if text is None else "not run"}
            worker, began = idle.get(), time.monotonic()
            try:
                outcome = _outcome(worker, mutant, text, reach)
            finally:
                idle.put(worker)
            if outcome == "survived" and (reason := excused.get(tuple(found[key] for key in KEY))):
                outcome, found["reason"] = "excused", reason
            print(f"  {outcome:9} {mutant.file}:{mutant.line}  {before}  ->  {after or '(gone)'}", flush=True)
            return found | {"outcome": outcome, "seconds": time.monotonic() - began}

        with ThreadPoolExecutor(jobs) as pool:
            for worker in workers:
                pool.submit(warm, worker)
            rows = list(pool.map(one, drawn))
    counts = Counter(each["outcome"] for each in rows)
    run = [each for each in rows if "seconds" in each]
    counted, survived = len(run) - counts["excused"], counts["survived"]
    return {
        "possible": len(every), "drawn": len(drawn), "no_program": counts["no program"], "not_run": counts["not run"], "planted": len(run),
        "caught": counts["caught"] + counts["timeout"], "timeouts": counts["timeout"], "excused": counts["excused"], "survived": survived,
        "share": survived / max(1, counted), "interval": _interval(survived, counted) if 0 < len(run) < len(every) else None,
        "seconds": round(time.monotonic() - start), "seconds_each": round(sum(each.pop("seconds") for each in run) / max(1, len(run)), 2),
        "mutants": [each for each in run if each["outcome"] in ("survived", "excused")],
    }  # fmt: skip


def _outcome(worker: Worker, mutant: Mutant, text: str, reach: Mapping[str, Any]) -> str:
    for batch in _batches(mutant, reach):
        limit = 30 + 10 * sum(reach["seconds"][test] for test in batch)
        code = worker.ask(Order(tuple(batch), limit, mutant.file, text))
        if code == pytest.ExitCode.USAGE_ERROR:  # the mutant changed the names of parametrised tests: take their whole files
            code = worker.ask(Order(tuple(dict.fromkeys(test.split("::")[0] for test in batch)), 10 * limit, mutant.file, text))
        if code:
            return "timeout" if code == TIMEOUT else "caught"
    return "survived"


def _batches(mutant: Mutant, reach: Mapping[str, Any]) -> Iterator[list[str]]:
    """The tests that run the mutant's lines, file by file, the quickest first; then all others: what is made once for several tests, in
    fixtures and caches, is charged to the first of them, and what tests do in other processes to none."""
    seconds, lines = reach["seconds"], reach["lines"][mutant.file]
    anywhere = {test for tests in lines.values() for test in tests}
    first = ({test for line in mutant.lines for test in lines.get(str(line), ())} or anywhere) & seconds.keys()
    files: dict[str, list[str]] = {}
    for test in sorted(first, key=seconds.__getitem__):
        files.setdefault(test.split("::")[0], []).append(test)
    yield from sorted(files.values(), key=lambda batch: sum(seconds[test] for test in batch))
    if rest := [test for test in seconds if test not in first]:
        yield rest


def _reach(root: Path, name: str, area: Mapping[str, list[str]], worker: Worker) -> dict[str, Any]:
    """Which test runs which lines: measured once for each state of the code, and kept in `.mutants`."""
    sources = [root / "pyproject.toml", *sorted(path for folder in ("recursify", "tests") for path in (root / folder).rglob("*.py"))]
    key = hashlib.sha256(repr([area, *(path.read_bytes() for path in sources if path.exists())]).encode()).hexdigest()
    kept = root / ".mutants" / f"{name}.json"
    if kept.exists() and (found := json.loads(kept.read_text(encoding="utf-8")))["key"] == key:
        return found
    if code := worker.ask(Order(tuple(area["tests"]), 3600, measured=tuple(area["files"]))):
        raise RuntimeError(f"{name}: its tests must pass before faults are planted (pytest gave {code})\n{worker.log()}")
    found = json.loads(json.dumps(worker.reach())) | {"key": key}
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def _interval(survived: int, counted: int) -> list[float]:
    """Wilson's 95% interval of a share that was found in a sample."""
    share, n, z = survived / max(1, counted), max(1, counted), 1.96
    spread = z * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5
    return [max(0.0, (share + z * z / (2 * n) + sign * spread) / (1 + z * z / n)) for sign in (-1, 1)]


def _where() -> dict[str, str]:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD") + (" with changes" if git("status", "--porcelain", "--", "recursify", "tests") else "")
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers", "pytest", "hypothesis", "cosmic-ray")]
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": date, "commit": commit, "versions": ", ".join([f"Python {platform.python_version()}", *versions])}


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """report.md."""
    lines = ["# Faults planted, and what the tests noticed", "", "Made by `make mutants`; README.md says how.", ""]
    lines += ["| area | planted, of possible | caught | by timeout | excused | survived | share, 95% interval | aim |", "|" + "---|" * 8]
    lines += [row(name, record) for name, record in found.items()]
    for name, record in found.items():
        drawn = f"A sample of {record['drawn']}, seed {record['seed']}" if record["drawn"] < record["possible"] else "All that are possible"
        lines += ["", f"## {name}", "", f"{record['date']}, commit {record['commit']}; {record['versions']}.", ""]
        lines += [f"{drawn}. Not run for want of time: {record['not_run']}. Left the same program, or none: {record['no_program']}."]
        lines += [f"{record['seconds']} s in {record['jobs']} processes, {record['seconds_each']} s of one of them per mutant."]
        for one in record["mutants"]:
            what = f"excused: {one['reason']}" if one["outcome"] == "excused" else "survived"
            diff = [f"{sign} {text}" for sign, key in (("-", "before"), ("+", "after")) for text in one[key].splitlines()]
            lines += ["", f"`{one['file']}:{one['line']}` `{one['function'] or 'module'}`, {what}", "", "```diff", *diff, "```"]
    return "\n".join(lines) + "\n"


def row(name: str, record: Mapping[str, Any]) -> str:
    interval = ", {:.0%} to {:.0%}".format(*record["interval"]) if record["interval"] else ""
    counts = [f"{record['planted']}, of {record['possible']}", *(record[key] for key in ("caught", "timeouts", "excused", "survived"))]
    verdict = "met" if record["share"] <= AIM else "missed"
    return f"| {name} | {' | '.join(map(str, counts))} | {record['share']:.0%}{interval} | at most {AIM:.0%}: {verdict} |"


if __name__ == "__main__":
    sys.exit(main())
