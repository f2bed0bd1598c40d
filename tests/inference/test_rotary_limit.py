"""Rotary angles that depend on the length of the pass: drafts, batches and the server keep to plain greedy text, or refuse by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config

from recursify import convert
from recursify.errors import UserError
from recursify.inference.generation import generate_batch, generate_text
from recursify.inference.options import Sampling
from recursify.network.decoding_recursive_llm import rotary_limit
from tests.support.old_donors import old_donor
from tests.support.served import running
from tests.support.tiny import make_tiny_tokenizer, sentences

LIMIT = 128  # of this donor's longrope


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("phi3")
    old_donor("phi3", folder)
    model = convert(str(folder), keep_donor=True, L_layers=2, H_cycles=2, L_cycles=1, gain=0.2)
    with torch.no_grad():  # sharper, so that a wrong angle changes the text
        model.lm_head.weight.mul_(8)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tiny_tokenizer()


def greedy(new: int, **options: Any) -> Sampling:
    return Sampling(temperature=0.0, max_new_tokens=new, **options)


def prompt_of(tokenizer: Any, tokens: int) -> str:
    text = " ".join(sentences(1, 60))
    return str(tokenizer.decode(tokenizer(text).input_ids[:tokens]))


def test_the_angles_do_depend_on_the_length(model: Any) -> None:
    """Otherwise the tests below could not fail."""
    ids = torch.randint(2, 300, (1, LIMIT + 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        short, long = model(ids[:, :16]).logits, model(ids).logits[:, :16]
        below = model(ids[:, :LIMIT]).logits[:, :16]
    assert not torch.allclose(short, long, atol=1e-2)
    torch.testing.assert_close(short, below, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("new", [20, LIMIT - 16])
def test_drafts_equal_greedy_up_to_the_limit(model: Any, tokenizer: Any, new: int) -> None:
    prompt = prompt_of(tokenizer, 16)
    plain = generate_text(model, tokenizer, prompt, greedy(new))
    drafted = generate_text(model, tokenizer, prompt, greedy(new, draft_cycles=1))
    assert drafted.token_ids == plain.token_ids


def test_drafts_beyond_the_limit_are_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=rf"--draft_cycles: .*phi3 .* beyond {LIMIT} tokens.* got 16 and {LIMIT}"):
        generate_text(model, tokenizer, prompt_of(tokenizer, 16), greedy(LIMIT, draft_cycles=1))
    ids = torch.randint(2, 300, (1, 16))
    with pytest.raises(ValueError, match=rf"draft_cycles: .*longrope.* beyond {LIMIT} tokens"):
        model.generate(ids, max_new_tokens=LIMIT, do_sample=False, draft_cycles=1)


def test_short_texts_do_not_change_beside_long_neighbours(model: Any, tokenizer: Any) -> None:
    prompts = [prompt_of(tokenizer, tokens) for tokens in (8, LIMIT + 30, 24, LIMIT - 4)]
    together = generate_batch(model, tokenizer, prompts, greedy(12))
    alone = [generate_text(model, tokenizer, prompt, greedy(12)) for prompt in prompts]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]


def test_server_keeps_to_the_limit(model: Any, tokenizer: Any) -> None:
    with running(model, tokenizer) as server:
        assert server.service.longest == LIMIT
        prompt = prompt_of(tokenizer, 16)
        assert server.write(prompt, max_tokens=40) == generate_text(model, tokenizer, prompt, greedy(40)).text
        refused = server.post(prompt=prompt_of(tokenizer, LIMIT + 10), max_tokens=1)
        assert refused.status_code == 400 and f"room for {LIMIT}" in refused.json()["error"]["message"]


def test_limits_by_kind() -> None:
    factors = {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48}
    long = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    assert rotary_limit(Phi3Config(rope_parameters=long, original_max_position_embeddings=64)) == 64
    assert rotary_limit(LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})) == 2048
    for kind in ({"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}):
        assert rotary_limit(LlamaConfig(rope_parameters={"rope_theta": 1e4, **kind})) is None
