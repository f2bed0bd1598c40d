"""recursify_export.json, and `recursify export --check` against a running server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import MonkeyPatch

from recursify.checkpoints import checkpoint
from recursify.cli import main as cli
from recursify.errors import UserError
from recursify.hub import engine_check, export
from recursify.hub.engine_check import FILE, TOKENS, compare
from recursify.hub.settings import ExportSettings
from recursify.network.decoding_recursive_llm import RecursiveCache
from tests.support.served import chatty_tokenizer, running, speaking_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return speaking_model(tmp_path_factory.mktemp("donor"))


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("place")
    checkpoint.save(place / "model.pt", model, chatty_tokenizer())
    export.run(ExportSettings(checkpoint=str(place / "model.pt"), out=str(place / "out")), say=lambda _: None)
    return str(place / "out")


def told(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / FILE).read_text())


def test_an_export_says_how_its_slots_run_and_what_it_says_at_each_depth(model: Any, folder: str) -> None:
    found = told(folder)
    assert found["architectures"] == ["RecursiveQwen2ForCausalLM"] and found["dtype"] == "float32"
    assert found["num_hidden_layers"] == 14 == len(found["slots"]) and found["num_physical_layers"] == 4
    assert found["slots"][:4] == [0, 3, 1, 2] and set(found["slots"][2:]) == {1, 2}, "prelude, coda, applications of the loop"
    assert [each["H_cycles"] for each in found["depths"]] == [0, 1, 2, 3]
    for each in found["depths"]:
        ids = torch.tensor([found["prompt_ids"] + each["ids"]])
        with torch.no_grad():
            cache = RecursiveCache(model.config, each["H_cycles"], 1)
            logits = model(ids, H_cycles=each["H_cycles"], past_key_values=cache).logits[0, len(found["prompt_ids"]) - 1 : -1]
        best = logits.log_softmax(-1).topk(5)
        assert best.indices[:, 0].tolist() == each["ids"]
        recorded = torch.tensor([[value for _, value in top] for top in each["top_logprobs"]])
        assert torch.allclose(best.values, recorded, atol=1e-5)


def test_our_server_agrees_at_every_depth_that_it_offers(model: Any, folder: str) -> None:
    said: list[str] = []
    with running(model, chatty_tokenizer(), depths=(1, 3)) as server:
        found = compare(folder, f"{server.url}/v1/", say=said.append)
        assert [each.H_cycles for each in found] == [1, 3] and all(each.tokens > 1 and each.worst < 1e-4 for each in found)
        assert len(said) == 2 and "H_cycles 3" in said[1]
        with pytest.raises(UserError, match="differs .* at H_cycles 2, got"):
            compare(folder, server.url, cycles=(1, 2))


def test_the_command_compares_and_writes_nothing(model: Any, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path(folder).iterdir())
    with running(model, chatty_tokenizer(), depths=(3,)) as server:
        cli.export(["--checkpoint", folder, "--check", server.url, "--cycles", "3"])
    assert "H_cycles 3: log-probabilities of" in capsys.readouterr().out and sorted(Path(folder).iterdir()) == before


def answering(monkeypatch: MonkeyPatch, logprobs: list[float]) -> None:
    """An engine that does not tell its depth, as vLLM."""
    answers = {
        "/v1/models": {"data": [{"id": "tiny"}]},
        "/v1/completions": {"choices": [{"logprobs": {"token_logprobs": logprobs}}]},
    }
    monkeypatch.setattr(engine_check, "_request", lambda base, route, body=None: answers[route])


def test_an_engine_that_does_not_tell_its_depth_is_compared_with_each(folder: str, monkeypatch: MonkeyPatch) -> None:
    at_two = [top[0][1] for top in told(folder)["depths"][2]["top_logprobs"]]
    answering(monkeypatch, at_two)
    assert [each.H_cycles for each in compare(folder, "http://engine")] == [2]
    assert [each.H_cycles for each in compare(folder, "http://engine", cycles=(2,))] == [2]
    with pytest.raises(UserError, match="at H_cycles 1, got differences of"):
        compare(folder, "http://engine", cycles=(1,))
    answering(monkeypatch, [*at_two[:3], *(value - 0.01 for value in at_two[3:])])  # as with a fault in the cache
    with pytest.raises(UserError, match=r"--check: http://engine differs .*within 0.001 nats at one of the recorded depths"):
        compare(folder, "http://engine")
    answering(monkeypatch, [])
    with pytest.raises(UserError, match="differs"):
        compare(folder, "http://engine")


def test_tokens_after_a_tie_are_not_compared(folder: str) -> None:
    depth = {"H_cycles": 1, "top_logprobs": [[[5, -1.0], [6, -2.0]], [[7, -1.0], [8, -1.0001]], [[9, -3.0], [1, -4.0]]]}
    assert engine_check._compared(depth, [-1.0, -1.0, -7.0], 1e-3) == engine_check.Answer(1, 0.0, 2)
    assert len(told(folder)["depths"][0]["ids"]) == TOKENS


def test_what_cannot_be_compared_is_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"has no {FILE}; name a folder that"):
        compare(str(tmp_path), "http://127.0.0.1:9")
    with pytest.raises(UserError, match="--check: http://127.0.0.1:9/v1/models: no answer"):
        compare(folder, "http://127.0.0.1:9")
    with pytest.raises(UserError, match="no answer"):
        compare(folder, "no address")
    with pytest.raises(UserError, match=r"--cycles: expected some of \[0, 1, 2, 3\]"):
        compare(folder, "http://127.0.0.1:9", cycles=(7,))
    (tmp_path / FILE).write_text('{"format": "other"}')
    with pytest.raises(UserError, match="expected format recursify-export/1, got 'other'"):
        compare(str(tmp_path), "http://127.0.0.1:9")


def test_a_server_that_wants_a_key(model: Any, folder: str, monkeypatch: MonkeyPatch) -> None:
    with running(model, chatty_tokenizer(), depths=(1,), api_key="secret") as server:
        monkeypatch.delenv("RECURSIFY_API_KEY", raising=False)
        with pytest.raises(UserError, match="expected status 200, got 401 .* RECURSIFY_API_KEY or OPENAI_API_KEY"):
            compare(folder, server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert compare(folder, server.url)


def test_settings_want_a_folder_or_a_server(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="OUT: expected the name of the folder to write"):
        export.run(ExportSettings(checkpoint="x"))
    with pytest.raises(UserError, match="--check: compares a server .* leave there out"):
        export.run(ExportSettings(checkpoint="x", out="there", check="http://engine"))
