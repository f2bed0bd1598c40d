"""Stages and their seconds."""

from __future__ import annotations

import pytest

from recursify.demo.stages import Clock


def test_stages_are_printed_numbered_and_timed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((10.0, 12.5, 20.0, 21.0))
    monkeypatch.setattr("recursify.demo.stages.time.monotonic", lambda: next(times))
    clock = Clock()
    for name in ("first", "second"):
        with clock.stage(name):
            pass
    assert clock.stages == [("first", 2.5), ("second", 1.0)] and clock.seconds == 3.5
    assert capsys.readouterr().out == "\n[1] first\n\n[2] second\n"
