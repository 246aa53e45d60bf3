"""`crism-mlops predict` against `crism-mlops serve`, whose server is the console script's own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import rasterio
import torch
from console import Ran, console
from random_models import log_random
from servers import Server, free_port

from crism_mlops.products.geotiff import write_geotiff
from crism_mlops.scenes.filters import CASSIS_BANDS
from crism_mlops.studies.remote import TOKEN
from crism_mlops.tracking import Tracker

NAME = "small"
SECRET = "a-token-of-32-characters-or-more"


class Serve(Server):
    name = "crism-mlops serve"

    def __init__(self, folder: Path, uri: str) -> None:
        super().__init__(folder, free_port())
        self._uri = uri

    def _command(self) -> list[str]:
        return [
            sys.executable, "-m", "crism_mlops.cli", "serve", "--port", str(self.port), "--tracking-uri", self._uri,
            "--model", f"models:/{NAME}@champion", "--max-megabytes", "1",
        ]  # fmt: skip

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", TOKEN: SECRET}

    def _answers(self) -> bool:
        try:
            with urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False


def test_a_server_predicts_what_the_model_predicts(
    tmp_path: Path, observation: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    def predict(*words: object, model: object, token: str = SECRET) -> Ran:
        monkeypatch.setenv(TOKEN, token)
        return console(["predict", *words, "--model", model, "--draws", 2], monkeypatch, capsys)

    tracker = Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "serve")
    version, _ = log_random(tracker, tmp_path, NAME, 1, "instruct_pix2pix")
    tracker.client.set_registered_model_alias(NAME, "champion", version)
    large = tmp_path / "large.tif"
    image = np.random.default_rng(1).uniform(0.05, 0.4, (300, 300, 4)).astype(np.float32)
    write_geotiff(large, image, np.ones((300, 300), dtype=bool), None, CASSIS_BANDS)
    server = Serve(tmp_path, tracker.uri)
    server.start()
    try:
        url = f"http://127.0.0.1:{server.port}"
        far = predict(observation, "-o", tmp_path / "far.tif", model=url)
        refused = predict(large, "-o", tmp_path / "out.tif", model=url)
        strange = predict(observation, "-o", tmp_path / "out.tif", model=url, token="of-another-server")
    finally:
        server.stop()
    assert far.code == 0, far.err
    assert "takes at once (the request is larger than 1 MB" in refused.err
    assert refused.code == 1
    assert "another token" in strange.error
    gone = predict(observation, "-o", tmp_path / "out.tif", model=url)
    assert "no connection (Connection refused)" in gone.error
    assert not (tmp_path / "out.tif").exists()
    # Bits depend on the number of threads: as many as the server has.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    near = predict(observation, "-o", tmp_path / "near.tif", model=tmp_path / f"{NAME}-1" / "checkpoint")
    assert near.code == 0, near.err
    for end in (".tif", "-deviation.tif"):
        with rasterio.open(tmp_path / f"far{end}") as a, rasterio.open(tmp_path / f"near{end}") as b:
            np.testing.assert_array_equal(a.read(), b.read())
            assert (a.crs, a.transform) == (b.crs, b.transform)
            assert a.tags()["crism.model_version"] == version
            assert a.tags()["crism.model_name"] == NAME
            assert a.tags()["crism.noise_seed"] == b.tags()["crism.noise_seed"]
