"""The way back: the alias champion to a version that held it before."""

from __future__ import annotations

from collections.abc import Callable

from crism_mlops.errors import PromotionError
from crism_mlops.registry.moves import CHAMPION, PREVIOUS, Move, history, move
from crism_mlops.registry.verify import verify
from crism_mlops.tracking import Tracker
from crism_mlops.tracking_registry import Registry, Version


def rollback(
    tracker: Tracker, name: str, to: str | None = None, reason: str = "", *, unverified: bool = False,
    say: Callable[[str], None] = lambda words: None,
) -> Move:  # fmt: skip
    """Give the alias champion back to the version before (or to another one), which is verified first, unless
    `unverified`.

    Raises PromotionError where there is none, or it does not stand the verification.
    """
    registry = Registry(tracker)
    champion = registry.by_alias(name, CHAMPION)
    if champion is None:
        known = [n for n in registry.names() if CHAMPION in registry.aliases(n)]
        raise PromotionError(f"{name} has no {CHAMPION}; those that have one: {', '.join(known) or 'none'}")
    target = _before(registry, champion) if to is None else registry.version(name, to)
    if target is None:
        versions = ", ".join(v.number for v in registry.versions(name))
        what = f"no version before it ({PREVIOUS})" if to is None else f"no version {to}"
        raise PromotionError(f"{name} has {what}; name one of its versions: --to {versions}")
    if target.number == champion.number:
        raise PromotionError(f"{name} version {target.number} is the {CHAMPION} already: nothing to do")
    held = {v for m in history(registry, name) if m.carried_out and m.alias == CHAMPION for v in (m.before, m.after)}
    if target.number not in held:
        raise PromotionError(
            f"{name} version {target.number} was never {CHAMPION}, so there is nothing to go back to; those that were: "
            f"{', '.join(sorted(held - {''}, key=int)) or 'none'}. crism-mlops promote holds it against the gates "
            "(--override REASON makes it champion though they refuse)"
        )
    wrong = [] if unverified else [check for check in verify(tracker, target, say) if not check.ok]
    if wrong:
        found = "; ".join(f"{check.name}: {check.figure}" for check in wrong)
        raise PromotionError(
            f"{target.uri} is not what it was ({found}); choose another one with --to, or add --unverified"
        )
    reason = (reason or "rolled back") + (" (unverified)" if unverified else "")
    made = move(registry, target, CHAMPION, champion.number, "rollback", reason, say=say)
    if made is None:
        raise PromotionError(f"{target.uri} is the {CHAMPION} by now: somebody else was faster")
    return made


def _before(registry: Registry, champion: Version) -> Version | None:
    """The champion before this one."""
    previous = registry.by_alias(champion.name, PREVIOUS)
    if previous is not None and previous.number != champion.number:
        return previous
    # A call that died between the two aliases leaves both on one version: the record knows.
    moves = [m for m in history(registry, champion.name) if m.carried_out and m.alias == CHAMPION]
    known = [m.before for m in reversed(moves) if m.after == champion.number and m.before]
    return registry.version(champion.name, known[0]) if known else None
