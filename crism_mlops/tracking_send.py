"""The operations that MLflow is told, which may wait in an outbox: of each, the second time changes nothing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from crism_mlops.errors import TrackingError

# What MLflow takes in one call.
_METRICS_A_CALL, _ITEMS_A_CALL = 1000, 100
# Where MLflow's UI looks for what it shows as a table.
_TABLES = "mlflow.loggedArtifacts"


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
        case "file" if payload is not None:
            _file(client, run_id, payload, op["file"])
            if op["table"]:
                _as_table(client, run_id, op["file"])
        case other:
            raise TrackingError(f"cannot tell MLflow {other!r}: written by another version, or damaged")


def _metrics(client: Any, run_id: str, rows: Sequence[Sequence[Any]]) -> None:
    from mlflow.entities import Metric

    for part in _parts(rows, _METRICS_A_CALL):
        client.log_batch(run_id, metrics=[Metric(*row) for row in part])


def _file(client: Any, run_id: str, content: bytes, file: str) -> None:
    place = PurePosixPath(file)
    within = None if place.parent == PurePosixPath(".") else str(place.parent)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / place.name
        path.write_bytes(content)
        client.log_artifact(run_id, str(path), within)


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
