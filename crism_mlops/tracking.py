"""Runs, metrics, artifacts: what MLflow is told. The one place that talks to the tracking server.

Tags and metrics are a contract that people filter by; they are listed in docs/tracking.md.
"""

from __future__ import annotations

import io
import json
import math
import subprocess
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from crism_mlops.errors import TrackingError, one_line
from crism_mlops.redact import redacted, without_secrets
from crism_mlops.tracking_data import DataSet
from crism_mlops.tracking_send import few_colours, send
from crism_mlops.tracking_store import (
    DEFAULT_ROOT,
    Outage,
    _migration_lock,
    artifact_folder,
    connect,
    default_tracking_uri,
    patiently,
    retry_ourselves,
    shown,
    sqlite_path,
    translated,
)
from crism_mlops.tracking_view import dress, experiment_path, wanted_tags

if TYPE_CHECKING:
    from crism_mlops.buffered import BufferedTracker

__all__ = [
    "DEFAULT_ROOT",
    "INFEASIBLE",
    "Kind",
    "RunInfo",
    "Tracker",
    "artifact_folder",
    "connect",
    "default_tracking_uri",
    "flat_json",
    "git_commit",
    "shown",
    "sqlite_path",
    "translated",
]

T = TypeVar("T")
Kind = Literal["study", "trial", "floor", "ceiling", "evaluation", "published"]
_READING = "crism.test_reading."
REPEAT_OF = "crism.repeat_of"  # on a trial that repeats another one with another seed: that one's number
INFEASIBLE = "crism.infeasible"  # on a finished trial that breaks a constraint of its study: which, and by how much
Status = Literal["FINISHED", "KILLED", "FAILED", "RUNNING"]
_MAX_PARAM = 6000
_REQUEST = "crism.request"


@dataclass(frozen=True, slots=True)
class RunInfo:
    """One run as it stands in MLflow."""

    run_id: str
    name: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    started: float = 0.0  # time.time()

    @property
    def kind(self) -> str:
        return self.tags.get("crism.kind", "")

    @property
    def ranking(self) -> float:
        """What a finished trial is ranked by: its objective, of one that was repeated the mean over seeds; NaN where
        it has none."""
        return self.metrics.get("seeds/mean", self.metrics.get("objective", math.nan))


def contenders(runs: Iterable[RunInfo]) -> list[RunInfo]:
    """The finished trials that can be the best: those that keep to their study's constraints, and where the best
    ones were repeated with other seeds, these alone: one lucky seed beats no mean. Not the repetitions themselves, nor
    settings of which one breaks a constraint."""
    trials = [run for run in runs if run.kind == "trial"]
    broken = {
        (run.tags.get("crism.study"), run.tags.get(REPEAT_OF, run.tags.get("crism.trial_number")))
        for run in trials
        if INFEASIBLE in run.tags
    }
    found = [
        run
        for run in trials
        if run.status == "FINISHED" and REPEAT_OF not in run.tags and INFEASIBLE not in run.tags
        and (run.tags.get("crism.study"), run.tags.get("crism.trial_number", run.run_id)) not in broken
        and math.isfinite(run.ranking)
    ]  # fmt: skip
    repeated = {run.tags.get("crism.study") for run in found if "seeds/mean" in run.metrics}
    return [run for run in found if run.tags.get("crism.study") not in repeated or "seeds/mean" in run.metrics]


