"""The interactive prompt: every command, every error, and Ctrl-C."""

from __future__ import annotations

import io
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
from recursify.errors import UserError
from recursify.inference import interactive
from recursify.inference.generation import generate_text
from recursify.inference.interactive import Conversation
from recursify.inference.settings import GenerateSettings
from tests.support.tiny import make_tiny_tokenizer, tiny_model

SETTINGS = GenerateSettings(checkpoint="x", temperature=0, max_new_tokens=6)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tiny_tokenizer()


@pytest.fixture(scope="module")
def model(donor_folder: Path) -> Any:
    return convert(str(donor_folder), L_layers=2, H_cycles=2, L_cycles=1, gain=0.3)


@pytest.fixture
def talk(model: Any, tokenizer: Any) -> Any:
    """Lines in (an exception is raised in place of a line), then stdout, stderr and the conversation out."""

    def run(*lines: str | BaseException, settings: GenerateSettings = SETTINGS, model: Any = model) -> tuple[str, str, Conversation]:
        left: Iterator[str | BaseException] = iter(lines)
        out, err = io.StringIO(), io.StringIO()

        def ask(prompt: str) -> str:
            line = next(left, EOFError())
            if isinstance(line, BaseException):
                raise line
            out.write(f"{prompt}{line}\n")
            return line

        conversation = Conversation(model, tokenizer, settings, ask, out, err)
        conversation.run()
        return out.getvalue(), err.getvalue(), conversation

    return run


def continuation(model: Any, tokenizer: Any, prompt: str, **changes: Any) -> str:
    return generate_text(model, tokenizer, prompt, replace(SETTINGS, **changes).sampling).text


def test_it_looks_as_in_the_quick_start(talk: Any, model: Any, tokenizer: Any) -> None:
    out, err, _ = talk("Once upon a time", "The meaning of life is", "/quit")
    once, meaning = (continuation(model, tokenizer, prompt) for prompt in ("Once upon a time", "The meaning of life is"))
    assert out == (
        f"Prompt: Once upon a time\nGenerating...\nOnce upon a time{once}\n\n"
        f"Prompt: The meaning of life is\nGenerating...\nThe meaning of life is{meaning}\n\n"
        "Prompt: /quit\nGoodbye!\n"
    )
    assert err == "Type a prompt to continue. /help lists the commands.\n\n"


def test_the_end_of_the_input_quits(talk: Any) -> None:
    assert talk()[0] == "\nGoodbye!\n"


def test_an_empty_line_asks_again(talk: Any) -> None:
    assert talk("", "  ", "/quit")[0] == "Prompt: \nPrompt:   \nPrompt: /quit\nGoodbye!\n"


def test_the_commands_change_what_is_written(talk: Any, model: Any, tokenizer: Any) -> None:
    out, _, conversation = talk("/cycles 5", "/max 3", "The", "/temp 0.5", "/quit")
    assert "H_cycles 5\n" in out and "max_new_tokens 3\n" in out and "temperature 0.5\n" in out
    assert f"Generating...\nThe{continuation(model, tokenizer, 'The', H_cycles=5, max_new_tokens=3)}\n" in out
    assert (conversation.settings.H_cycles, conversation.settings.max_new_tokens, conversation.settings.temperature) == (5, 3, 0.5)


def test_a_command_without_a_value_shows_the_value(talk: Any) -> None:
    out, _, _ = talk("/temp", "/max", "/cycles")
    assert "temperature 0\n" in out and "max_new_tokens 6\n" in out
    assert "H_cycles 2\n" in out  # the checkpoint's own


def test_help_lists_every_command(talk: Any) -> None:
    out, _, _ = talk("/max 7", "/help")
    for command in (
        "/temp X",
        "/max N",
        "/cycles N",
        "/show on|off",
        "/save FILE",
        "/load FILE",
        "/help",
        "/quit",
        '"""',
        "//text",
        "Ctrl-C",
        "Ctrl-D",
    ):
        assert command in out
    assert "(now 7)" in out and "(now 2)" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/temp hot", "/temp: expected a number, got 'hot'"),
        ("/temp -1", "/temp: expected a number of at least 0 (0 is greedy), got -1.0"),
        ("/max 0", "/max: expected at least 1, got 0"),
        ("/max 2.5", "/max: expected a whole number, got '2.5'"),
        ("/cycles -1", "/cycles: expected at least 0 (0 is one plain pass), got -1"),
        ("/show maybe", "/show: expected on or off, got 'maybe'"),
        ("/save", "/save: expected a file name, got none"),
        ("/load", "/load: expected the name of a file written by /save, got none"),
        ("/load missing.json", "missing.json cannot be read (No such file or directory)"),
        ("/dance now", "unknown command /dance; /help lists the commands, and //dance now sends '/dance now' as a prompt"),
        ("/", "unknown command /; /help lists the commands, and // sends '/' as a prompt"),
        ("a" * 1000, "but the model has 512 positions; shorten the prompt to 511 tokens or less"),
        ("\udcff", "--prompt: expected UTF-8 text"),
    ],
)
def test_errors_are_printed_and_change_nothing(talk: Any, line: str, message: str) -> None:
    out, err, conversation = talk(line, "The", "/quit")
    assert "error: " in err and message in err
    assert conversation.settings == SETTINGS
    assert "Generating...\nThe" in out and out.endswith("Goodbye!\n")


