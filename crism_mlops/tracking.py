"""Runs, metrics, artifacts: what MLflow is told. The one place that talks to the tracking server.

Tags and metrics are a contract that people filter by; they are listed in docs/tracking.md.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import socket
import sqlite3
import subprocess
import tempfile
import traceback
import urllib.error
import urllib.parse
import urllib.request
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

from crism_mlops.errors import TrackingError, one_line

# Read by mlflow when it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

log = logging.getLogger(__name__)

DEFAULT_ROOT = Path("mlruns")
Kind = Literal["study", "trial", "floor", "ceiling", "evaluation", "published"]
_READING = "crism.test_reading."
INFEASIBLE = "crism.infeasible"  # on a finished trial that breaks a constraint of its study: which, and by how much
Status = Literal["FINISHED", "KILLED", "FAILED", "RUNNING"]
MODEL_CODE = Path(__file__).parent / "registry" / "pyfunc.py"
_MAX_PARAM = 6000
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def default_tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or SQLite under mlruns/ (the file store is deprecated in MLflow)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{DEFAULT_ROOT / 'mlflow.db'}"


@dataclass(frozen=True, slots=True)
class RunInfo:
    """One run as it stands in MLflow."""

    run_id: str
    name: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]

    @property
    def kind(self) -> str:
        return self.tags.get("crism.kind", "")


class Tracker:
    """One experiment of one tracking store."""

    def __init__(self, uri: str | None, experiment: str, *, create: bool = True) -> None:
        """Raises TrackingError where the store cannot be reached, or (create=False) holds no such experiment."""
        self.uri = uri or default_tracking_uri()
        path = sqlite_path(self.uri)
        if not create and path is not None and not path.is_file():
            raise TrackingError(f"{self.uri}: no such store yet; run a sweep first, e.g. sweeps/quickstart-unet.yaml")
        self.client = connect(self.uri)
        self.experiment = experiment
        with translated(self.uri), _migration_lock(self.uri):
            found = self.client.get_experiment_by_name(experiment)
            if found is None and create:
                found = self._create()
        if found is None:
            names = sorted(e.name for e in self.client.search_experiments() if e.name != "Default")
            raise TrackingError(
                f"no experiment {experiment!r} in {shown(self.uri)}; it holds {', '.join(names) or 'none'}"
            )
        if found.lifecycle_stage != "active":
            raise TrackingError(f"experiment {experiment!r} was deleted in MLflow; restore it or name another")
        self.experiment_id: str = found.experiment_id

    @property
    def public_uri(self) -> str:
        """Where others find the store: without a password, and a file by its whole path."""
        path = sqlite_path(self.uri)
        if path is not None:
            return f"sqlite:///{path.absolute()}"
        parts = urllib.parse.urlsplit(self.uri)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()

    def delete(self, run_id: str) -> None:
        """Mark a run as deleted; MLflow can restore it until it is garbage-collected."""
        with translated(self.uri):
            self.client.delete_run(run_id)

    def _create(self) -> Any:
        from mlflow.exceptions import MlflowException

        folder = artifact_folder(self.uri, self.experiment)
        try:
            self.client.create_experiment(
                self.experiment, artifact_location=None if folder is None else folder.as_uri()
            )
        except MlflowException as error:
            # Of two processes at one server the other one was faster.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return self.client.get_experiment_by_name(self.experiment)

    def start(
        self, name: str, kind: Kind, tags: Mapping[str, str], params: Mapping[str, Any], parent: str | None = None
    ) -> str:
        """Create a run; returns its id."""
        every = {"crism.kind": kind, **tags}
        if parent is not None:
            every["mlflow.parentRunId"] = parent
        commit = git_commit()
        if commit is not None:
            every["mlflow.source.git.commit"] = commit
        with translated(self.uri):
            run = self.client.create_run(self.experiment_id, tags=every, run_name=name)
            self.params(run.info.run_id, params)
        return str(run.info.run_id)

    def params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Log parameters in one call; None becomes "none"."""
        from mlflow.entities import Param

        texts = {k: ("none" if v is None else str(v))[:_MAX_PARAM] for k, v in params.items()}
        if texts:
            with translated(self.uri):
                self.client.log_batch(run_id, params=[Param(k, v) for k, v in texts.items()])

    def metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics in one call."""
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        with translated(self.uri):
            self.client.log_batch(run_id, metrics=[Metric(k, float(v), now, step) for k, v in metrics.items()])

    def tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        with translated(self.uri):
            self.client.log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def text(self, run_id: str, text: str, file: str) -> None:
        """Log a text artifact."""
        with translated(self.uri):
            self.client.log_text(run_id, text, file)

    def figure(self, run_id: str, figure: Any, file: str) -> None:
        """Log a matplotlib figure as a picture."""
        with translated(self.uri):
            self.client.log_figure(run_id, figure, file)

    def table(self, run_id: str, rows: Any, file: str) -> None:
        """Log rows (dicts) as a table that MLflow's UI shows."""
        import pandas

        with translated(self.uri), warnings.catch_warnings():
            # MLflow looks for pictures among the columns in a way that pandas 3 deprecates.
            warnings.filterwarnings("ignore", message="For backward compatibility, 'str' dtypes")
            self.client.log_table(run_id, pandas.DataFrame(list(rows)), file)

    def note_test_reading(self, run_id: str, reason: str, test_digest: str) -> None:
        """Count a reading of the test set on the experiment: with time, run, reason and the set's digest."""
        entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "run": run_id, "reason": reason,
                 "test_digest": test_digest}  # fmt: skip
        with translated(self.uri):
            # A key of its own, so that two at once do not count as one.
            self.client.set_experiment_tag(self.experiment_id, f"{_READING}{uuid.uuid4().hex}", json.dumps(entry))

    def test_readings(self) -> list[dict[str, str]]:
        """Every reading of a test set in the experiment, oldest first: time, run, reason, test_digest."""
        with translated(self.uri):
            tags = self.client.get_experiment(self.experiment_id).tags
        found = [json.loads(value) for key, value in tags.items() if key.startswith(_READING)]
        return sorted(found, key=lambda entry: str(entry["time"]))

    def read_table(self, run_id: str, file: str) -> list[dict[str, Any]]:
        """The rows of a parquet table that a run logged (JSON would round them). Raises TrackingError where it
        logged none."""
        import pandas

        with translated(self.uri), tempfile.TemporaryDirectory() as folder:
            if file not in {item.path for item in self.client.list_artifacts(run_id)}:
                raise TrackingError(f"run {run_id} has no {file}; it did not finish, or is of an older version")
            rows = pandas.read_parquet(self.client.download_artifacts(run_id, file, folder)).to_dict("records")
        return [{str(key): value for key, value in row.items()} for row in rows]

    def model(self, run_id: str, checkpoint: Path, metadata: Mapping[str, Any], channels: int) -> str:
        """Log a checkpoint folder as a logged model (models from code, no pickle); returns its model id."""
        import mlflow

        from crism_mlops import __version__

        pins = [f"crism-mlops=={__version__}", *(_pin(p) for p in ("torch", "diffusers", "transformers", "mlflow"))]
        with translated(self.uri), warnings.catch_warnings():
            # MLflow asks for an input example: the signature says it all, and a scene is megabytes of JSON.
            warnings.filterwarnings("ignore", message=".*[Ii]nput example.*", category=UserWarning)
            with mlflow.start_run(run_id=run_id):
                info = mlflow.pyfunc.log_model(
                    name="model",
                    python_model=str(MODEL_CODE),
                    artifacts={"checkpoint": str(checkpoint)},
                    signature=_signature(channels),
                    metadata=dict(metadata),
                    pip_requirements=pins,
                )
            # Leaving start_run marks the run as finished; the trial is not over yet.
            self.client.update_run(run_id, status="RUNNING")
        return str(info.model_id)

    def end(self, run_id: str, status: Status) -> None:
        """Give a run its final status."""
        with translated(self.uri):
            self.client.set_terminated(run_id, status=status)

    def stop(self, run_id: str, how: str, why: str = "") -> None:
        """End a run that was pruned or interrupted: KILLED, with a tag that says which."""
        self.tags(run_id, {"crism.stopped": how, **({"crism.why": why} if why else {})})
        self.end(run_id, "KILLED")

    def fail(self, run_id: str, error: BaseException) -> None:
        """End a run that failed: FAILED, with its traceback as an artifact."""
        self.tags(run_id, {"crism.stopped": "failed", "crism.why": f"{type(error).__name__}: {one_line(error)}"})
        self.text(run_id, "".join(traceback.format_exception(error)), "traceback.txt")
        self.end(run_id, "FAILED")

    def reopen(self, run_id: str) -> None:
        """An ended run runs again; how it ended last time is forgotten."""
        with translated(self.uri):
            for tag in {"crism.stopped", "crism.why"} & set(self.run(run_id).tags):
                self.client.delete_tag(run_id, tag)
            self.client.update_run(run_id, status="RUNNING")

    def find(self, **tags: str) -> list[RunInfo]:
        """Runs of the experiment that carry all of these tags (`crism_kind` means crism.kind), oldest first."""
        if any("'" in v for v in tags.values()):
            return []  # MLflow's filter cannot say it, and no tag of ours holds a quote.
        terms = [f"tags.`{k.replace('_', '.', 1)}` = '{v}'" for k, v in tags.items()]
        runs: list[RunInfo] = []
        token = None
        with translated(self.uri):
            while True:
                page = self.client.search_runs(
                    [self.experiment_id], " and ".join(terms), order_by=["attributes.start_time ASC"], page_token=token
                )
                runs += [_info(r) for r in page]
                token = page.token
                if not token:
                    return runs

    def run(self, run_id: str) -> RunInfo:
        """One run by its id."""
        with translated(self.uri):
            return _info(self.client.get_run(run_id))

    def ui_url(self) -> str | None:
        """Where the experiment is seen, if the store is a server."""
        return (
            f"{shown(self.uri).rstrip('/')}/#/experiments/{self.experiment_id}" if self.uri.startswith("http") else None
        )


