"""Runs, metrics, artifacts: what MLflow is told. The one place that talks to the tracking server.

Tags and metrics are a contract that people filter by; they are listed in docs/tracking.md.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from crism_mlops.errors import TrackingError

# Read by mlflow when it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

log = logging.getLogger(__name__)

DEFAULT_ROOT = Path("mlruns")
Kind = Literal["study", "trial", "floor", "ceiling"]
Status = Literal["FINISHED", "KILLED", "FAILED", "RUNNING"]
MODEL_CODE = Path(__file__).parent / "registry" / "pyfunc.py"
_MAX_PARAM = 6000


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
        _reach(self.uri)
        import mlflow
        from mlflow.exceptions import MlflowException

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self.uri)
        self.client = mlflow.MlflowClient(self.uri, self.uri)
        self.experiment = experiment
        try:
            with _migration_lock(self.uri):
                found = self.client.get_experiment_by_name(experiment)
                if found is None and create:
                    self.client.create_experiment(experiment, artifact_location=self._artifact_location(experiment))
                    found = self.client.get_experiment_by_name(experiment)
        except MlflowException as error:
            raise TrackingError(f"tracking store {_shown(self.uri)}: {_one_line(error)}") from error
        if found is None:
            names = sorted(e.name for e in self.client.search_experiments() if e.name != "Default")
            raise TrackingError(
                f"no experiment {experiment!r} in {_shown(self.uri)}; it holds {', '.join(names) or 'none'}"
            )
        if found.lifecycle_stage != "active":
            raise TrackingError(f"experiment {experiment!r} was deleted in MLflow; restore it or name another")
        self.experiment_id: str = found.experiment_id

    def _artifact_location(self, experiment: str) -> str | None:
        if not self.uri.startswith("sqlite:"):
            return None
        root = Path(urllib.parse.urlparse(self.uri).path.removeprefix("/") or DEFAULT_ROOT / "mlflow.db")
        if self.uri.startswith("sqlite:////"):
            root = Path("/") / root
        safe = urllib.parse.quote(experiment, safe="")
        return (root.parent / "artifacts" / safe).absolute().as_uri()

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
        with _translated(self.uri):
            run = self.client.create_run(self.experiment_id, tags=every, run_name=name)
            self.params(run.info.run_id, params)
        return str(run.info.run_id)

    def params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Log parameters in one call; None becomes "none"."""
        from mlflow.entities import Param

        texts = {k: ("none" if v is None else str(v))[:_MAX_PARAM] for k, v in params.items()}
        if texts:
            with _translated(self.uri):
                self.client.log_batch(run_id, params=[Param(k, v) for k, v in texts.items()])

    def metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics in one call."""
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        with _translated(self.uri):
            self.client.log_batch(run_id, metrics=[Metric(k, float(v), now, step) for k, v in metrics.items()])

    def tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        with _translated(self.uri):
            self.client.log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def text(self, run_id: str, text: str, file: str) -> None:
        """Log a text artifact."""
        with _translated(self.uri):
            self.client.log_text(run_id, text, file)

    def figure(self, run_id: str, figure: Any, file: str) -> None:
        """Log a matplotlib figure as a picture."""
        with _translated(self.uri):
            self.client.log_figure(run_id, figure, file)

    def table(self, run_id: str, rows: Any, file: str) -> None:
        """Log rows (dicts) as a table that MLflow's UI shows."""
        import pandas

        with _translated(self.uri):
            self.client.log_table(run_id, pandas.DataFrame(list(rows)), file)

    def model(self, run_id: str, checkpoint: Path, metadata: Mapping[str, Any], channels: int) -> str:
        """Log a checkpoint folder as a logged model (models from code, no pickle); returns its model id."""
        import mlflow

        from crism_mlops import __version__

        pins = [f"crism-mlops=={__version__}", *(_pin(p) for p in ("torch", "diffusers", "transformers", "mlflow"))]
        with _translated(self.uri), warnings.catch_warnings():
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

    def checkpoint(self, model_uri: str) -> Path:
        """The checkpoint folder of a logged or registered model, downloaded where it is remote."""
        import mlflow

        with _translated(self.uri):
            folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=model_uri))
        return folder / "artifacts" / "checkpoint"

    def end(self, run_id: str, status: Status) -> None:
        """Give a run its final status."""
        with _translated(self.uri):
            self.client.set_terminated(run_id, status=status)

    def reopen(self, run_id: str) -> None:
        """A finished parent run runs again."""
        with _translated(self.uri):
            self.client.update_run(run_id, status="RUNNING")

    def find(self, **tags: str) -> list[RunInfo]:
        """Runs of the experiment that carry all of these tags (`crism_kind` means crism.kind), oldest first."""
        terms = [f"tags.`{k.replace('_', '.', 1)}` = '{v}'" for k, v in tags.items()]
        runs: list[RunInfo] = []
        token = None
        with _translated(self.uri):
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
        with _translated(self.uri):
            return _info(self.client.get_run(run_id))

    def ui_url(self) -> str | None:
        """Where the experiment is seen, if the store is a server."""
        return f"{self.uri.rstrip('/')}/#/experiments/{self.experiment_id}" if self.uri.startswith("http") else None


def git_commit() -> str | None:
    """The commit of the code that runs, with "+dirty" where files differ; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+dirty" if dirty else "")


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


def _reach(uri: str) -> None:
    """Fail at once, in one line, where MLflow would retry for minutes."""
    scheme = urllib.parse.urlparse(uri).scheme
    if scheme in ("http", "https"):
        url = uri.rstrip("/") + "/health"
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except urllib.error.HTTPError:
            return  # Something answers; what it thinks of us comes with the first real call.
        except (OSError, ValueError) as error:
            raise TrackingError(
                f"tracking server {_shown(uri)} does not answer ({_one_line(error)}); start it, or use the local "
                "store by leaving out --tracking-uri and MLFLOW_TRACKING_URI"
            ) from error
    if scheme == "sqlite":
        path = Path(uri.removeprefix("sqlite:///"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrackingError(f"tracking store {uri}: {error}") from error
    elif scheme in ("", "file"):
        raise TrackingError(
            f"tracking store {uri!r}: MLflow no longer takes plain folders; use sqlite:///FOLDER/mlflow.db or a server"
        )


@contextmanager
def _migration_lock(uri: str) -> Iterator[None]:
    """Several processes on a fresh SQLite file race in MLflow's schema migration."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    from filelock import FileLock

    with FileLock(uri.removeprefix("sqlite:///") + ".lock"):
        yield


@contextmanager
def _translated(uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise TrackingError(f"tracking store {_shown(uri)}: {_one_line(error)}") from error


def _shown(uri: str) -> str:
    """A URI without its password."""
    parts = urllib.parse.urlparse(uri)
    if parts.password is None:
        return uri
    return parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@")).geturl()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def flat_json(content: Any) -> str:
    """JSON text for an artifact."""
    return json.dumps(content, indent=2, sort_keys=True, default=str) + "\n"
