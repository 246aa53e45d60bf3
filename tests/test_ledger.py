"""Leases: who works on which trial, whoever dies; on a real SQLite file, with a clock that the tests turn."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from trackers import optuna_store

from crism_mlops.errors import StudyError
from crism_mlops.studies.ledger import ATTEMPTS, COUNTED, INDEX, REPEAT, Ledger, own
from crism_mlops.studies.processes import here, process_lives, process_name
from crism_mlops.studies.storage import open_store

LEASE = 60.0
STUDY = "s"


class Office:
    """A ledger, a clock, and workers on other machines: those die of nothing but silence."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time = 1000.0
        monkeypatch.setattr(Ledger, "_now", lambda ledger, connection: self.time)
        self.store = open_store(optuna_store(folder), 0.0)
        self.study = optuna.create_study(study_name=STUDY, storage=self.store.storage)
        self.ledger = self.store.ledger

    def join(self, name: str, process: str = "1:1", machine: str = "far/boot/ns") -> str:
        self.ledger.join(STUDY, name, machine, process, LEASE)
        return name

    def claim(self, name: str, total: int = 3, **options: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self.ledger.claim(STUDY, name, total, **options)
        return answer

    def pass_time(self, seconds: float, *beating: str) -> None:
        """Time passes; those who live beat all the while."""
        end = self.time + seconds
        while self.time < end:
            self.time = min(end, self.time + 10.0)
            for name in beating:
                self.ledger.beat(STUDY, name, LEASE)

    def end(self, name: str, claim: dict[str, Any], state: TrialState = TrialState.COMPLETE) -> None:
        values = [1.0] if state == TrialState.COMPLETE else None
        self.study._storage.set_trial_state_values(claim["trial"], state, values)
        self.ledger.free(name)

    def trial(self, number: int) -> optuna.trial.FrozenTrial:
        return self.study.get_trials()[number]

    def hows(self, number: int) -> list[str | None]:
        return [attempt.get("how") for attempt in self.trial(number).user_attrs[ATTEMPTS]]


@pytest.fixture
def office(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Office:
    return Office(tmp_path, monkeypatch)


def test_slots_of_the_total(office: Office) -> None:
    a, b = office.join("a"), office.join("b")
    first, second = office.claim(a, 2), office.claim(b, 2)
    assert [(c["what"], c["number"]) for c in (first, second)] == [("new", 0), ("new", 1)]
    assert office.claim(office.join("c"), 2) == {"what": "later"}
    office.end(a, first)
    assert office.claim(a, 2) == {"what": "later"}
    office.end(b, second, TrialState.FAIL)
    third = office.claim(a, 2)
    assert (third["what"], third["number"]) == ("new", 2), "a failed one gives its slot back"
    office.end(a, third, TrialState.PRUNED)
    assert office.claim(a, 2) == {"what": "done"}
    assert [t.user_attrs[INDEX] for t in office.study.trials] == [0, 1, 2]


def test_a_worker_that_dies_is_followed_by_another(office: Office) -> None:
    a, b = office.join("a"), office.join("b")
    lost = office.claim(a, 1)
    office.pass_time(LEASE - 1.0, b)
    assert office.claim(b, 1) == {"what": "later"}
    office.pass_time(2.0, b)
    again = office.claim(b, 1)
    assert again == {**lost, "what": "again"}
    assert office.hows(0) == ["lost", None]
    assert office.trial(0).user_attrs[ATTEMPTS][0]["ended"] == 1000.0, "it was last seen then"
    # The one that was given up for dead hears of it, and what it says changes nothing.
    assert office.ledger.beat(STUDY, a, LEASE)["alive"] is False
    assert office.ledger.free(a) is False
    assert office.ledger.give_back(STUDY, a, 0) is False
    assert office.trial(0).state == TrialState.RUNNING
    assert office.claim(a, 1) == {"what": "lost"}


def test_every_death_is_counted(office: Office) -> None:
    for attempt in range(3):
        name = office.join(f"w{attempt}")
        office.pass_time(LEASE, name)
        assert office.claim(name, 1)["number"] == 0
        office.pass_time(LEASE + 1.0)
    last = office.join("last")
    office.pass_time(LEASE, last)
    office.claim(last, 1)
    assert office.hows(0) == ["lost", "lost", "lost", None]


def test_nobody_is_buried_right_after_an_outage(office: Office) -> None:
    a, b = office.join("a"), office.join("b")
    held = office.claim(a, 1)
    for outage in (600.0, LEASE - 5.0):
        office.pass_time(40.0, a, b)
        office.time += 9.0  # `a` beats a little later than `b`
        office.ledger.beat(STUDY, b, LEASE)
        office.time += outage
        office.ledger.beat(STUDY, b, LEASE)
        assert office.claim(b, 1) == {"what": "later"}
        assert office.ledger.cancel(STUDY, 0) == "asked", "who is no worker cannot tell either"
        office.ledger.control(STUDY, "cancel:0", None)
        assert office.ledger.beat(STUDY, a, LEASE)["alive"] is True
    office.pass_time(LEASE + 1.0, b)
    assert office.claim(b, 1) == {**held, "what": "again"}, "one that stays silent is dead after all"


def test_a_process_of_this_machine_that_died(office: Office) -> None:
    """SIGKILL is known at once: nobody waits for the lease."""
    me = here()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        name = process_name(child.pid)
        a, b = office.join("a", name, me.machine), office.join("b", me.process, me.machine)
        lost = office.claim(a, 1)
        assert process_lives(name)
        assert office.claim(b, 1) == {"what": "later"}
        child.kill()
    assert not process_lives(name)
    assert [row["worker"] for row in office.ledger.workers(STUDY)] == ["b"]
    assert office.claim(b, 1) == {**lost, "what": "again"}


def test_a_process_number_that_was_given_again() -> None:
    pid, _, began = process_name(os.getpid()).partition(":")
    assert process_lives(f"{pid}:{began}")
    assert not process_lives(f"{pid}:{began}0")
    assert not process_lives("4194399:1")


def test_a_zombie_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        name = process_name(child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not process_lives(name)


def test_an_answer_that_was_lost(office: Office) -> None:
    """The same call a second time: the same trial, and one attempt."""
    a = office.join("a")
    first = office.claim(a)
    assert office.claim(a) == {**first, "what": "again"}
    assert office.hows(0) == [None]
    office.join("a")
    assert [row["trial"] for row in office.ledger.workers(STUDY)] == [None]


def test_an_orphan_whose_worker_signed_off(office: Office) -> None:
    a, b = office.join("a"), office.join("b")
    office.claim(a, 1)
    office.ledger.leave(a)
    assert office.claim(b, 1)["what"] == "again"
    assert office.hows(0) == ["lost", None], "no attempt stays open: budget.hours would count it for ever"


def test_what_is_given_back_goes_on(office: Office) -> None:
    a, b = office.join("a"), office.join("b")
    first = office.claim(a, 1)
    assert office.ledger.give_back(STUDY, a, 0) is True
    assert office.trial(0).state == TrialState.WAITING
    assert office.hows(0) == ["interrupted"]
    assert office.claim(b, 1) == {**first, "what": "waiting"}
    assert office.ledger.give_back(STUDY, a, 0) is False


def test_only_orphans_where_none_may_begin(office: Office) -> None:
    a, b = office.join("a"), office.join("b")
    office.claim(a)
    assert office.claim(b, begin=False) == {"what": "later"}
    office.ledger.leave(a)
    assert office.claim(b, begin=False)["what"] == "again"


def test_points_of_a_grid(office: Office) -> None:
    a = office.join("a")
    office.end(a, office.claim(a, 9, draws=2), TrialState.FAIL)
    office.end(a, office.claim(a, 9, draws=2))
    assert office.claim(a, 9, draws=2) == {"what": "done"}


def test_the_queue(office: Office) -> None:
    entries = [{"key": "k1", "params": {"x": 1.0}}, {"key": "k2", "params": {"x": 2.0}, "attributes": {REPEAT: 0}}]
    assert office.ledger.enqueue(STUDY, entries) == 2
    assert office.ledger.enqueue(STUDY, entries) == 0
    a = office.join("a")
    office.end(a, office.claim(a, 1))
    assert office.claim(a, 1)["number"] == 1, "a repetition is beyond the total"
    office.end(a, {"trial": office.trial(1)._trial_id})
    assert office.claim(a, 1) == {"what": "done"}
    assert office.ledger.enqueue(STUDY, entries) == 0, "nor again when they have ended"


def test_one_prepares(office: Office) -> None:
    a, b = office.join("a"), office.join("b")
    assert office.ledger.prepare(STUDY, a) is True
    assert office.ledger.prepare(STUDY, b) is False
    assert office.ledger.prepare(STUDY, "nobody") is False
    office.pass_time(LEASE + 1.0, b)
    assert office.ledger.prepare(STUDY, b) is True, "the one that prepared is dead"
    assert office.claim(office.join("c"), 1)["what"] == "new"


def test_controls(office: Office) -> None:
    office.ledger.control(STUDY, "run", "pause")
    office.ledger.control(STUDY, "run", "stop")
    assert office.ledger.controls(STUDY) == {"run": {"value": "stop", "since": 1000.0}}
    assert office.ledger.beat(STUDY, office.join("a"), LEASE)["controls"]["run"]["value"] == "stop"
    office.ledger.control(STUDY, "run", None)
    assert office.ledger.controls(STUDY) == {}


def test_cancel(office: Office) -> None:
    a = office.join("a")
    first = office.claim(a)
    assert office.ledger.cancel(STUDY, 0) == "asked"
    assert "cancel:0" in office.ledger.controls(STUDY)
    office.ledger.give_back(STUDY, a, 0)
    assert office.ledger.cancel(STUDY, 0) == "cancelled"
    assert office.trial(0).user_attrs["crism.state"] == "cancelled"
    assert office.ledger.cancel(STUDY, first["number"]) == "ended"
    with pytest.raises(StudyError, match="has no trial 7; it has 1"):
        office.ledger.cancel(STUDY, 7)
    office.claim(a)
    office.ledger.leave(a)
    assert office.ledger.cancel(STUDY, 1) == "cancelled"
    assert office.hows(1) == ["cancelled"]


def test_settled_by_somebody_who_is_no_worker(office: Office) -> None:
    a = office.join("a")
    office.claim(a)
    assert office.ledger.settle(STUDY, 0, "WAITING", {"crism.state": "interrupted"}) is False, "it is run"
    office.pass_time(LEASE + 1.0)
    assert office.ledger.settle(STUDY, 0, "WAITING", {"crism.state": "interrupted"}) is True
    assert office.ledger.beat(STUDY, a, LEASE)["alive"] is False
    assert office.hows(0) == ["interrupted"]
    assert office.ledger.settle(STUDY, 0, "COMPLETE", {"crism.state": "finished"}, [2.0]) is True
    assert office.trial(0).value == 2.0
    assert office.ledger.settle(STUDY, 0, "FAIL", {"crism.state": "failed"}) is False


ACTS = ("claim", "finish", "prune", "fail", "interrupt", "die", "pass", "outage", "cancel")


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts=st.lists(st.tuples(st.sampled_from(ACTS), st.integers(0, 2)), max_size=25))
def test_whatever_happens_the_total_is_reached_and_no_more(
    tmp_path_factory: pytest.TempPathFactory, acts: list[tuple[str, int]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        office, total = Office(tmp_path_factory.mktemp("office"), patch), 3
        names = [office.join(f"{place}.0") for place in range(3)]
        holds: dict[str, dict[str, Any]] = {}

        def hold() -> None:
            trials = office.study.get_trials(deepcopy=False)
            running = [t for t in trials if t.state == TrialState.RUNNING and own(t)]
            assert sum(t.state in COUNTED and own(t) for t in trials) + len(running) <= total
            rows = [row["trial"] for row in office.ledger.workers(STUDY) if row["trial"] is not None]
            assert len(rows) == len(set(rows)), "each number is held by one"

        def act(what: str, place: int) -> None:
            name = names[place]
            if what == "die":
                holds.pop(name, None)
                names[place] = office.join(f"{place}.{int(name.partition('.')[2]) + 1}")
            elif what == "pass":
                office.pass_time(40.0, *names)
            elif what == "outage":
                office.time += 600.0
                for one in names:
                    office.ledger.beat(STUDY, one, LEASE)
            elif what == "cancel":
                count = len(office.study.get_trials(deepcopy=False))
                if place < count and office.ledger.cancel(STUDY, place) == "asked":
                    for one, held in list(holds.items()):
                        if held["number"] == place:
                            office.end(one, holds.pop(one), TrialState.FAIL)
            elif what == "claim" and name not in holds:
                answer = office.claim(name, total)
                assert answer["what"] != "lost", "who beats is not buried"
                if "trial" in answer:
                    assert answer["number"] not in {held["number"] for held in holds.values()}
                    holds[name] = answer
            elif what == "interrupt" and name in holds:
                assert office.ledger.give_back(STUDY, name, holds.pop(name)["number"])
            elif name in holds:
                state = {"finish": TrialState.COMPLETE, "prune": TrialState.PRUNED, "fail": TrialState.FAIL}.get(what)
                if state is not None:
                    office.end(name, holds.pop(name), state)

        for what, place in acts:
            act(what, place)
            hold()
        # In the end one worker is left.
        for place in (1, 2):
            act("die", place)
            office.ledger.leave(names[place])
        office.pass_time(3.0 * LEASE, names[0])
        act("finish", 0)
        for _ in range(20):
            act("claim", 0)
            act("finish", 0)
            hold()
        trials = office.study.get_trials(deepcopy=False)
        assert sum(t.state in COUNTED and own(t) for t in trials) == total
        assert all(t.state.is_finished() for t in trials), "no trial is lost"
        assert all(attempt["ended"] is not None or t.user_attrs[ATTEMPTS][-1] is attempt
                   for t in trials for attempt in t.user_attrs.get(ATTEMPTS, []))  # fmt: skip
