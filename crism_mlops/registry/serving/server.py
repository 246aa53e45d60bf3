"""The whole server: listen, load, follow, and at the end leave nothing running."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from crism_mlops.errors import ServingError
from crism_mlops.registry.serving.follow import Follower, house_of
from crism_mlops.registry.serving.front import Front
from crism_mlops.registry.serving.logs import tell
from crism_mlops.registry.serving.metrics import Metrics
from crism_mlops.registry.serving.pool import Pool
from crism_mlops.registry.serving.settings import TOKEN_VARIABLE, Settings
from crism_mlops.registry.serving.source import Registry

# Connections, idle ones included: more are answered 503 by uvicorn itself.
CONNECTIONS = 1000


class Connection(H11Protocol):
    """uvicorn's, whose requests can drop it: `scope["state"]["drop"]`, without waiting for what is not read."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn's own
        super().connection_made(transport)
        self.app_state = {**self.app_state, "drop": transport.abort}


class Server(uvicorn.Server):
    """uvicorn without its signals: it would end the process by the signal it got before workers are stopped."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(settings: Settings, say: Callable[[str], None]) -> int:
    """Serve until Ctrl-C or SIGTERM; the number of the signal. `say` gets what a person wants to read.

    Raises CrismError where the address cannot be had, or the model cannot be found or loaded at the beginning.
    """
    listener = listen(settings.host, settings.port)
    with contextlib.closing(listener):
        registry = Registry(settings.model, settings.tracking_uri)
        # No process started from here, and no log of the environment, has the token.
        os.environ.pop(TOKEN_VARIABLE, None)
        # Only this user may enter it: mkdtemp's mode is 0700.
        with tempfile.TemporaryDirectory(prefix="crism-serve-", ignore_cleanup_errors=True) as folder:
            house_of(folder)
            return asyncio.run(_run(settings, registry, listener, folder, say))


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes any. Raises ServingError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind(address)
        except BaseException:
            made.close()
            raise
    except OSError as error:
        raise ServingError(
            f"cannot listen on {host} port {port} ({error.strerror}); try another --port or --host"
        ) from error
    return made


async def _run(
    settings: Settings, registry: Registry, listener: socket.socket, folder: str, say: Callable[[str], None]
) -> int:
    metrics = Metrics()
    pool = Pool(
        house_of(folder), settings.workers, settings.concurrency, settings.timeout, metrics, start=settings.start
    )
    front = Front(settings, pool, metrics)
    config = uvicorn.Config(
        front, log_config=None, access_log=False, lifespan="off", ws="none", proxy_headers=False, server_header=False,
        http=Connection, limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=round(settings.drain), backlog=1024,
    )  # fmt: skip
    server = Server(config)
    signals: list[int] = []
    with _signals(server, front, signals):
        following = asyncio.create_task(_follow(settings, registry, pool, metrics, listener, say))
        # A model that does not load at the beginning ends the server.
        following.add_done_callback(lambda _: setattr(server, "should_exit", True))
        try:
            await server.serve(sockets=[listener])
        finally:
            following.cancel()
            outcome = (await asyncio.gather(following, return_exceptions=True))[0]
            await pool.stop()
    if not signals and isinstance(outcome, Exception):
        raise outcome
    tell(logging.INFO, "stopped")
    return signals[0] if signals else 0


async def _follow(
    settings: Settings, registry: Registry, pool: Pool, metrics: Metrics, listener: socket.socket,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    follower = Follower(registry, pool, metrics, settings.poll)
    version = await follower.first()
    host, port = listener.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    say(f"{version.name} version {version.version} is served at http://{where}:{port}/invocations (Ctrl-C stops it)")
    if registry.moves:
        await follower.follow(version)
    else:
        await asyncio.Event().wait()


@contextlib.contextmanager
def _signals(server: Server, front: Front, signals: list[int]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM lets requests end, a second one does not wait for them."""
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        if signals:
            server.force_exit = True
        signals.append(number)
        front.draining = server.should_exit = True
        tell(logging.INFO, "stopping", signal=signal.Signals(number).name)

    numbers: Any = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
