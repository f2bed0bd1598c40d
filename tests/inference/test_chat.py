"""Chat: output, history, truncation of the history, and which tokens are prefilled again."""

from __future__ import annotations

import io
import json
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recursify.checkpoints import checkpoint
from recursify.conversion.convert import convert
from recursify.inference import chat
from recursify.inference.chat import Chat, ChatSettings
from recursify.inference.chat_prompt import Dialogue
from recursify.inference.generation import generate_text
from tests.support.reading import reading
from tests.support.tiny import make_tiny_tokenizer, tiny_model
from tests.support.tokenizers import with_template

SETTINGS = ChatSettings(checkpoint="x", temperature=0, max_new_tokens=6)
HELLO = "Type a message. /help lists the commands.\n"


@pytest.fixture(scope="module")
def model(donor_folder: Path) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return convert(str(donor_folder), L_layers=2, H_cycles=2, L_cycles=1, gain=0.3)


@pytest.fixture(scope="module", params=["plain", "template"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return make_tiny_tokenizer() if request.param == "plain" else with_template()


class Talk:
    """Runs turns and returns the output."""

    def __init__(self, model: Any, tokenizer: Any, settings: ChatSettings = SETTINGS, input_prompt: str = "You: "):
        self.out, self.err = io.StringIO(), io.StringIO()
        self.lines: Iterator[Any] = iter(())
        self.chat = Chat(model, tokenizer, settings, self._ask, self.out, self.err, input_prompt=input_prompt)

    def _ask(self, input_prompt: str) -> str:
        self.out.write(input_prompt)
        line = next(self.lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return str(line)

    def __call__(self, *lines: Any) -> tuple[str, str]:
        """Output of these lines on stdout and stderr."""
        for stream in (self.out, self.err):
            stream.seek(0)
            stream.truncate()
        self.lines = iter([*lines, "/quit"])
        self.chat.run()
        return self.out.getvalue(), self.err.getvalue()


@pytest.fixture
def talk(model: Any, tokenizer: Any) -> Talk:
    return Talk(model, tokenizer)


def expected(model: Any, tokenizer: Any, messages: list[dict[str, str]], **changes: Any) -> str:
    """The answer without a prefix cache."""
    dialogue = Dialogue(tokenizer)
    sampling = replace(SETTINGS.sampling, stop=dialogue.stop, **changes)
    return dialogue.answer_text(generate_text(model, tokenizer, dialogue.prompt(messages), sampling, ends=dialogue.ends).text)


def test_each_answer_is_conditioned_on_the_whole_conversation(talk: Talk, model: Any, tokenizer: Any) -> None:
    out, _ = talk("The old lobster", "A castle?", "Why")
    messages: list[dict[str, str]] = []
    for line in ("The old lobster", "A castle?", "Why"):
        messages.append({"role": "user", "content": line})
        answer = expected(model, tokenizer, messages)
        assert answer.strip() in out
        messages.append({"role": "assistant", "content": answer})
    assert talk.chat.messages == messages


def test_a_turn_prefills_only_new_tokens(talk: Talk, model: Any) -> None:
    with reading(model) as counts:
        talk("The old lobster follows the river near the castle and the quiet village")
    first, counts[:] = counts[0], []
    with reading(model) as counts:
        talk("Why")
    assert counts[0] < first
    whole = len(talk.chat.dialogue.prompt(talk.chat.messages))
    assert counts[0] < whole / 2


def test_what_is_shown_at_a_terminal_and_from_a_pipe(model: Any) -> None:
    tokenizer = make_tiny_tokenizer()
    answer = expected(model, tokenizer, [{"role": "user", "content": "The"}])
    out, err = Talk(model, tokenizer)("The")
    assert out.startswith(f"You: {answer}") and out.endswith("\n\nYou: ")
    assert err.startswith(HELLO) and "has no chat template" in err and err.endswith("Goodbye!\n")
    piped, _ = Talk(model, tokenizer, input_prompt="")("The")
    assert piped == out.replace("You: ", "")
    assert "template" not in Talk(model, with_template())("The")[1]


def test_system_message_comes_first(model: Any, tokenizer: Any) -> None:
    talk = Talk(model, tokenizer, replace(SETTINGS, system="Be brief."))
    talk("The")
    system = {"role": "system", "content": "Be brief."}
    assert talk.chat.messages[0] == system
    assert talk.chat.messages[-1]["content"] == expected(model, tokenizer, [system, {"role": "user", "content": "The"}])
    out, _ = talk("/reset", "/system", "/system Be long.", "Why")
    assert "Conversation cleared.\n" in out and "system 'Be brief.'\n" in out and "system 'Be long.'\n" in out
    assert [message["content"] for message in talk.chat.messages[:2]] == ["Be long.", "Why"]
    assert "system: no system message\n" in Talk(model, tokenizer)("/system")[0]


def test_reset_forgets(talk: Talk, model: Any, tokenizer: Any) -> None:
    talk("The old lobster", "/reset", "Why")
    assert [message["content"] for message in talk.chat.messages if message["role"] == "user"] == ["Why"]
    assert talk.chat.messages[-1]["content"] == expected(model, tokenizer, [{"role": "user", "content": "Why"}])


def test_depth_change_drops_the_cache(talk: Talk, model: Any, tokenizer: Any) -> None:
    assert "read again" not in talk("/cycles 1", "/cycles 2")[0]  # no turn yet
    out, _ = talk("The old lobster follows the river", "/cycles", "/cycles 2", "/cycles 1")
    assert out.count("H_cycles 2\n") == 2
    assert "H_cycles 1; the conversation is read again at this depth\n" in out
    before = list(talk.chat.messages)
    with reading(model) as counts:
        talk("Why")
    asked = [*before, {"role": "user", "content": "Why"}]
    assert counts[0] == len(talk.chat.dialogue.prompt(asked))
    assert talk.chat.messages[-1]["content"] == expected(model, tokenizer, asked, H_cycles=1)


def test_loaded_conversation_continues(talk: Talk, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    out, _ = talk("/max 4", "The 龙虾 🦞", f"/save {file}")
    assert f"saved 2 messages to {file}\n" in out
    assert json.loads(file.read_text(encoding="utf-8"))["messages"] == talk.chat.messages
    other = Talk(model, tokenizer)
    out, _ = other("A castle", f"/load {file}", "/max", "Why")
    assert f"loaded 2 messages from {file}\n" in out and "max_new_tokens 4\n" in out
    talk("Why")
    assert other.chat.messages == talk.chat.messages


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speed": 3}, "settings: speed is none that a conversation has; they are"),
        ({"temperature": "hot"}, "settings: temperature: expected a number, got 'hot'"),
        ({"H_cycles": 2.5}, "settings: H_cycles: expected a whole number, got 2.5"),
        ({"max_new_tokens": 0}, "--max_new_tokens: expected at least 1, got 0"),
        ({"halt": "q_head"}, "q_head was never trained"),
    ],
)
def test_invalid_settings_in_a_transcript_are_refused(talk: Talk, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"format": "recursify-conversation/1", "messages": [], "settings": settings}))
    _, err = talk("The", f"/load {file}")
    assert "error: " in err and message in err
    assert talk.chat.settings == SETTINGS and len(talk.chat.messages) == 2