class Tracker:
    """One experiment of one tracking store. A method returns when the store has what it was told."""

    def __init__(
        self,
        uri: str | None,
        experiment: str,
        *,
        create: bool = True,
        patience: float = 0.0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Raises TrackingError where the store cannot be reached, or (create=False) holds no such experiment:
        at once, it may be a wrong address. A store that goes away later is waited for: each call tries again
        until `patience` seconds have passed (math.inf: for ever); `say` hears when that begins and ends."""
        self.uri = uri or default_tracking_uri()
        self.patience = patience
        self.outage = Outage(self.uri, say, "trying again")
        path = sqlite_path(self.uri)
        if not create and path is not None and not path.is_file():
            raise TrackingError(f"{self.uri}: no such store yet; run a sweep first, e.g. sweeps/quickstart-unet.yaml")
        if patience:
            retry_ourselves()
        self.client = connect(self.uri)
        self.experiment = experiment
        with translated(self.uri), _migration_lock(self.uri):
            found = self.client.get_experiment_by_name(experiment)
            if found is None and create:
                found = self._create()
            if found is not None and create and found.lifecycle_stage == "active":
                dress(self.client, found)
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
        return without_secrets(self.uri)

    def delete(self, run_id: str) -> None:
        """Mark a run as deleted; MLflow can restore it until it is garbage-collected."""
        self._ask(lambda: self.client.delete_run(run_id))

    @property
    def pending(self) -> int:
        """How many updates wait for the store."""
        return 0

    def flush(self, within: float | None = None) -> None:
        """Wait until the store has everything, `within` so many seconds: here it always has."""

    @property
    def away_since(self) -> float | None:
        """Since when (time.time()) the store has not answered; None where it does."""
        return self.outage.since

    @contextmanager
    def buffered(self, folder: Path, say: Callable[[str], None] | None = None) -> Iterator[BufferedTracker]:
        """A tracker for one trial, whose updates never wait for the store: they lie in `folder`, which is the
        trial's own and outlives its process, until they are delivered. See BufferedTracker."""
        from crism_mlops.buffered import BufferedTracker

        with BufferedTracker(self, folder, say) as buffered:
            yield buffered

    def _ask(self, call: Callable[[], T]) -> T:
        """An operation that needs an answer."""

        def translated_call() -> T:
            with translated(self.uri):
                return call()

        return patiently(self.uri, translated_call, self.patience, self.outage)

    def _tell(self, op: dict[str, Any], payload: bytes | None = None) -> None:
        """An operation that needs none."""
        self._ask(lambda: self._send(op, payload))

    def _keep(self, op: dict[str, Any]) -> None:
        """An operation that needs none, of a thread that shall not hear what became of earlier ones."""
        self._tell(op)

    def _send(self, op: Mapping[str, Any], payload: bytes | None) -> None:
        """Tell MLflow. Of every operation the second time changes nothing."""
        send(self.client, op, payload)

    def _create(self) -> Any:
        from mlflow.exceptions import MlflowException

        folder = artifact_folder(self.uri, self.experiment)
        try:
            self.client.create_experiment(
                self.experiment,
                artifact_location=None if folder is None else folder.as_uri(),
                tags=wanted_tags(None, {}),
            )
        except MlflowException as error:
            # Of two processes at one server the other one was faster.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return self.client.get_experiment_by_name(self.experiment)

    def start(
        self,
        name: str,
        kind: Kind,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        parent: str | None = None,
        *,
        once: Sequence[str] = (),
    ) -> str:
        """Create a run; returns its id.

        `once` names the tags that identify it ("crism.kind" is one): where the experiment has a run with
        these, that is returned as it stands, with the parameters that it lacked.
        """
        every = {"crism.kind": kind, **tags}
        if parent is not None:
            every["mlflow.parentRunId"] = parent
        commit = git_commit()
        if commit is not None:
            every["mlflow.source.git.commit"] = commit
        every = {key: redacted(value) for key, value in every.items()}
        if self.patience and not once:
            # A server that goes away in mid-call may have made the run: the next attempt knows it by this.
            every[_REQUEST] = uuid.uuid4().hex
        keys = tuple(once) or ((_REQUEST,) if _REQUEST in every else ())
        tried = bool(once)

        def create() -> tuple[str, Mapping[str, str]]:
            nonlocal tried
            if tried and keys and (found := self._search({k: every[k] for k in keys})):
                return found[0].run_id, found[0].params
            tried = True
            return str(self.client.create_run(self.experiment_id, tags=every, run_name=name).info.run_id), {}

        run_id, known = self._ask(create)
        self.params(run_id, {k: v for k, v in params.items() if k not in known})
        return run_id

    def params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Log parameters; None becomes "none"."""
        texts = {k: ("none" if v is None else redacted(str(v)))[:_MAX_PARAM] for k, v in params.items()}
        if texts:
            self._tell({"op": "params", "run": run_id, "params": texts})

    def metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics, as of now."""
        self._tell(_metrics_now(run_id, metrics, step))

    def keep_metrics(self, run_id: str, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics from another thread than the trial's."""
        self._keep(_metrics_now(run_id, metrics, step))

    def tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self._tell({"op": "tags", "run": run_id, "tags": {k: redacted(str(v)) for k, v in tags.items()}})

    def data(self, run_id: str, sets: Sequence[DataSet]) -> None:
        """Tell what data sets a run uses."""
        self._tell({"op": "inputs", "run": run_id, "sets": [asdict(one) for one in sets]})

    def scored(self, run_id: str, model_id: str, sets: Mapping[str, DataSet]) -> None:
        """Give a logged model the run's last figures: those named in `sets`, or that begin with "NAME/", as figures
        on that data set."""
        data = {name: [one.name, one.digest] for name, one in sets.items()}
        self._tell({"op": "scored", "run": run_id, "model": model_id, "sets": data})

    def text(self, run_id: str, text: str, file: str) -> None:
        """Log a text artifact; passwords in it are hidden."""
        self._tell_file(run_id, redacted(text).encode(), file)

    def content(self, run_id: str, content: bytes, file: str) -> None:
        """Log a file's content as an artifact, as it is: texts go through `text`."""
        self._tell_file(run_id, content, file)

    def figure(self, run_id: str, figure: Any, file: str) -> None:
        """Log a matplotlib figure as a picture; a PNG of 256 colours, half as large as matplotlib's."""
        picture = io.BytesIO()
        kind = PurePosixPath(file).suffix[1:]
        figure.savefig(picture, format=kind)
        content = picture.getvalue()
        self._tell_file(run_id, few_colours(content) if kind == "png" else content, file)

    def image(self, run_id: str, picture: bytes, key: str, step: int) -> None:
        """Log a PNG as the run's image `key` at a step: MLflow's UI shows these with a slider for the step. The
        first one of a key and step stays: a trial that goes on has each once."""
        now = int(time.time() * 1000)
        self._tell({"op": "image", "run": run_id, "key": key, "step": int(step), "time": now}, picture)

    def table(self, run_id: str, rows: Any, file: str) -> None:
        """Log rows (dicts) as a table, that MLflow's UI shows, in place of an earlier one: .json, numbers with six
        digits, or .parquet, exact.

        (MLflow's own log_table appends to that: a trial that goes on would have each row twice.)
        """
        import pandas

        frame = pandas.DataFrame(list(rows))
        if file.endswith(".parquet"):
            buffer = io.BytesIO()
            # Tables of few rows and many columns: what parquet says of each column is longer than the column.
            frame.to_parquet(
                buffer, index=False, engine="pyarrow", compression="zstd", use_dictionary=False, write_statistics=False,
                store_schema=False,
            )  # fmt: skip
            content = buffer.getvalue()
        else:
            frame = frame.map(_six_digits)
            content = frame.to_json(orient="split", index=False, date_format="iso").encode()
        self._tell_file(run_id, content, file, table=True)

    def _tell_file(self, run_id: str, content: bytes, file: str, table: bool = False) -> None:
        self._tell({"op": "file", "run": run_id, "file": file, "table": table}, content)

    def note_test_reading(self, run_id: str, reason: str, test_digest: str) -> None:
        """Count a reading of the test set on the experiment: with time, run, reason and the set's digest."""
        entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "run": run_id, "reason": reason,
                 "test_digest": test_digest}  # fmt: skip
        # A key of its own, so that two at once do not count as one, and one that is told twice does.
        key = f"{_READING}{uuid.uuid4().hex}"
        self._ask(lambda: self.client.set_experiment_tag(self.experiment_id, key, json.dumps(entry)))

    def test_readings(self) -> list[dict[str, str]]:
        """Every reading of a test set in the experiment, oldest first: time, run, reason, test_digest."""
        tags = self._ask(lambda: self.client.get_experiment(self.experiment_id).tags)
        found = [json.loads(value) for key, value in tags.items() if key.startswith(_READING)]
        return sorted(found, key=lambda entry: str(entry["time"]))

    def files(self, run_id: str, folder: str | None = None) -> list[str]:
        """Artifacts of a run that lie in a folder of it, by their whole names."""
        return [item.path for item in self._ask(lambda: self.client.list_artifacts(run_id, folder))]

    def read(self, run_id: str, file: str) -> bytes:
        """The content of an artifact. Raises TrackingError where the run has none of that name."""
        within = str(PurePosixPath(file).parent)
        if file not in self.files(run_id, None if within == "." else within):
            raise TrackingError(f"run {run_id} has no {file}; it did not finish, or is of an older version")

        def read() -> bytes:
            with tempfile.TemporaryDirectory() as folder:
                return Path(self.client.download_artifacts(run_id, file, folder)).read_bytes()

        return self._ask(read)

    def read_table(self, run_id: str, file: str) -> list[dict[str, Any]]:
        """The rows of a parquet table that a run logged (JSON would round them). Raises TrackingError where it
        logged none."""
        import pandas

        content = self.read(run_id, file)
        try:
            rows = pandas.read_parquet(io.BytesIO(content)).to_dict("records")
        except (ValueError, OSError) as error:
            raise TrackingError(f"run {run_id}: {file} is damaged ({one_line(error)})") from error
        return [{str(key): value for key, value in row.items()} for row in rows]

    def model(self, run_id: str, checkpoint: Path, metadata: Mapping[str, Any], channels: int) -> str:
        """Log a checkpoint folder as a logged model (models from code, no pickle); returns its model id.

        A model of this run with the same bytes, metadata and channels is not logged twice: where an attempt
        that got no answer has left a whole one, that is it.
        """
        from crism_mlops.tracking_model import log_model, model_digest

        digest = model_digest(checkpoint, metadata, channels)
        where = (self.client, self.uri, self.experiment_id)
        return self._ask(lambda: log_model(*where, run_id, checkpoint, metadata, channels, digest))

    def end(self, run_id: str, status: Status) -> None:
        """Give a run its final status."""
        self._ask(lambda: self.client.set_terminated(run_id, status=status))

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

        def reopen() -> None:
            for tag in {"crism.stopped", "crism.why"} & set(self.client.get_run(run_id).data.tags):
                self.client.delete_tag(run_id, tag)
            self.client.update_run(run_id, status="RUNNING")

        self._ask(reopen)

    def find(self, **tags: str) -> list[RunInfo]:
        """Runs of the experiment that carry all of these tags (`crism_kind` means crism.kind), oldest first."""
        return self._ask(lambda: self._search({k.replace("_", ".", 1): v for k, v in tags.items()}))

    def _search(self, tags: Mapping[str, str]) -> list[RunInfo]:
        if any("'" in v for v in tags.values()):
            return []  # MLflow's filter cannot say it, and no tag of ours holds a quote.
        terms = " and ".join(f"tags.`{k}` = '{v}'" for k, v in tags.items())
        runs: list[RunInfo] = []
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment_id], terms, order_by=["attributes.start_time ASC"], page_token=token
            )
            runs += [_info(r) for r in page]
            token = page.token
            if not token:
                return runs

    def run(self, run_id: str) -> RunInfo:
        """One run by its id."""
        return _info(self._ask(lambda: self.client.get_run(run_id)))

    def run_of_model(self, model: str) -> str:
        """The run that made models:/NAME@ALIAS, models:/NAME/VERSION or models:/ID. Raises TrackingError."""
        name, at, alias = model.removeprefix("models:/").partition("@")
        if at:
            version = self._ask(lambda: self.client.get_model_version_by_alias(name, alias))
        elif "/" in name:
            name, _, number = name.partition("/")
            version = self._ask(lambda: self.client.get_model_version(name, number))
        else:
            return str(self._ask(lambda: self.client.get_logged_model(name)).source_run_id)
        return str(version.tags.get("crism.run_id") or version.run_id)

    def ui_path(self) -> str:
        """Where the experiment's runs are seen, from the address of MLflow's UI on."""
        tags = self._ask(lambda: self.client.get_experiment(self.experiment_id).tags)
        return experiment_path(self.experiment_id, tags)

    def ui_url(self) -> str | None:
        """Where the experiment's runs are seen, if the store is a server."""
        return shown(self.uri).rstrip("/") + self.ui_path() if self.uri.startswith("http") else None


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


def _metrics_now(run_id: str, metrics: Mapping[str, float], step: int) -> dict[str, Any]:
    now = int(time.time() * 1000)
    rows = [[key, float(value), now, int(step)] for key, value in metrics.items()]
    return {"op": "metrics", "run": run_id, "metrics": rows}


def _six_digits(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _info(run: Any) -> RunInfo:
    return RunInfo(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        status=run.info.status,
        tags=dict(run.data.tags),
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
        started=(run.info.start_time or 0) / 1000.0,
    )


def flat_json(content: Any) -> str:
    """JSON text for an artifact."""
    return json.dumps(content, indent=2, sort_keys=True, default=str) + "\n"
