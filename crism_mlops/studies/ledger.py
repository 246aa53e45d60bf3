"""Who works on which trial: leases and slots of a study's total, in the search database beside Optuna's tables.

Optuna knows which trials run, not who runs them. A worker is a row here: it beats, and while it beats what it holds
is its own. All that could go wrong with two at once is decided under one lock a study: there, a trial that runs
and that no living worker holds is an orphan, without doubt, and the next one who asks gets it.

Every public method takes and gives plain JSON, so that it can be called through `studies.proxy` as well.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.trial import FrozenTrial, TrialState, create_trial

from crism_mlops.errors import StudyError
from crism_mlops.studies.processes import machine, process_lives

COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)
ATTEMPTS = "crism.attempts"  # on a trial: who ran it from when until when, and how that ended
STATE = "crism.state"  # on a trial: what Optuna's state does not tell (interrupted, failed, cancelled)
INDEX = "crism.index"  # on a trial: how many-th draw of the sampler it is
QUEUED = "crism.queued"  # on a trial: the entry of the queue that it is
COPIED = "crism.copied_from"  # on a trial: it was run in another study, and counts nowhere
REPEAT = "crism.repeat_of"  # on a trial: the trial whose settings it runs with another seed
PREPARING = -1  # held instead of a trial: the study's floors are being computed

_tables = sa.MetaData()
_workers = sa.Table(
    "crism_workers",
    _tables,
    sa.Column("worker", sa.String(64), primary_key=True),
    sa.Column("study", sa.String(512), nullable=False, index=True),
    sa.Column("machine", sa.String(512), nullable=False),
    sa.Column("process", sa.String(64), nullable=False),
    sa.Column("gpus", sa.Float(53), nullable=False),
    sa.Column("group", sa.String(64), nullable=False),
    sa.Column("joined", sa.Float(53), nullable=False),
    sa.Column("seen", sa.Float(53), nullable=False),
    sa.Column("expires", sa.Float(53), nullable=False),
    sa.Column("trial", sa.Integer, nullable=True),
    sa.Column("doing", sa.Text, nullable=False),
)
_controls = sa.Table(
    "crism_controls",
    _tables,
    sa.Column("study", sa.String(512), primary_key=True),
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
    sa.Column("since", sa.Float(53), nullable=False),
)


class Ledger:
    """Leases and controls in one SQLite or PostgreSQL database; `storage` is Optuna's over the same one."""

    def __init__(self, url: str, storage: optuna.storages.BaseStorage) -> None:
        self.url = url
        self.storage = storage
        self.file = sqlite_file(url)
        # Nothing is kept open: a worker beats a few times a minute, and a server's connections are few.
        options = {} if self.file is None else {"connect_args": {"timeout": 60}}
        self.engine = sa.create_engine(url, poolclass=sa.NullPool, **options)
        self._identities: dict[str, int] = {}

    def lay_out(self) -> None:
        """Make the tables where there are none; under `database_lock`."""
        _tables.create_all(self.engine)

    # -- a worker's life

    def join(
        self, study: str, worker: str, machine: str, process: str, lease: float, gpus: float = 0.0,
        group: str = "",
    ) -> None:  # fmt: skip
        """A worker begins, with so many GPUs; it holds nothing, not even what it held before. `group` names the
        call that started it."""
        with self.engine.begin() as connection:
            now = self._now(connection)
            # A second time where the answer to the first was lost.
            connection.execute(sa.delete(_workers).where(_workers.c.worker == worker))
            connection.execute(
                sa.insert(_workers).values(
                    worker=worker, study=study, machine=machine, process=process, gpus=gpus, group=group,
                    joined=now, seen=now, expires=now + lease, trial=None, doing="{}",
                )
            )  # fmt: skip

    def beat(self, study: str, worker: str, lease: float, doing: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A worker lives: its lease is prolonged. `alive` is False where it was given up for dead: what it held is
        another's. Gives the study's controls as well."""
        with self.engine.begin() as connection:
            now = self._now(connection)
            values: dict[str, Any] = {"seen": now, "expires": now + lease, "joined": _joined(now)}
            if doing is not None:
                values["doing"] = json.dumps(doing)
            changed = connection.execute(sa.update(_workers).where(_workers.c.worker == worker).values(values))
            controls = self._controls(connection, study)
            return {"alive": changed.rowcount == 1, "now": now, "controls": controls}

    def leave(self, worker: str) -> None:
        """A worker ends; what it held is an orphan."""
        with self.engine.begin() as connection:
            connection.execute(sa.delete(_workers).where(_workers.c.worker == worker))

    def free(self, worker: str) -> bool:
        """What a worker held has ended, or is not its own any more (False)."""
        with self.engine.begin() as connection:
            return self._hold(connection, worker, None)

    def give_back(self, study: str, worker: str, number: int) -> bool:
        """A trial that its worker stops in the midst of waits for whoever goes on with it; False where it is
        another's by now, or has ended."""
        with self._critical(study) as connection:
            row = connection.execute(sa.select(_workers).where(_workers.c.worker == worker)).mappings().first()
            if row is None or row["trial"] != number:
                return False
            trial = self._trial(study, number)
            if trial.state == TrialState.RUNNING:
                self._put(trial, TrialState.WAITING, {STATE: "interrupted"}, self._now(connection))
            self._hold(connection, worker, None)
            return trial.state == TrialState.RUNNING

    def settle(
        self, study: str, number: int, state: str, attributes: Mapping[str, str],
        values: Sequence[float] | None = None,
    ) -> bool:  # fmt: skip
        """Let a trial that nobody runs wait, or end as its run in MLflow did; False where somebody runs it by now,
        or it has ended. `state` is the name of Optuna's."""
        with self._critical(study) as connection:
            held = sa.and_(_workers.c.study == study, _workers.c.trial == number)
            rows = connection.execute(sa.select(_workers).where(held)).mappings().all()
            trial, now = self._trial(study, number), self._now(connection)
            if trial.state.is_finished() or any(not self._dead(row, now) for row in rows):
                return False
            # Should one live after all, it finds itself given up for dead, and writes nothing more.
            connection.execute(sa.delete(_workers).where(held))
            self._put(trial, TrialState[state], attributes, max((row["seen"] for row in rows), default=None), values)
            return True

    def workers(self, study: str) -> list[dict[str, Any]]:
        """Living workers of a study: worker, machine, process, joined, seen, trial, doing; the first to join first."""
        with self.engine.connect() as connection:
            now = self._now(connection)
            rows = connection.execute(
                sa.select(_workers).where(_workers.c.study == study).order_by(_workers.c.joined)
            ).mappings().all()  # fmt: skip
        living = [dict(row) for row in rows if not self._dead(row, now)]
        return [{**row, "doing": json.loads(row["doing"]), "age": now - row["seen"]} for row in living]

    # -- what is to be done

    def claim(
        self, study: str, worker: str, total: int, begin: bool = True, draws: int | None = None
    ) -> dict[str, Any]:  # fmt: skip
        """What a worker does next, decided under the study's lock. `what` is

        - "again", "waiting" or "new", with `trial` (id), `number`: it is now held by the worker, and runs. One
          that a dead worker left goes first, then one that waits (interrupted, or enqueued), then a new one;
        - "later": nothing is free, but what runs may yet fail; "done": the total is reached;
        - "lost": the worker was given up for dead and has to join again.

        With `begin` False only what dead workers left is given. `draws` limits how many new trials there may be,
        failed ones too: the points of a grid.
        """
        with self._critical(study) as connection:
            if not self._refresh(connection, worker):
                return {"what": "lost"}
            # Who holds what before what runs: a trial ends first, and is let go of then.
            held, dead = self._bury(connection, study, worker)
            identity = self._identity(study)
            trials = self.storage.get_all_trials(identity, deepcopy=False)
            self._lost(trials, dead)
            running = [t for t in trials if t.state == TrialState.RUNNING]
            orphan = next((t for t in running if t.number not in held), None)
            if orphan is not None:
                return self._take(connection, worker, self.storage.get_trial(orphan._trial_id), "again")
            if not begin:
                return {"what": "later" if running else "done"}
            counted = sum(t.state in COUNTED and own(t) for t in trials)
            room = total - counted - sum(own(t) for t in running)
            for trial in trials:
                if trial.state == TrialState.WAITING and (room > 0 or REPEAT in trial.user_attrs):
                    self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
                    return self._take(connection, worker, trial, "waiting")
            index = sum(INDEX in t.user_attrs for t in trials)
            if room > 0 and (draws is None or index < draws):
                # Whole at once: a worker that dies here leaves an orphan that knows its place.
                template = create_trial(state=TrialState.RUNNING, user_attrs={INDEX: index})
                made = self.storage.create_new_trial(identity, template)
                return self._take(connection, worker, self.storage.get_trial(made), "new")
            return {"what": "later" if running else "done"}

    def prepare(self, study: str, worker: str) -> bool:
        """Whether this worker is the one that prepares the study now; it holds that until `free`."""
        with self._critical(study) as connection:
            if not self._refresh(connection, worker):
                return False
            held, dead = self._bury(connection, study, worker)
            self._lost(self.storage.get_all_trials(self._identity(study), deepcopy=False), dead)
            if PREPARING in held:
                return False
            self._hold(connection, worker, PREPARING)
            return True

    def enqueue(self, study: str, entries: Sequence[Mapping[str, Any]]) -> int:
        """Add trials to the queue, each once: `key` names an entry for ever, `params` are its settings, `attributes`
        go with it. Returns how many were new."""
        with self._critical(study):
            identity = self._identity(study)
            known = {t.user_attrs.get(QUEUED) for t in self.storage.get_all_trials(identity, deepcopy=False)}
            new = [entry for entry in entries if entry["key"] not in known]
            for entry in new:
                template = create_trial(
                    state=TrialState.WAITING,
                    user_attrs={QUEUED: entry["key"], **entry.get("attributes", {})},
                    system_attrs={"fixed_params": dict(entry["params"])},
                )
                self.storage.create_new_trial(identity, template)
            return len(new)

    # -- what others want

    def control(self, study: str, name: str, value: str | None) -> None:
        """Set a control (`run`: pause, stop, ...; `cancel:NUMBER`), or take it away."""
        with self._critical(study) as connection:
            self._set_control(connection, study, name, value)

    def controls(self, study: str) -> dict[str, Any]:
        """All controls of a study: value and since when (seconds since 1970)."""
        with self.engine.connect() as connection:
            return self._controls(connection, study)

    def cancel(self, study: str, number: int) -> str:
        """Give a trial up: at once where nobody runs it ("cancelled"), else by its worker ("asked"); "ended" where
        it has ended."""
        with self._critical(study) as connection:
            held, dead = self._bury(connection, study, "")
            trials = self.storage.get_all_trials(self._identity(study), deepcopy=False)
            self._lost(trials, dead)
            trial = next((t for t in trials if t.number == number), None)
            if trial is None:
                raise StudyError(f"study {study!r} has no trial {number}; it has {len(trials)}, counted from 0")
            if trial.state.is_finished():
                return "ended"
            if trial.state == TrialState.RUNNING and number in held:
                self._set_control(connection, study, f"cancel:{number}", "yes")
                return "asked"
            self._put(self.storage.get_trial(trial._trial_id), TrialState.FAIL, {STATE: "cancelled"})
            return "cancelled"

    # -- within

    def _take(self, connection: sa.Connection, worker: str, trial: FrozenTrial, what: str) -> dict[str, Any]:
        self._hold(connection, worker, trial.number)
        row = connection.execute(sa.select(_workers).where(_workers.c.worker == worker)).mappings().one()
        attempts = trial.user_attrs.get(ATTEMPTS, [])
        running = bool(attempts) and attempts[-1]["ended"] is None
        if not running or attempts[-1]["worker"] != worker[:8]:  # else it asks again: our answer was lost
            if running:
                attempts = [*attempts[:-1], _ended(attempts[-1], "lost", None)]
            begun = {
                "worker": worker[:8], "host": row["machine"].partition("/")[0], "gpus": row["gpus"],
                "began": self._now(connection), "ended": None,
            }  # fmt: skip
            self.storage.set_trial_user_attr(trial._trial_id, ATTEMPTS, [*attempts, begun])
        return {"what": what, "trial": trial._trial_id, "number": trial.number}

    def _hold(self, connection: sa.Connection, worker: str, trial: int | None) -> bool:
        done = connection.execute(sa.update(_workers).where(_workers.c.worker == worker).values(trial=trial))
        return done.rowcount == 1

    def _trial(self, study: str, number: int) -> FrozenTrial:
        identity = self._identity(study)
        return self.storage.get_trial(self.storage.get_trial_id_from_study_id_trial_number(identity, number))

    def _put(
        self, trial: FrozenTrial, state: TrialState, attributes: Mapping[str, str], when: float | None = None,
        values: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        for key, value in attributes.items():
            self.storage.set_trial_user_attr(trial._trial_id, key, value)
        end_attempt(self.storage, trial, attributes[STATE], when)
        self.storage.set_trial_state_values(trial._trial_id, state, values)

    def _set_control(self, connection: sa.Connection, study: str, name: str, value: str | None) -> None:
        connection.execute(sa.delete(_controls).where(_controls.c.study == study, _controls.c.name == name))
        if value is not None:
            now = self._now(connection)
            connection.execute(sa.insert(_controls).values(study=study, name=name, value=value, since=now))

    def _refresh(self, connection: sa.Connection, worker: str) -> bool:
        """Whether a worker's row still stands; asking is a sign of life."""
        now = self._now(connection)
        lease = _workers.c.expires - _workers.c.seen
        values = {"seen": now, "expires": now + lease, "joined": _joined(now)}
        done = connection.execute(sa.update(_workers).where(_workers.c.worker == worker).values(values))
        return done.rowcount == 1

    def _bury(self, connection: sa.Connection, study: str, worker: str) -> tuple[set[int], list[Mapping[Any, Any]]]:
        """Remove dead workers; returns what the living ones hold, the asking one left out, and who was removed."""
        now = self._now(connection)
        rows = connection.execute(sa.select(_workers).where(_workers.c.study == study)).mappings().all()
        mine = next((row for row in rows if row["worker"] == worker), None)
        # After an outage of the database everybody is late; those who live have some beats' time to say so.
        # Who is no worker cannot tell.
        late = mine is not None and now - mine["joined"] > (mine["expires"] - mine["seen"]) / 2
        dead: list[Mapping[Any, Any]] = [
            row for row in rows if row["worker"] != worker and self._dead(row, now, by_time=late)
        ]
        if dead:
            connection.execute(sa.delete(_workers).where(_workers.c.worker.in_([row["worker"] for row in dead])))
        gone = {row["worker"] for row in dead} | {worker}
        return {row["trial"] for row in rows if row["worker"] not in gone and row["trial"] is not None}, dead

    def _lost(self, trials: Sequence[FrozenTrial], dead: Sequence[Mapping[Any, Any]]) -> None:
        """Note on the trials of dead workers how their attempts ended."""
        by_number = {t.number: t for t in trials}
        for row in dead:
            trial = by_number.get(row["trial"])
            if trial is not None and not trial.state.is_finished():
                end_attempt(self.storage, trial, "lost", row["seen"])

    def _identity(self, study: str) -> int:
        if study not in self._identities:
            self._identities[study] = self.storage.get_study_id_from_name(study)
        return self._identities[study]

    def _dead(self, row: Mapping[Any, Any], now: float, by_time: bool = True) -> bool:
        if row["machine"] == machine():
            # A process of this machine that is stopped, not dead, is late as one elsewhere would be.
            return not process_lives(row["process"]) or (by_time and row["expires"] < now)
        return bool(by_time and row["expires"] < now)

    def _controls(self, connection: sa.Connection, study: str) -> dict[str, Any]:
        rows = connection.execute(sa.select(_controls).where(_controls.c.study == study)).mappings().all()
        return {row["name"]: {"value": row["value"], "since": row["since"]} for row in rows}

    def _now(self, connection: sa.Connection) -> float:
        """The database's clock: those of many machines differ. SQLite is on this one."""
        if self.file is not None:
            return time.time()
        return float(connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())

    def _critical(self, study: str) -> AbstractContextManager[sa.Connection]:
        return database_lock(self.engine, self.file, study)


@contextmanager
def database_lock(engine: sa.Engine, file: Path | None, name: str) -> Iterator[sa.Connection]:
    """One at a time, over all processes that use a database; falls when its holder dies. Gives a connection, each
    statement on which stands for itself: in a transaction of ours, Optuna's own connections would wait for it.
    """
    if file is not None:
        from filelock import FileLock

        # One file for all studies: they write to one database, and that takes one writer at a time.
        with FileLock(f"{file}.lock", poll_interval=0.005), _autocommit(engine) as connection:
            yield connection
        return
    key = blake2b(f"crism/{name}".encode(), digest_size=8).digest()
    number = int.from_bytes(key, "big", signed=True)
    with _autocommit(engine) as connection:
        # A session's lock falls with its connection, and none is pooled: so whatever happens it is let go of.
        connection.execute(sa.text("SELECT pg_advisory_lock(:number)"), {"number": number})
        try:
            yield connection
        finally:
            connection.execute(sa.text("SELECT pg_advisory_unlock(:number)"), {"number": number})


@contextmanager
def _autocommit(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as connection:
        yield connection.execution_options(isolation_level="AUTOCOMMIT")


def _joined(now: float) -> Any:
    """When a worker joined. One that was out of touch for half its lease begins anew: so perhaps were all, and for
    as long again it buries nobody for being late."""
    silent = now - _workers.c.seen > (_workers.c.expires - _workers.c.seen) / 2
    return sa.case((silent, now), else_=_workers.c.joined)


def own(trial: FrozenTrial) -> bool:
    """Whether a trial counts towards its study's total: it was neither copied nor is it a repetition."""
    return COPIED not in trial.user_attrs and REPEAT not in trial.user_attrs


def end_attempt(storage: optuna.storages.BaseStorage, trial: FrozenTrial, how: str, when: float | None) -> None:
    """Note on a trial how its running attempt ended, and when; None where nobody knows."""
    attempts = trial.user_attrs.get(ATTEMPTS, [])
    if attempts and attempts[-1]["ended"] is None:
        ended = _ended(attempts[-1], how, when)
        storage.set_trial_user_attr(trial._trial_id, ATTEMPTS, [*attempts[:-1], ended])


def _ended(attempt: Mapping[str, Any], how: str, when: float | None) -> dict[str, Any]:
    # That it took no time is the only claim that needs no witness.
    return {**attempt, "ended": attempt["began"] if when is None else when, "how": how}


def sqlite_file(url: str) -> Path | None:
    """The file of a SQLite URL, absolute; None for other databases."""
    if not url.startswith("sqlite"):
        return None
    database = sa.make_url(url).database
    if not database or database == ":memory:":
        raise StudyError(
            f"{url}: a study in memory is gone with its process; name a file, e.g. sqlite:///mlruns/optuna.db"
        )
    return Path(database).absolute()
