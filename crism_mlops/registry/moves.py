"""Who holds an alias, who held it, and why: moves of champion, challenger and previous, one at a time, each on record.

The record stands in the registered model's tags, `crism.move.NUMBER` and `crism.attempt.KEY` (JSON), so that it goes
where the registry goes.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any, Literal

from crism_mlops.errors import PromotionError, TrackingError, one_line
from crism_mlops.tracking_registry import LOCK, Registry, Version
from crism_mlops.untrusted import parse_json

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
Kind = Literal["promotion", "override", "rollback"]
_MOVE, _ATTEMPT = "crism.move.", "crism.attempt."
# A move takes seconds; whoever held the lock for so long is dead.
STALE = 120.0
BURIAL = 1.0
# Characters of a reason and of a gate's figure on record: a tag holds 5000 in PostgreSQL and MySQL, and there are
# thirteen gates. The whole stands on the run.
_REASON, _FIGURE = 1000, 160


@dataclass(frozen=True, slots=True)
class Move:
    """An alias that went from one version ("" for none) to another. gates: name -> verdict and figure; evidence: where
    on the run the whole of it stands; carried_out: whether the alias moved, or the process died before."""

    number: int
    time: str
    by: str
    alias: str
    before: str
    after: str
    kind: Kind
    reason: str
    run_id: str = ""
    gates: dict[str, str] = field(default_factory=dict)
    evidence: str = ""
    carried_out: bool = True


@dataclass(frozen=True, slots=True)
class Attempt:
    """A candidate that was held against a champion on a test set: the how manyth on that set, and how it ended."""

    number: int
    time: str
    by: str
    test_digest: str
    run_id: str
    champion_run_id: str
    level: float
    outcome: str = "begun"


def now() -> str:
    """The time, as records give it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def who() -> str:
    """Who does this: MLFLOW_TRACKING_USERNAME, or the system's user."""
    if name := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        return name
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"  # A container's user id without a name.


@contextmanager
def alone(
    registry: Registry, name: str, say: Callable[[str], None] | None = None, patience: float = STALE + 15.0
) -> Iterator[Callable[[], None]]:
    """Nobody else moves an alias of this model meanwhile. Yields a function that raises PromotionError where the lock
    was lost. Waits `patience` seconds for who holds it; takes it from one that is dead, which is one that has held it
    for STALE seconds by the clocks of both."""
    mine = {"crism.holder": f"{who()} on {socket.gethostname()}", "crism.token": uuid.uuid4().hex,
            "crism.since": f"{time.time():.0f}"}  # fmt: skip
    end = time.monotonic() + patience
    told = False
    while (held := registry.claim(name, mine)) is not None:
        if held == mine:
            break  # It was made, and the answer was lost.
        age = time.time() - float(held.get("crism.since", time.time()))
        if age > STALE:
            _bury(registry, name, held)
            # Of several who find it dead, all have taken it away before the first one claims it.
            time.sleep(BURIAL)
            continue
        holder = held.get("crism.holder", "somebody else")
        if time.monotonic() > end:
            raise PromotionError(
                f"{name}: {holder} has been at it for {max(age, 0.0):.0f} s; try again when that is done"
            )
        if held and say is not None and not told:
            ago = f"{max(age, 0.0):.0f} s ago"
            say(f"{name}: waiting for {holder}, who began {ago} and is taken for dead after {STALE:.0f} s")
            told = True
        time.sleep(0.2)

    def still() -> None:
        if registry.tags(name + LOCK) != mine:
            raise PromotionError(f"{name}: this took so long that somebody else went on; see crism-mlops history")

    try:
        yield still
    finally:
        registry.release(name, mine)


def _bury(registry: Registry, name: str, held: Mapping[str, str]) -> None:
    """Take the lock of a dead process away."""
    try:
        registry.release(name, held)
    except TrackingError as error:
        # With log-in, what somebody made is theirs to delete.
        raise PromotionError(
            f"{name}: {held.get('crism.holder', 'somebody')} died while moving its aliases, and their lock cannot be "
            f"taken away ({one_line(error)}); let them or an administrator delete the registered model {name}{LOCK}"
        ) from error


def history(registry: Registry, name: str) -> list[Move]:
    """Every move of a registered model's aliases, the oldest first."""
    found = [_read(Move, key, value) for key, value in registry.tags(name).items() if key.startswith(_MOVE)]
    moves: list[Move] = sorted(found, key=lambda one: one.number)
    if moves and not moves[-1].carried_out:
        # Whoever wrote it died before saying how it ended: the alias itself says it.
        done = registry.aliases(name).get(moves[-1].alias) == moves[-1].after
        moves[-1] = replace(moves[-1], carried_out=done)
    return moves


