"""Text generation from prompts, with a KV cache, streamed in pieces.

    generate_text     one prompt; with a `PrefixCache`, only what is new of it is read
    generate_batch    several at a time

Works for recursive models and, for comparison, for plain ones of transformers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList

from ..errors import UserError
from ..network.decoding_recursive_llm import rotary_limit
from ..utils.models import evaluating, without_donor_settings
from .early_exit import applications
from .options import Sampling
from .prefix_cache import PrefixCache
from .prompt import EncodedPrompt, check_ids, encode_prompt, end_tokens
from .streaming import Finish, Row, Rows


@dataclass(frozen=True)
class Generated:
    """One continued prompt.

    Args:
        text: The completion without the prompt.
        prompt_ids, token_ids: Tokens of the prompt and of the completion. The last one may be an end token, which has no text; a stop
            string is in the tokens, but not in the text.
        finish_reason: `stop` at an end token or stop string, `length` at max_new_tokens, `interrupted` by `should_stop`.
        cycles: With early exit, the exit cycle of each generated token; else None.
        of_cycles: Cycles at full depth; 0 for a plain model.
        applications, plain_applications: With early exit, layer applications for the generated tokens, and those at full depth.
        drafted, accepted, undrafted: With self-speculation, tokens drafted, accepted, and made without a draft while drafts were slower.
            The rows of a batch draft together: their counts are given with the first, and the others have 0.
        seconds, first_token_seconds: Wall-clock time of the text, prefill included, and of its first token; in a batch those of the batch.
    """

    prompt: str
    text: str
    prompt_ids: list[int]
    token_ids: list[int]
    finish_reason: Finish
    cycles: tuple[int, ...] | None = None
    of_cycles: int = 0
    applications: int | None = None
    plain_applications: int | None = None
    drafted: int | None = None
    accepted: int | None = None
    undrafted: int | None = None
    seconds: float = field(default=0.0, compare=False)
    first_token_seconds: float = field(default=0.0, compare=False)


def generate_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | EncodedPrompt | Sequence[int],
    sampling: Sampling | None = None,
    *,
    seed: int | None = None,
    on_text: Callable[[str], object] | None = None,
    should_stop: Callable[[], bool] | None = None,
    memory: PrefixCache | None = None,
    ends: Sequence[int] = (),
) -> Generated:
    """Continue a prompt.

    Args:
        model: A recursive model, or any causal language model of transformers. Its training mode is restored afterwards.
        prompt: Text, an `EncodedPrompt`, or token ids, which are used as they are.
        sampling: None is the defaults of `Sampling`.
        seed: Makes sampling repeatable without touching torch's global random state (cpu and cuda); None uses the global state.
        on_text: Called with each piece of text as soon as it is final; a character whose bytes span tokens comes whole. The pieces
            joined are `Generated.text`.
        should_stop: Called after each token; True ends the text there.
        memory: Prefix cache of the conversation that the prompt continues. Greedy text is the same with and without; see `PrefixCache`.
        ends: End tokens beside those of the model and the tokenizer.

    Raises:
        UserError: An empty prompt, a value out of range, more tokens than the model has positions, a tokenizer of another model.
    """
    sampling = sampling or Sampling()
    sampling.validate()
    if isinstance(prompt, str):
        prompt = encode_prompt(model, tokenizer, prompt, sampling.max_new_tokens)
    elif not isinstance(prompt, EncodedPrompt):
        check_ids(model, prompt, sampling.max_new_tokens)
        prompt = EncodedPrompt(str(tokenizer.decode(list(prompt))), list(prompt))
    ids = prompt.ids
    row = Row(tokenizer, ids, {*end_tokens(model, tokenizer), *ends}, sampling.stop, on_text)
    cache = None if memory is None else memory.lookup(model, ids, sampling.resolved(model))
    output, seconds = _write(model, tokenizer, [row], sampling, seed, should_stop, cache, keeps_cache=memory is not None)
    if memory is not None:
        memory.store(model, output.sequences[0].tolist(), sampling.resolved(model), output.past_key_values)
    return _results(model, [prompt.text], [row], sampling, output, seconds)[0]


def generate_batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | EncodedPrompt],
    sampling: Sampling | None = None,
    *,
    seed: int | None = None,
    ends: Sequence[int] = (),
) -> list[Generated]:
    """Continue several prompts as one batch; greedy texts are those of `generate_text`.

    Args:
        ends: As in `generate_text`.
        seed: As in `generate_text`. Sampled texts depend on the composition of the batch.

    Raises:
        UserError: As `generate_text`.
    """
    sampling = sampling or Sampling()
    sampling.validate()
    if not prompts:
        return []
    stops = {*end_tokens(model, tokenizer), *ends}
    new = sampling.max_new_tokens
    encoded = [encode_prompt(model, tokenizer, prompt, new) if isinstance(prompt, str) else prompt for prompt in prompts]
    results: dict[int, Generated] = {}
    for group in _groups(model, encoded, new):
        rows = [Row(tokenizer, encoded[i].ids, stops, sampling.stop) for i in group]
        output, seconds = _write(model, tokenizer, rows, sampling, seed)
        results |= dict(zip(group, _results(model, [encoded[i].text for i in group], rows, sampling, output, seconds), strict=True))
    return [results[i] for i in range(len(encoded))]


def _groups(model: Any, prompts: Sequence[EncodedPrompt], new: int) -> list[list[int]]:
    """Indices of prompts that may share a batch: one whose rotary angles depend on the longest text of a pass runs alone."""
    limit = rotary_limit(model.config)
    alone = [i for i, prompt in enumerate(prompts) if limit is not None and len(prompt.ids) + new > limit]
    return [group for group in ([i for i in range(len(prompts)) if i not in alone], *([i] for i in alone)) if group]


def _check_rotary_limit(model: Any, width: int, sampling: Sampling) -> None:
    limit = rotary_limit(model.config)
    if sampling.draft_cycles is not None and limit is not None and width + sampling.max_new_tokens > limit:
        raise UserError(
            f"--draft_cycles: the rotary embedding of this {model.config.model_type} changes with the length of the text beyond {limit} "
            f"tokens, so drafts cannot be verified there; expected prompt and --max_new_tokens of at most {limit} tokens together, got "
            f"{width} and {sampling.max_new_tokens}"
        )


def _write(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    sampling: Sampling,
    seed: int | None,
    should_stop: Callable[[], bool] | None = None,
    cache: Any = None,
    keeps_cache: bool = False,
) -> tuple[Any, dict[str, float]]:
    """Generate into the rows; returns the output of `generate`, and the seconds of `Generated`. Prompts are left-padded.

    Args:
        keeps_cache: Whether a conversation goes on with the cache afterwards, which a static one of this text's length cannot.
    """
    ends = sorted(rows[0].ends)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (*ends, 0)[0]
    width = max(len(row.prompt_ids) for row in rows)
    missing = [width - len(row.prompt_ids) for row in rows]
    batch = torch.tensor([[pad] * gap + row.prompt_ids for gap, row in zip(missing, rows, strict=True)], device=model.device)
    mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in missing], device=model.device)
    criterion, start = Rows(rows, width, should_stop), time.perf_counter()
    _check_rotary_limit(model, width, sampling)
    static = cache is None and not keeps_cache and sampling.uses_static_cache(model.device) and rotary_limit(model.config) is None
    config = sampling.as_transformers(ends, pad, static)
    with evaluating(model), without_donor_settings(model), _seeded(seed, model.device):
        output = model.generate(
            batch,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([criterion]),
            **({} if cache is None else {"past_key_values": cache}),
            **sampling.generate_kwargs(model),
        )
    criterion.close("length")
    end = time.perf_counter()
    return output, {"seconds": end - start, "first_token_seconds": (criterion.first_at or end) - start}


def _results(
    model: Any, prompts: Sequence[str], rows: Sequence[Row], sampling: Sampling, output: Any, seconds: dict[str, float]
) -> list[Generated]:
    results = []
    width = max(len(row.prompt_ids) for row in rows)
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        spent: dict[str, Any] = dict(seconds)
        if sampling.criterion is not None:
            # the token at t was predicted from the position before it
            used = output.past_key_values.cycles_used[:, width - 1 : width - 1 + len(row.token_ids)]
            # a batch goes on until its last row has halted
            spent |= _spent_on(model, used[index].tolist(), used.max(dim=0).values.tolist(), sampling)
        if sampling.draft_cycles is not None:
            spent |= {name: int(getattr(output, name)) if index == 0 else 0 for name in ("drafted", "accepted", "undrafted")}
        results.append(Generated(prompt, row.text, row.prompt_ids, row.token_ids, row.finish or "length", **spent))
    return results


def _spent_on(model: Any, cycles: list[int], computed: list[int], sampling: Sampling) -> dict[str, Any]:
    of = sampling.cycles(model)
    plain = len(cycles) * model.config.depth(of)
    cost = sum(applications(model.config, computed, sampling.halt))
    return {"cycles": tuple(cycles), "of_cycles": of, "applications": cost, "plain_applications": plain}


def decoding_stats(*generated: Generated) -> str:
    """One line of statistics on early exit or self-speculation over these texts; empty if neither was on."""
    cycles = [cycle for one in generated for cycle in one.cycles or ()]
    if cycles:
        cost, plain = (sum(getattr(one, name) or 0 for one in generated) for name in ("applications", "plain_applications"))
        saved = f"{1 - cost / plain:.0%} of layer applications saved"
        if cost > plain:  # with a coda, evaluating the criterion can cost more than it saves
            saved = f"{cost / plain - 1:.0%} more layer applications than without halting"
        return f"halting: {sum(cycles) / len(cycles):.1f} of {generated[0].of_cycles} cycles per token, {saved}"
    drafted, accepted, undrafted = (sum(getattr(one, name) or 0 for one in generated) for name in ("drafted", "accepted", "undrafted"))
    off = f"; {undrafted} tokens without drafts, to compare or because drafts were slower" if undrafted else ""
    return f"self-speculation: {accepted} of {drafted} drafted tokens accepted ({accepted / drafted:.0%}){off}" if drafted else ""


def speed_stats(generated: Generated) -> str:
    """One line: number of tokens, tokens per second after the first, and seconds to the first, which the prefill takes."""
    count = len(generated.token_ids)
    rate = (count - 1) / max(1e-9, generated.seconds - generated.first_token_seconds)
    speed = f", {rate:.1f} tokens per second" if count > 1 else ""
    return f"speed: {count} token{'' if count == 1 else 's'}{speed}, the first after {generated.first_token_seconds:.2f} s"


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
