"""The logged model through MLflow's own scoring code: what it is asked in JSON; nonsense is a 400 and no more."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from served_models import IP2P, card, image, recording, saved
from trackers import new_tracker

from crism_mlops.registry import pyfunc
from crism_mlops.studies import request as asking
from crism_mlops.studies.served import Served
from crism_mlops.studies.served_description import description

BANDS = ["PAN", "NIR", "RED"]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny InstructPix2Pix as MLflow loads it."""
    folder = tmp_path_factory.mktemp("pyfunc")
    tracker = new_tracker(folder)
    of = card(IP2P, {"draws": 2})
    run_id = tracker.start("trial", "trial", {}, {})
    model_id = tracker.model(run_id, saved(folder / "checkpoint", of), description(of), len(BANDS))
    mlflow.set_tracking_uri(tracker.uri)
    return mlflow.pyfunc.load_model(f"models:/{model_id}")


@pytest.fixture
def quick(logged: Any) -> Iterator[Any]:
    """The same, with a network that gives its input back."""
    served = logged.unwrap_python_model()
    own, served.served = served.served, recording()[0]
    yield logged
    served.served = own


def answer(model: Any, body: Any) -> tuple[int, Any]:
    """Status and content, as MLflow's server gives them."""
    text = body if isinstance(body, str) else json.dumps(body)
    try:
        reply = scoring_server.invocations(text, "application/json", model, model.metadata.get_input_schema())
    except MlflowException as error:
        return error.get_http_status_code(), str(error)
    return reply.status, json.loads(reply.response)


def test_a_request_and_its_answer(logged: Any) -> None:
    given = image(12, 9)
    given[:3] = 0.0
    params = {"bands": BANDS, "units": "I/F", "longitude": 77.5, "latitude": 18.4, "seed": 3}
    status, content = answer(logged, {"inputs": [given.tolist(), image(12, 9).tolist()], "params": params})
    assert status == 200, content
    found = {name: np.array(value) for name, value in content["predictions"].items()}
    assert {name: a.shape for name, a in found.items()} == {
        "prediction": (2, 12, 9, 3), "nodata": (2, 12, 9), "deviation": (2, 12, 9, 3)
    }  # fmt: skip
    served: Served = logged.unwrap_python_model().served
    asked = {"longitude": 77.5, "latitude": 18.4, "seed": 3}
    (expected,) = served.answers([asking.Request(given, served.bands, **asked)])
    np.testing.assert_array_equal(found["prediction"][0].astype(np.float32), expected.prediction)
    np.testing.assert_array_equal(found["deviation"][0].astype(np.float32), expected.deviation)
    np.testing.assert_array_equal(found["nodata"][0], expected.nodata)
    assert (found["prediction"][0, :3] == 0.0).all()

    status, content = answer(logged, {"inputs": [given.tolist()], "params": {**params, "scaled": True}})
    scaled = {name: np.array(value) for name, value in content["predictions"].items()}
    shown = ~expected.nodata
    np.testing.assert_array_equal(scaled["prediction"][0][shown].astype(np.float32), expected.scaled[shown])
    assert (scaled["prediction"][0][~shown] == 0.0).all()
    np.testing.assert_allclose(scaled["deviation"][0] * served.span, expected.deviation, atol=1e-6)


def test_signature_and_metadata(logged: Any) -> None:
    """What a client can know without a prediction: everything is typed, pinned and told; nothing is a pickle."""
    signature = logged.metadata.signature
    assert str(signature.inputs.inputs[0]) == "Tensor('float32', (-1, -1, -1, 3))"
    assert [t.name for t in signature.outputs.inputs] == ["prediction", "nodata", "deviation"]
    assert [p.name for p in signature.params.params] == [
        "bands", "units", "nodata", "prompt", "longitude", "latitude", "location", "seed", "steps", "guidance",
        "image_guidance", "draws", "scaled",
    ]  # fmt: skip
    told = logged.metadata.metadata
    assert told == logged.unwrap_python_model().served.describe()
    pins = Path(mlflow.artifacts.download_artifacts(f"models:/{logged.metadata.model_id}")) / "requirements.txt"
    lines = pins.read_text().split()
    assert all("==" in line for line in lines)
    assert {line.partition("==")[0] for line in lines} >= {"crism-mlops", "torch", "mlflow", "diffusers", "safetensors"}
    kinds = {p.suffix for p in pins.parent.rglob("*") if p.is_file()}
    assert not kinds & {".pkl", ".pickle", ".bin", ".pt", ".joblib"}


