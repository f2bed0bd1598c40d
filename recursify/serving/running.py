"""Start and shutdown of the server."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, first_line
from ..utils.device import choose_device, placed
from .settings import ServeSettings

if TYPE_CHECKING:
    from .answering import Service

_NEEDED = ("fastapi", "uvicorn")
_TICK = 0.05  # seconds between checks for running requests, and for the engine
_LAST_WORDS = 2.0  # seconds that /health says that the engine has stopped, before the process ends
_GOODBYE = 5  # seconds for connections to receive the rest of their answers
_KILLED = 130  # exit status after SIGINT


class EngineStopped(RuntimeError):
    """A batch manager has died; only a new process can serve again."""


def run(settings: ServeSettings, say: Callable[[str], object] | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM; a second one exits at once.

    Args:
        say: Called with each status line; None prints.

    Raises:
        UserError: A flag out of range, a checkpoint that cannot be read, caches that do not fit, a port in use, packages that are
            missing.
        EngineStopped: A batch manager has died.
    """
    say = say or _print
    settings.validate()
    require_packages()
    with bound(settings.host, settings.port) as sock:
        service = load(settings)
        for line in described(service):
            say(line)
        stop = Stop()
        with stop.on_signals():
            asyncio.run(serve(service, sock, stop, ready=lambda: say(f"listening on {address(sock)}; Ctrl-C stops")))
    say("stopped")


def require_packages() -> None:
    """Raises UserError if FastAPI or uvicorn is missing."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f'{" and ".join(missing)}: not installed, and the server needs it; pip install "recursify[serve]"')


def load(settings: ServeSettings) -> Service:
    """Load model and tokenizer and allocate the caches.

    Raises:
        UserError: As `run`.
    """
    from ..checkpoints.loading import load_model
    from .answering import Service

    device = choose_device(settings.device)
    model, tokenizer = load_model(settings.checkpoint, settings.tokenizer_path, revision=settings.revision, donor=settings.donor)
    path = Path(settings.checkpoint)
    name = settings.model_name or (path.absolute().name.removesuffix(".pt") if path.exists() else settings.checkpoint)
    return Service(placed(model, device, settings.dtype).eval(), tokenizer, name, settings)


def described(service: Service) -> Iterator[str]:
    """The lines printed at startup."""
    engine, model = service.engine, service.model
    offered = f", H_cycles {', '.join(map(str, service.depths))} (default {engine.default})" if service.depths else ""
    yield f"model {service.name}{offered}, {str(model.dtype).removeprefix('torch.')} on {model.device}"
    for depth, batcher in engine.batchers.items():
        where = "" if depth is None else f" at H_cycles {depth}"
        yield f"cache{where}: {batcher.blocks} blocks of {batcher.page} tokens, {batcher.memory / 1e6:,.0f} MB"
    yield f"a text has at most {service.longest} tokens, prompt included; {service.settings.max_running} are written at once"


async def serve(service: Service, sock: socket.socket, stop: Stop, ready: Callable[[], object] = lambda: None) -> None:
    """Serve on a bound socket until `stop`; then finish running requests within the configured time.

    Args:
        ready: Called once when requests are accepted.

    Raises:
        EngineStopped: A batch manager has died. All requests have failed then, and `/health` has said so for a moment.
    """
    import uvicorn

    from .app import make_app
    from .connections import patient

    class Server(uvicorn.Server):
        def capture_signals(self) -> Any:  # `Stop` handles signals
            return nullcontext()

    config = uvicorn.Config(
        make_app(service), http=patient(service.settings.request_timeout), ws="none", lifespan="off", log_level="warning",
        access_log=False, server_header=False,
    )  # fmt: skip
    server = Server(config)
    asked = stop.here()
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        service.engine.start()
        while not server.started and not serving.done():
            await asyncio.sleep(_TICK)
        ready()
        ends = {serving, asyncio.ensure_future(asked.wait()), asyncio.ensure_future(_until_dead(service))}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if service.engine.alive:
            service.engine.stopping = True
            await _until_idle(service, service.settings.shutdown_timeout)
        if not service.engine.alive:
            raise await _last_words(service)
    finally:
        service.engine.abandon()
        server.should_exit = True
        closed = asyncio.create_task(asyncio.to_thread(service.close))
        await asyncio.wait({serving}, timeout=_GOODBYE)
        for connection in list(server.server_state.connections):
            connection.transport.abort()  # to its request, the client has gone
        await asyncio.gather(serving, closed)


async def _until_dead(service: Service) -> None:
    while service.engine.alive:
        await asyncio.sleep(_TICK)


async def _until_idle(service: Service, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while service.engine.alive and not service.engine.idle and loop.time() < deadline:
        await asyncio.sleep(_TICK)


async def _last_words(service: Service) -> EngineStopped:
    """Fail all requests of an engine that has died, also those that its manager did not, and let `/health` say so for a moment."""
    service.engine.fail("the engine has stopped")
    await asyncio.sleep(_LAST_WORDS)
    fault = service.engine.fault
    cause = "" if fault is None else f" ({first_line(fault)})"
    return EngineStopped(f"the engine has stopped{cause}; what was asked for has failed, and the server must be started again")


class Stop:
    """A stop request, from any thread, possibly before the server has started."""

    def __init__(self) -> None:
        self.asked = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()

    def here(self) -> asyncio.Event:
        """An event of the running loop, set by the stop request."""
        self._loop = asyncio.get_running_loop()
        if self.asked:
            self._event.set()
        return self._event

    def ask(self) -> None:
        self.asked = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._event.set)

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM; the second one ends the process at once. Main thread only."""
        before = {kind: signal.signal(kind, self._on_signal) for kind in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)

    def _on_signal(self, kind: int, frame: object) -> None:
        if self.asked:
            os._exit(_KILLED)
        self.ask()


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """Bind a socket, without listening.

    Raises:
        UserError: No such host, or the port is in use or not permitted.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise UserError(f"--host: expected an address of this machine, got {host!r} ({error.strerror or error})") from error
    with socket.socket(family, kind, protocol) as sock:
        if os.name == "posix":  # allows a port in TIME_WAIT; on Windows the option means something else
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(where)
        except OSError as error:
            raise UserError(
                f"--port: {host} port {port} cannot be had ({error.strerror}); choose another, or 0 for any free one"
            ) from error
        yield sock


def address(sock: socket.socket) -> str:
    """The URL for clients."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _print(line: str) -> None:
    print(line, flush=True)
