"""Tool calls in the text of a model of Hermes' and Qwen's kind: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

import json
import uuid

from pydantic_core import from_json

from .pieces import ToolCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class CallReader:
    """Parts the text of one choice, piece by piece, into content and calls.

    What is between the marks and is no call (invalid JSON, no name, no closing mark) stays content, as it stands. Whitespace before a call,
    and at the end behind the last one, is dropped. The result does not depend on how the text is split into pieces.
    """

    def __init__(self) -> None:
        self.held = ""  # what may be, or begin, a call
        self.count = 0  # calls so far
        self.behind = False  # nothing but whitespace since the last call

    def put(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """Content and calls that the next piece of text completes."""
        inside = self.held.lstrip().startswith(OPEN)
        self.held += text
        if inside and CLOSE not in self.held[-len(text) - len(CLOSE) :]:
            return "", ()
        content, calls = "", []
        while (start := self.held.find(OPEN)) >= 0 and (end := self.held.find(CLOSE, start)) >= 0:
            call = self._parsed(self.held[start + len(OPEN) : end])
            end += len(CLOSE)
            if call is None:
                content += self._passed(end)
            else:
                content += self._passed(len(self.held[:start].rstrip()))
                calls.append(call)
                self.held, self.behind = self.held.lstrip()[end - start :], True
        return content + self._passed(self._begins()), tuple(calls)

    def end(self) -> str:
        """The rest of the content, at the end of the text."""
        return "" if self.behind and not self.held.strip() else self._passed(len(self.held))

    def _passed(self, count: int) -> str:
        """Take this many characters off what is held, as content."""
        content, self.held = self.held[:count], self.held[count:]
        self.behind = self.behind and not content
        return content

    def _begins(self) -> int:
        """Where a call, or what may become one, begins in what is held, with the whitespace before it."""
        start = self.held.find(OPEN)
        if start < 0:
            partial = next((n for n in range(len(OPEN) - 1, 0, -1) if self.held.endswith(OPEN[:n])), 0)
            start = len(self.held) - partial
        return len(self.held[:start].rstrip())

    def _parsed(self, text: str) -> ToolCall | None:
        try:
            found = from_json(text, allow_inf_nan=False)  # limits depth, and takes no half of a surrogate pair
            name, arguments = found["name"], found.get("arguments", {})
            arguments_text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        except (ValueError, KeyError, TypeError, AttributeError):  # no JSON, or no object with a name
            return None
        if not (isinstance(name, str) and name):
            return None
        self.count += 1
        return ToolCall(self.count - 1, f"call_{uuid.uuid4().hex}", name, arguments_text)
