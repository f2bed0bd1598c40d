"""The server under load: valid requests, among clients that disconnect or send too long prompts, no JSON, unknown fields, absurd values.

Units: bytes, seconds.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from .case import Bench, Check, Table, case
from .measure import say
from .record import ROOT

CLIENTS = 16
DEPTHS = (1, 3)
GROWTH_BOUND = 0.05  # of resident memory, from the first tenth of the load to its end
MAX_BODY = 100_000
RUNNING, QUEUE = 6, 4  # so few that requests wait, and some are turned away
WRITTEN = "recursify_completion_tokens_total"
PROMPTS = (
    "The old man", "In the morning", "She said that", "There was once", "My dear sir,", "It was a dark", "The captain of", "When I was",
    "He looked at", "The king had", "A long time", "They went into", "Nothing could", "I do not", "The house on", "At last the",
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """How long, and how many tokens a text has at most."""

    seconds: float = 60.0
    tokens: int = 40


@dataclass(frozen=True)
class Text:
    """A text to ask for; what it should be is known from the client alone."""

    prompt: str
    depth: int
    chat_seed: int | None  # None is greedy

    def body(self, tokens: int) -> dict[str, Any]:
        choice = {"temperature": 0.0} if self.chat_seed is None else {"temperature": 1.0, "top_p": 0.95, "seed": self.chat_seed}
        return {"prompt": self.prompt, "max_tokens": tokens, "H_cycles": self.depth, **choice}


# What a client may do


class Client:
    """One of the sixteen."""

    def __init__(self, number: int, url: str, right: dict[Text, str], sizes: Sizes, tally: Tally):
        self.rng = random.Random(number)
        self.http = httpx.Client(base_url=url, timeout=60)
        self.right, self.sizes, self.tally = right, sizes, tally
        self.texts = list(right)
        self.kinds: dict[Callable[[], None], float] = {
            self.whole: 6, self.streamed: 6, self.vanish_streaming: 2, self.vanish_waiting: 2, self.too_long: 1, self.too_long_in_pieces: 1,
            self.no_json: 1, self.unknown_field: 1, self.absurd: 1, self.other_depth: 1, self.other_path: 1,
        }  # fmt: skip

    def run(self, until: float) -> None:
        while time.monotonic() < until:
            (kind,) = self.rng.choices(list(self.kinds), list(self.kinds.values()))
            try:
                kind()
            except httpx.HTTPError as error:
                self.tally.add(kind.__name__, f"{type(error).__name__}")
        self.http.close()

    def whole(self) -> None:
        text = self.rng.choice(self.texts)
        answer = self._post("whole", text.body(self.sizes.tokens))
        if answer is not None:
            self._judge("whole", answer.json()["choices"][0]["text"], text)

    def streamed(self) -> None:
        text = self.rng.choice(self.texts)
        with self.http.stream("POST", "/v1/completions", json={**text.body(self.sizes.tokens), "stream": True}) as answer:
            if answer.status_code != 200:
                self._seen("streamed", answer.status_code)
                return
            events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        whole = events[-1] == "[DONE]"
        self._judge("streamed", "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) if whole else "", text)

    def vanish_streaming(self) -> None:
        with self.http.stream("POST", "/v1/completions", json={"prompt": "Once", "max_tokens": 500, "stream": True}) as answer:
            lines = answer.iter_lines()
            for _ in range(self.rng.randint(0, 4)):
                next(lines, None)
            self._seen("vanish_streaming", answer.status_code, {200})

    def vanish_waiting(self) -> None:
        try:
            body = {"prompt": "Once", "max_tokens": 500, "n": 2}
            answer = self.http.post("/v1/completions", json=body, timeout=self.rng.uniform(0.02, 0.5))
            self._seen("vanish_waiting", answer.status_code, set())
        except httpx.TimeoutException:
            self.tally.add("vanish_waiting", "gone")

    def too_long(self) -> None:
        self._bad("too_long", 413, content=json.dumps({"prompt": "x" * 3 * MAX_BODY}))

    def too_long_in_pieces(self) -> None:
        self._bad("too_long_in_pieces", 413, content=(b"x" * 8192 for _ in range(3 * MAX_BODY // 8192)))

    def no_json(self) -> None:
        self._bad("no_json", 400, content=self.rng.choice([b"", b"{", b"[[", b"\xff\xff", b'{"prompt": NaN}']))

    def unknown_field(self) -> None:
        self._bad("unknown_field", 400, json={"prompt": "a", "temprature": 1})

    def absurd(self) -> None:
        values: list[dict[str, Any]] = [
            {"max_tokens": -1}, {"n": 10**6}, {"temperature": 1e9}, {"top_p": -1}, {"prompt": [1] * 10**4},
        ]  # fmt: skip
        self._bad("absurd", 400, json={"prompt": "a", **self.rng.choice(values)})

    def other_depth(self) -> None:
        self._bad("other_depth", 400, json={"prompt": "a", "H_cycles": 9})

    def other_path(self) -> None:
        self._bad("other_path", 404, path="/v1/nothing", json={})

    def _bad(self, kind: str, expected: int, path: str = "/v1/completions", **what: Any) -> None:
        answer = self.http.post(path, **what)
        self._seen(kind, answer.status_code, {expected})

    def _post(self, kind: str, body: dict[str, Any]) -> httpx.Response | None:
        answer = self.http.post("/v1/completions", json=body)
        if answer.status_code == 200:
            return answer
        self._seen(kind, answer.status_code)
        return None

    def _judge(self, kind: str, found: str, text: Text) -> None:
        self.tally.add(kind, "right" if found == self.right[text] else "wrong")

    def _seen(self, kind: str, status: int, expected: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        """429 is fair of anyone."""
        self.tally.add(kind, str(status) if status in {429, *expected} else f"unexpected {status}")
        if status == 429:
            time.sleep(0.2)


class Tally:
    """Outcomes of all requests."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.lock = threading.Lock()

    def add(self, kind: str, end: str) -> None:
        with self.lock:
            self.counts[kind, end] += 1

    def to_dict(self) -> dict[str, dict[str, int]]:
        kinds = sorted({kind for kind, _ in self.counts})
        return {kind: {end: n for (of, end), n in sorted(self.counts.items()) if of == kind} for kind in kinds}


