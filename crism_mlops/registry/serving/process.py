"""One worker process, seen from the front: started, asked, ended."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from crism_mlops.errors import ServingError
from crism_mlops.registry.serving.logs import tell
from crism_mlops.registry.serving.settings import START_S
from crism_mlops.registry.serving.source import Version
from crism_mlops.registry.serving.worker import Job

if TYPE_CHECKING:
    import aiohttp

STOP_S = 10.0
LONGEST = 1000
# Characters of one text in the log: looking for passwords in it keeps all requests waiting.
LONGEST_TEXT = 8192


class Worker:
    """One process. `start` returns when it has made a prediction."""

    def __init__(
        self, job: Job, version: Version, environment: Mapping[str, str], module: str, limit: float = START_S
    ) -> None:
        """`limit`: seconds from its start to its first prediction."""
        self.version = version
        self.in_flight = 0
        self.ready = False
        # It ends because it was told to.
        self.stopping = False
        self._job, self._environment, self._module, self._limit = job, environment, module, limit
        self._process: asyncio.subprocess.Process | None = None
        self._session: aiohttp.ClientSession | None = None
        self._reading: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        return 0 if self._process is None else self._process.pid

    async def start(self) -> None:
        """Raises ServingError where the process ends, says why it cannot or says nothing within its time before it is
        ready; OSError where there can be none. None runs then."""
        try:
            async with asyncio.timeout(self._limit) as limit:
                await self._start()
        except Exception as error:
            await self.stop(0.0)
            if limit.expired():
                raise ServingError(
                    f"its worker was not ready within {self._limit:g} s; see the log, or give it more with "
                    "--start-timeout"
                ) from error
            raise
        self.ready = True

    async def _start(self) -> None:
        import aiohttp

        Path(self._job.socket).unlink(missing_ok=True)
        self._process = await asyncio.create_subprocess_exec(
            # -P: a file in the working directory is no module of ours.
            sys.executable, "-P", "-m", self._module, stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=self._environment, limit=1 << 20,
            # A group of its own: Ctrl-C is the front's, which lets running requests end first.
            process_group=0,
        )  # fmt: skip
        self._reading = asyncio.create_task(self._relay())
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._process.stdin.write(self._job.line())
            await self._process.stdin.drain()
        try:
            line = await self._process.stdout.readline()
            told = json.loads(line) if line else None
        except ValueError as error:
            raise ServingError(f"its worker says what is no JSON ({error}); see the log") from error
        if told is None:
            code = await self._process.wait()
            raise ServingError(f"its worker ended with {code} before it was ready; see the log")
        if not isinstance(told, dict) or told.get("ready") is not True:
            raise ServingError(str(told.get("error", "no error") if isinstance(told, dict) else told)[:LONGEST])
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(self._job.socket, limit=0, keepalive_timeout=3600.0),
            cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False,
        )  # fmt: skip

    async def ask(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], seconds: float
    ) -> tuple[int, dict[str, str], bytes]:
        """Raises aiohttp.ClientError or OSError where it ends before the answer, TimeoutError after `seconds`."""
        import aiohttp

        assert self._session is not None
        limit = aiohttp.ClientTimeout(total=seconds)
        # A file, which aiohttp sends in pieces: the other requests are not kept waiting.
        content = io.BytesIO(body) if body else None
        async with self._session.request(
            method, f"http://worker{path}", data=content, headers=headers, timeout=limit, allow_redirects=False
        ) as response:
            return response.status, {k.lower(): v for k, v in response.headers.items()}, await response.read()

    async def ended(self, within: float | None = None) -> bool:
        """Wait for the end of the process, for ever or `within` seconds; whether it has ended."""
        assert self._process is not None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), within)
        gone = self._process.returncode is not None
        self.ready = self.ready and not gone
        return gone

    @property
    def code(self) -> int | None:
        return None if self._process is None else self._process.returncode

    def kill(self) -> None:
        self.ready = False
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def stop(self, grace: float = STOP_S) -> None:
        """End the process: asked first, killed after `grace` seconds."""
        self.ready = False
        # One that has ended by itself was not told to.
        self.stopping |= self.code is None
        if self._session is not None:
            await self._session.close()
        if self._process is None:
            return
        if grace > 0:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
        if not await self.ended(grace):
            self.kill()
            await self.ended()
        if self._reading is not None:
            await self._reading
        assert self._process.stdin is not None
        self._process.stdin.close()
        Path(self._job.socket).unlink(missing_ok=True)

    async def _relay(self) -> None:
        """The worker's log lines as they are; what libraries print beside them as lines of ours."""
        assert self._process is not None
        assert self._process.stderr is not None
        while True:
            try:
                line = await self._process.stderr.readline()
            except ValueError:
                continue  # Longer than a megabyte: left out.
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            try:
                told = json.loads(text)
                level = logging.getLevelNamesMapping()[told.pop("level").upper()]
                told.pop("time")
                told = {key: _ends(value) if isinstance(value, str) else value for key, value in told.items()}
                tell(level, told.pop("event"), worker=self.pid, **told)
            except (ValueError, KeyError, AttributeError, TypeError):
                if text:
                    tell(logging.WARNING, "worker output", worker=self.pid, line=_beginning(text))


def _ends(text: str) -> str:
    """A long text without its middle: a traceback's last lines say most."""
    half = LONGEST_TEXT // 2
    return text if len(text) <= LONGEST_TEXT else f"{text[:half]} ... {text[-half:]}"


def _beginning(text: str) -> str:
    """A long text's first words, all of them whole: half an address would not show that it ends a password."""
    return text if len(text) <= LONGEST_TEXT else " ".join([*text[:LONGEST_TEXT].rsplit(maxsplit=1)[:-1], "..."])
