"""Worker processes of one version, and the pool that requests go through, whatever happens to a worker."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crism_mlops
from crism_mlops.errors import ServingError
from crism_mlops.redact import tells_secret
from crism_mlops.registry.serving.logs import log, tell, unexpected
from crism_mlops.registry.serving.metrics import Metrics
from crism_mlops.registry.serving.process import STOP_S, Worker
from crism_mlops.registry.serving.settings import START_S, TOKEN_VARIABLE
from crism_mlops.registry.serving.source import Version
from crism_mlops.registry.serving.worker import SECONDS, Job
from crism_mlops.tracking_store import pauses

TRIES = 3
GRACE_S = 5.0
# What a worker has no use for, beside all that is secret: it reads a folder, and the model's code runs in it.
_NOT_ITS = (TOKEN_VARIABLE, "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI",
            "CRISM_MLOPS_STORAGE")  # fmt: skip


class NoWorkerError(Exception):
    """No worker takes requests, and none did in time."""


class LostError(Exception):
    """Each worker that was given the request ended before its answer."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A worker's answer, whole. `tries`: workers that were asked; `worker`: the process id of the last."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    version: Version
    tries: int
    worker: int


class Generation:
    """All workers of one version; one that ends by itself is replaced."""

    def __init__(
        self, version: Version, folder: Path, make: Callable[[], Worker], count: int, metrics: Metrics,
        changed: Callable[[], None],
    ) -> None:  # fmt: skip
        self.version, self.folder = version, folder
        self._make, self._metrics, self._changed = make, metrics, changed
        self.workers = [make() for _ in range(count)]
        self._keepers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Returns when all are ready. Raises ServingError where one is not; none runs then."""
        try:
            async with asyncio.TaskGroup() as group:
                for worker in self.workers:
                    group.create_task(worker.start())
        except ExceptionGroup as errors:
            await self.stop(0.0)
            raise errors.exceptions[0] from errors
        except asyncio.CancelledError:
            await self.stop(0.0)
            raise
        self._keepers = [asyncio.create_task(self._keep(i)) for i in range(len(self.workers))]

    async def _keep(self, index: int) -> None:
        rest = pauses()
        while True:
            begun = time.monotonic()
            await self.workers[index].ended()
            self._changed()
            lost = self.workers[index]
            tell(logging.WARNING, "worker ended", worker=lost.pid, code=lost.code, version=self.version.version)
            self._metrics.restarts.inc()
            await lost.stop(0.0)
            if time.monotonic() - begun > 60.0:
                rest = pauses()
                begun = time.monotonic()
            while True:
                self.workers[index] = self._make()
                try:
                    await self.workers[index].start()
                except Exception as error:
                    # Whatever it is: without a keeper there would be no worker for ever.
                    tell(logging.ERROR, "worker does not start", exc_info=unexpected(error), error=str(error),
                         version=self.version.version)  # fmt: skip
                    await asyncio.sleep(next(rest))
                else:
                    break
            tell(logging.INFO, "worker started", worker=self.workers[index].pid, version=self.version.version)
            self._changed()

    async def stop(self, drain: float) -> None:
        """Wait for requests in flight, at most `drain` seconds, and end all processes."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        end = time.monotonic() + drain
        while any(worker.in_flight for worker in self.workers) and time.monotonic() < end:
            await asyncio.sleep(0.02)
        await asyncio.gather(*(worker.stop(STOP_S if drain else 0.0) for worker in self.workers))
        shutil.rmtree(self.folder, ignore_errors=True)


