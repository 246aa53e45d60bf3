"""All that is known of a study, read from MLflow and, where it can be had, from the search database."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna

from crism_mlops.config import SweepConfig, error_sign, override_sweep
from crism_mlops.config_text import read_yaml
from crism_mlops.errors import CrismError, StudyError, TrackingAwayError, TrackingError, one_line
from crism_mlops.studies.ledger import own
from crism_mlops.studies.overview import stored_sweep
from crism_mlops.studies.storage import SearchStore, load_study, open_store
from crism_mlops.studies.trial import TOKEN
from crism_mlops.tracking import (
    INFEASIBLE,
    REPEAT_OF,
    RunInfo,
    Tracker,
    contenders,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

TOKEN_TAG = "crism.study_token"
# Params of a study's run that say what its test figures are of.
_SAME_TEST = ("test_digest", "data.target", "data.target_normalization")
_STATES = {"FINISHED": "finished", "FAILED": "failed", "RUNNING": "running"}


@dataclass(frozen=True, slots=True)
class StudyRecord:
    """One study. trials: its own, by number; repeats: those with other seeds; floors and ceilings: finished ones,
    once each. search, sweep: Optuna's study and the resolved study file, None where nobody has them; without_file: why
    there is no file. lacking: what is missing, a sentence each."""

    name: str
    experiment: str
    parent: RunInfo | None
    trials: tuple[RunInfo, ...]
    repeats: tuple[RunInfo, ...]
    floors: tuple[RunInfo, ...]
    ceilings: tuple[RunInfo, ...]
    search: optuna.Study | None
    sweep: SweepConfig | None
    lacking: tuple[str, ...]
    without_file: str = ""

    @property
    def objectives(self) -> tuple[str, ...]:
        """The figures that the search looked at."""
        if self.sweep is not None:
            return tuple(self.sweep.objective.metrics)
        if self.search is not None and (known := self.search.user_attrs.get("crism.metrics")):
            return tuple(map(str, known))
        return ("val/rmse" if self.parent is None else self.parent.tags.get("crism.objective", "val/rmse"),)

    @property
    def objective(self) -> str:
        """The first of them, by which trials are ranked."""
        return self.objectives[0]

    @property
    def model(self) -> str:
        """unet or instruct_pix2pix; "" where no run says it."""
        return next((r.tags["crism.model"] for r in (self.parent, *self.trials) if r and "crism.model" in r.tags), "")

    @property
    def ranked(self) -> list[RunInfo]:
        """The trials that can be the best, the best first."""
        sign = error_sign(self.objective)
        return sorted(contenders(self.trials), key=lambda r: sign * r.ranking)

    @property
    def best(self) -> RunInfo | None:
        """The best trial."""
        return next(iter(self.ranked), None)

    @property
    def counts(self) -> dict[str, int]:
        """Trials by state."""
        states = [state_of(r) for r in self.trials]
        return {state: states.count(state) for state in sorted(set(states))}

    def floors_of(self, run: RunInfo) -> list[RunInfo]:
        """The floors of a trial's own scenes and input, the best (by RMSE of the balanced test set) first."""
        same = {f.name: f for f in self.floors if _alike(f, run)}.values()
        return sorted(same, key=lambda f: f.metrics.get("test/rmse", float("inf")))


def _alike(one: RunInfo, other: RunInfo) -> bool:
    """Whether two runs saw the same scenes and input; of runs without a digest, of older versions, the same kind of
    input."""
    digests = [r.params.get("inputs_digest") for r in (one, other)]
    if all(digests):
        return digests[0] == digests[1]
    kinds = [[r.params.get(f"data.{k}", r.tags.get(f"crism.{k}")) for k in ("variant", "normalization")]
             for r in (one, other)]  # fmt: skip
    return kinds[0] == kinds[1]


def state_of(run: RunInfo) -> str:
    """finished, infeasible, pruned, interrupted, cancelled, failed, running or killed."""
    state = _STATES.get(run.status) or run.tags.get("crism.stopped", "killed")
    return "infeasible" if state == "finished" and INFEASIBLE in run.tags else state


def trial_number(run: RunInfo) -> int:
    """A trial's number; -1 of what is none."""
    return int(run.tags.get("crism.trial_number", "-1"))


def study_names(tracker: Tracker) -> list[str]:
    """Names of the studies of an experiment, oldest first; also of those whose own run was deleted."""
    runs = [*tracker.find(crism_kind="study"), *tracker.find(crism_kind="trial")]
    return list(dict.fromkeys(r.tags["crism.study"] for r in runs if "crism.study" in r.tags))


def read_study(tracker: Tracker, name: str, store: SearchStore | None) -> StudyRecord:
    """Read a study. What MLflow or the search database lacks is named in `lacking`; raises StudyError where
    neither knows the study."""
    runs = tracker.find(crism_study=name)
    search = None
    lacking = []
    if store is not None:
        try:
            search = load_study(store, name)
        except StudyError:
            lacking.append(f"The search database {store.shown} does not hold {name}: figures of the search come from "
                           "MLflow, as far as it has them.")  # fmt: skip
    named = tracker.experiment if search is None else search.user_attrs.get("crism.experiment", tracker.experiment)
    if named != tracker.experiment:
        search = None
        lacking.append(f"The search database's {name} is of experiment {named!r}: it is left out.")
    if not runs and search is None:
        raise StudyError(
            f"no study {name!r} in experiment {tracker.experiment!r}; it holds "
            f"{', '.join(study_names(tracker)) or 'none'}"
        )
    parent = next((r for r in reversed(runs) if r.kind == "study"), None)
    if parent is None:
        lacking.append("The study's own run is missing (deleted in MLflow?): its audit, file and surroundings are "
                       "not to be had.")  # fmt: skip
    every = [r for r in runs if r.kind == "trial"]
    trials = sorted(_of_one_study(every, search), key=trial_number)
    if others := len(every) - len(trials):
        lacking.append(f"{others} trials are of an earlier study of that name: they are left out.")
    sweep, without_file = _sweep(tracker, parent, search)
    lacking += _gaps(search, {trial_number(r) for r in trials})
    return StudyRecord(
        name,
        tracker.experiment,
        parent,
        tuple(r for r in trials if REPEAT_OF not in r.tags),
        tuple(r for r in trials if REPEAT_OF in r.tags),
        _latest(runs, "floor"),
        _latest(runs, "ceiling"),
        search,
        sweep,
        tuple(lacking),
        without_file,
    )