@pytest.mark.parametrize("line", ["/load", "/save", "/load missing.json", "/show perhaps", "/cycles -1", "/dance"])
def test_failed_load_changes_nothing(talk: Talk, line: str) -> None:
    _, err = talk("The", line, "Why")
    assert err.count("error: ") == 1
    assert talk.chat.settings == SETTINGS and len(talk.chat.messages) == 4


def test_the_table_follows_each_answer_while_it_is_on(talk: Talk) -> None:
    out, _ = talk("The", "/show on", "The", "/show", "/show off", "The")
    assert out.count("cycle 2") == 1
    assert out.count("show_recursive_steps on\n") == 2 and out.count("show_recursive_steps off\n") == 1


def test_early_exit_statistics_are_printed(talk: Talk) -> None:
    talk.chat.change(halt="kl")
    out, err = talk("The")
    assert "halting: " in err and "halting" not in out


def test_slashes_and_several_lines(talk: Talk) -> None:
    talk("//usr/bin", '"""', "/one", "two", '"""', "three\\", "four", "  ")
    messages = [message["content"] for message in talk.chat.messages if message["role"] == "user"]
    assert messages == ["/usr/bin", "/one\ntwo", "three\nfour"]


def test_help_lists_every_command(talk: Talk) -> None:
    out = talk("/help")[0].removeprefix("You: ")
    for name in (*talk.chat.commands(), "/quit", "//text", '"""', "Ctrl-C"):
        assert f"\n{name}" in f"\n{out}"


