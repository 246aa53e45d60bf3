"""The server's parts: what is refused, who is asked, what happens when a worker ends; batches; errors in a sentence."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import aiohttp
import numpy as np
import psutil
import pytest
from console import console
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import PyFuncModel
from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec
from trackers import new_tracker

import crism_mlops
from crism_mlops.errors import GivenUpError, ModelError, RequestError, ServingError, TrackingError
from crism_mlops.registry.serving.batching import Batcher, ExpiredError, end_if_poisoned, is_memory
from crism_mlops.registry.serving.follow import Follower, house_of
from crism_mlops.registry.serving.front import Front
from crism_mlops.registry.serving.logs import JsonLines, log, log_as_json, tell
from crism_mlops.registry.serving.metrics import Metrics
from crism_mlops.registry.serving.pool import GRACE_S, TRIES, Generation, Pool
from crism_mlops.registry.serving.process import LONGEST_TEXT, Worker
from crism_mlops.registry.serving.scoring import Call, Scoring, refusal
from crism_mlops.registry.serving.server import Connection, Server, listen
from crism_mlops.registry.serving.settings import TOKEN_VARIABLE, Settings, is_loopback, named, read_token
from crism_mlops.registry.serving.source import Registry, Version
from crism_mlops.registry.serving.worker import Job, warm_up
from crism_mlops.registry.trusted import check_model_folder

TOKEN = "a-token-of-32-characters-or-more"
CHAMPION = "models:/small@champion"
FIRST, SECOND = Version("small", "1", "run1", "models:/small/1"), Version("small", "2", "run2", "models:/small/2")
THIRD = Version("small", "3", "run3", "models:/small/3")


# --- what is refused before anything starts


def test_the_three_ways_to_name_a_model() -> None:
    assert named("models:/crism-unet@champion").alias == "champion"
    assert (named("models:/crism-unet/12").name, named("models:/crism-unet/12").version) == ("crism-unet", "12")
    assert named("models:/m-0a1b2c").id == "m-0a1b2c"
    for uri in (
        "crism-unet",
        "models:/crism-unet",
        "models:/crism-unet/latest",
        "runs:/1/model",
        "/etc",
        "models:/a/b/1",
    ):
        with pytest.raises(ServingError, match="expected models:/NAME@ALIAS, models:/NAME/VERSION or models:/m-ID"):
            named(uri)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org", ""])
def test_another_address_needs_a_token(host: str) -> None:
    with pytest.raises(ServingError, match=f"no token is set; put one .* into {TOKEN_VARIABLE} or a file"):
        Settings(named(CHAMPION), host=host)
    assert not is_loopback(host)
    settings = Settings(named(CHAMPION), host=host, token=TOKEN.encode())
    assert TOKEN not in repr(settings)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.9.1"])
def test_a_loopback_address_needs_none(host: str) -> None:
    assert Settings(named(CHAMPION), host=host).token is None


def test_tokens_that_are_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o644)
    with pytest.raises(ServingError, match="other users may open it; chmod 600"):
        read_token(file, {})
    file.chmod(0o600)
    assert read_token(file, {TOKEN_VARIABLE: "unused"}) == TOKEN.encode()
    assert read_token(None, {TOKEN_VARIABLE: TOKEN}) == TOKEN.encode()
    assert read_token(None, {}) is None
    for weak in ("", "fifteen-letters", "sixteen letters with spaces", "ümlaut-ümlaut-ümlaut"):
        with pytest.raises(ServingError, match="expected 16 or more printable characters") as caught:
            read_token(None, {TOKEN_VARIABLE: weak})
        assert not weak or weak not in str(caught.value)
    with pytest.raises(ServingError, match="cannot be read"):
        read_token(tmp_path / "none", {})


def test_the_command_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    error = console(["serve", "--host", "0.0.0.0"], monkeypatch, capsys).error
    assert "no token is set" in error
    assert "cannot be served" in console(["serve", "--model", "/tmp"], monkeypatch, capsys).error
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=f"cannot listen on 127.0.0.1 port {port} .* try another --port"):
            listen("127.0.0.1", port)
    with pytest.raises(TrackingError, match="no such store; name another with --tracking-uri"):
        Registry(named(CHAMPION), f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(ServingError, match="set TMPDIR to a shorter one"):
        house_of("/tmp/" + "long" * 30)


@pytest.mark.parametrize("option", ["--max-megabytes", "--timeout", "--start-timeout", "--poll", "--concurrency"])
@pytest.mark.parametrize("value", ["inf", "nan", "1e9", "0", "-inf"])
def test_numbers_that_no_server_can_work_with(
    option: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = console(["serve", option, value], monkeypatch, capsys)
    assert ran.code == 2
    assert f"Invalid value for '{option}'" in " ".join(ran.err.split())
    assert "Traceback" not in ran.err


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    tracker = new_tracker(tmp_path)
    for uri in (CHAMPION, "models:/small/3", "models:/m-00ff"):
        with pytest.raises((ServingError, TrackingError), match=r"small|m-00ff"):
            Registry(named(uri), tracker.uri).resolve()


def test_a_link_in_a_model_s_folder_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leads to would be copied into the server's own folder, and pass for a file of the model's."""
    secret, files = tmp_path / "secret", tmp_path / "files"
    secret.write_text("of another")
    files.mkdir()
    (files / "MLmodel").touch()
    (files / "weights").symlink_to(secret)
    # As where MLflow hands out the folder itself.
    monkeypatch.setattr("mlflow.artifacts.download_artifacts", lambda **_: str(files))
    made = Registry(named(CHAMPION), new_tracker(tmp_path).uri).fetch(FIRST, tmp_path / "fetched")
    assert made.is_relative_to(tmp_path / "fetched")
    assert (made / "MLmodel").is_file()
    with pytest.raises(ModelError, match="weights: refused, it is a link"):
        check_model_folder(made)


# --- the front, with workers that have no model