def _of_one_study(trials: Sequence[RunInfo], search: optuna.Study | None) -> list[RunInfo]:
    """The trials of the study that stands in the search database, or of the latest one: another one may have had its
    name before. Those of older versions do not say."""
    tokens = [r.tags[TOKEN_TAG] for r in trials if TOKEN_TAG in r.tags]
    wanted = (None if search is None else search.user_attrs.get(TOKEN)) or (tokens[-1] if tokens else None)
    return [r for r in trials if r.tags.get(TOKEN_TAG, wanted) == wanted]


def _gaps(search: optuna.Study | None, known: set[int]) -> list[str]:
    """Trials that were begun and have no run any more."""
    if search is None:
        return []
    begun = [t for t in search.get_trials(deepcopy=False) if "crism.run_id" in t.user_attrs and own(t)]
    gone = [t.number for t in begun if t.number not in known]
    if not gone:
        return []
    numbers = ", ".join(map(str, gone[:8])) + (", ..." if len(gone) > 8 else "")
    return [f"{len(gone)} of {len(begun)} trials have no run in MLflow (deleted?): {numbers}."]


def _latest(runs: Sequence[RunInfo], kind: str) -> tuple[RunInfo, ...]:
    """Finished runs of a kind, of several of one name and input the last."""
    found = {(r.name, r.params.get("inputs_digest")): r for r in runs if r.kind == kind and r.status == "FINISHED"}
    return tuple(found.values())


def _sweep(tracker: Tracker, parent: RunInfo | None, search: optuna.Study | None) -> tuple[SweepConfig | None, str]:
    """The resolved study file, from the search database or from the study's run, or why neither has it."""
    why = "neither the search database nor a run in MLflow holds it"
    if search is not None:
        try:
            return stored_sweep(search), ""
        except CrismError as error:
            why = one_line(error)
    if parent is not None:
        try:
            return override_sweep(read_yaml(tracker.read(parent.run_id, "study.yaml").decode())), ""
        except (CrismError, ValueError) as error:
            why = one_line(error)
    return None, why


def best_unet(tracker: Tracker, record: StudyRecord) -> RunInfo | None:
    """The best U-Net of the experiment's studies of the same test scenes, target and objective, by that objective."""
    if record.parent is None:
        return None
    grounds = [record.parent.params.get(key) for key in (*_SAME_TEST, "objective")]
    best = []
    for study in tracker.find(crism_kind="study", crism_model="unet"):
        if [study.params.get(key) for key in (*_SAME_TEST, "objective")] == grounds:
            found = read_study(tracker, study.tags.get("crism.study", study.name), None).best
            best += [] if found is None else [found]
    return min(best, key=lambda r: error_sign(record.objective) * r.ranking, default=None)


def read_json(tracker: Tracker, run: RunInfo | None, file: str) -> tuple[Any, str]:
    """A JSON artifact's content and "", or None and why it cannot be had. Raises TrackingAwayError."""
    if run is None:
        return None, "the study's own run is missing"
    try:
        return json.loads(tracker.read(run.run_id, file)), ""
    except TrackingAwayError:
        raise
    except (TrackingError, ValueError, RecursionError) as error:
        return None, f"{file} of {run.name} cannot be read: {one_line(error)}"


def searched_keys(record: StudyRecord) -> list[str]:
    """The keys that the study searched over; without its file, the settings in which its trials differ."""
    if record.sweep is not None:
        return list(record.sweep.search)
    values: Mapping[str, set[str]] = {
        key: {r.params.get(key, "") for r in record.trials}
        for key in sorted({k for r in record.trials for k in r.params if k.split(".")[0] in ("data", "train", "model")})
    }
    return [key for key, found in values.items() if len(found) > 1]


def tracker_of(tracking_uri: str | None, experiment: str | None, study: str | None, storage: str | None) -> Tracker:
    """The tracker of an experiment; of that which a study names in the search database, or crism, where none is named.

    Raises TrackingError where there is no such store or experiment, StudyError for a study that nobody knows.
    """
    store = None if experiment or study is None else _search_database(storage)
    found = None
    unknown: StudyError | None = None
    if store is not None and study is not None:
        try:
            found = load_study(store, study).user_attrs.get("crism.experiment")
        except StudyError as error:
            unknown = error
    try:
        return Tracker(tracking_uri, experiment or found or "crism", create=False)
    except TrackingError:
        if unknown is None:
            raise
        # Not of that experiment, which nobody named, but of a study whose name is not right.
        raise unknown from None


def _search_database(storage: str | None) -> SearchStore | None:
    try:
        return open_store(storage, 0.0, create=False)
    except StudyError:
        return None  # MLflow alone tells as well, if the experiment is the default one.


def search_store(storage: str | None) -> tuple[SearchStore | None, str]:
    """The search database, or None and why it cannot be had. Raises StudyError for one that was asked for."""
    try:
        return open_store(storage, 0.0, create=False), ""
    except StudyError as error:
        if storage is not None:
            raise
        return None, str(error)
