"""Connections that come to nothing end. Needs uvicorn."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

_PATIENCE = 60.0  # seconds, as in nginx


class Connection(H11Protocol):
    """uvicorn's connection, closed where the client keeps the server waiting for too long.

    uvicorn waits for ever for a request of which no or not every header has come, for the rest of a body that no route reads, and for a
    client that does not read its answer; only a kept connection on which nothing more comes is closed, after 5 seconds. Here none of them
    may take longer than `patience`: whole headers must come in that time, however slowly, since the connection was made or the last answer
    was written; and of what is written, something must be read.
    """

    patience = _PATIENCE
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    @property
    def _waits(self) -> bool:
        """For the client. It has done so since `_watch`, which is called wherever it begins to."""
        return self.cycle is None or self.cycle.response_complete or self.flow.write_paused

    def _watch(self) -> None:
        self._unwatch()
        self._timer = self.loop.call_later(self.patience, self._look, self.transport.get_write_buffer_size())

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self, unread: int) -> None:
        """Close the connection, but for that of a client which has read some of what was written."""
        if self._waits:
            if self.transport.get_write_buffer_size() < unread:
                self._watch()
            else:
                self.transport.abort()  # a mere close would wait until all is read


def patient(request_timeout: float) -> type[Connection]:
    """The class of connections of a server on which a request may take so many seconds."""
    return type("Connection", (Connection,), {"patience": min(_PATIENCE, request_timeout)})
