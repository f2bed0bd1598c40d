"""The parts of the server by themselves: sampling, views of a model, settings, metrics, the start and the end of the process."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from recursify import RecursiveLLM
from recursify.checkpoints import checkpoint
from recursify.cli import main as cli
from recursify.conversion.convert import convert
from recursify.errors import UserError
from recursify.serving import ServeSettings, run
from recursify.serving.engine import Batcher, at_depth
from recursify.serving.metrics import Metrics, labelled
from recursify.serving.running import Stop
from recursify.serving.sampling import Choice, History, PerRequestSampling, choose, gumbel
from tests.support.served import PROMPTS, ids_of, speaking_model
from tests.support.tiny import make_tiny_tokenizer, tiny_donor

SIZES = {"cache_tokens": 2048, "batch_tokens": 48, "max_running": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return speaking_model(tmp_path_factory.mktemp("speaking"))


# --- sampling


def shares(logits: torch.Tensor, choice: Choice, draws: int = 40_000) -> torch.Tensor:
    """How often each token is drawn, over as many positions."""
    keys = [choice.key(position) for position in range(draws)]
    scores = choose(logits.expand(draws, -1), [choice] * draws, keys)
    return torch.bincount(scores.argmax(-1), minlength=logits.shape[-1]) / draws


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [
        (1.0, 1.0, 0), (0.5, 1.0, 0), (2.0, 1.0, 0), (1.0, 0.8, 0), (1.5, 0.5, 0), (1.0, 1e-9, 0),
        (1.0, 1.0, 3), (2.0, 1.0, 1), (2.0, 1.0, 10**30), (2.0, 0.7, 4),
    ],
)  # fmt: skip
def test_samples_follow_the_distribution(temperature: float, top_p: float, top_k: int) -> None:
    logits = torch.tensor([2.0, 1.5, 0.0, -1.0, 1.0, -4.0, 0.5])
    expected = (logits / temperature).softmax(-1)
    order = expected.argsort(descending=True)[: top_k or None]
    expected /= expected[order].sum()  # the nucleus is that of the top_k
    kept = [token for n, token in enumerate(order.tolist()) if n == 0 or expected[order[:n]].sum() < top_p]
    nucleus = torch.zeros_like(expected).index_copy(0, torch.tensor(kept), expected[kept])
    nucleus /= nucleus.sum()
    found = shares(logits, Choice(temperature=temperature, top_p=top_p, top_k=top_k, seed=5))
    assert (found[nucleus == 0] == 0).all()
    # five standard deviations of a share of so many draws
    assert ((found - nucleus).abs() <= 5 * (nucleus * (1 - nucleus) / 40_000).sqrt() + 1e-9).all()


def test_noise_is_gumbel_distributed_and_unique_per_key() -> None:
    noise = gumbel(torch.tensor([Choice(seed=1).key(p) for p in range(200)]), 500)
    assert abs(noise.mean().item() - 0.5772) < 0.02 and abs(noise.var().item() - torch.pi**2 / 6) < 0.05
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.3
    keys = {Choice(seed=s, index=i).key(p) for s in range(20) for i in range(5) for p in range(20)}
    assert len(keys) == 2000


def test_row_is_independent_of_the_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    choices = [Choice(temperature=0.5 + n, top_p=1 - n / 10, top_k=7 * (n % 3), seed=n) for n in range(6)]
    keys = [choice.key(3) for choice in choices]
    together = choose(logits, choices, keys)
    for n in range(6):
        assert torch.equal(choose(logits[n : n + 1], [choices[n]], [keys[n]])[0], together[n])


def request_of(choice: Choice, generated: tuple[int, ...] = (), name: str = "a", new: bool = True) -> Any:
    """What the manager knows of a sequence with the prompt 1, 2, 2."""
    state = SimpleNamespace(
        request_id=name,
        logit_processor_kwargs={"choice": choice},
        position_offset=4,
        initial_tokens=[1, 2, 2],
        generated_tokens=list(generated),
    )
    return SimpleNamespace(state=state, has_new_token=new)


def test_greedy_and_padding_rows_are_unchanged() -> None:
    hot = Choice(temperature=1.0, seed=3)
    sampler = PerRequestSampling()
    # the second is still read, so that its logits are not there: those of the third are in the second row
    sampler.prepare_tensor_args([request_of(Choice()), request_of(hot, new=False), request_of(hot)], torch.empty(0))
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    found = sampler(torch.empty(0), logits.clone(), torch.empty(0))
    assert torch.equal(found[[0, 2]], logits[[0, 2]])
    assert torch.equal(found[1:2], choose(logits[1:2], [hot], [hot.key(4)]))


def test_penalties_by_hand() -> None:
    choice = Choice(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0)
    sampler = PerRequestSampling()
    logits = torch.tensor([[3.0, 3.0, -3.0, 3.0, -3.0, 0.0]])
    for generated in ((), (3,), (3, 4, 4)):  # token by token, as the manager calls it
        sampler.prepare_tensor_args([request_of(choice, generated)], torch.empty(0))
        found = sampler(torch.empty(0), logits.clone(), torch.empty(0))
    # 0 and 5 did not occur; 1 and 2 are in the prompt, which counts for repetition alone; 3 was generated once, 4 twice
    assert found.tolist() == [[3.0, 1.5, -6.0, 1.5 - 0.5 - 0.25, -6.0 - 0.5 - 2 * 0.25, 0.0]]
    sampler.prepare_tensor_args([request_of(choice, (3, 4, 4), name="another")], torch.empty(0))
    again = sampler(torch.empty(0), logits.clone(), torch.empty(0))
    assert torch.equal(again, found) and set(sampler.histories) == {"another"}


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    history = History([4, 9, 9], 50, logits.device)
    history.extend([9, 30])
    for penalty in (0.5, 1.3):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[4, 9, 9, 9, 30]]), logits.clone())
        torch.testing.assert_close(history.penalise(logits[0], Choice(repetition_penalty=penalty)), expected[0])


def test_penalised_row_is_independent_of_the_batch() -> None:
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
    choices = [
        Choice(presence_penalty=1.0),
        Choice(temperature=1.0, seed=2, repetition_penalty=1.5, top_k=5),
        Choice(),
        Choice(temperature=0.7, frequency_penalty=-2.0),
    ]
    requests = [request_of(choice, (n, n + 1), name=str(n)) for n, choice in enumerate(choices)]
    sampler = PerRequestSampling()
    sampler.prepare_tensor_args(requests, torch.empty(0))
    together = sampler(torch.empty(0), logits.clone(), torch.empty(0))
    for n in range(4):
        alone = PerRequestSampling()
        alone.prepare_tensor_args(requests[n : n + 1], torch.empty(0))
        assert torch.equal(alone(torch.empty(0), logits[n : n + 1].clone(), torch.empty(0))[0], together[n])
    assert torch.equal(together[2], logits[2])


# --- views and managers


def test_at_depth_shares_all_parameters_and_keeps_the_model(model: Any) -> None:
    view = at_depth(model, 1)
    assert isinstance(view, RecursiveLLM)
    assert (view.config.H_cycles, view.model.config.H_cycles, model.config.H_cycles, model.model.config.H_cycles) == (1, 1, 3, 3)
    assert view.model is not model.model and model._modules["model"] is model.model
    mine = dict(model.named_parameters())
    assert all(mine[name] is parameter for name, parameter in view.named_parameters())


@pytest.mark.parametrize("family", ["mistral", "smollm3", "qwen3"])
def test_engine_batches_equal_single_sequences_with_sliding_windows(family: str, tmp_path: Path) -> None:
    """Windows of 6 tokens, alone (mistral) and among layers without (smollm3); prompts read in several passes, and all blocks back."""
    tiny_donor(family, tmp_path)
    model: Any = convert(str(tmp_path), L_layers=4, H_cycles=2, L_cycles=1, prelude_layers=2, coda_layers=2, gain=0.3)
    model.set_attn_implementation("sdpa")
    tokenizer = make_tiny_tokenizer()
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS[:6]]
    batcher = Batcher(at_depth(model, 2), [], **SIZES)
    found: dict[str, list[int]] = {}
    batcher.router.deliver_batch = lambda outputs: found.update({o.request_id: o.generated_tokens for o in outputs})
    batcher.manager.start()
    try:
        for number, prompt in enumerate(prompts):
            batcher.manager.add_request(prompt, str(number), 10, eos_token_id=[-1], choice=Choice())
        batcher.manager.stop()
    finally:
        batcher.stop()
    assert [found[str(number)] for number in range(6)] == [ids_of(model, prompt, 2, 10) for prompt in prompts]
    assert batcher.free_blocks == batcher.blocks


def test_caches_that_do_not_fit_are_refused(model: Any) -> None:
    from recursify.serving.answering import Service

    settings = ServeSettings(checkpoint="x", cache_tokens=10**12, depths=(1,))
    with pytest.raises(UserError, match="--cache_tokens: 1000000000000 tokens at 1 cycles do not fit into memory"):
        Service(model, make_tiny_tokenizer(), "x", settings)


# --- settings


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"depths": ("1",)}, "--depths: expected a whole number, got ('1',)"),
        ({"depths": (1, -1)}, "--depths: expected whole numbers of at least 0, such as 1 3 5, got -1"),
        ({"port": 70000}, "--port: expected 0 to 65535"),
        ({"max_running": 0}, "--max_running: expected at least 1"),
        ({"max_queue": -1}, "--max_queue: expected at least 0"),
        ({"max_body_bytes": 0}, "--max_body_bytes"),
        ({"cache_tokens": 0}, "--cache_tokens"),
        ({"batch_tokens": 31}, "--batch_tokens: expected at least --max_running, 32"),
        ({"request_timeout": 0}, "--request_timeout: expected more than 0"),
        ({"request_timeout": float("nan")}, "--request_timeout: expected seconds"),
        ({"shutdown_timeout": -1}, "--shutdown_timeout: expected seconds"),
        ({"api_key": ""}, "--api_key: expected some text"),
        ({"model_name": ""}, "--model_name: expected some text"),
        ({"device": "tpu"}, "--device"),
    ],
)
def test_a_flag_out_of_range_is_named(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        run(ServeSettings(checkpoint="nowhere.pt", **wrong))


def test_depths_accept_numbers_and_comma_lists() -> None:
    assert cli.parse("serve", ServeSettings, ["--checkpoint", "x", "--depths", "1", "3"]).wanted_depths() == (1, 3)
    assert cli.parse("serve", ServeSettings, ["--checkpoint", "x", "--depths", "5,0,5"]).wanted_depths() == (5, 0)


def test_depths_of_a_plain_donor_are_refused(donor_folder: Path) -> None:
    with pytest.raises(UserError, match="--depths: .* is a plain model without cycles"):
        run(ServeSettings(checkpoint=str(donor_folder), depths=(1,), port=0))


def test_missing_packages_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recursify.serving.running.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'fastapi and uvicorn: not installed.*pip install "recursify\[serve\]"'):
        run(ServeSettings(checkpoint="x.pt"))


def test_port_in_use_is_reported_before_loading() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="--port: .* cannot be had"):
        run(ServeSettings(checkpoint="nowhere.pt", port=taken.getsockname()[1]))
    with pytest.raises(UserError, match="--host: expected an address of this machine, got 'no.such.host.invalid'"):
        run(ServeSettings(checkpoint="nowhere.pt", host="no.such.host.invalid"))


# --- metrics


def test_metrics_are_prometheus_text() -> None:
    metrics = Metrics()
    metrics.add("recursify_requests_total", route='a"b\\c\nd', status=200)
    metrics.add("recursify_requests_total", 2, route='a"b\\c\nd', status=200)
    page = metrics.render({"recursify_up": {labelled(): 1}})
    assert 'recursify_requests_total{route="a\\"b\\\\c\\nd",status="200"} 3\n' in page
    assert page.endswith("# TYPE recursify_up gauge\nrecursify_up 1\n")


# --- the process


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_requests_a_stop(kind: signal.Signals) -> None:
    before, stop = signal.getsignal(kind), Stop()
    with stop.on_signals():
        signal.raise_signal(kind)
    assert stop.asked and signal.getsignal(kind) is before


def test_sigterm_shuts_down_cleanly(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    checkpoint.save(path, model, make_tiny_tokenizer())
    words = ["serve", "--checkpoint", str(path), "--depths", "1", "3", "--port", "0", "--cache_tokens", "512", "--dtype", "float32"]
    with subprocess.Popen(
        [sys.executable, "-m", "recursify", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            lines = [process.stdout.readline() for _ in range(5)]
            assert lines[0] == "model m, H_cycles 1, 3 (default 3), float32 on cpu\n"
            assert lines[1].startswith("cache at H_cycles 1: 16 blocks of 32 tokens, ")
            url = re.match(r"listening on (http://127.0.0.1:\d+); Ctrl-C stops", lines[4])[1]  # type: ignore[index]
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 3}, timeout=60)
            assert answer.json()["usage"]["completion_tokens"] == 3
            os.kill(process.pid, signal.SIGTERM)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    said = [line for line in err.splitlines() if "torchao" not in line and "_pytree.py" not in line]  # torch's own, of an optional package
    assert (process.returncode, out, said) == (0, "stopped\n", [])
