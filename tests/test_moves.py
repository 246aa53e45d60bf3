"""Aliases move one at a time, each move on record: against a real registry, with processes that die in between."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from trackers import logged_trial, new_tracker

from crism_mlops.config import PromotionConfig
from crism_mlops.errors import PromotionError
from crism_mlops.registry import moves
from crism_mlops.registry.moves import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    Attempt,
    alone,
    attempts,
    begin_attempt,
    end_attempt,
    history,
    move,
)
from crism_mlops.tracking import Tracker
from crism_mlops.tracking_registry import Registry, Version

NAME = "crism-instruct-pix2pix"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(new_tracker(tmp_path))


def version(registry: Registry, name: str) -> Version:
    run_id = logged_trial(registry.tracker, name, 1.0)
    model = registry.tracker.run(run_id).tags["crism.model_id"]
    return registry.register(model, NAME, {"crism.run_id": run_id})


def test_first_second_and_back(registry: Registry) -> None:
    first, second = version(registry, "first"), version(registry, "second")
    made = move(registry, first, CHAMPION, "", "promotion", "the first one", {"audit": "passed: 0 leaks"}, "p.json")
    assert (made.number, made.before, made.after, made.carried_out) == (1, "", "1", True)
    assert registry.aliases(NAME) == {CHAMPION: "1"}
    registry.set_alias(NAME, CHALLENGER, "2")
    move(registry, second, CHAMPION, "1", "override", "because")
    assert registry.aliases(NAME) == {CHAMPION: "2", PREVIOUS: "1"}, "the challenger has become champion"
    move(registry, first, CHAMPION, "2", "rollback", "stripes")
    assert registry.aliases(NAME) == {CHAMPION: "1", PREVIOUS: "2"}
    told = [(m.number, m.before, m.after, m.kind, m.reason, m.run_id) for m in history(registry, NAME)]
    assert told == [
        (1, "", "1", "promotion", "the first one", first.run_id),
        (2, "1", "2", "override", "because", second.run_id),
        (3, "2", "1", "rollback", "stripes", first.run_id),
    ]
    assert history(registry, NAME)[0].gates == {"audit": "passed: 0 leaks"}
    assert history(registry, NAME)[0].evidence == "p.json"
    assert registry.names() == [NAME], "no lock is left, and none is shown"


def test_a_move_whose_ground_is_gone_changes_nothing(registry: Registry) -> None:
    first, second, third = (version(registry, name) for name in ("first", "second", "third"))
    move(registry, first, CHAMPION, "", "promotion", "a")
    move(registry, second, CHAMPION, "1", "promotion", "b")
    with pytest.raises(PromotionError, match=r"champion is version 2 now and was 1 when this began: somebody else"):
        move(registry, third, CHAMPION, "1", "promotion", "c")
    assert registry.aliases(NAME) == {CHAMPION: "2", PREVIOUS: "1"}
    assert [m.reason for m in history(registry, NAME)] == ["a", "b"]


def test_of_two_at_once_one_wins_and_the_other_is_told(registry: Registry, tmp_path: Path) -> None:
    move(registry, version(registry, "first"), CHAMPION, "", "promotion", "a")
    rivals = [version(registry, name) for name in ("second", "third", "fourth")]
    start, ends = threading.Barrier(len(rivals)), []

    def promote(rival: Version) -> None:
        own = Registry(Tracker(registry.tracker.uri, registry.tracker.experiment))
        start.wait()
        try:
            ends.append(move(own, rival, CHAMPION, "1", "promotion", f"version {rival.number}").after)
        except PromotionError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=promote, args=(rival,)) for rival in rivals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = registry.aliases(NAME)[CHAMPION]
    assert registry.aliases(NAME)[PREVIOUS] == "1"
    assert ends.count(winner) == 1
    assert sum("somebody else was faster" in end for end in ends) == 2
    assert [m.after for m in history(registry, NAME)] == ["1", winner]


def test_a_record_of_a_later_version_is_read_and_a_damaged_one_is_named(registry: Registry) -> None:
    move(registry, version(registry, "first"), CHAMPION, "", "promotion", "a")
    content = json.loads(registry.tags(NAME)["crism.move.00001"])
    registry.set_tags(NAME, {"crism.move.00001": json.dumps({**content, "of_the_future": 1})})
    assert [m.after for m in history(registry, NAME)] == ["1"]
    registry.set_tags(NAME, {"crism.move.00002": "{"})
    with pytest.raises(PromotionError, match=r"tag crism\.move\.00002 is damaged"):
        history(registry, NAME)


@pytest.mark.parametrize("step", ["set_alias", "delete_alias", "release"])
def test_killed_in_mid_move_and_repeated(registry: Registry, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = version(registry, "first"), version(registry, "second")
    move(registry, first, CHAMPION, "", "promotion", "a")
    registry.set_alias(NAME, CHALLENGER, "2")

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        # A process that is killed gives no lock back either.
        patched.setattr(registry, "release", lambda *_: None)
        patched.setattr(registry, step, die)
        with pytest.raises(Killed):
            move(registry, second, CHAMPION, "1", "promotion", "b")
    holder = registry.aliases(NAME)[CHAMPION]
    assert holder == ("2" if step == "release" else "1")
    last = history(registry, NAME)[-1]
    assert (last.after, last.carried_out) == ("2", holder == "2")
    # Its lock is taken from it once it is known to be dead.
    monkeypatch.setattr(moves, "STALE", -1.0)
    move(registry, second if holder == "1" else first, CHAMPION, holder, "promotion", "again")
    numbers = [m.number for m in history(registry, NAME)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) == (3 if holder == "2" else 2), "what was not carried out is not counted"
    assert all(m.carried_out for m in history(registry, NAME))


def test_who_holds_the_lock_is_named(registry: Registry) -> None:
    said: list[str] = []
    other = {"crism.holder": "ada on venus", "crism.token": "t", "crism.since": "9e12"}
    assert registry.claim(NAME, other) is None
    with (
        pytest.raises(PromotionError, match="ada on venus has been at it for 0 s; try again when that is done"),
        alone(registry, NAME, said.append, patience=0.3),
    ):
        pytest.fail("two hold the lock")
    assert said == [f"{NAME}: waiting for ada on venus, who began 0 s ago and is taken for dead after 120 s"]
    registry.release(NAME, {**other, "crism.token": "of somebody else"})
    assert registry.claim(NAME, other) == other, "only its holder gives it back"


def test_a_lock_whose_making_was_not_answered(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = registry.claim

    def asked_again(name: str, tags: Mapping[str, str]) -> dict[str, str] | None:
        claim(name, tags)
        return claim(name, tags)

    monkeypatch.setattr(registry, "claim", asked_again)
    with alone(registry, NAME, patience=0.0) as still:
        still()


def test_a_lock_that_is_given_back_while_mlflow_looks_at_it(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = registry.tracker.client.create_registered_model
    answers = [MlflowException("not found", error_code=RESOURCE_DOES_NOT_EXIST)]

    def given_back(*words: Any) -> Any:
        if answers:
            raise answers.pop()
        return create(*words)

    monkeypatch.setattr(registry.tracker.client, "create_registered_model", given_back)
    with alone(registry, NAME, patience=5.0) as still:
        still()


def test_a_lost_lock_is_noticed(registry: Registry) -> None:
    with alone(registry, NAME) as still:
        still()
        registry.release(NAME, registry.tags(f"{NAME}.lock"))
        with pytest.raises(PromotionError, match="took so long that somebody else went on"):
            still()


def test_a_record_fits_the_narrowest_database(registry: Registry) -> None:
    long = {f"gate-{i}": "ü" * 5000 for i in range(13)}
    move(registry, version(registry, "first"), CHAMPION, "", "override", "x" * 9000, long)
    (text,) = [v for k, v in registry.tags(NAME).items() if k.startswith("crism.move.")]
    assert len(text) <= 5000, "PostgreSQL's column"
    assert len(json.loads(text)["gates"]) == 13


def asked(run: str, champion: str = "c1", digest: str = "d" * 32) -> Attempt:
    return Attempt(0, moves.now(), "ada", digest, run, champion, 0.0)


def test_attempts_are_counted_before_their_result_is_seen(registry: Registry) -> None:
    move(registry, version(registry, "first"), CHAMPION, "", "promotion", "a")
    level = PromotionConfig().level_at
    first = begin_attempt(registry, NAME, asked("r1"), level)
    assert (first.number, first.level, first.outcome) == (1, 0.025, "begun")
    end_attempt(registry, NAME, replace(first, outcome="refused"))
    assert begin_attempt(registry, NAME, asked("r2"), level).number == 2
    again = begin_attempt(registry, NAME, replace(asked("r1"), by="bob"), lambda number: 1.0)
    assert again == replace(first, outcome="refused"), "the same question again leaves its record as it is"
    assert begin_attempt(registry, NAME, asked("r1", "c2"), level).number == 3, "another champion"
    assert begin_attempt(registry, NAME, asked("r1", digest="e" * 32), level).number == 1, "another test set"
    assert [a.number for a in attempts(registry, "d" * 32)] == [1, 2, 3]
    assert len(attempts(registry)) == 4