class Pool:
    """The generation that answers. Requests are given to its least busy worker, and to another if that one ends."""

    def __init__(
        self, house: Path, workers: int, concurrency: int, timeout: float, metrics: Metrics,
        module: str = "crism_mlops.registry.serving.worker", start: float = START_S,
    ) -> None:  # fmt: skip
        self.house, self.metrics = house, metrics
        self._count, self._concurrency, self._timeout = workers, concurrency, timeout
        self._module, self._start = module, start
        self._numbers = itertools.count()
        self._change = asyncio.Event()
        self._suspects = asyncio.Lock()
        self._draining: dict[asyncio.Task[None], Generation] = {}
        self._drained_by = 0.0
        self.generation: Generation | None = None

    @property
    def ready(self) -> list[Worker]:
        """The workers that take requests."""
        return [] if self.generation is None else [worker for worker in self.generation.workers if worker.ready]

    async def replace(self, version: Version, folder: Path, files: Path) -> None:
        """Start workers of a version whose `files` lie in `folder`, let them answer, stop the old ones when their
        requests are answered. Raises ServingError; then nothing has changed.

        Begins when those that an earlier call replaced are `drained`: in memory are two versions, however often an
        alias moves."""
        await self.drained()
        environment = self._environment()

        def make() -> Worker:
            path = self.house / f"{next(self._numbers)}.sock"
            job = Job(str(files), str(self.house), str(path), self._concurrency, self._timeout)
            return Worker(job, version, environment, self._module, self._start)

        new = Generation(version, folder, make, self._count, self.metrics, self._changed)
        await new.start()
        old, self.generation = self.generation, new
        self._changed()
        if old is not None:
            # So long the last of them may take.
            last = self._timeout + GRACE_S
            task = asyncio.create_task(old.stop(last))
            self._draining[task] = old
            self._drained_by = time.monotonic() + last + STOP_S + GRACE_S
            task.add_done_callback(lambda done: self._draining.pop(done, None))

    @property
    def draining(self) -> bool:
        """Whether workers that were replaced still run."""
        return bool(self._draining)

    async def drained(self) -> None:
        """Wait for the end of workers that were replaced. Raises ServingError where they outlive the time of the last
        request and of their being killed."""
        if self._draining:
            await asyncio.wait(self._draining, timeout=max(self._drained_by - time.monotonic(), 0.0))
        for old in self._draining.values():
            name, pids = old.version, ", ".join(str(worker.pid) for worker in old.workers)
            raise ServingError(
                f"the workers of {name.name} version {name.version} (process {pids}) do not end, and two versions at "
                "most are in memory; see what keeps them, or start the server again"
            )

    async def ask(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        """A worker's answer. Raises NoWorkerError, LostError, TimeoutError (`timeout` is for all that are asked)."""
        end = time.monotonic() + self._timeout
        lost = 0
        async with contextlib.AsyncExitStack() as alone:
            for number in itertools.count(1):
                self.metrics.retries.inc(number > 1)
                found = await self._once(method, path, body, headers, end, number)
                if isinstance(found, Reply):
                    return found
                if found.stopping:
                    continue  # Not because of the request.
                lost += 1
                if lost == TRIES:
                    break
                if lost == 1:
                    # Perhaps because of it: the next such goes alone, not all of them together again.
                    async with asyncio.timeout(end - time.monotonic()):
                        await alone.enter_async_context(self._suspects)
        raise LostError

    async def _once(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], end: float, number: int
    ) -> Reply | Worker:
        """The answer of an idle worker, or the worker itself that was lost."""
        import aiohttp

        worker = await self._idle(end)
        seconds = end - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        worker.in_flight += 1
        try:
            # After so many seconds the worker says itself that it takes too long.
            told = {**headers, SECONDS: f"{seconds:.3f}"}
            status, found, content = await worker.ask(method, path, body, told, seconds + GRACE_S)
            return Reply(status, found, content, worker.version, number, worker.pid)
        except TimeoutError:
            # It neither answered nor gave up by itself: it hangs.
            tell(logging.ERROR, "worker hangs", worker=worker.pid)
            worker.kill()
            raise
        except (aiohttp.ClientError, OSError) as error:
            gone = await worker.ended(0.5)
            log.debug("worker %d lost a request (%r), gone: %s", worker.pid, error, gone)
            return worker
        finally:
            worker.in_flight -= 1

    async def _idle(self, end: float) -> Worker:
        while not (ready := self.ready):
            self._change.clear()
            try:
                await asyncio.wait_for(self._change.wait(), max(end - time.monotonic(), 0.0))
            except TimeoutError:
                raise NoWorkerError from None
        return min(ready, key=lambda worker: worker.in_flight)

    async def stop(self) -> None:
        """End all processes; requests in flight are the caller's to wait for."""
        running = [self.generation] if self.generation is not None else []
        running += self._draining.values()
        tasks = list(self._draining)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(generation.stop(0.0) for generation in running))

    def _changed(self) -> None:
        self.metrics.workers.set(len(self.ready))
        self._change.set()

    def _environment(self) -> dict[str, str]:
        kept: dict[str, Any] = {
            name: value for name, value in os.environ.items() if name not in _NOT_ITS and not tells_secret(name, value)
        }
        package = str(Path(crism_mlops.__file__).parents[1])
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, (package, kept.get("PYTHONPATH"))))
        if self._count > 1:
            # Each would start as many threads as there are cores.
            kept.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._count)))
        return kept
