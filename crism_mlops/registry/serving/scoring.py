"""MLflow's scoring application around a model that predicts in batches, and what it says when it fails."""

from __future__ import annotations

import json
import logging
import math
import time
from contextvars import ContextVar
from dataclasses import dataclass
from threading import TIMEOUT_MAX, Lock
from typing import TYPE_CHECKING, Any, cast

from crism_mlops.errors import RequestError
from crism_mlops.registry.serving.batching import Batcher, ExpiredError, end_if_poisoned, is_memory
from crism_mlops.registry.serving.logs import tell
from crism_mlops.registry.serving.worker import SECONDS

if TYPE_CHECKING:
    from mlflow.pyfunc import PyFuncModel

    from crism_mlops.registry.serving.asgi import Message, Receive, Scope, Send

LONGEST_MESSAGE = 600
# Of all images in a worker at once: their answers, as arrays and as JSON, take some 260 bytes a pixel.
MOST_PIXELS = 1 << 22
QUEUED, MODEL, BATCH = b"x-crism-queued", b"x-crism-model", b"x-crism-batch"


@dataclass(slots=True)
class Call:
    """One request on its way through the worker. `entering`: it is here and not in the queue yet; `reached`: its input
    was read, the model is at work; `pixels`: of its images; `over`: it was answered."""

    request_id: str = ""
    deadline: float = float("inf")
    reached: bool = False
    entering: bool = False
    pixels: int = 0
    over: bool = False
    queued: float | None = None
    model: float | None = None
    images: int | None = None


# MLflow predicts in a thread, which inherits this.
_CALL: ContextVar[Call] = ContextVar("call")


class Queued:
    """Stands where MLflow's PyFuncModel keeps the model: `predict` gets what passes its checks of input and params."""

    def __init__(self, model: PyFuncModel) -> None:
        self._whole = model
        self._python = cast(Any, getattr(getattr(model, "_model_impl", None), "python_model", None))
        self._entering = self._pixels = 0
        self._count, self._alone = Lock(), Lock()
        self.batches = all(hasattr(self._python, name) for name in ("served", "requests", "response"))
        # The params without which such a model answers nothing.
        self.required: dict[str, Any] = {}
        self.description: dict[str, Any] | None = None
        if self.batches:
            served: Any = self._python.served
            self.required = {"bands": list(served.bands)}
            self.description = served.describe()
            self._batcher = Batcher(served.answers, served.checkpoint.config.evaluate.chunk, lambda: self._entering)

    def enter(self, call: Call) -> None:
        """The call is here, whole: a batch may wait a moment for it."""
        with self._count:
            self._entering += not call.entering
            call.entering = True

    def leave(self, call: Call) -> None:
        """Nothing need wait for the call: it is in the queue, or has failed."""
        with self._count:
            self._entering -= call.entering
            call.entering = False

    def admit(self, call: Call, pixels: int) -> bool:
        """Whether there is room for an answer of so many pixels; one of any size has it alone.
        Raises ExpiredError for a call that is over: its thread went on reading after MLflow gave it up."""
        with self._count:
            if call.over:
                raise ExpiredError
            if self._pixels and self._pixels + pixels > MOST_PIXELS:
                return False
            self._pixels += pixels
            call.pixels += pixels
            return True

    def release(self, call: Call) -> None:
        """The call's answer is written, or there is none."""
        with self._count:
            self._pixels -= call.pixels
            call.pixels, call.over = 0, True

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import DEADLINE_EXCEEDED, INTERNAL_ERROR, TEMPORARILY_UNAVAILABLE

        asked = _CALL.get(None)
        call = asked or Call()
        call.reached = True
        # Without a call it is the first prediction, beside which there is none.
        pixels = math.prod(getattr(model_input, "shape", ())[:-1]) if self.batches and asked is not None else 0
        try:
            if not self.admit(call, pixels):
                raise MlflowException(
                    f"{pixels} pixels, and other images are being answered, which is the limit; try again later",
                    TEMPORARILY_UNAVAILABLE,
                )
            return self._predict(call, model_input, params)
        except MlflowException:
            raise
        except RequestError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        except ExpiredError as error:
            raise MlflowException("the prediction was not made in time", DEADLINE_EXCEEDED) from error
        except Exception as error:
            end_if_poisoned(error)
            # MLflow makes a 400 of it, with the traceback; it is not the client's fault.
            tell(logging.ERROR, "prediction failed", exc_info=error, request_id=call.request_id)
            if is_memory(error):
                raise MlflowException(
                    "memory ran out; try again later, or send smaller or fewer images", TEMPORARILY_UNAVAILABLE
                ) from error
            raise MlflowException("the model failed; the server's log says why", INTERNAL_ERROR) from error

    def _predict(self, call: Call, model_input: Any, params: dict[str, Any] | None) -> Any:
        if not self.batches:
            # A model that is no more than MLflow asks for: whole, and one call at a time.
            begun = time.monotonic()
            with self._alone:
                call.queued, call.images = time.monotonic() - begun, len(model_input)
                result = self._whole.predict(model_input, params)
            call.model = time.monotonic() - begun - call.queued
            return result
        requests = self._python.requests(model_input, params)
        future = self._batcher.submit(requests, call.deadline)
        self.leave(call)
        try:
            # The thread is another call's when nobody waits here any more.
            done = future.result(min(max(call.deadline - time.monotonic(), 0.0), TIMEOUT_MAX))
        except TimeoutError as error:
            raise ExpiredError from error
        call.queued, call.model, call.images = done.queued, done.model, done.images
        return self._python.response(done.answers, params)