# --- Ctrl-C


class PressesCtrlC(io.StringIO):
    """An output stream that sends Ctrl-C a number of times at the first text."""

    def __init__(self, times: int):
        super().__init__()
        self.times = times

    def write(self, text: str) -> int:
        count = super().write(text)
        while self.times and text.strip():
            self.times -= 1
            signal.raise_signal(signal.SIGINT)
        return count


@pytest.fixture
def listens() -> Iterator[None]:
    """Python's default SIGINT handler, which is missing in a suite started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listens")
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals are for the main thread")
def test_interrupted_answer_stays_in_the_conversation(model: Any, tokenizer: Any, times: int) -> None:
    whole = expected(model, tokenizer, [{"role": "user", "content": "The old lobster"}], max_new_tokens=40)
    out, err = PressesCtrlC(times), io.StringIO()
    lines = iter(["The old lobster", "Why", "/quit"])
    settings = replace(SETTINGS, max_new_tokens=40)
    talk = Chat(model, tokenizer, settings, lambda _: next(lines), out, err, input_prompt="")
    talk.run()
    first, again = (message["content"] for message in talk.messages if message["role"] == "assistant")
    assert whole.startswith(first) and 0 < len(first) < len(whole)
    assert again == expected(model, tokenizer, talk.messages[:3], max_new_tokens=40)
    assert err.getvalue().count("(stopped)") == 1


def test_empty_answer_adds_no_turn(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(model, tokenizer)
    real = chat.generate_text
    monkeypatch.setattr(chat, "generate_text", lambda *args, **kwargs: real(*args, **kwargs | {"ends": range(400)}))
    _, err = talk("The")
    assert "(no answer; your message was dropped)" in err and talk.chat.messages == []


# --- room


@pytest.fixture
def small(tokenizer: Any) -> Any:
    """A model of 64 positions."""
    model = tiny_model("qwen2", num_hidden_layers=1, max_position_embeddings=64)
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer))
    return model


def test_conversation_longer_than_the_context(small: Any, tokenizer: Any) -> None:
    talk = Talk(small, tokenizer, replace(SETTINGS, max_new_tokens=20))
    _, err = talk(*["The old lobster follows"] * 8)
    assert "(the conversation has filled the model's positions; /reset begins a new one)" in err or "the model has 64 positions" in err
    assert "the model has 64 positions; /reset begins a new one, or say it in fewer words" in err
    _, err = talk("/reset", "Why")
    assert "error" not in err and len(talk.chat.messages) == 2
    assert "the model has 64 positions; say it in fewer words" in talk("/reset", "lobster" * 80)[1]
    assert talk.chat.messages == []


def test_forget_oldest_drops_old_turns(small: Any, tokenizer: Any) -> None:
    settings = replace(SETTINGS, max_new_tokens=10, forget_oldest=True, system="Be brief.")
    talk = Talk(small, tokenizer, settings)
    lines = [f"The old lobster {number}" for number in range(8)]
    _, err = talk(*lines)
    assert "error" not in err
    kept = [message["content"] for message in talk.chat.messages if message["role"] == "user"]
    assert kept == lines[-len(kept) :] and 0 < len(kept) < 8
    assert talk.chat.messages[0]["role"] == "system"
    assert len(talk.chat.dialogue.prompt(talk.chat.messages[:-1])) + 10 <= 64


# --- the whole command


def test_run_from_a_pipe(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "model.pt")
    tokenizer = make_tiny_tokenizer()
    checkpoint.save(path, model, tokenizer)
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("The old\n"))
    chat.run(replace(SETTINGS, checkpoint=path, device="cpu"))
    answer = expected(model, tokenizer, [{"role": "user", "content": "The old"}])
    printed = capsys.readouterr()
    assert printed.out.strip() == answer
    assert HELLO in printed.err and printed.err.endswith("Goodbye!\n")


def test_an_answer_that_was_cut_says_so(model: Any, tokenizer: Any) -> None:
    _, err = Talk(model, tokenizer, replace(SETTINGS, max_new_tokens=3))("The old tower")
    assert "(cut after 3 tokens; /max sets another limit)" in err
