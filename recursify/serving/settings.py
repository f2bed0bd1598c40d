"""The flags of the server."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from ..checkpoints.settings import ModelSource, TokenizerSource
from ..errors import UserError
from ..utils.device import choose_device
from ..utils.options import DeviceOptions, ModelDtype

API_KEY = "RECURSIFY_API_KEY"


@dataclass(kw_only=True)
class ServeSettings(DeviceOptions, ModelDtype, TokenizerSource, ModelSource):
    """Serve a model over HTTP with an OpenAI-compatible API."""

    depths: tuple[int, ...] = ()
    """Cycle counts that requests choose from with H_cycles: 1 3 5, or 1,3,5. Each has a KV cache of its own. Default: that of the
    checkpoint."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all interfaces."""
    port: int = 8000
    """Port to listen on; 0 picks a free one and prints it."""
    api_key: str | None = None
    """Key that requests must send as a bearer token. Default: the environment variable RECURSIFY_API_KEY, which other users cannot see."""
    model_name: str | None = None
    """Model name in the API. Default: the name of the checkpoint."""
    cache_tokens: int | None = None
    """Tokens in the KV cache of each depth, over all requests. Default: 8192; 65536 on a GPU."""
    batch_tokens: int | None = None
    """Maximum tokens per forward pass; longer prompts are prefilled in chunks. Default: 512; 2048 on a GPU."""
    max_running: int = 32
    """Maximum concurrent sequences per depth; more are queued."""
    max_queue: int = 128
    """Maximum queued sequences over all depths; further requests get status 429."""
    max_completion_tokens: int = 1024
    """Largest max_tokens of a request; also the default of chats."""
    max_choices: int = 16
    """Largest number of completions per request: prompts times n."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages whose scripts may call the API, e.g. https://chat.example.org, or * for all. Default: none."""
    max_body_bytes: int = 2_000_000
    """Largest request body in bytes."""
    request_timeout: float = 600.0
    """Seconds after which a request fails, queueing included."""
    shutdown_timeout: float = 30.0
    """Seconds that running requests may take to finish after Ctrl-C or SIGTERM."""

    def validate(self) -> None:
        """Check everything that needs no model.

        Raises:
            UserError: A value out of range.
        """
        self.wanted_depths()
        if not 0 <= self.port < 2**16:
            raise UserError(f"--port: expected 0 to {2**16 - 1} (0 is any free one), got {self.port}")
        for name in ("max_running", "max_completion_tokens", "max_choices", "max_body_bytes", "cache_tokens", "batch_tokens"):
            self._at_least(name, 1)
        self._at_least("max_queue", 0)
        for name in ("request_timeout", "shutdown_timeout"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"--{name}: expected seconds, at least 0, got {value}")
        if self.request_timeout == 0:
            raise UserError("--request_timeout: expected more than 0 seconds, got 0")
        if self.batch_tokens is not None and self.batch_tokens < self.max_running:
            raise UserError(
                f"--batch_tokens: expected at least --max_running, {self.max_running}, since each sequence takes a token of a pass; "
                f"got {self.batch_tokens}"
            )
        for name in ("api_key", "model_name"):
            if getattr(self, name) == "":
                raise UserError(f"--{name}: expected some text, got an empty one")
        choose_device(self.device)

    def wanted_depths(self) -> tuple[int, ...]:
        """`depths` as numbers, each once, in the order given.

        Raises:
            UserError: A depth below 0.
        """
        for depth in self.depths:
            if depth < 0:
                raise UserError(f"--depths: expected whole numbers of at least 0, such as 1 3 5, got {depth}")
        return tuple(dict.fromkeys(self.depths))

    @property
    def key(self) -> str | None:
        """The API key that requests must send; None if there is none."""
        return self.api_key or os.environ.get(API_KEY) or None

    def sizes(self, device: Any) -> tuple[int, int]:
        """(cache tokens, batch tokens) for a `torch.device`, with defaults filled in."""
        cache, batch = (8192, 512) if device.type == "cpu" else (65536, 2048)
        return self.cache_tokens or cache, self.batch_tokens or max(batch, self.max_running)

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise UserError(f"--{name}: expected at least {least}, got {value}")