WRONG: list[Any] = [
    {}, [], 5, "pixels", "{", {"inputs": []}, {"inputs": {}}, {"inputs": None}, {"instances": 1}, {"inputs": [[[[]]]]},
    {"inputs": "pixels"}, {"inputs": [[1, 2], [3]]}, {"inputs": [[["a"]]]}, {"dataframe_split": {}},
    {"inputs": image().tolist()}, {"inputs": image()[None, ..., :2].tolist()}, {"inputs": [[[[None] * 3]]]},
    {"inputs": [image().tolist(), image(4, 4).tolist()]}, {"inputs": [[[[10**400] * 3]]]},
    {"inputs": [image().tolist()], "instances": [image().tolist()]}, {"inputs": (image()[None] + 2).tolist()},
    {"inputs": [[[[math.nan] * 3]]]}, {"inputs": [[[[math.inf] * 3]]]},
]  # fmt: skip


@pytest.mark.parametrize("body", WRONG, ids=lambda body: str(body)[:30])
def test_wrong_inputs(quick: Any, body: Any) -> None:
    if isinstance(body, dict):
        body = {**body, "params": {"bands": BANDS}}
    assert answer(quick, body)[0] == 400


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (None, "no bands are named"),
        ({"bands": []}, "no bands are named"),
        ({"bands": None}, ""),
        ({"bands": 3}, "1D array"),
        ({"bands": [1, 2, 3]}, ""),
        ({"bands": [["PAN"], "NIR"]}, ""),
        ({"bands": ["RED", "NIR", "PAN"]}, r"\['RED', 'NIR', 'PAN'\]; expected bands \['PAN', 'NIR', 'RED'\]"),
        ({"bands": BANDS, "units": "DN"}, "units are 'DN'; expected 'I/F'"),
        ({"bands": BANDS, "latitude": 1000.0, "longitude": 1.0}, "latitude is 1000"),
        ({"bands": BANDS, "latitude": "north"}, "latitude"),
        ({"bands": BANDS, "nodata": "x"}, "nodata"),
        ({"bands": BANDS, "seed": -1}, "seed is -1"),
        ({"bands": BANDS, "seed": 10**30}, "seed"),
        ({"bands": BANDS, "draws": 2}, "draws is 2"),
        ({"bands": BANDS, "prompt": "x" * 10**6}, ""),
        ([], "must be a dictionary"),
        ("bands", "must be a dictionary"),
    ],
)
def test_wrong_params(quick: Any, params: Any, words: str) -> None:
    status, said = answer(quick, {"inputs": [image().tolist()], "params": params})
    assert status == 400
    assert re.search(words, said)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
NAMES = [
    "bands", "units", "nodata", "prompt", "longitude", "latitude", "location", "seed", "steps", "guidance",
    "image_guidance", "draws", "scaled",
]  # fmt: skip


@given(params=st.dictionaries(st.sampled_from([n for n in NAMES if n != "bands"]), JSON, max_size=4))
@settings(max_examples=60, deadline=None)
def test_wild_params_are_answered_or_refused(logged: Any, params: dict[str, Any]) -> None:
    """Whatever JSON a param holds, the model's own check says 400 at worst (the model itself is not asked)."""
    python_model = logged.unwrap_python_model()
    try:
        requests = python_model.requests(image()[None], {"bands": BANDS, **params})
    except MlflowException as error:
        refused = error
    else:
        assert len(requests) == 1
        return
    assert refused.get_http_status_code() == 400
    assert len(str(refused)) < 1000


@given(body=JSON, bands=JSON)
@settings(max_examples=60, deadline=None)
def test_wild_bodies_are_refused(logged: Any, body: Any, bands: Any) -> None:
    status, _ = answer(logged, {"inputs": body, "params": {"bands": bands}})
    assert status == 400


def test_requests_are_limited(quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.full((pyfunc.MAX_IMAGES + 1, 1, 1, 3), 0.2, dtype=np.float32)
    with pytest.raises(
        MlflowException, match=r"input has shape \(257, 1, 1, 3\); expected N x H x W x 3 with N from 1"
    ):
        quick.predict(images, params={"bands": BANDS})
    monkeypatch.setattr(asking, "MAX_PIXELS", 127)
    with pytest.raises(MlflowException, match=r"input has 128 pixels; expected .* 127 pixels in all; ask for parts"):
        quick.predict(np.stack([image()] * 2), params={"bands": BANDS})


def test_images_times_draws_are_limited(logged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "MAX_PIXELS", 300)
    python_model = logged.unwrap_python_model()
    assert len(python_model.requests(np.stack([image()] * 2), {"bands": BANDS})) == 2
    with pytest.raises(MlflowException, match="2 images of 64 pixels, 3 draws each"):
        python_model.requests(np.stack([image()] * 2), {"bands": BANDS, "draws": 3})
