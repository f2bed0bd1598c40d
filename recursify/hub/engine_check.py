"""What an export says at each depth, for checking an engine that runs it.

    write(folder, model, tokenizer)   recursify_export.json: the shape of the model, and what it says to a short prompt at each depth
    compare(folder, url)              ask a running server with OpenAI's API for the same, and compare

The answers are greedy, of passes without a cache, so an engine with a fault in its cache differs from the second token on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, first_line
from ..utils.files import read_json
from ..utils.http import httpx

FILE, FORMAT = "recursify_export.json", "recursify-export/1"
PROMPT = "The quick brown fox jumps over the lazy dog, and then"
TOKENS, BEST = 8, 5  # of an answer; most likely tokens in each place
# Log-probabilities in nats. In 16 bits kernels round differently, and engines may choose another type than the file's.
TOLERANCES = {"float32": 1e-3}
LOW_PRECISION = 0.1
_KEYS = ("RECURSIFY_API_KEY", "OPENAI_API_KEY")
_SECONDS = 120.0


@dataclass(frozen=True)
class Answer:
    """How far an engine is from a recorded depth.

    Args:
        H_cycles: The recorded depth.
        worst: Largest difference of the log-probabilities of tokens, in nats.
        tokens: How many were compared: those before two tokens were as likely as each other.
    """

    H_cycles: int
    worst: float
    tokens: int


def write(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write the file into the folder of an export."""
    config = model.config
    ids = tokenizer(PROMPT, add_special_tokens=False).input_ids
    fields = {
        "format": FORMAT,
        "architectures": [type(model).__name__],
        **{
            name: getattr(config, name)
            for name in ("prelude_layers", "L_layers", "coda_layers", "H_cycles", "L_cycles", "injection", "lora_rank")
        },
        "num_physical_layers": config.physical_layers,
        "num_hidden_layers": config.num_hidden_layers,
        "slot_order": "prelude, coda, applications of the loop",
        "slots": _slots(config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompt": PROMPT,
        "prompt_ids": ids,
        "depths": [_answer(model, ids, H) for H in range(config.H_cycles + 1)],
    }
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
    (folder / FILE).write_text("{\n " + ",\n ".join(lines) + "\n}\n", encoding="utf-8")


def _slots(config: Any) -> list[int]:
    """The physical layer of each slot of the cache."""
    P, K, C = config.prelude_layers, config.L_layers, config.coda_layers
    layers = list(range(config.physical_layers))
    return layers[:P] + layers[P + K :] + layers[P : P + K] * ((config.num_hidden_layers - P - C) // K)


@torch.no_grad()
def _answer(model: Any, prompt: Sequence[int], H_cycles: int) -> dict[str, Any]:
    """The greedy answer at a depth; for each of its tokens the most likely ones, `[id, log-probability in nats]`, the best first."""
    ids, top = list(prompt), []
    for _ in range(TOKENS):
        logits = model(torch.tensor([ids], device=model.device), H_cycles=H_cycles, use_cache=False, logits_to_keep=1).logits
        best = logits[0, -1].float().log_softmax(-1).topk(BEST)
        top.append([[token, round(value, 6)] for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)])
        ids.append(top[-1][0][0])
    return {"H_cycles": H_cycles, "ids": ids[len(prompt) :], "top_logprobs": top}


def compare(folder: str, url: str, cycles: Sequence[int] = (), say: Callable[[str], None] = print) -> list[Answer]:
    """Compare a running server with the file of an export.

    A server that lists its depths in /v1/models, as `recursify serve` does, is asked for each of those that are recorded. Any other has
    one depth that it does not tell: it is compared with each.

    Args:
        url: Of the server, with or without `/v1`.
        cycles: Depths that must be served; any one where empty.

    Raises:
        UserError: No such file, no answer, or log-probabilities that differ.
    """
    told = _read(folder)
    depths = {each["H_cycles"]: each for each in told["depths"]}
    if unknown := sorted(set(cycles) - set(depths)):
        raise UserError(f"--cycles: expected some of {sorted(depths)}, which {folder} records, got {unknown}")
    base = url.rstrip("/").removesuffix("/v1")
    tolerance = TOLERANCES.get(told["dtype"], LOW_PRECISION)
    served = _request(base, "/v1/models")["data"][0]
    offered = (served.get("H_cycles") or {}).get("offered")
    body = {"model": served["id"], "prompt": told["prompt_ids"], "max_tokens": TOKENS, "temperature": 0, "logprobs": BEST}
    answers: list[Answer] = []
    for H in [None] if offered is None else [H for H in offered if H in (cycles or depths)]:
        found = _request(base, "/v1/completions", body if H is None else body | {"H_cycles": H})["choices"][0]["logprobs"]["token_logprobs"]
        answers += [_compared(depths[each], found, tolerance) for each in (depths if H is None else (H,))]
    good = [answer for answer in answers if answer.worst <= tolerance]
    expected = set(cycles) or ({answer.H_cycles for answer in answers} if offered is not None else set())
    missing = expected - {answer.H_cycles for answer in good}
    if missing or not good:
        raise UserError(_difference(url, answers, tolerance, sorted(missing), told["dtype"]))
    for answer in good:
        how = f"log-probabilities of {answer.tokens} tokens equal, the largest difference {answer.worst:.1e} nats"
        say(f"✓ {url} at H_cycles {answer.H_cycles}: {how}")
    return good


def _compared(depth: dict[str, Any], found: Sequence[float], tolerance: float) -> Answer:
    """Compare the log-probabilities of an answer's tokens, up to where rounding may have chosen another token."""
    worst, count = 0.0, 0
    for value, top in zip(found, depth["top_logprobs"], strict=False):  # an engine ends at an end token
        worst, count = max(worst, abs(value - top[0][1])), count + 1
        if top[0][1] - top[1][1] < 2 * tolerance:
            break
    return Answer(depth["H_cycles"], worst if count else float("inf"), count)


def _difference(url: str, answers: Sequence[Answer], tolerance: float, missing: Sequence[int], dtype: str) -> str:
    each = ", ".join(f"{answer.worst:.2g} at H_cycles {answer.H_cycles}" for answer in answers) or "no depth in common"
    wanted = f"H_cycles {', '.join(map(str, missing))}" if missing else "one of the recorded depths"
    return (
        f"--check: {url} differs from {FILE}: expected log-probabilities within {tolerance:g} nats at {wanted}, got differences of {each}; "
        f"serve this folder in its own dtype ({dtype}), at a depth that is recorded"
    )


def _read(folder: str) -> dict[str, Any]:
    path = Path(folder) / FILE
    if not path.is_file():
        raise UserError(
            f"--check: {folder}: has no {FILE}; name a folder that `recursify export` wrote with --checkpoint, or export it again"
        )
    told = read_json(path)
    if told.get("format") != FORMAT:
        raise UserError(f"--check: {path}: expected format {FORMAT}, got {told.get('format')!r}; export the model again")
    return told


def _request(base: str, route: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON that a server answers.

    Raises:
        UserError: It cannot be reached, refuses, or answers something else.
    """
    key = next((os.environ[name] for name in _KEYS if os.environ.get(name)), None)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(timeout=_SECONDS, headers=headers) as client:
            answer = client.get(base + route) if body is None else client.post(base + route, json=body)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise UserError(
            f"--check: {base}{route}: no answer ({first_line(error)}); expected the address of a running server with OpenAI's API, such as "
            "http://127.0.0.1:8000"
        ) from error
    if answer.status_code != 200:
        raise UserError(
            f"--check: {base}{route}: expected status 200, got {answer.status_code} ({answer.text[:200].strip()}); the key of a server is "
            f"read from {' or '.join(_KEYS)}"
        )
    try:
        return answer.json()
    except ValueError as error:
        raise UserError(f"--check: {base}{route}: expected JSON, got {answer.text[:80]!r}; is it a server with OpenAI's API?") from error