class Scoring:
    """MLflow's application as ASGI, with errors in one sentence and without tracebacks; figures go into headers."""

    def __init__(self, model: PyFuncModel, timeout: float) -> None:
        from mlflow.pyfunc import PyFuncModel, scoring_server

        self._queued = Queued(model)
        self.model = PyFuncModel(model_meta=model.metadata, model_impl=self._queued, model_id=model.model_id)
        self._app: Any = scoring_server.init(self.model)
        self._timeout = timeout

    @property
    def batches(self) -> bool:
        """Whether requests that wait together are predicted together."""
        return self._queued.batches

    @property
    def required(self) -> dict[str, Any]:
        """The params that any prediction must have."""
        return self._queued.required

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] == "/model" and self._queued.description is not None:
            # What a client needs to know before it asks; MLflow's application has nothing like it.
            await _send(
                send, 200, [(b"content-type", b"application/json")], json.dumps(self._queued.description).encode()
            )
            return
        given = dict(scope["headers"])
        seconds = min(self._timeout, float(given.get(SECONDS.encode(), self._timeout)))
        call = Call(given.get(b"x-request-id", b"").decode("latin-1"), time.monotonic() + seconds)
        _CALL.set(call)
        status, headers, body = 500, [(b"content-type", b"application/json")], bytearray()

        async def keep(message: Message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], list(message["headers"])
            else:
                body.extend(message.get("body", b""))

        async def watched() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                self._queued.enter(call)
            return message

        try:
            await self._app(scope, watched, keep)
        except Exception as error:
            status = self._status_of(error, call)
            body = bytearray(json.dumps({"message": f"input cannot be read: {_first(str(error))}"}).encode())
            if status >= 500:
                tell(logging.ERROR, "request failed", exc_info=error, request_id=call.request_id)
                body = bytearray(json.dumps({"message": "the server failed; its log says why"}).encode())
        finally:
            self._queued.leave(call)
        if status >= 400:
            body = bytearray(refusal(status, bytes(body), call.request_id))
            headers = [(b"content-type", b"application/json")]
        headers = [(k, v) for k, v in headers if k.lower() != b"content-length"]
        figures = ((QUEUED, call.queued), (MODEL, call.model), (BATCH, call.images))
        headers += [(name, f"{value:.6g}".encode()) for name, value in figures if value is not None]
        try:
            await _send(send, status, headers, bytes(body))
        finally:
            self._queued.release(call)

    @staticmethod
    def _status_of(error: Exception, call: Call) -> int:
        if is_memory(error):
            return 503
        # Before the model was reached only the request was looked at: nested too deep, ragged, no numbers.
        return 500 if call.reached else 400


async def _send(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def refusal(status: int, body: bytes, request_id: str) -> bytes:
    """MLflow's error as one JSON object whose message is the sentence that matters: MLflow quotes the whole input."""
    try:
        content = json.loads(body)
    except ValueError:
        content = {"message": body.decode(errors="replace")}
    if not isinstance(content, dict):
        content = {"message": str(content)}
    message = _essence(str(content.get("message", content.get("detail", ""))))
    code = content.get("error_code", {400: "BAD_REQUEST", 404: "NOT_FOUND", 503: "TEMPORARILY_UNAVAILABLE",
                                      504: "DEADLINE_EXCEEDED"}.get(status, "INTERNAL_ERROR"))  # fmt: skip
    return json.dumps({"error_code": code, "message": message, "request_id": request_id}).encode()


def _essence(message: str) -> str:
    for quoted in ("Failed to predict data", "Failed to enforce schema of data"):
        if message.startswith(quoted):
            _, _, rest = message.rpartition("Error: ") if quoted.startswith("Failed to enforce") else message.partition(
                "\nError: "
            )  # fmt: skip
            message = rest or message
    for advice in ("\nInput:", "IMPORTANT: The MLflow Model scoring protocol"):
        message = message.partition(advice)[0]
    return _first(message)


def _first(text: str) -> str:
    return " ".join(text.split())[:LONGEST_MESSAGE]