# The server


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a server, and its process."""
    with serving(converted(folder)) as (url, process):
        yield url, process
        stop(process)


def converted(folder: Path) -> Path:
    """A small model of which every depth says something else."""
    donor, model = ROOT / "recursify" / "demo" / "donors" / "prose", folder / "model.pt"
    words = ["convert", "--qwen_model", str(donor), "--keep_donor", "--L_layers", "2", "--L_cycles", "1", "--gain", "0.2"]
    recursify([*words, "--output_path", str(model)])
    return model


@contextmanager
def serving(model: Path, *more: str, port: int = 0, stderr: Any = None) -> Iterator[tuple[str, psutil.Popen]]:
    """The address of a server, and its process, which is killed at the end if it still runs; `more` are flags."""
    words = ["serve", "--checkpoint", str(model), "--depths", *map(str, DEPTHS), "--port", str(port), "--dtype", "float32"]
    words += ["--max_body_bytes", str(MAX_BODY), "--max_running", str(RUNNING), "--max_queue", str(QUEUE), *more]
    command = [sys.executable, "-m", "recursify", *words]
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT)
    try:
        found = next((m for line in process.stdout if (m := re.match(r"listening on (\S+);", line))), None)
        assert found is not None, "the server did not start"
        yield found[1], process
    finally:
        if process.is_running():
            process.kill()
        process.wait()
        process.stdout.close()


def stop(process: psutil.Popen) -> None:
    """End a server as its owner does."""
    process.terminate()
    assert process.wait(60) == 0, "the server did not end well"


def recursify(words: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "recursify", *words], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def gauges(url: str) -> dict[str, float]:
    """Every value of /metrics."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def total(found: dict[str, float], name: str) -> int:
    return int(sum(value for key, value in found.items() if key.split("{")[0] == name))


def resources(process: psutil.Process) -> dict[str, int]:
    return {"resident": process.memory_info().rss, "threads": process.num_threads(), "files": process.num_fds()}


def settled(url: str) -> dict[str, float]:
    """The metrics once no request is running."""
    while total(found := gauges(url), "recursify_running") + total(found, "recursify_queued"):
        time.sleep(0.1)
    time.sleep(0.5)  # the managers' own turn
    return gauges(url)


# What is made of it


@dataclass(frozen=True)
class Load:
    """What was measured.

    Args:
        right: Every text, as the client alone got it.
        took: Seconds that the clients had.
        alone, together: Tokens per second of one client, and of all of them.
        before, after: `resources` of the server.
        gauges: Of /metrics, when all is answered.
    """

    right: dict[Text, str]
    took: float
    alone: float
    together: float
    tally: Tally
    before: dict[str, int]
    after: dict[str, int]
    gauges: dict[str, float]