class Client:
    def __init__(self, session: aiohttp.ClientSession, base: str, pool: Pool, front: Front) -> None:
        self.session, self.base, self.pool, self.front = session, base, pool, front

    async def get(self, path: str, **headers: str) -> tuple[int, Any, Any]:
        return await self._call("GET", path, None, headers)

    async def post(self, content: Any, **headers: str) -> tuple[int, Any, Any]:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return await self._call("POST", "/invocations", body, {"Content-Type": "application/json", **headers})

    async def _call(self, method: str, path: str, body: Any, headers: dict[str, str]) -> tuple[int, Any, Any]:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.request(method, self.base + path, data=body, headers=headers) as response:
            text = await response.text()
            return response.status, response.headers, json.loads(text) if text.startswith("{") else text

    async def adopt(self, version: Version, *, broken: str = "") -> None:
        folder = self.pool.house / f"v{version.version}"
        folder.mkdir()
        if broken:
            (folder / broken).touch()
        await self.pool.replace(version, folder, folder)


@pytest.fixture
def house() -> Iterator[Path]:
    # pytest's own folders are too deep for sockets.
    with tempfile.TemporaryDirectory(prefix="crism-serve-test-") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _plain_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    log.setLevel(logging.INFO)


@asynccontextmanager
async def running(
    house: Path, *, workers: int = 1, load: bool = True, timeout: float = 30.0, **options: Any
) -> AsyncIterator[Client]:
    settings = Settings(named(CHAMPION), port=0, workers=workers, timeout=timeout, **options)
    metrics = Metrics()
    pool = Pool(house, workers, settings.concurrency, timeout, metrics, "small_worker", settings.start)
    front = Front(settings, pool, metrics)
    listener = listen("127.0.0.1", 0)
    import uvicorn

    server = Server(
        uvicorn.Config(front, log_config=None, access_log=False, lifespan="off", ws="none", http=Connection)
    )
    task = asyncio.create_task(server.serve(sockets=[listener]))
    async with aiohttp.ClientSession() as session:
        client = Client(session, f"http://127.0.0.1:{listener.getsockname()[1]}", pool, front)
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            if load:
                await client.adopt(FIRST)
            yield client
        finally:
            server.should_exit = True
            await task
            await pool.stop()
            listener.close()


