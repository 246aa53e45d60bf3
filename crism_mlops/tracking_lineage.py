"""What lineage asks of MLflow: a run's data sets, a logged model's card, runs by their parameters."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, get_args

from crism_mlops.errors import TrackingError, one_line
from crism_mlops.tracking import RunInfo, Tracker, _info
from crism_mlops.tracking_data import Context, DataSet
from crism_mlops.untrusted import parse_json

_CARD = "artifacts/checkpoint/crism.json"
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")


def experiments(tracker: Tracker) -> list[str]:
    """Experiments of the store that were not deleted, sorted."""

    def read() -> list[str]:
        names: list[str] = []
        token = None
        while True:
            page = tracker.client.search_experiments(page_token=token)
            names += [str(e.name) for e in page]
            token = page.token
            if not token:
                return sorted(names)

    return tracker._ask(read)


def experiment_of(tracker: Tracker, run_id: str) -> str:
    """The experiment that a run is of, whichever the tracker's is."""

    def read() -> str:
        found = tracker.client.get_run(run_id).info.experiment_id
        return str(tracker.client.get_experiment(found).name)

    return tracker._ask(read)


def is_deleted(tracker: Tracker, run_id: str) -> bool:
    """Whether a run was deleted, or is no more; "" is no run and was not."""

    def read() -> bool:
        return str(tracker.client.get_run(run_id).info.lifecycle_stage) == "deleted"

    try:
        return bool(run_id) and tracker._ask(read)
    except TrackingError as error:
        if getattr(error.__cause__, "error_code", "") in _MISSING:
            return True
        raise


def data_of(tracker: Tracker, run_id: str) -> list[DataSet]:
    """The data sets that a run was told to use, as `Tracker.data` told it."""
    inputs = tracker._ask(lambda: tracker.client.get_run(run_id).inputs.dataset_inputs)
    found = []
    for one in inputs:
        said = next((tag.value for tag in one.tags if tag.key == "mlflow.data.context"), "")
        kind, data = next((known for known in get_args(Context) if known == said), None), one.dataset
        if kind is not None:
            texts = (data.source_type, data.source, data.schema or "", data.profile or "")
            found.append(DataSet(data.name, data.digest, kind, *texts))
    return found


def checkpoint_card(tracker: Tracker, model_id: str) -> dict[str, Any] | None:
    """What the checkpoint of a logged model says of itself (crism.json); None where the model or the file is gone.

    Raises TrackingError for a damaged one.
    """
    import mlflow

    def read() -> bytes | None:
        known = tracker.client.list_logged_model_artifacts(model_id, str(Path(_CARD).parent))
        if _CARD not in [item.path for item in known]:
            return None
        place = str(tracker.client.get_logged_model(model_id).artifact_location).rstrip("/")
        # A server's own scheme is resolved where MLflow's functions without a client look.
        mlflow.set_tracking_uri(tracker.uri)
        with tempfile.TemporaryDirectory() as folder:
            path = mlflow.artifacts.download_artifacts(artifact_uri=f"{place}/{_CARD}", dst_path=folder)
            return Path(path).read_bytes()

    try:
        content = tracker._ask(read)
    except TrackingError as error:
        if getattr(error.__cause__, "error_code", "") in _MISSING:
            return None
        raise
    if content is None:
        return None
    try:
        return parse_json(content, constants=True)
    except (ValueError, TypeError) as error:
        raise TrackingError(f"model {model_id}: {_CARD} is damaged ({one_line(error)})") from error


def runs_with(tracker: Tracker, param: str, begin: str) -> list[RunInfo]:
    """Runs of the experiment one of whose parameters begins with some letters and digits, oldest first."""
    if not begin.isalnum():
        return []  # MLflow's filter would take % and _ for any letters, and a quote for its end.

    def read() -> list[RunInfo]:
        runs: list[RunInfo] = []
        token = None
        while True:
            page = tracker.client.search_runs(
                [tracker.experiment_id], f"params.`{param}` LIKE '{begin}%'", order_by=["attributes.start_time ASC"],
                page_token=token,
            )  # fmt: skip
            runs += [_info(r) for r in page]
            token = page.token
            if not token:
                return runs

    return tracker._ask(read)
