"""The operations that MLflow is told, which may wait in an outbox: of each, the second time changes nothing."""

from __future__ import annotations

import io
import json
import math
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from crism_mlops.errors import TrackingError

# What MLflow takes in one call.
_METRICS_A_CALL, _ITEMS_A_CALL = 1000, 100
# Where MLflow's UI looks for what it shows as a table.
_TABLES = "mlflow.loggedArtifacts"
# Where it looks for images, and the pixels a side of the small ones that it shows first: as many as its page has room
# for (MLflow's own have 256, and stand in the middle of grey).
_IMAGES, _THUMBNAIL = "images", 352


def send(client: Any, op: Mapping[str, Any], payload: bytes | None) -> None:
    """Tell MLflow one operation. Raises MLflow's errors, TrackingError for an operation that nobody knows."""
    run_id = op["run"]
    match op["op"]:
        case "metrics":
            _metrics(client, run_id, op["metrics"])
        case "params":
            from mlflow.entities import Param

            for part in _parts(op["params"].items(), _ITEMS_A_CALL):
                client.log_batch(run_id, params=[Param(k, v) for k, v in part])
        case "tags":
            from mlflow.entities import RunTag

            for part in _parts(op["tags"].items(), _ITEMS_A_CALL):
                client.log_batch(run_id, tags=[RunTag(k, v) for k, v in part])
        case "image" if payload is not None:
            _image(client, run_id, payload, op["key"], op["step"], op["time"])
        case "file" if payload is not None:
            _file(client, run_id, payload, op["file"])
            if op["table"]:
                _as_table(client, run_id, op["file"])
        case "inputs":
            _inputs(client, run_id, op["sets"])
        case "scored":
            _scored(client, run_id, op["model"], op["sets"])
        case other:
            raise TrackingError(f"cannot tell MLflow {other!r}: written by another version, or damaged")


def _metrics(client: Any, run_id: str, rows: Sequence[Sequence[Any]]) -> None:
    from mlflow.entities import Metric

    for part in _parts(rows, _METRICS_A_CALL):
        client.log_batch(run_id, metrics=[Metric(*row) for row in part])


def _inputs(client: Any, run_id: str, sets: Sequence[Mapping[str, str]]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    inputs = [
        DatasetInput(
            Dataset(**{key: value for key, value in one.items() if key != "context"}),
            [InputTag("mlflow.data.context", one["context"])],
        )
        for one in sets
    ]
    try:
        client.log_inputs(run_id, inputs)
    except MlflowException:
        # Of two processes that begin with a new data set at once, a database refuses one: by now it is there.
        client.log_inputs(run_id, inputs)


def _scored(client: Any, run_id: str, model_id: str, sets: Mapping[str, Sequence[str]]) -> None:
    from mlflow.entities import Metric

    found = []
    for metric in client.get_run(run_id).data._metric_objs:
        data = sets.get(metric.key.partition("/")[0])
        # Of a model, MLflow would keep a NaN as 0.
        if data is not None and math.isfinite(metric.value):
            row = (metric.key, metric.value, metric.timestamp, metric.step)
            found.append(Metric(*row, model_id=model_id, dataset_name=data[0], dataset_digest=data[1]))
    for part in _parts(found, _METRICS_A_CALL):
        client.log_batch(run_id, metrics=part)


def _file(client: Any, run_id: str, content: bytes, file: str) -> None:
    place = PurePosixPath(file)
    within = None if place.parent == PurePosixPath(".") else str(place.parent)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / place.name
        path.write_bytes(content)
        client.log_artifact(run_id, str(path), within)


def _image(client: Any, run_id: str, content: bytes, key: str, step: int, milliseconds: int) -> None:
    """As MlflowClient.log_image names its two files, but with one name for a run, key and step."""
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES

    begin = f"{_IMAGES}/{key.replace('/', '~')}+step+{step}+"
    known = {item.path for item in client.list_artifacts(run_id, _IMAGES)}
    own = uuid.uuid5(uuid.NAMESPACE_OID, f"{run_id}/{key}/{step}")
    stems = [path.removesuffix(".png") for path in known if path.startswith(begin) and path.endswith(".png")]
    stem = min(stems, default=f"{begin}timestamp+{milliseconds}+{own}")
    # Last the one that tells, in its absence, that the other may be missing.
    for path, make in ((f"{stem}+compressed.webp", _thumbnail), (f"{stem}.png", bytes)):
        if path not in known:
            _file(client, run_id, make(content), path)
    client.set_tag(run_id, MLFLOW_LOGGED_IMAGES, "True")


def _thumbnail(content: bytes) -> bytes:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as picture:
        small = picture.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    made = io.BytesIO()
    small.save(made, "WEBP", quality=30, method=6)
    return made.getvalue()


def few_colours(content: bytes, count: int = 256) -> bytes:
    """A PNG with so many colours at most, those that it has most of."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as picture:
        flat = picture.convert("RGB")
    made = io.BytesIO()
    # Without the second step (k-means) rare strong colours turn grey.
    flat.quantize(count, Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE).save(made, "PNG", optimize=True)
    return made.getvalue()


def _as_table(client: Any, run_id: str, file: str) -> None:
    known = json.loads(client.get_run(run_id).data.tags.get(_TABLES, "[]"))
    entry = {"path": file, "type": "table"}
    if entry not in known:
        client.set_tag(run_id, _TABLES, json.dumps([*known, entry]))


def _parts(items: Any, size: int) -> Iterator[list[Any]]:
    """Items, so many at a time."""
    left = iter(items)
    while part := list(islice(left, size)):
        yield part