def run(house: Path, body: Callable[[Client], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with running(house, **options) as client:
            await body(client)

    asyncio.run(main())


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(JsonLines().format(record)) for record in caplog.records if record.name == log.name]


def test_an_answer_names_its_version_and_leaves_a_line(house: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body(client: Client) -> None:
        status, headers, content = await client.post({"inputs": [1]}, X_Request_Id="mine-7")
        assert (status, content["predictions"]) == (200, {"inputs": [1]})
        assert (headers["X-Model-Name"], headers["X-Model-Version"], headers["X-Model-Run"]) == ("small", "1", "run1")
        assert headers["X-Request-Id"] == "mine-7"
        assert not [name for name in headers if name.lower().startswith("x-crism")]
        for strange in ('x" "status": 200', "ä", "y" * 65):
            _, headers, _ = await client.post({}, X_Request_Id=strange)
            assert len(headers["X-Request-Id"]) == 32
        assert (await client.get("/version"))[2] == "3.0"
        assert (await client.get("/health"))[0] == (await client.get("/ping"))[0] == 200
        assert (await client.get("/ready"))[2] == {
            "ready": True, "model": "small", "version": "1", "run": "run1", "workers": 1
        }  # fmt: skip
        for path in ("/docs", "/openapi.json", "/redoc", "/invocations/../etc", "/invocations/"):
            assert (await client.get(path))[0] == 404
        assert (await client.get("/invocations"))[0] == 405
        _, _, text = await client.get("/metrics")
        for figure in ('requests_total{code="200",path="/invocations",version="1"} 4.0', "batch_images_sum 12.0",
                       "queue_seconds_sum 1.0", "workers_ready 1.0", 'path="other"'):  # fmt: skip
            assert f"crism_serve_{figure}" in text or figure in text
        assert "etc" not in text

    run(house, body)
    told = lines(caplog)
    assert {"event": "worker output", "line": "a library's own words"}.items() <= told[0].items()
    first = next(line for line in told if line.get("request_id") == "mine-7")
    assert first["status"] == 200
    assert (first["version"], first["tries"], first["batch"], first["bytes_in"]) == ("1", 1, 3.0, 15)
    assert first["seconds"] > 0


def test_long_words_are_cut_in_the_log(house: Path, caplog: pytest.LogCaptureFixture) -> None:
    cut = f"http://me:{TOKEN}@server"
    said = {
        "word": "a" * 20_000,
        "address": f"{'b' * (LONGEST_TEXT - 20)} {cut} c",
        "traceback": json.dumps(
            {"time": "", "level": "error", "event": "e", "traceback": f"{'d' * 9000}ValueError: e"}
        ),
    }

    async def body(client: Client) -> None:
        assert (await client._call("A-" * 8000, "/version", None, {}))[0] == 405
        for text in said.values():
            assert (await client.post({"says": text}))[0] == 200
        while not any("traceback" in line for line in lines(caplog)):
            await asyncio.sleep(0.01)

    run(house, body)
    told = lines(caplog)
    assert "A-A-A-A-A-A-A-A-" in [line.get("method") for line in told]
    shown = [line["line"] for line in told if line["event"] == "worker output"]
    assert shown[1:] == ["...", f"{'b' * (LONGEST_TEXT - 20)} ..."]
    (traceback,) = (line["traceback"] for line in told if "traceback" in line)
    assert traceback.startswith("ddd")
    assert traceback.endswith("ValueError: e")
    assert len(traceback) < 8200


def test_a_name_that_no_header_can_hold(house: Path) -> None:
    version = Version(" Märs 火星/\r\nX-Other: 1", "1 %", "small-unet_2.0@(a+b)", "")

    async def body(client: Client) -> None:
        await client.adopt(version)
        status, headers, _ = await client.post({})
        assert status == 200
        assert "X-Other" not in headers
        found = [headers[f"X-Model-{what}"] for what in ("Name", "Version", "Run")]
        assert found[0].startswith("%20M%C3%A4rs%20")
        assert [unquote(text) for text in found] == [version.name, version.version, version.run_id]
        # What is plain is as it is.
        assert found[2] == version.run_id

    run(house, body, load=False)


def test_a_token_opens_everything_but_two_doors(house: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body(client: Client) -> None:
        for wrong in ({}, {"Authorization": "Bearer"}, {"Authorization": f"Bearer {TOKEN}x"},
                      {"Authorization": f"Basic {TOKEN}"}, {"Authorization": "Bearer ümlaut"}):  # fmt: skip
            for path in ("/metrics", "/version", "/ping", "/nothing"):
                assert (await client.get(path, **wrong))[0] == 401
            status, headers, content = await client.post({}, **wrong)
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
            assert content["error_code"] == "UNAUTHENTICATED"
        assert (await client.get("/health"))[0] == 200
        assert (await client.get("/ready"))[2] == {"ready": True}
        for scheme in ("Bearer", "bearer"):
            assert (await client.post({}, Authorization=f"{scheme} {TOKEN}"))[0] == 200
        assert (await client.get("/ready", Authorization=f"Bearer {TOKEN}"))[2]["version"] == "1"

    run(house, body, token=TOKEN.encode())
    assert TOKEN not in "".join(json.dumps(line) for line in lines(caplog))


def test_a_host_that_is_not_ours(house: Path) -> None:
    async def body(client: Client) -> None:
        for good in ("127.0.0.1", "localhost:5001", "LOCALHOST", "[::1]:80", "mars.example"):
            assert (await client.get("/health", Host=good))[0] == 200
        for bad in ("evil.example", "127.0.0.1.evil.example", "localhost:80@evil", "[::2]", "", "a b"):
            for path in ("/health", "/version"):
                assert (await client.get(path, Host=bad))[0] == 421

    run(house, body, allowed_hosts=("mars.example",))
    assert Front(Settings(named(CHAMPION), host="::", token=TOKEN.encode()), None, None)._hosts == set()  # type: ignore[arg-type]  # neither is asked


def test_too_large_however_it_is_said(house: Path) -> None:
    async def pieces(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b" " * 1000

    async def body(client: Client) -> None:
        assert (await client.post(b"{}" + b" " * 9998))[0] == 200
        status, headers, content = await client.post(b"{}" + b" " * 9999)
        assert (status, content["error_code"]) == (413, "REQUEST_TOO_LARGE")
        assert content["message"] == "the request is larger than 0.01 MB; send fewer or smaller images"
        assert content["request_id"] == headers["X-Request-Id"]
        # Without a Content-Length, so counted as it arrives.
        status, _, _ = await client._call("POST", "/invocations", pieces(11), {"Content-Type": "application/json"})
        assert status == 413
        assert client.front._in_flight == 0

    run(house, body, max_bytes=10_000)


def test_only_plain_json(house: Path) -> None:
    async def body(client: Client) -> None:
        for kind in ("text/csv", "text/plain", "application/vnd.apache.parquet", ""):
            assert (await client.post({}, Content_Type=kind))[0] == 415
        assert (await client.post({}, Content_Encoding="gzip"))[0] == 415
        assert (await client.post({}, Content_Type="application/json; charset=utf-8"))[0] == 200

    run(house, body)


def test_beyond_the_limit_a_request_is_told_when_to_come_again(house: Path) -> None:
    async def body(client: Client) -> None:
        slow = [asyncio.create_task(client.post({"sleep": 0.8})) for _ in range(2)]
        while client.front._in_flight < 2:
            await asyncio.sleep(0.01)
        status, headers, content = await client.post({})
        assert (status, content["error_code"]) == (503, "TEMPORARILY_UNAVAILABLE")
        assert 1 <= int(headers["Retry-After"]) <= 60
        assert (await client.get("/ready"))[0] == 200
        assert [status for status, _, _ in await asyncio.gather(*slow)] == [200, 200]
        assert (await client.post({}))[0] == 200
        assert "crism_serve_refused_total 1.0" in (await client.get("/metrics"))[2]

    run(house, body, concurrency=2)


async def deaf(client: Client, content: Any) -> socket.socket:
    """A client that asks and does not read; returns when the worker has answered."""
    asked, body = socket.socket(), json.dumps(content).encode()
    asked.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    asked.setblocking(False)
    loop, worker = asyncio.get_running_loop(), client.pool.ready[0]
    address = client.base.removeprefix("http://")
    await loop.sock_connect(asked, ("127.0.0.1", int(address.rpartition(":")[2])))
    head = f"POST /invocations HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
    await loop.sock_sendall(asked, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    for busy in (1, 0):
        async with asyncio.timeout(20):
            while worker.in_flight != busy:
                await asyncio.sleep(0.001)
    return asked


def test_an_answer_that_nobody_reads(
    house: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It counts as being answered, and is given up in the end: or the server would keep any number of them."""
    # More than the system's own buffers take.
    large = {"sleep": 0.1, "pad": "x" * 12_000_000}

    async def free(client: Client) -> None:
        async with asyncio.timeout(20):
            while client.front._in_flight:
                await asyncio.sleep(0.01)

    async def body(client: Client) -> None:
        whole = io.BytesIO(json.dumps(large).encode())
        status, _, content = await client._call("POST", "/invocations", whole, {"Content-Type": "application/json"})
        assert (status, content["predictions"]) == (200, large)
        with await deaf(client, large):
            assert client.front._in_flight == 1
            assert (await client.post({}))[0] == 503
        # It went away.
        await free(client)
        assert (await client.post({}))[0] == 200
        monkeypatch.setattr("crism_mlops.registry.serving.front.SEND_S", 0.2)
        monkeypatch.setattr("crism_mlops.registry.serving.front.SLOWEST", 1e9)
        with await deaf(client, large) as asked:
            await free(client)
            taken = 0
            with contextlib.suppress(ConnectionResetError):
                while block := await asyncio.get_running_loop().sock_recv(asked, 1 << 20):
                    taken += len(block)
            assert taken < 12_000_000
        assert (await client.post({}))[0] == 200

    run(house, body, concurrency=1)
    assert [line["reason"] for line in lines(caplog) if line.get("reason", "").startswith("the answer")] == [
        "the answer was not read in time"
    ]
    assert "without completing" not in caplog.text


def test_without_a_model_yet(house: Path) -> None:
    async def body(client: Client) -> None:
        assert (await client.get("/health"))[0] == 200
        status, _, content = await client.get("/ready")
        assert (status, content) == (503, {"ready": False})
        status, headers, _ = await client.post({})
        assert (status, headers["Retry-After"]) == (503, "5")

    run(house, body, load=False)


def test_a_killed_worker_costs_no_answer(house: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body(client: Client) -> None:
        first = client.pool.ready[0].pid
        flag = tmp_path / "die"
        flag.touch()
        asked = [{"sleep": 0.1, "die": str(flag), "number": n} for n in range(6)]
        found = await asyncio.gather(*(client.post(content) for content in asked))
        assert [(status, content["predictions"]) for status, _, content in found] == [(200, one) for one in asked]
        assert first not in {content["pid"] for _, _, content in found}
        assert "crism_serve_worker_restarts_total 1.0" in (await client.get("/metrics"))[2]

    run(house, body)
    assert [line["code"] for line in lines(caplog) if line["event"] == "worker ended"] == [9]


def test_a_request_that_no_worker_survives(house: Path) -> None:
    async def body(client: Client) -> None:
        status, _, content = await client.post({"die": "always"})
        assert (status, content["message"]) == (
            500, "each worker that was given the request ended; see the server's log"
        )  # fmt: skip
        assert (await client.post({"sleep": 0.0}))[0] == 200
        assert f"crism_serve_worker_restarts_total {TRIES}.0" in (await client.get("/metrics"))[2]

    run(house, body, workers=2)


def test_a_worker_that_hangs_is_replaced(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crism_mlops.registry.serving.pool.GRACE_S", 0.0)

    async def body(client: Client) -> None:
        status, _, content = await client.post({"sleep": 30.0})
        assert (status, content["message"]) == (504, "no answer within 0.5 s")
        while not client.pool.ready:
            await asyncio.sleep(0.05)
        assert (await client.post({}))[0] == 200

    run(house, body, timeout=0.5)


def test_the_least_busy_worker_is_asked(house: Path) -> None:
    async def body(client: Client) -> None:
        found = await asyncio.gather(*(client.post({"sleep": 0.2}) for _ in range(6)))
        pids = [content["pid"] for _, _, content in found]
        assert sorted(pids.count(pid) for pid in set(pids)) == [3, 3]

    run(house, body, workers=2)


def test_a_swap_under_load_loses_nothing(house: Path) -> None:
    async def body(client: Client) -> None:
        versions: list[str] = []

        async def ask(number: int) -> None:
            while len(versions) < 400 and not ("2" in versions and versions.count("2") > 20):
                status, headers, content = await client.post({"number": number, "sleep": 0.01})
                assert (status, content["predictions"]["number"]) == (200, number)
                versions.append(headers["X-Model-Version"])

        old = client.pool.ready[0].pid
        asking = [asyncio.create_task(ask(number)) for number in range(4)]
        await asyncio.sleep(0.1)
        await client.adopt(SECOND)
        await asyncio.gather(*asking)
        assert set(versions) == {"1", "2"}
        while psutil.pid_exists(old):
            await asyncio.sleep(0.02)
        assert not (house / "v1").exists()
        assert (await client.get("/ready"))[2]["version"] == "2"

    run(house, body)


def test_what_a_swap_cuts_is_asked_again_and_at_once(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker was stopped, so the request is under no suspicion: it does not wait for others of its kind."""

    async def body(client: Client) -> None:
        old = client.pool.ready[0]
        asking = [asyncio.create_task(client.post({"sleep": 1.0, "number": n})) for n in range(4)]
        while old.in_flight < 4:
            await asyncio.sleep(0.01)
        # No time for them to end.
        with monkeypatch.context() as patch:
            patch.setattr("crism_mlops.registry.serving.pool.GRACE_S", -30.0)
            await client.adopt(SECOND)
        async with asyncio.timeout(20):
            while client.pool.ready[0].in_flight < 4:
                await asyncio.sleep(0.01)
        found = await asyncio.gather(*asking)
        assert [(status, content["predictions"]["number"]) for status, _, content in found] == [
            (200, number) for number in range(4)
        ]
        assert {headers["X-Model-Version"] for _, headers, _ in found} == {"2"}

    run(house, body)


def test_a_swap_waits_as_long_as_a_prediction_may_take(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drains: list[float] = []
    stop = Generation.stop

    async def stopped(self: Generation, drain: float) -> None:
        drains.append(drain)
        await stop(self, drain)

    monkeypatch.setattr(Generation, "stop", stopped)

    async def body(client: Client) -> None:
        slow = asyncio.create_task(client.post({"sleep": 0.5}))
        while not client.pool.ready[0].in_flight:
            await asyncio.sleep(0.01)
        await client.adopt(SECOND)
        status, headers, _ = await slow
        assert (status, headers["X-Model-Version"]) == (200, "1")
        assert drains == [100.0 + GRACE_S]

    run(house, body, timeout=100.0)


def test_two_versions_at_most_are_in_memory(house: Path) -> None:
    async def body(client: Client) -> None:
        old = client.pool.ready[0]
        slow = asyncio.create_task(client.post({"sleep": 1.0}))
        while not old.in_flight:
            await asyncio.sleep(0.01)
        await client.adopt(SECOND)
        before = len(psutil.Process().children())
        again = asyncio.create_task(client.adopt(THIRD))
        while psutil.pid_exists(old.pid):
            assert (await client.post({"number": 1}))[1]["X-Model-Version"] == "2"
            assert len(psutil.Process().children()) <= before
            await asyncio.sleep(0.02)
        status, headers, _ = await slow
        assert (status, headers["X-Model-Version"]) == (200, "1")
        await again
        assert (await client.post({"number": 1}))[1]["X-Model-Version"] == "3"

    run(house, body)


def test_a_request_s_time_is_for_all_its_tries(house: Path, tmp_path: Path) -> None:
    flag = tmp_path / "die"

    async def body(client: Client) -> None:
        flag.touch()
        status, _, content = await client.post({"sleep": 0.5, "die": str(flag)})
        assert status == 200
        assert 0.0 < float(content["seconds"]) < 2.5
        # It waits for its turn no longer than for an answer.
        async with client.pool._suspects:
            flag.touch()
            status, _, content = await client.post({"die": str(flag)})
            assert (status, content["message"]) == (504, "no answer within 3 s")
        assert (await client.post({}))[0] == 200

    run(house, body, timeout=3.0)


@pytest.mark.parametrize(
    ("how", "words"),
    [("broken", "no weights"), ("hangs", "not ready within 3 s"), ("babbles", "no JSON .*; see the log")],
)
def test_a_version_that_does_not_load_changes_nothing(house: Path, how: str, words: str) -> None:
    async def body(client: Client) -> None:
        before = {child.pid for child in psutil.Process().children()}
        with pytest.raises(ServingError, match=words):
            await client.adopt(SECOND, broken=how)
        assert (await client.post({}))[1]["X-Model-Version"] == "1"
        assert {child.pid for child in psutil.Process().children()} == before

    run(house, body, start=3.0)


def test_a_worker_that_does_not_start_again_is_tried_again(
    house: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the reason: one nobody thought of leaves its traceback."""
    start, failures = Worker.start, iter((KeyError("of a library"), OSError("no more processes")))

    async def failing(self: Worker) -> None:
        if (failure := next(failures, None)) is not None:
            raise failure
        await start(self)

    async def body(client: Client) -> None:
        monkeypatch.setattr(Worker, "start", failing)
        client.pool.ready[0].kill()
        assert (await client.post({}))[0] == 200

    run(house, body)
    told = [line for line in lines(caplog) if line["event"] == "worker does not start"]
    assert ["Traceback" in line.get("traceback", "") for line in told] == [True, False]


class Moving:
    """A registry whose alias the test moves; what it says may be an error."""

    moves = True

    def __init__(self) -> None:
        self.says: Version | Exception = FIRST
        self.broken: bool | Exception = False
        self.asked = 0
        self.fetched: list[Version] = []

    def resolve(self) -> Version:
        self.asked += 1
        if isinstance(self.says, Exception):
            raise self.says
        return self.says

    def fetch(self, version: Version, folder: Path) -> Path:
        self.fetched.append(version)
        folder.mkdir()
        if isinstance(self.broken, Exception):
            raise self.broken
        if self.broken:
            (folder / "broken").touch()
        return folder


def test_the_alias_is_followed(house: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)

    async def body(client: Client) -> None:
        registry, metrics = Moving(), client.pool.metrics

        def figure(name: str) -> float:
            return metrics.registry.get_sample_value(f"crism_serve_{name}") or 0.0

        follower = Follower(registry, client.pool, metrics, 0.02)  # type: ignore[arg-type]  # as a Registry
        following = asyncio.create_task(follower.follow(await follower.first()))
        registry.says, registry.broken = SECOND, True
        await until(lambda: figure("swap_failures_total") == 2.0)
        assert figure("swap_failing") == 1.0
        assert (await client.post({}))[1]["X-Model-Version"] == "1"
        for failure in (TrackingError("no answer"), KeyError("of a library")):
            registry.says = failure
            await until(lambda: figure("registry_up") == 0.0)
            assert (await client.post({}))[1]["X-Model-Version"] == "1"
            registry.says = FIRST
            await until(lambda: figure("registry_up") == 1.0)
        failures = figure("swap_failures_total")
        registry.says, registry.broken = SECOND, KeyError("of another library")
        await until(lambda: figure("swap_failures_total") == failures + 1.0)
        assert not following.done()
        registry.says, registry.broken = SECOND, False
        await until(lambda: figure("swaps_total") == 2.0)
        await until(lambda: figure("swap_failing") == 0.0)
        assert (await client.post({}))[1]["X-Model-Version"] == "2"
        assert figure("registry_up") == 1.0
        following.cancel()
        left = {path.name for path in house.iterdir() if path.is_dir()}
        assert left <= {"version-0", f"version-{follower._numbers.__reduce__()[1][0] - 1}"}

    run(house, body, load=False)
    told = [line["event"] for line in lines(caplog)]
    assert told.count("registry does not say which version") == told.count("registry answers again") == 2
    causes = [line["traceback"].splitlines()[-1] for line in lines(caplog) if "traceback" in line]
    assert causes == ["KeyError: 'of a library'", "KeyError: 'of another library'"]
    failure = next(line for line in lines(caplog) if line["event"].startswith("version does not load"))
    assert (failure["version"], failure["serving"]) == ("2", "1")
    assert "no weights" in failure["error"]


def test_an_alias_that_moves_on_while_an_old_version_drains(
    house: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two versions' files at most lie on the disk; what is loaded then is what the alias names then."""

    async def body(client: Client) -> None:
        registry, pool = Moving(), client.pool
        follower = Follower(registry, pool, pool.metrics, 0.02)  # type: ignore[arg-type]  # as a Registry
        following = asyncio.create_task(follower.follow(await follower.first()))
        old = pool.ready[0]
        slow = asyncio.create_task(client.post({"sleep": 2.0}))
        while not old.in_flight:
            await asyncio.sleep(0.01)

        async def serves(version: Version) -> None:
            async with asyncio.timeout(20):
                while pool.generation is None or pool.generation.version != version:
                    await asyncio.sleep(0.01)

        registry.says = SECOND
        await serves(SECOND)
        registry.says = THIRD
        asked = registry.asked
        while registry.asked == asked:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        registry.says = FIRST
        assert (await slow)[1]["X-Model-Version"] == "1"
        await serves(FIRST)
        assert registry.fetched == [FIRST, SECOND, FIRST]
        following.cancel()

    run(house, body, load=False)


def test_an_old_version_that_does_not_end(
    house: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It holds up the next one, but not for ever and not in silence."""
    stop, hangs = Worker.stop, asyncio.Event()

    async def hanging(self: Worker, grace: float = 10.0) -> None:
        await hangs.wait()
        await stop(self, grace)

    monkeypatch.setattr(Worker, "stop", hanging)
    monkeypatch.setattr("crism_mlops.registry.serving.pool.STOP_S", -39.5)

    async def body(client: Client) -> None:
        registry, pool = Moving(), client.pool
        follower = Follower(registry, pool, pool.metrics, 0.02)  # type: ignore[arg-type]  # as a Registry
        following = asyncio.create_task(follower.follow(await follower.first()))
        old = pool.ready[0].pid
        try:
            for version, figure in ((SECOND, "swaps_total"), (THIRD, "swap_failing")):
                registry.says = version
                async with asyncio.timeout(20):
                    while pool.metrics.registry.get_sample_value(f"crism_serve_{figure}") != 1.0 + (version == SECOND):
                        await asyncio.sleep(0.01)
            assert registry.fetched == [FIRST, SECOND]
            failure = next(line for line in lines(caplog) if line["event"].startswith("version does not load"))
            assert (failure["version"], failure["serving"]) == ("3", "2")
            assert f"workers of small version 1 (process {old}) do not end" in failure["error"]
            with pytest.raises(ServingError, match="do not end"):
                await client.adopt(THIRD)
        finally:
            hangs.set()
            following.cancel()

    run(house, body, load=False)


def test_workers_end_with_the_front_however_it_ends(house: Path) -> None:
    pids: list[int] = []

    async def body(client: Client) -> None:
        pids.extend(worker.pid for worker in client.pool.ready)

    run(house, body, workers=2)
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not (house / "v1").exists()


def test_what_a_worker_is_not_told(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (TOKEN_VARIABLE, "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD", "MYSQL_PWD",
                 "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "CRISM_MLOPS_STORAGE"):  # fmt: skip
        monkeypatch.setenv(name, TOKEN)
    for name in ("MLFLOW_TRACKING_URI", "HTTPS_PROXY", "OF_A_NAME_THAT_NOBODY_KNOWS"):
        monkeypatch.setenv(name, f"http://me:{TOKEN}@127.0.0.1:1")
    monkeypatch.setenv("DSN", f"host=db password={TOKEN}")
    harmless = {"HF_HUB_OFFLINE": "1", "PWD": "/somewhere", "TOKENIZERS_PARALLELISM": "false"}
    for name, value in harmless.items():
        monkeypatch.setenv(name, value)

    async def body(client: Client) -> None:
        environment = psutil.Process(client.pool.ready[0].pid).environ()
        assert TOKEN not in "".join(environment.values())
        assert environment["PATH"] == os.environ["PATH"]
        assert harmless.items() <= environment.items()

    run(house, body)


# --- batches


def test_what_waits_is_predicted_together_up_to_the_chunk() -> None:
    seen: list[list[int]] = []
    go = threading.Event()

    def answers(requests: Sequence[int], wanted: Callable[[], bool]) -> list[int]:
        seen.append(list(requests))
        assert go.wait(10)
        return [-request for request in requests]

    batcher = Batcher(answers, 4)
    first = batcher.submit([1], np.inf)
    while not seen:
        time.sleep(0.001)
    others = [batcher.submit(requests, np.inf) for requests in ([2], [3, 4], [5], [6])]
    go.set()
    assert first.result(10).answers == [-1]
    assert [future.result(10).answers for future in others] == [[-2], [-3, -4], [-5], [-6]]
    assert seen == [[1], [2, 3, 4, 5], [6]]
    assert [future.result().images for future in others] == [4, 4, 4, 1]


def test_a_batch_waits_a_moment_for_what_is_being_read() -> None:
    seen: list[int] = []
    coming = 1

    def answers(requests: Sequence[int], wanted: Callable[[], bool]) -> Sequence[int]:
        seen.append(len(requests))
        return requests

    batcher = Batcher(answers, 8, lambda: coming)
    futures = [batcher.submit([1], np.inf), batcher.submit([2], np.inf)]
    begun = time.monotonic()
    assert [future.result(10).answers for future in futures] == [[1], [2]]
    assert seen == [2]
    assert time.monotonic() - begun < 5


def test_clients_that_ask_again_are_waited_for() -> None:
    """Two that fell out of step are together again, instead of each waiting for the other's forward pass."""
    seen: list[int] = []

    def answers(requests: Sequence[int], wanted: Callable[[], bool]) -> Sequence[int]:
        seen.append(len(requests))
        time.sleep(0.1)
        return requests

    batcher = Batcher(answers, 8)

    def ask() -> None:
        for _ in range(5):
            batcher.submit([1], np.inf).result(10)

    clients = [threading.Thread(target=ask) for _ in range(2)]
    for client in clients:
        client.start()
        time.sleep(0.03)
    for client in clients:
        client.join(20)
    assert seen[0] == 1
    assert max(seen) == 2
    assert len(seen) < 10


def test_one_that_fails_does_not_fail_the_others() -> None:
    def answers(requests: Sequence[int], wanted: Callable[[], bool]) -> list[int]:
        if 3 in requests:
            raise ValueError("three")
        if 4 in requests:
            raise MemoryError
        time.sleep(0.02)
        return [10 * request for request in requests]

    batcher = Batcher(answers, 8)
    futures = [batcher.submit([number], np.inf) for number in (1, 2, 3, 4, 5)]
    assert [futures[i].result(10).answers for i in (0, 1, 4)] == [[10], [20], [50]]
    with pytest.raises(ValueError, match="three"):
        futures[2].result(10)
    assert is_memory(futures[3].exception(10) or Exception())
    with pytest.raises(ExpiredError):
        batcher.submit([1], time.monotonic() - 1).result(10)
    assert batcher.submit([6], np.inf).result(10).answers == [60]


POISONED = RuntimeError("CUDA error: device-side assert triggered")


def test_a_worker_whose_gpu_is_lost_ends() -> None:
    """Every later call would fail as well."""
    program = (
        "from crism_mlops.registry.serving.batching import Batcher\n"
        "from crism_mlops.registry.serving.logs import log_as_json\n"
        "log_as_json()\n"
        "def answers(requests, wanted):\n"
        f"    raise {POISONED!r}\n"
        "Batcher(answers, 1).submit([1], float('inf')).result(20)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(crism_mlops.__file__).parents[1], capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (told,) = (json.loads(line) for line in done.stderr.splitlines())
    assert told["event"] == "the GPU's context is lost, the worker ends"
    assert "device-side assert" in told["traceback"]


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (POISONED, True),
        (type("AcceleratorError", (RuntimeError,), {})("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA error"), False),
    ],
)
def test_which_errors_a_gpu_does_not_survive(
    error: Exception, ends: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    end_if_poisoned(error)
    assert codes == [1] * ends
    assert is_memory(error) == any(words in str(error) for words in ("out of memory", "ALLOC_FAILED"))


def test_memory_that_cannot_be_released_costs_no_later_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class torch:  # noqa: N801 -- stands for the module
        class cuda:  # noqa: N801 -- stands for a module
            @staticmethod
            def is_available() -> bool:
                raise RuntimeError("no driver any more")

    def answers(requests: Sequence[int], wanted: Callable[[], bool]) -> Sequence[int]:
        if 1 in requests:
            raise MemoryError
        return requests

    monkeypatch.setitem(sys.modules, "torch", torch)
    batcher = Batcher(answers, 1)
    with pytest.raises(MemoryError):
        batcher.submit([1], np.inf).result(10)
    assert batcher.submit([2], np.inf).result(10).answers == [2]
    assert [line["event"] for line in lines(caplog)] == ["memory is not released"]


def test_a_batch_that_nobody_waits_for_ends() -> None:
    """When its last caller has gone, not before."""
    begun: list[int] = []

    def answers(requests: Sequence[int], wanted: Callable[[], bool]) -> Sequence[int]:
        begun.append(len(requests))
        while 1 in requests:
            if not wanted():
                raise GivenUpError("nobody waits")
            time.sleep(0.01)
        return requests

    batcher, start = Batcher(answers, 2, lambda: len(begun) == 0), time.monotonic()
    futures = [batcher.submit([number], start + seconds) for number, seconds in ((1, 0.2), (2, 0.5))]
    after = batcher.submit([3], np.inf)
    for future in futures:
        with pytest.raises(ExpiredError):
            future.result(10)
    assert time.monotonic() - start >= 0.5
    assert after.result(10).answers == [3]
    assert begun == [2, 1]


# --- MLflow's application around a model


class Doubling:
    """A model with the interface of the served ones: doubles, and fails as its first pixel says."""

    class served:  # noqa: N801 -- stands for an object
        bands = ("PAN", "NIR")

        class checkpoint:  # noqa: N801 -- stands for an object
            class config:  # noqa: N801 -- stands for an object
                class evaluate:  # noqa: N801 -- stands for an object
                    chunk = 4

        @staticmethod
        def describe() -> dict[str, Any]:
            return {"bands": ["PAN", "NIR"]}

        @classmethod
        def answers(
            cls, requests: Sequence[np.ndarray[Any, Any]], wanted: Callable[[], bool]
        ) -> list[np.ndarray[Any, Any]]:
            for request in requests:
                match float(request[0, 0, 0]):
                    case 7.0:
                        raise MemoryError
                    case 8.0:
                        raise RuntimeError("secret path /root/weights")
                    case 9.0:
                        raise RequestError("a pixel is 9", "another")
                    case 10.0:
                        while wanted():
                            time.sleep(0.01)
                        raise GivenUpError("nobody waits")
            return [2 * request for request in requests]

    def requests(self, model_input: Any, params: dict[str, Any] | None) -> list[Any]:
        bands = tuple((params or {}).get("bands") or ())
        if bands != self.served.bands:
            raise MlflowException.invalid_parameter_value(f"bands are {bands}; expected {self.served.bands}")
        return list(model_input)

    def response(self, answers: Sequence[Any], params: dict[str, Any] | None) -> dict[str, Any]:
        return {"prediction": np.stack(answers)}


class Wrapped:
    def __init__(self, python_model: Any) -> None:
        self.python_model = python_model

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        return self.python_model.response(self.python_model.requests(model_input, params), params)


def scoring(python_model: Any, timeout: float = 20.0) -> Scoring:
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, -1, -1, 2), name=None)]),
        params=ParamSchema([ParamSpec("bands", "string", [], shape=(-1,)), ParamSpec("seed", "long", None)]),
    )
    meta = Model(signature=signature, flavors={"python_function": {"loader_module": "none"}})
    return Scoring(PyFuncModel(model_meta=meta, model_impl=Wrapped(python_model)), timeout)


def post(app: Scoring, content: Any, seconds: float = 20.0) -> tuple[int, dict[str, str], Any]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()

    async def main() -> tuple[int, dict[str, str], Any]:
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/invocations", "raw_path": b"/invocations", "query_string": b"",
            "root_path": "", "scheme": "http", "http_version": "1.1", "client": None, "server": None,
            "headers": [(b"content-type", b"application/json"), (b"x-request-id", b"r1"),
                        (b"x-crism-seconds", f"{seconds}".encode())],
        }  # fmt: skip
        await app(scope, receive, send)
        headers = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        assert int(headers["content-length"]) == len(sent[1]["body"])
        return sent[0]["status"], headers, json.loads(sent[1]["body"])

    return asyncio.run(main())


def image(value: float, side: int = 1) -> Any:
    return np.full((1, side, side, 2), value, dtype=np.float32).tolist()


def test_a_prediction_through_mlflow_s_application() -> None:
    app = scoring(Doubling())
    assert app.batches
    status, headers, content = post(app, {"inputs": image(1.5), "params": {"bands": ["PAN", "NIR"]}})
    assert (status, content) == (200, {"predictions": {"prediction": image(3.0)}})
    assert headers["x-crism-batch"] == "1"
    assert float(headers["x-crism-model"]) >= 0
    assert warm_up(app) is True
    assert app._queued._entering == app._queued._pixels == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"inputs": 3', "valid JSON"),
        (b"[" * 100_000, "input cannot be read: maximum recursion depth"),
        (b"\xff\xfe{}", "valid JSON"),
        (b"[1]", "exactly one of the input fields"),
        (b"{}", "exactly one of the input fields"),
        ({"inputs": [[1.0], [2.0, 3.0]]}, "inhomogeneous"),
        ({"inputs": [[[[1.0, 2.0, 3.0]]]]}, "Shape of input"),
        ({"inputs": [[[["a", "b"]]]]}, "string to float"),
        ({"inputs": image(1.0), "params": {"seed": "x"}}, "seed"),
        ({"inputs": image(1.0)}, "bands are (); expected ('PAN', 'NIR')"),
        ({"inputs": image(9.0), "params": {"bands": ["PAN", "NIR"]}}, "a pixel is 9; expected another"),
    ],
    ids=range(11),
)
def test_a_request_that_is_wrong_is_told_so_in_a_sentence(content: Any, words: str) -> None:
    status, _, answer = post(scoring(Doubling()), content)
    assert status == 400
    assert words in answer["message"]
    assert "Failed to predict data" not in answer["message"]
    assert "IMPORTANT" not in answer["message"]
    assert len(answer["message"]) <= 600
    assert set(answer) == {"error_code", "message", "request_id"}
    assert answer["request_id"] == "r1"


def test_what_is_not_the_client_s_fault(caplog: pytest.LogCaptureFixture) -> None:
    app = scoring(Doubling())
    bands = {"bands": ["PAN", "NIR"]}
    status, _, answer = post(app, {"inputs": image(8.0), "params": bands})
    assert (status, answer["error_code"]) == (500, "INTERNAL_ERROR")
    assert answer["message"] == "the model failed; the server's log says why"
    told = lines(caplog)[-1]
    assert told["request_id"] == "r1"
    assert "secret path" in told["traceback"]
    status, _, answer = post(app, {"inputs": image(7.0), "params": bands})
    assert (status, answer["error_code"]) == (503, "TEMPORARILY_UNAVAILABLE")
    assert "memory ran out" in answer["message"]
    assert post(app, {"inputs": image(1.0), "params": bands})[0] == 200


def test_a_prediction_that_takes_too_long_leaves_the_worker_free() -> None:
    app = scoring(Doubling(), 0.5)
    bands = {"bands": ["PAN", "NIR"]}
    status, _, answer = post(app, {"inputs": image(10.0), "params": bands})
    assert (status, answer["error_code"]) == (504, "DEADLINE_EXCEEDED")
    assert answer["message"] == "the prediction was not made in time"
    # A request that was with another worker before has less.
    assert post(scoring(Doubling()), {"inputs": image(10.0), "params": bands}, 0.3)[0] == 504
    assert post(app, {"inputs": image(1.0), "params": bands})[0] == 200


def test_answers_beyond_the_memory_are_refused_until_others_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crism_mlops.registry.serving.scoring.MOST_PIXELS", 4)
    app, other = scoring(Doubling()), Call()
    asked = {"inputs": image(1.0, 3), "params": {"bands": ["PAN", "NIR"]}}
    # Alone, one of any size; and what was refused or has failed takes no room.
    assert post(app, asked)[0] == 200
    assert post(app, {"inputs": image(8.0, 3), "params": {"bands": ["PAN", "NIR"]}})[0] == 500
    assert app._queued.admit(other, 2)
    for _ in range(2):
        status, _, answer = post(app, asked)
        assert (status, answer["error_code"]) == (503, "TEMPORARILY_UNAVAILABLE")
        assert "9 pixels, and other images are being answered" in answer["message"]
    assert post(app, {"inputs": image(1.0), "params": {"bands": ["PAN", "NIR"]}})[0] == 200
    app._queued.release(other)
    # Given up while it was read, it comes too late.
    with pytest.raises(ExpiredError):
        app._queued.admit(other, 2)
    assert post(app, asked)[0] == 200
    assert app._queued._pixels == 0


def test_a_model_that_knows_nothing_of_batches_is_served_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain:
        def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
            if model_input.max() == 9.0:
                raise POISONED
            return model_input + 1.0

    meta = Model(
        signature=ModelSignature(inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, -1, -1, 2), name=None)])),
        flavors={"python_function": {"loader_module": "none"}},
    )
    app = Scoring(PyFuncModel(model_meta=meta, model_impl=Plain()), 20.0)
    assert not app.batches
    assert post(app, {"inputs": image(1.0)})[2] == {"predictions": image(2.0)}
    assert warm_up(app) is True
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    assert post(app, {"inputs": image(9.0)})[0] == 500
    assert codes == [1]


