"""The server follows its alias: a new version is fetched, loaded, tried out, and takes over."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import TypeVar

from crism_mlops.errors import ServingError
from crism_mlops.registry.serving.logs import tell, unexpected
from crism_mlops.registry.serving.metrics import Metrics
from crism_mlops.registry.serving.pool import Pool
from crism_mlops.registry.serving.source import Registry, Version
from crism_mlops.tracking_store import pauses

T = TypeVar("T")


class Follower:
    """Looks at the alias every `poll` seconds. What does not load changes nothing: it is tried again, in ever longer
    pauses, until the alias names another."""

    def __init__(self, registry: Registry, pool: Pool, metrics: Metrics, poll: float) -> None:
        self.registry, self.pool, self.metrics = registry, pool, metrics
        self._poll = poll
        self._numbers = itertools.count()

    async def first(self) -> Version:
        """Load what is meant now. Raises CrismError: there is nothing to go on with."""
        version = await in_thread(self.registry.resolve)
        self.metrics.registry_up.set(1)
        await self._adopt(version)
        return version

    async def follow(self, current: Version) -> None:
        """For ever."""
        failed: Version | None = None
        again, rest = 0.0, pauses()
        away = False
        while True:
            await asyncio.sleep(self._poll)
            try:
                wanted = await in_thread(self.registry.resolve)
            except Exception as error:
                # A store that is away, an alias that was taken away, what nobody thought of: the model goes on.
                self.metrics.registry_up.set(0)
                if not away:
                    tell(
                        logging.WARNING,
                        "registry does not say which version",
                        exc_info=unexpected(error),
                        error=str(error),
                    )
                away = True
                continue
            if away:
                tell(logging.INFO, "registry answers again")
            away = False
            self.metrics.registry_up.set(1)
            if wanted == current:
                failed = None
                self.metrics.swap_failing.set(0)
                continue
            if wanted == failed and time.monotonic() < again:
                continue
            if wanted != failed:
                rest = pauses()
            try:
                if self.pool.draining:
                    # Before a third version lies on the disk; until then the alias may name another.
                    await self.pool.drained()
                    continue
                await self._adopt(wanted)
            except Exception as error:
                failed, pause = wanted, next(rest)
                again = time.monotonic() + pause
                self.metrics.swap_failures.inc()
                self.metrics.swap_failing.set(1)
                tell(logging.ERROR, "version does not load, the old one goes on", version=wanted.version,
                     serving=current.version, exc_info=unexpected(error), error=str(error),
                     again_in_seconds=round(pause, 1))  # fmt: skip
            else:
                failed, current = None, wanted
                self.metrics.swap_failing.set(0)

    async def _adopt(self, version: Version) -> None:
        begun = time.monotonic()
        folder = self.pool.house / f"version-{next(self._numbers)}"
        tell(logging.INFO, "loading", model=version.name, version=version.version, run=version.run_id)
        try:
            files = await in_thread(lambda: self.registry.fetch(version, folder))
            await self.pool.replace(version, folder, files)
        except OSError as error:
            raise ServingError(f"version {version.version} cannot be fetched or started ({error})") from error
        except ServingError as error:
            raise ServingError(f"{version.name} version {version.version} does not load: {error}") from error
        finally:
            generation = self.pool.generation
            if generation is None or generation.folder != folder:
                shutil.rmtree(folder, ignore_errors=True)
        self.metrics.served.clear()
        self.metrics.served.labels(version.name, version.version, version.run_id).set(1)
        self.metrics.swaps.inc()
        tell(logging.INFO, "serving", model=version.name, version=version.version, run=version.run_id,
             seconds=round(time.monotonic() - begun, 2), workers=len(self.pool.ready))  # fmt: skip


async def in_thread(call: Callable[[], T]) -> T:
    """The result of a call that blocks; the process's end does not wait for it, as it would for asyncio's own."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return  # Nobody waits any more.
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # None only where T is

    def run() -> None:
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = call()
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # The loop is closed.
            loop.call_soon_threadsafe(settle, result, failure)

    Thread(target=run, daemon=True).start()
    return await future


def house_of(folder: str) -> Path:
    """The server's private folder. Raises ServingError where sockets cannot lie in it."""
    house = Path(folder)
    if len(str(house).encode()) > 80:
        raise ServingError(f"{house}: too long a path for Unix sockets; set TMPDIR to a shorter one, such as /tmp")
    return house