@cache
def git_commit() -> str | None:
    """The commit of the code that runs, with "+dirty" where files differ; None outside a checkout."""
    here = Path(__file__)

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        # Installed below somebody's checkout, the code is not part of it.
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _signature(channels: int) -> Any:
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    images = Schema([TensorSpec(np.dtype(np.float32), (-1, -1, -1, channels), name=None)])
    output = Schema([TensorSpec(np.dtype(np.float32), (-1, -1, -1, 3), name=None)])
    params = ParamSchema(
        [
            ParamSpec("prompt", "string", None),
            ParamSpec("longitude", "double", None),
            ParamSpec("latitude", "double", None),
            ParamSpec("location", "string", None),
            ParamSpec("seed", "long", None),
        ]
    )
    return ModelSignature(inputs=images, outputs=output, params=params)


def _pin(package: str) -> str:
    from importlib.metadata import version

    return f"{package}=={version(package).split('+')[0]}"


def _info(run: Any) -> RunInfo:
    return RunInfo(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        status=run.info.status,
        tags=dict(run.data.tags),
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
    )


def connect(uri: str) -> Any:
    """A client of a tracking store and its registry, once it is known to answer."""
    _reach(uri)
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with translated(uri), _migration_lock(uri):
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        client = mlflow.MlflowClient(uri, uri)
        # Lays out a fresh database, where the constructor has not.
        client.search_experiments(max_results=1)
        client.search_registered_models(max_results=1)
    return client