def test_a_first_prediction_that_is_none() -> None:
    class Nothing(Doubling):
        def response(self, answers: Sequence[Any], params: dict[str, Any] | None) -> dict[str, Any]:
            return {"prediction": np.stack(answers) * np.nan}

    with pytest.raises(ServingError, match="not finite; promote another"):
        warm_up(scoring(Nothing()))


def test_a_refusal_that_is_no_json() -> None:
    assert json.loads(refusal(504, b"Request processing time exceeded limit", "r")) == {
        "error_code": "DEADLINE_EXCEEDED", "message": "Request processing time exceeded limit", "request_id": "r"
    }  # fmt: skip
    assert json.loads(refusal(404, b'{"detail":"Not Found"}', "r"))["message"] == "Not Found"


def test_a_line_of_the_log_is_json_whatever_is_said() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger = logging.Logger("a.library")
    logger.addHandler(handler)
    logger.warning('two\nlines and "quotes" %s', {1})
    content = json.loads(stream.getvalue())
    assert (content["level"], content["logger"]) == ("warning", "a.library")
    assert content["event"] == 'two\nlines and "quotes" {1}'


def test_no_line_of_the_log_tells_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those in addresses nor those of the environment, in words, fields and tracebacks; and it stays JSON."""
    monkeypatch.setenv("PGPASSWORD", "of-the-environment")
    address = "postgresql://u:of-the-address@h/x"
    stream, root = io.StringIO(), logging.getLogger()
    before = root.handlers[:]
    try:
        log_as_json(stream)
        try:
            raise OSError(f'no "{address}", no "password=of-the-option"')
        except OSError as error:
            tell(logging.ERROR, f"failed at {address}", exc_info=error, error=str(error), at=Path("of-the-environment"),
                 tried=[address, {"then": "of-the-environment"}])  # fmt: skip
        logging.getLogger("a.library").warning("connecting with %s", "of-the-environment")
    finally:
        root.handlers[:] = before
        logging.captureWarnings(False)
    told = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert "of-the" not in stream.getvalue()
    assert told[0]["error"] == 'no "postgresql://u:***@h/x", no "password=***"'
    assert (told[0]["at"], told[0]["tried"][1]) == ("***", {"then": "***"})
    assert "Traceback" in told[0]["traceback"]
    assert told[1]["event"] == "connecting with ***"


def test_a_job_is_one_line(tmp_path: Path) -> None:
    job = Job(str(tmp_path / "a\nb"), "h", "s", 2, 1.0)
    assert job.line().count(b"\n") == 1
    assert Job(**json.loads(job.line())) == job
