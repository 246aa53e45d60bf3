"""Optuna's gRPC proxy with the ledger behind it as well: many workers, few connections to the database."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import optuna
from optuna.storages import BaseStorage

from crism_mlops.errors import StudyError, one_line

if TYPE_CHECKING:
    import grpc

    from crism_mlops.studies.ledger import Ledger

SERVICE = "crism.Ledger"
METHODS = (
    "join", "beat", "leave", "free", "give_back", "settle", "workers", "claim", "prepare", "enqueue", "control",
    "controls", "cancel",
)  # fmt: skip
CONNECT_S = 10.0


class RemoteLedger:
    """`studies.ledger.Ledger` behind a proxy: the same methods, run where the database is."""

    def __init__(self, storage: optuna.storages.GrpcStorageProxy) -> None:
        # Optuna's own channel: one connection a worker.
        channel = storage._channel
        assert channel is not None
        self._calls = {
            name: channel.unary_unary(f"/{SERVICE}/{name}", _pack, json.loads) for name in METHODS
        }  # fmt: skip

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in METHODS:
            raise AttributeError(name)

        def call(*args: Any, **options: Any) -> Any:
            answer = self._calls[name]({"args": args, "options": options}, timeout=60.0)
            if "error" in answer:
                raise StudyError(answer["error"])
            return answer["result"]

        return call


def remote_storage(host: str, port: int) -> optuna.storages.GrpcStorageProxy:
    """Optuna's client of a proxy. Raises StudyError where nobody answers within ten seconds."""
    try:
        import grpc
    except ImportError as error:
        raise StudyError("grpcio is not installed; pip install 'crism-mlops[cluster]'") from error
    with warnings.catch_warnings():
        # Experimental by its own words; the version of Optuna is pinned.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.GrpcStorageProxy(host=host, port=port)
    try:
        assert storage._channel is not None
        grpc.channel_ready_future(storage._channel).result(timeout=CONNECT_S)
    except grpc.FutureTimeoutError as error:
        raise StudyError(
            f"no proxy answers at {host}:{port}; start one with crism-mlops proxy --storage postgresql+psycopg://... "
            f"--port {port}"
        ) from error
    return storage


def serve(storage: BaseStorage, ledger: Ledger | RemoteLedger, host: str, port: int, threads: int = 32) -> grpc.Server:
    """A started server of both services. Raises StudyError where the address cannot be had."""
    import grpc
    from optuna.storages._grpc import servicer
    from optuna.storages._grpc.auto_generated import api_pb2_grpc

    server = grpc.server(ThreadPoolExecutor(threads), interceptors=[_interceptor()])
    api_pb2_grpc.add_StorageServiceServicer_to_server(servicer.OptunaStorageProxyService(storage), server)
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(_handler(getattr(ledger, name)), json.loads, _pack)
        for name in METHODS
    }  # fmt: skip
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    try:
        server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise StudyError(f"cannot listen on {host}:{port}; try another --port") from error
    server.start()
    return server


def _interceptor() -> grpc.ServerInterceptor:
    """A database that is away behind the proxy is told as such, for the client to wait; any other error is no reason
    to try again."""
    import grpc

    from crism_mlops.studies.storage import is_away

    class Away(grpc.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
        def intercept_service(self, continuation: Any, details: Any) -> Any:
            handler = continuation(details)
            if handler is None or handler.unary_unary is None:
                return handler

            def call(request: Any, context: grpc.ServicerContext) -> Any:
                try:
                    return handler.unary_unary(request, context)
                except Exception as error:
                    if is_away(error):
                        context.abort(grpc.StatusCode.UNAVAILABLE, one_line(error))
                    raise

            return grpc.unary_unary_rpc_method_handler(
                call, handler.request_deserializer, handler.response_serializer
            )  # fmt: skip

    return Away()


def _handler(method: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    def handle(request: dict[str, Any], context: grpc.ServicerContext) -> dict[str, Any]:
        try:
            return {"result": method(*request["args"], **request["options"])}
        except StudyError as error:
            return {"error": str(error)}

    return handle


def _pack(content: Any) -> bytes:
    return json.dumps(content).encode()


def refusals() -> tuple[type[Exception], ...]:
    """What is raised where a proxy, or the database behind it, did not do what was asked."""
    try:
        import grpc
    except ImportError:
        return ()
    return (grpc.RpcError,)


def told(error: Any) -> str | None:
    """What a proxy says of an error, in its words; None where it is not a proxy's."""
    if not isinstance(error, refusals()):
        return None
    call: Any = error  # grpc's answers are its errors too, and have no types
    return f"{call.code().name}: {call.details()}"


def unreachable(error: BaseException) -> bool:
    """Whether a proxy did not answer."""
    try:
        import grpc
    except ImportError:
        return False
    return isinstance(error, grpc.RpcError) and error.code() in (
        grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED,
    )  # fmt: skip
