"""A model on a server: a real HTTP server in a thread, whose answers a real checkpoint gives."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from console import Ran, console

from crism_mlops.config import RunConfig
from crism_mlops.dataset.carbonate import CarbonateRule
from crism_mlops.dataset.variants import InputTransform
from crism_mlops.errors import CrismError
from crism_mlops.models import instruct_pix2pix
from crism_mlops.models.checkpoint import Checkpoint, save_checkpoint
from crism_mlops.products.geotiff import write_geotiff
from crism_mlops.scenes.filters import CASSIS_BANDS
from crism_mlops.studies.inputs import inputs_in
from crism_mlops.studies.predict import Options, predict_scene
from crism_mlops.studies.predictors import LocalModel
from crism_mlops.studies.remote import TOKEN, RemoteModel
from crism_mlops.studies.served import Request

Reply = tuple[int, dict[str, str], bytes]


@dataclass
class Server:
    """Says what `crism-mlops serve` says, and before that what `replies` hold; remembers what it was asked.

    versions: which version gives the next answers; then it is version 3.
    """

    local: LocalModel
    replies: list[Reply] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    description: Any = None
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def reply(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        self.asked.append((method, path, headers))
        if method == "GET" and path == "/model":
            description = self.description or self.local.served.describe()
            return 200, {"X-Model-Name": "crism-%E7%81%AB%0A", "X-Model-Version": "3"}, json.dumps(description).encode()
        if self.replies:
            return self.replies.pop(0)
        content = json.loads(body)
        params = content["params"]
        assert params.pop("units") == "I/F"
        (image,) = np.asarray(content["inputs"], dtype=np.float32)
        try:
            (answer,) = self.local.answers([Request(image, tuple(params.pop("bands")), **params)])
        except CrismError as error:
            return 400, {}, json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": str(error)}).encode()
        found = {"prediction": answer.prediction, "nodata": answer.nodata, "carbonate": answer.carbonate,
                 "deviation": answer.deviation}  # fmt: skip
        given = {name: [value.tolist()] for name, value in found.items() if value is not None}
        version = self.versions.pop(0) if self.versions else "3"
        return 200, {"X-Model-Version": version}, json.dumps({"predictions": given}).encode()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    config = RunConfig.model_validate({
        "data": {"source": "simulated", "resolution": 32},
        "model": {"kind": "instruct_pix2pix", "pretrained": "tiny", "steps": 1, "prompt": "at {longitude}, {location}"},
        "evaluate": {"chunk": 1, "seed": 4},
    })  # fmt: skip
    assert config.model.kind == "instruct_pix2pix"
    folder = tmp_path_factory.mktemp("checkpoint") / "checkpoint"
    rule = CarbonateRule("classifier", 0.45, (0.0,) * 19, (1.0,) * 19, (1.0,) + (0.0,) * 18)
    card = Checkpoint(config, InputTransform("pnr", "physical"), "0" * 16, 1, 1, 1.0, {}, rule)
    save_checkpoint(instruct_pix2pix.build(config.model, 1), folder, card)
    return LocalModel(folder, "cpu")


@pytest.fixture
def server(local: LocalModel) -> Iterator[Server]:
    made = Server(local)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, more, content = made.reply(self.command, self.path, headers, body)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **more}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, args=(0.02,))
    thread.start()
    made.url = f"http://127.0.0.1:{listening.server_port}"
    yield made
    listening.shutdown()
    thread.join()
    listening.server_close()


def failed(server: Server, observation: Path, reply: Reply | None = None) -> str:
    """The one line of what goes wrong."""
    server.replies = [] if reply is None else [reply]
    with pytest.raises(CrismError) as caught:
        predict_scene(RemoteModel(server.url), *inputs_in(observation))
    assert "\n" not in str(caught.value)
    assert server.url in str(caught.value)
    return str(caught.value)


def test_the_server_s_prediction_is_the_model_s_own(server: Server, local: LocalModel, observation: Path) -> None:
    """Values, mask, deviation, truth, to the bit: float32 survives the way through JSON."""
    (given,) = inputs_in(observation)
    options = Options(draws=2, seed=7)
    far, near = predict_scene(RemoteModel(server.url), given, options), predict_scene(local, given, options)
    np.testing.assert_array_equal(far.answer.prediction, near.answer.prediction)
    np.testing.assert_array_equal(far.answer.nodata, near.answer.nodata)
    np.testing.assert_array_equal(far.answer.carbonate, near.answer.carbonate)
    np.testing.assert_array_equal(far.answer.deviation, near.answer.deviation)
    np.testing.assert_array_equal(far.truth, near.truth)
    valid = ~near.answer.nodata
    np.testing.assert_allclose(far.scaled[valid], near.scaled[valid], atol=1e-6)
    assert far.tags["crism.model_version"] == "3"
    assert far.tags["crism.model_name"] == "crism-火"
    assert far.tags["crism.server"] == server.url
    assert far.tags["crism.noise_seed"] == near.tags["crism.noise_seed"]


def test_command(
    server: Server, observation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def run(name: str, *words: object) -> Ran:
        return console(
            ["predict", observation, "-o", tmp_path / name, "--model", server.url, *words], monkeypatch, capsys
        )

    busy = (503, {"Retry-After": "0"}, b'{"message": "busy"}')
    server.replies = [busy, busy]
    ran = run("a.tif")
    assert ran.code == 0, ran.err
    assert ran.err.count("is busy; asking again") == 2
    assert (tmp_path / "a-carbonate.tif").is_file()
    with rasterio.open(tmp_path / "a.tif") as written:
        assert written.crs is not None
        assert written.tags()["crism.model_version"] == "3"
    # What the model refuses is the server's own sentence.
    assert "steps is 2000; expected a whole number from 1 to 1000" in run("b.tif", "--steps", 2000).error


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_champion_that_changes_ends_the_batch(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chunk: int
) -> None:
    image = np.random.default_rng(1).uniform(0.05, 0.4, (8, 9, 4)).astype(np.float32)
    tifs = [tmp_path / f"{name}.tif" for name in "abcdef"]
    for tif in tifs:
        write_geotiff(tif, image, np.ones((8, 9), dtype=bool), None, CASSIS_BANDS)
    server.description = server.local.served.describe() | {"chunk": chunk}
    server.versions = ["3", "3", "4", "4", "4", "4"]

    def run(*words: object) -> Ran:
        more = ["-o", tmp_path / "out", "--model", server.url, "--no-carbonate", *words]
        return console(["predict", *tifs, *more], monkeypatch, capsys)

    ran = run()
    assert ran.code == 1
    assert "2 of 6 predicted, 1 failed" in ran.out
    assert "version 3 at first and now 4, so nothing more is predicted; for all by one version name" in ran.err
    assert ran.err.count("failed: ") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.tif", "b.tif"]
    assert [method for method, _, _ in server.asked] == ["GET", "POST", "POST", "POST"], "the rest is not sent"
    server.versions = []
    assert "6 of 6 predicted, 0 failed" in run("--force").out


def test_a_server_that_stays_busy(server: Server, observation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    model = RemoteModel(server.url, said.append)
    server.replies = [(503, {"Retry-After": "0"}, b"")] * 10
    with pytest.raises(CrismError, match="still busy after 10 tries"):
        predict_scene(model, *inputs_in(observation))
    assert len(said) == 9


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ((413, {}, b'{"message": "larger than 1 MB"}'), "40 x 40 pixels.*more than the server.*than 1 MB.*models:/"),
        ((400, {}, b'{"message": "input has 9 pixels"}'), "40 x 40 pixels.*more than.*has 9 pixels.*or predict with"),
        ((400, {}, b'{"error_code": "BAD", "message": "no bands\\nat all"}'), r": no bands at all \(HTTP 400\)"),
        ((401, {}, b"{}"), TOKEN),
        ((500, {}, b"\x1b[31mpanic"), r": \[31mpanic \(HTTP 500\)"),
        ((302, {"Location": "http://127.0.0.1:1/elsewhere"}, b""), "redirect.*not followed"),
        ((200, {}, b"<html>"), "not JSON"),
        ((200, {}, b"[]"), "not a JSON object"),
        ((200, {}, b'{"predictions": [[1, 2]]}'), "not that of crism-mlops serve"),
        ((200, {}, b'{"predictions": {"prediction": [[[[1, 2, 3]]]]}}'), r"prediction has shape \(1, 1, 1, 3\)"),
        ((200, {"X-Model-Version": "4"}, b"{}"), "version 3 at first and now 4"),
    ],
)  # fmt: skip
def test_what_a_server_may_answer(server: Server, observation: Path, reply: Reply, says: str) -> None:
    message = failed(server, observation, reply)
    assert re.search(says, message), message
    assert message.isprintable()


def test_models_that_say_too_little(server: Server, observation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = server.local.served.describe()
    # As a plain MLflow server does.
    real, answer = Server.reply, (404, {}, b'{"detail": "Not Found"}')
    monkeypatch.setattr(Server, "reply", lambda *words: answer)
    assert "plain `mlflow models serve`" in failed(server, observation)
    monkeypatch.setattr(Server, "reply", real)
    for change in ({"variant": "new"}, {"bands": ["PAN"]}, {"names": ["a"]}, {"defaults": None}, {"units": "DN"}):
        server.description = whole | change
        assert "does not fit this version" in failed(server, observation)
    server.description = whole | {"wavelengths_nm": None}
    assert "filters of its own" in str(failed_alone(server, observation))


def failed_alone(server: Server, observation: Path) -> CrismError:
    with pytest.raises(CrismError) as caught:
        predict_scene(RemoteModel(server.url), *inputs_in(observation))
    return caught.value


def test_nobody_answers() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(CrismError, match=r"no connection \(Connection refused\); start a server") as caught:
            RemoteModel(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://", "http://:80", "http://me:secret@127.0.0.1:1", "http://127.0.0.1:99999", "http://a/?token=secret"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(CrismError) as caught:
        RemoteModel(url)
    assert "secret" not in str(caught.value)


def test_the_token_goes_to_the_host_asked_for_and_nowhere_else(
    server: Server, observation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv(TOKEN, "s3cret")
    # Neither of these may see it, or replace it.
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    predict_scene(RemoteModel(server.url), *inputs_in(observation))
    assert [headers.get("authorization") for _, _, headers in server.asked] == ["Bearer s3cret"] * 2
    asked = len(server.asked)
    assert "s3cret" not in failed(server, observation, (302, {"Location": f"{server.url}/other"}, b""))
    # /model and /invocations, and nothing after them.
    assert [path for _, path, _ in server.asked[asked:]] == ["/model", "/invocations"]
    assert "s3cret" not in failed(server, observation, (403, {}, b"{}"))
    monkeypatch.setenv(TOKEN, "s3cret\nX-Other: 1")
    words = ["predict", observation, "-o", tmp_path / "a.tif", "--model", server.url]
    assert "s3cret" not in console(words, monkeypatch, capsys).error
