"""What clients talk to: host, token and size are checked, requests counted, limited, logged, and given to workers."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import re
import string
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from crism_mlops.registry.serving.logs import tell
from crism_mlops.registry.serving.metrics import Metrics
from crism_mlops.registry.serving.pool import LostError, NoWorkerError, Pool, Reply
from crism_mlops.registry.serving.settings import LOOPBACK_NAMES, Settings, is_loopback

if TYPE_CHECKING:
    from crism_mlops.registry.serving.asgi import Message, Receive, Scope, Send

BODY_S = 60.0
# An answer is sent within SEND_S seconds, and one more for each SLOWEST bytes; PIECE of them at once.
SEND_S, SLOWEST, PIECE = 60.0, 1e6, 1 << 20
OPEN = ("/health", "/ready")
ROUTES = {
    "/health": "GET",
    "/ping": "GET",
    "/ready": "GET",
    "/version": "GET",
    "/model": "GET",
    "/metrics": "GET",
    "/invocations": "POST",
}
# A header holds neither letters beyond Latin-1 nor line ends, which a model's name may: all but these are %-encoded.
_PLAIN = string.punctuation.replace("%", "")
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CODES = {400: "BAD_REQUEST", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND",
          405: "METHOD_NOT_ALLOWED", 408: "REQUEST_TIMEOUT", 413: "REQUEST_TOO_LARGE", 415: "UNSUPPORTED_MEDIA_TYPE",
          421: "WRONG_HOST", 503: "TEMPORARILY_UNAVAILABLE", 504: "DEADLINE_EXCEEDED"}  # fmt: skip
_FIGURES = {"queue_seconds": "x-crism-queued", "model_seconds": "x-crism-model", "batch": "x-crism-batch"}


@dataclass(slots=True)
class Visit:
    """One request, for its line in the log. `inside`: it counts as being answered."""

    id: str
    inside: bool = False
    status: int = 0
    taken: int = 0
    given: int = 0
    reply: Reply | None = None
    reason: str | None = None


class RefusedError(Exception):
    """An answer other than 200, in one sentence."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class InPieces(Response):
    """A response that is over when all but a rest of it has left: sent at once, a large one would lie in uvicorn's
    buffer for as long as nobody reads it, and count for nothing."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for first in range(0, len(self.body), PIECE):
            piece = self.body[first : first + PIECE]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        # uvicorn waits before each for most of what it was given earlier to leave.
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Front:
    """The application as ASGI. Nothing in a request names a file or a model."""

    def __init__(self, settings: Settings, pool: Pool, metrics: Metrics) -> None:
        self.settings, self.pool, self.metrics = settings, pool, metrics
        self.draining = False
        self._in_flight = 0
        # Of late predictions, for Retry-After.
        self._usual_s = 1.0
        own = settings.allowed_hosts + ((*LOOPBACK_NAMES, settings.host) if is_loopback(settings.host) else ())
        # On another address the token keeps strangers out, whatever name they use; unless names are given.
        self._hosts = {name.lower() for name in own}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")
        given = Headers(scope=scope).get("x-request-id", "")
        visit = Visit(given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex)
        try:
            await self._visited(Request(scope, receive), visit, send)
        finally:
            # Not before: what is to be sent lies in memory.
            if visit.inside:
                self._in_flight -= 1
                self.metrics.in_flight.set(self._in_flight)

    async def _visited(self, request: Request, visit: Visit, send: Send) -> None:
        begun = time.monotonic()

        async def watched(message: Message) -> None:
            await send(message)
            visit.given += len(message.get("body", b""))

        try:
            response = await self._answer(request, visit)
        except RefusedError as refused:
            visit.reason = refused.message
            response = problem(refused.status, refused.message, visit.id, refused.headers)
        except ClientDisconnect:
            visit.status, visit.reason = 499, "the client went away"
            self._log(request, visit, begun)
            return
        except Exception as error:
            tell(logging.ERROR, "front failed", exc_info=error, request_id=visit.id)
            response = problem(500, "the server failed; its log says why", visit.id)
        visit.status = response.status_code
        response.headers["x-request-id"] = visit.id
        try:
            async with asyncio.timeout(SEND_S + len(response.body) / SLOWEST):
                await response(request.scope, request.receive, watched)
        except TimeoutError:
            visit.reason = "the answer was not read in time"
            request.scope["state"]["drop"]()
            # So that uvicorn sees it before it finds that this answer is not whole.
            await asyncio.sleep(0)
        finally:
            self._log(request, visit, begun)

    async def _answer(self, request: Request, visit: Visit) -> Response:
        path, method = request.url.path, request.method
        self._check_host(request.headers)
        permitted = self._permitted(request.headers)
        if path not in OPEN and not permitted:
            raise RefusedError(401, "a token is needed: Authorization: Bearer TOKEN", www_authenticate="Bearer")
        if path not in ROUTES:
            raise RefusedError(404, f"nothing is here; expected one of {', '.join(ROUTES)}")
        if method != ROUTES[path] and not (method == "HEAD" and ROUTES[path] == "GET"):
            raise RefusedError(405, f"expected {ROUTES[path]}", allow=ROUTES[path])
        match path:
            case "/health" | "/ping":
                return Response("\n", media_type="application/json")
            case "/ready":
                return self._ready(permitted)
            case "/metrics":
                return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")
            case "/version" | "/model":
                return self._passed_on(await self._ask("GET", path, b"", visit))
        return await self._predict(request, visit)

    def _check_host(self, headers: Headers) -> None:
        """A page in a browser can make a name of its own mean 127.0.0.1; it cannot send another Host than that name."""
        if self._hosts and _host(headers.get("host", "")) not in self._hosts:
            raise RefusedError(421, "the Host header names another server; --allowed-host NAME admits it")

    def _permitted(self, headers: Headers) -> bool:
        token = self.settings.token
        if token is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Both are looked at in full: the time it takes tells nothing of the token.
        return hmac.compare_digest(given.strip().encode("latin-1", "replace"), token) & (scheme.lower() == "bearer")

    def _ready(self, permitted: bool) -> Response:
        workers = len(self.pool.ready)
        ready = workers > 0 and not self.draining
        content: dict[str, Any] = {"ready": ready}
        if permitted and self.pool.generation is not None:
            version = self.pool.generation.version
            content |= {"model": version.name, "version": version.version, "run": version.run_id, "workers": workers}
        return Response(json.dumps(content), 200 if ready else 503, media_type="application/json")

    async def _predict(self, request: Request, visit: Visit) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" or request.headers.get("content-encoding", "identity") != "identity":
            raise RefusedError(415, "expected Content-Type: application/json, not compressed")
        if self.pool.generation is None:
            raise RefusedError(503, "no model is loaded yet", retry_after="5")
        if self._in_flight >= self.settings.concurrency:
            self.metrics.refused.inc()
            raise RefusedError(
                503, f"{self._in_flight} requests are being answered, which is the limit; try again later",
                retry_after=str(min(max(math.ceil(self._usual_s), 1), 60)),
            )  # fmt: skip
        visit.inside = True
        self._in_flight += 1
        self.metrics.in_flight.set(self._in_flight)
        begun = time.monotonic()
        body = await self._body(request, visit)
        reply = await self._ask("POST", "/invocations", body, visit)
        seconds = time.monotonic() - begun
        if reply.status == 200:
            self._usual_s += 0.2 * (seconds - self._usual_s)
            self.metrics.seconds.observe(seconds)
        for name, histogram in (("queue_seconds", self.metrics.queue), ("model_seconds", self.metrics.model),
                                ("batch", self.metrics.batch)):  # fmt: skip
            if (value := reply.headers.get(_FIGURES[name])) is not None:
                histogram.observe(float(value))
        response = self._passed_on(reply)
        if reply.status == 503:
            response.headers["retry-after"] = "5"
        return response

    async def _body(self, request: Request, visit: Visit) -> bytes:
        """What really arrives is counted; Content-Length may be absent, or wrong."""
        most = self.settings.max_bytes
        too_large = RefusedError(413, f"the request is larger than {most / 1e6:g} MB; send fewer or smaller images")
        claimed = request.headers.get("content-length", "")
        if claimed.isascii() and claimed.isdigit() and int(claimed[:20]) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                async for block in request.stream():
                    visit.taken += len(block)
                    if visit.taken > most:
                        raise too_large
                    body += block
        except TimeoutError:
            raise RefusedError(408, f"the request did not arrive within {BODY_S:.0f} s") from None
        return bytes(body)

    async def _ask(self, method: str, path: str, body: bytes, visit: Visit) -> Reply:
        try:
            headers = {"content-type": "application/json", "x-request-id": visit.id}
            visit.reply = await self.pool.ask(method, path, body, headers)
        except NoWorkerError:
            raise RefusedError(503, "no worker is ready", retry_after="5") from None
        except TimeoutError:
            raise RefusedError(504, f"no answer within {self.settings.timeout:g} s") from None
        except LostError:
            raise RefusedError(500, "each worker that was given the request ended; see the server's log") from None
        return visit.reply

    def _passed_on(self, reply: Reply) -> Response:
        version = reply.version
        told = {"x-model-name": version.name, "x-model-version": version.version, "x-model-run": version.run_id}
        headers = {name: quote(value, _PLAIN, errors="replace") for name, value in told.items() if value}
        return InPieces(reply.body, reply.status, headers, media_type=reply.headers.get("content-type"))

    def _log(self, request: Request, visit: Visit, begun: float) -> None:
        path = request.url.path if request.url.path in ROUTES else "other"
        reply = visit.reply
        version = None if reply is None else reply.version.version
        self.metrics.requests.labels(path, str(visit.status), version or "").inc()
        # Probes come every few seconds.
        level = logging.DEBUG if path in ("/health", "/ping", "/ready", "/metrics") else logging.INFO
        headers = {} if reply is None else reply.headers
        figures: dict[str, Any] = {key: _number(headers.get(name)) for key, name in _FIGURES.items()}
        tell(
            # Any word passes for a method, and one of kilobytes is nobody's.
            level, "request", request_id=visit.id, method=request.method[:16], path=path, status=visit.status,
            seconds=round(time.monotonic() - begun, 4), bytes_in=visit.taken, bytes_out=visit.given, version=version,
            worker=None if reply is None else reply.worker, tries=None if reply is None else reply.tries,
            client=request.client.host if request.client else None, reason=visit.reason, **figures,
        )  # fmt: skip


def problem(status: int, message: str, request_id: str, headers: dict[str, str] | None = None) -> Response:
    """An error in the form that MLflow's scoring server gives it, with the request's id."""
    content = {"error_code": _CODES.get(status, "INTERNAL_ERROR"), "message": message, "request_id": request_id}
    return Response(json.dumps(content), status, headers, media_type="application/json")


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    found = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\](?::[0-9]*)?|([^:\[\]]*)(?::[0-9]*)?", header.strip())
    return "" if found is None else (found[1] or found[2] or "").lower()


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)