def download_checkpoint(uri: str | None, model_uri: str) -> Path:
    """The checkpoint folder of a logged or registered model, downloaded where it is remote."""
    uri = uri or default_tracking_uri()
    connect(uri)
    import mlflow

    with translated(uri):
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=model_uri))
    return folder / "artifacts" / "checkpoint"


def _reach(uri: str) -> None:
    """Fail at once, in one line, where MLflow would retry for minutes."""
    parts = urllib.parse.urlsplit(uri)
    path = sqlite_path(uri)
    try:
        if parts.scheme in ("http", "https"):
            # urllib takes what stands before an @ for a part of the host's name.
            bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
            try:
                urllib.request.urlopen(bare.rstrip("/") + "/health", timeout=10).close()
            except urllib.error.HTTPError as answer:
                answer.close()  # Something answers; what it thinks of us comes with the first real call.
        elif path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                connection = sqlite3.connect(path)
                try:
                    connection.execute("PRAGMA schema_version")
                finally:
                    connection.close()
        elif parts.scheme in ("", "file"):
            raise TrackingError(
                f"tracking store {uri!r}: MLflow no longer takes plain folders; use sqlite:///FOLDER/mlflow.db "
                "or a server"
            )
        elif parts.hostname and (port := parts.port or _DATABASE_PORTS.get(parts.scheme.partition("+")[0])):
            socket.create_connection((parts.hostname, port), timeout=10).close()
    except (OSError, ValueError, http.client.HTTPException, sqlite3.Error) as error:
        if path is not None:
            raise TrackingError(f"tracking store {uri}: {one_line(error)}; name another with --tracking-uri") from error
        raise TrackingError(
            f"tracking server {shown(uri)} does not answer ({shown(uri, one_line(error))}); start it, or use the local "
            "store by leaving out --tracking-uri and MLFLOW_TRACKING_URI"
        ) from error


def artifact_folder(uri: str, experiment: str) -> Path | None:
    """Where a new experiment's artifacts go: beside the SQLite file, or below mlruns/ for another database;
    None for a server, which has a place of its own."""
    if uri.startswith(("http://", "https://")):
        return None
    path = sqlite_path(uri)
    root = DEFAULT_ROOT if path is None else path.parent
    return (root / "artifacts" / urllib.parse.quote(experiment, safe="")).absolute()


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite URI (three slashes: relative, four: absolute), None for other stores."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])


@contextmanager
def _migration_lock(uri: str) -> Iterator[None]:
    """Several processes on a fresh SQLite file race in MLflow's schema migration."""
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    from filelock import FileLock

    with FileLock(f"{path}.lock"):
        yield


@contextmanager
def translated(uri: str) -> Iterator[None]:
    """MLflow's errors, and those of the database below it, as a TrackingError of one line."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError) as error:
        raise TrackingError(f"tracking store {shown(uri)}: {shown(uri, one_line(error))}") from error


def shown(uri: str, text: str | None = None) -> str:
    """A URI without its password, or a text that may quote the URI."""
    password = urllib.parse.urlsplit(uri).password
    text = uri if text is None else text
    return text.replace(f":{password}@", ":***@") if password else text


def flat_json(content: Any) -> str:
    """JSON text for an artifact."""
    return json.dumps(content, indent=2, sort_keys=True, default=str) + "\n"