@case("serving", "The server under load", sizes=("cpu",), asked=True)
def measure(bench: Bench) -> Iterator[Table | Check]:
    """The shipped donor with 2 of its 8 layers looped, and gains that make every depth say something else, is served at H_cycles 1 and 3 by
    `recursify serve` in a process of its own, in float32. One client asks for every text that will be asked for; then sixteen at once, each
    in a thread, take by chance, from a fixed seed, what to do next, for a minute. A text is wrong if it is not, letter by letter, the one
    that the client alone got. At each depth 6 texts are written at once and 4 may wait: what the full queue turns away (429) is counted.
    Memory is that of the server's process: after the texts for the client alone and a first tenth of the load, and at the end, when all is
    answered."""
    sizes = bench.pick(Sizes(seconds=1.0, tokens=8), Sizes(), Sizes())
    found = put_under_load(sizes)
    kinds = found.tally.to_dict()
    came = [{"what clients did": kind.replace("_", " "), "what came of it": _ends(ends)} for kind, ends in kinds.items()]
    different = f"{len(found.right)} texts of at most {sizes.tokens} tokens, {len(set(found.right.values()))} of them different."
    yield Table("What clients did", came, different)
    requests, cancelled = sum(found.tally.counts.values()), sum(int(n) for key, n in found.gauges.items() if 'end="cancelled"' in key)
    together = {"tokens per second": found.together, "requests per second": requests / found.took, "texts cancelled": cancelled}
    yield Table("Speed", [{"clients": 1, "tokens per second": found.alone}, {"clients": CLIENTS, **together}])
    blocks, free = (total(found.gauges, f"recursify_cache_blocks{which}") for which in ("", "_free"))
    yield Table("The server's process", [*_before_and_after(found), {"what": f"free blocks of {blocks}", "after": free}])
    yield from bounds(kinds, blocks - free, found.after["resident"] / found.before["resident"] - 1)


def put_under_load(sizes: Sizes) -> Load:
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as (url, process):
        texts = [Text(p, d, seed) for n, p in enumerate(PROMPTS) for d in DEPTHS for seed in (None, n)]
        say(f"{len(texts)} texts for a client alone")
        right = {}
        start = time.monotonic()
        for text in texts:
            answer = httpx.post(f"{url}/v1/completions", json=text.body(sizes.tokens), timeout=60).json()
            right[text] = answer["choices"][0]["text"]
        alone = total(gauges(url), WRITTEN) / (time.monotonic() - start)
        say(f"{CLIENTS} clients for {sizes.seconds:g} seconds, after a tenth of it as a start")
        crowd(url, right, sizes, sizes.seconds / 10, Tally(), first=100)
        before, values = resources(process), settled(url)
        tally, start = Tally(), time.monotonic()
        crowd(url, right, sizes, sizes.seconds, tally)
        took, after = time.monotonic() - start, settled(url)
        together = (total(after, WRITTEN) - total(values, WRITTEN)) / took
        return Load(right, took, alone, together, tally, before, resources(process), after)


def crowd(url: str, right: dict[Text, str], sizes: Sizes, seconds: float, tally: Tally, first: int = 0) -> None:
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(CLIENTS) as pool:
        for done in [pool.submit(Client(first + n, url, right, sizes, tally).run, until) for n in range(CLIENTS)]:
            done.result()


def bounds(kinds: dict[str, dict[str, int]], lost: int, growth: float) -> Iterator[Check]:
    """
    Args:
        kinds: What came of what clients did.
        lost: Blocks of the caches.
        growth: Of resident memory, as a share.
    """
    ends = [(end, n) for kind in kinds.values() for end, n in kind.items()]
    fair = {"right", "wrong", "gone", "200", "400", "404", "413", "429"}
    yield Check("wrong texts", sum(n for end, n in ends if end == "wrong"), most=0)
    unfair = sum(n for end, n in ends if end not in fair)
    yield Check("answers of another status than is fair, and broken connections", unfair, most=0)
    yield Check("blocks of the caches that are not free afterwards", lost, most=0)
    yield Check("growth of resident memory", growth, most=GROWTH_BOUND)


def _ends(ends: dict[str, int]) -> str:
    return ", ".join(f"{n} {end}" for end, n in ends.items())


def _before_and_after(found: Load) -> list[dict[str, Any]]:
    before, after = found.before, found.after
    memory = {"what": "resident memory, MB", "before": before["resident"] / 1e6, "after": after["resident"] / 1e6}
    rest = {"threads": "threads", "files": "open files"}
    return [memory, *({"what": what, "before": before[key], "after": after[key]} for key, what in rest.items())]