def test_any_exception_is_printed_with_its_type(talk: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(interactive, "write_once", fail)
    monkeypatch.delenv("RECURSIFY_DEBUG", raising=False)
    out, err, _ = talk("The", "/quit")
    assert "error: RuntimeError: out of memory\n" in err and "Traceback" not in err
    assert out.endswith("Goodbye!\n")
    monkeypatch.setenv("RECURSIFY_DEBUG", "1")
    assert "Traceback" in talk("The", "/quit")[1]


def test_cycles_of_a_plain_model(talk: Any) -> None:
    _, err, conversation = talk("/cycles 3", "/quit", model=tiny_model("qwen2", num_hidden_layers=1))
    assert "/cycles: expected a recursive model, got a Qwen2ForCausalLM, which has no cycles" in err
    assert conversation.settings.H_cycles is None


def test_a_prompt_may_begin_with_a_slash(talk: Any, model: Any, tokenizer: Any) -> None:
    out, _, _ = talk("//usr/bin is", "/quit")
    assert f"Generating...\n/usr/bin is{continuation(model, tokenizer, '/usr/bin is')}\n" in out


def test_the_steps_follow_each_answer(talk: Any) -> None:
    out, _, _ = talk("The", "The", settings=replace(SETTINGS, show_recursive_steps=True))
    assert out.count("cycle 2") == 2


def test_the_table_can_be_switched_on(talk: Any) -> None:
    out, _, _ = talk("/show on", "The", "/show off", "The", "/show")
    assert out.count("cycle 2") == 1 and "show_recursive_steps off\n" in out
    _, err, _ = talk("/show on", model=tiny_model("qwen2", num_hidden_layers=1))
    assert "/show: expected a recursive model, got a Qwen2ForCausalLM" in err


def test_a_prompt_of_several_lines(talk: Any, model: Any, tokenizer: Any) -> None:
    out, _, _ = talk('"""', "/The", "", "river", '"""', "A\\", "castle")
    for prompt in ("/The\n\nriver", "A\ncastle"):
        assert f"Generating...\n{prompt}{continuation(model, tokenizer, prompt)}\n" in out


def test_save_and_load_round_trip(talk: Any, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    out, _, first = talk("/max 3", "The", f"/save {file}")
    assert f"saved 2 messages to {file}\n" in out
    out, _, second = talk(f"/load {file}", "The")
    assert f"Generating...\nThe{continuation(model, tokenizer, 'The', max_new_tokens=3)}\n" in out
    assert second.messages == first.messages * 2


def test_depth_not_above_draft_cycles_is_refused(talk: Any) -> None:
    settings = replace(SETTINGS, draft_cycles=1)
    _, err, conversation = talk("/cycles 1", "The", settings=settings)
    assert "--draft_cycles: expected fewer than the 1 cycles of the run, got 1" in err
    assert conversation.settings == settings and "self-speculation: " in err


def test_seed_applies_once_per_session(talk: Any) -> None:
    settings = replace(SETTINGS, temperature=1.0, seed=4)
    state = torch.get_rng_state()
    try:
        first, second = (talk("The", "The", settings=settings)[0] for _ in range(2))
    finally:
        torch.set_rng_state(state)
    assert first == second
    answers = [line for line in first.split("Generating...\n")[1:]]
    assert answers[0].split("\n\n")[0] != answers[1].split("\n\n")[0]


def test_ctrl_c_at_the_prompt_drops_the_line(talk: Any) -> None:
    out, err, _ = talk(KeyboardInterrupt(), "The", "/quit")
    assert "(/quit or Ctrl-D ends)" in err
    assert "Generating...\nThe" in out


class PressesCtrlC(io.StringIO):
    """An output stream that sends Ctrl-C `times` times after the prompt is shown."""

    def __init__(self, times: int):
        super().__init__()
        self.times = times

    def write(self, text: str) -> int:
        count = super().write(text)
        while self.times and self.getvalue().endswith("Generating...\nThe"):
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
def test_ctrl_c_stops_the_answer_and_not_the_program(model: Any, tokenizer: Any, times: int) -> None:
    out, err = PressesCtrlC(times), io.StringIO()
    before = signal.getsignal(signal.SIGINT)
    lines = iter(["The", "A river", "/quit"])
    settings = replace(SETTINGS, show_recursive_steps=True)
    Conversation(model, tokenizer, settings, lambda _: next(lines), out, err).run()
    stopped, answered = out.getvalue().split("Generating...\n")[1:]
    whole = continuation(model, tokenizer, "The")
    first = generate_text(model, tokenizer, "The", replace(SETTINGS, max_new_tokens=1).sampling).text
    assert stopped.rstrip("\n") == ("The" + first if times == 1 else "The") != "The" + whole
    assert "cycle 1" in answered
    assert err.getvalue().count("(stopped)") == 1
    assert answered.endswith("Goodbye!\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread_signals_are_left_alone(talk: Any) -> None:
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(talk("The", "/quit")[0]))
    thread.start()
    thread.join()
    assert "Generating...\nThe" in results[0]


# --- the whole command


def test_run_loads_and_asks(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "model.pt")
    checkpoint.save(path, model, tokenizer)
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("The old\n/quit\n"))
    interactive.run(replace(SETTINGS, checkpoint=path, device="cpu"))
    assert capsys.readouterr().out == f"Prompt: Generating...\nThe old{continuation(model, tokenizer, 'The old')}\n\nPrompt: Goodbye!\n"


def test_run_checks_its_settings_before_it_loads() -> None:
    with pytest.raises(UserError, match="--top_k: expected at least 0"):
        interactive.run(replace(SETTINGS, checkpoint="not/there.pt", top_k=-1))


def test_closed_stdout_ends_the_session(model: Any, tokenizer: Any) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Conversation(model, tokenizer, SETTINGS, lambda _: "The", Closed(), io.StringIO()).run()