def attempts(registry: Registry, test_digest: str | None = None, name: str | None = None) -> list[Attempt]:
    """Every attempt on a test set (or on all), of one registered model (or over all): by test set, in their order."""
    found = [
        _read(Attempt, key, value)
        for one in ([name] if name is not None else registry.names())
        for key, value in registry.tags(one).items()
        if key.startswith(_ATTEMPT)
    ]
    return sorted(
        (a for a in found if test_digest in (None, a.test_digest)), key=lambda a: (a.test_digest, a.number, a.time)
    )


def numbered(known: list[Attempt], asked: Attempt, level: Callable[[int], float]) -> Attempt:
    """An attempt with its number and level: the next one, or the record of the same candidate and champion, who are
    asked nothing new: who made it first, when, at which level."""
    pair = (asked.run_id, asked.champion_run_id)
    number = 1 + max((a.number for a in known), default=0)
    new = replace(asked, number=number, level=level(number))
    return next((a for a in known if (a.run_id, a.champion_run_id) == pair), new)


def begin_attempt(
    registry: Registry, name: str, asked: Attempt, level: Callable[[int], float],
    say: Callable[[str], None] | None = None,
) -> Attempt:  # fmt: skip
    """Put an attempt on record before its result is told, `numbered`."""
    # Numbers run over all registered models, so it is the test set that one has to be alone with.
    with alone(registry, f"attempts-{asked.test_digest[:16]}", say):
        known = attempts(registry, asked.test_digest)
        begun = numbered(known, asked, level)
        if begun not in known:
            end_attempt(registry, name, begun)
    return begun


def end_attempt(registry: Registry, name: str, attempt: Attempt) -> None:
    """Put on record how an attempt ended."""
    key = f"{_ATTEMPT}{attempt.test_digest[:16]}.{attempt.run_id}.{attempt.champion_run_id}"
    registry.set_tags(name, {key: json.dumps(asdict(attempt), ensure_ascii=False)})


def check_holder(registry: Registry, name: str, alias: str, before: str) -> None:
    """Raises PromotionError where an alias's holder is not `before` ("" for nobody) any more."""
    holder = registry.aliases(name).get(alias, "")
    if holder != before:
        raise PromotionError(
            f"{name}: {alias} is version {holder or 'none'} now and was {before or 'none'} when this began: "
            "somebody else was faster. Nothing was changed; look at crism-mlops history, and promote again if it "
            "is still better"
        )


def move(
    registry: Registry, version: Version, alias: str, before: str, kind: Kind, reason: str,
    gates: Mapping[str, str] | None = None, evidence: str = "", say: Callable[[str], None] | None = None,
) -> Move | None:  # fmt: skip
    """Let an alias mean a version, on record; the champion that was becomes `previous`. None where somebody else has
    moved it there meanwhile.

    `before`: the version that the decision took for the alias's holder ("" for none). Raises PromotionError where it is
    another one by now: nothing has changed then. The alias is the last step; a call that died before it is safe to
    repeat.
    """
    name = version.name
    with alone(registry, name, say) as still:
        aliases = registry.aliases(name)
        if aliases.get(alias) == version.number:
            return None
        check_holder(registry, name, alias, before)
        done = history(registry, name)
        last = done[-1] if done else None
        # One that was never carried out gives its number to the next.
        number = 1 if last is None else last.number + last.carried_out
        if last is not None and last.carried_out:
            _write(registry, name, last)
        record = Move(
            number, now(), who(), alias, before, version.number, kind, reason[:_REASON], version.run_id,
            {k: v[:_FIGURE] for k, v in (gates or {}).items()}, evidence, carried_out=False,
        )  # fmt: skip
        _write(registry, name, record)
        if alias == CHAMPION:
            if before and before != version.number:
                still()
                registry.set_alias(name, PREVIOUS, before)
            if aliases.get(CHALLENGER) == version.number:
                still()
                registry.delete_alias(name, CHALLENGER)
        still()
        registry.set_alias(name, alias, version.number)
        still()
        record = replace(record, carried_out=True)
        _write(registry, name, record)
        return record


def _write(registry: Registry, name: str, record: Move) -> None:
    registry.set_tags(name, {f"{_MOVE}{record.number:05d}": json.dumps(asdict(record), ensure_ascii=False)})


def discard(registry: Registry, version: Version) -> None:
    """Remove a version that has come to nothing, unless it is somebody's by now: has an alias, or a move names it."""
    with alone(registry, version.name):
        there = registry.version(version.name, version.number)
        if there is None or there.aliases:
            return
        if not any(version.number in (m.before, m.after) for m in history(registry, version.name)):
            registry.delete_version(version)


def _read(kind: type[Any], key: str, value: str) -> Any:
    try:
        content = parse_json(value.encode(), constants=True)
        # A later version may have added some.
        return kind(**{f.name: content[f.name] for f in fields(kind) if f.name in content})
    except (ValueError, TypeError, KeyError) as error:
        raise PromotionError(
            f"the registered model's tag {key} is damaged ({one_line(error)}); correct or delete it in MLflow"
        ) from error
