"""The checks of the audit: records of scenes -> findings."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from crism_mlops.dataset.fingerprints import Fingerprint, alike
from crism_mlops.dataset.footprints import overlaps
from crism_mlops.dataset.split import PARTS

if TYPE_CHECKING:
    import shapely

Verdict = Literal["ok", "warning", "leak", "unknown"]

# A targeted observation is about 10 km wide; centres that are nearer than that see common ground.
SCENE_KM = 10.0
MARS_RADIUS_KM = 3389.5
# Images whose detail correlates so are one image (copied, compressed, with a little noise) ...
SAME_IMAGE = 0.9
# ... or, from here on, two looks at one place. Of 3655 pairs of real scenes two are above 0.45, with 0.66 and
# 0.79: one pair has centres 0.9 km apart, the other shares Jezero's nominal coordinate.
SAME_GROUND, SAME_GROUND_BITS = 0.6, 16
# An image-wise stretched channel is crushed where 98 % of the pixels lie within this share of its scale: 40 of 256
# grey levels, as in the real scenes that are known to be crushed by an outlier (29 and 39 levels; the next has 48).
CRUSHED = 40.0 / 255.0
MOSTLY_NO_DATA = 0.9
SMALL_TEST = 10
# The number of an observation counts over all classes: FRT, HRL, HRS, ...
_OBSERVATION = re.compile(r"([a-z]{3})([0-9a-f]{5,})(?![0-9a-z])")


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found: a sentence with figures, and the ids of the scenes concerned."""

    check: str
    verdict: Verdict
    message: str
    scenes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """What the audit keeps of a scene.

    saturated: share of the valid pixels at 0 or 1, by channel (input, then target); crushed: whether
    an outlier crushed the channel; no_data: share of the pixels without data.
    """

    observation_id: str
    split: str
    kind: str
    region: str
    place: tuple[float, float] | None
    footprint: shapely.Polygon | None
    image: Fingerprint
    target_digest: str | None
    saturated: tuple[float, ...]
    crushed: tuple[bool, ...]
    no_data: float

    @property
    def number(self) -> str:
        """What tells an observation: its number, whatever class and case it is written with."""
        return observation_number(self.observation_id)

    def __str__(self) -> str:
        return f"{self.observation_id} ({self.split})"


def observation_number(observation_id: str) -> str:
    """The number of an observation, 8 hex digits; the id in lower case where it has none."""
    match = _OBSERVATION.match(observation_id.casefold())
    return f"{int(match[2], 16):08x}" if match else observation_id.casefold()


def learned_before(records: Sequence[Record], name: str, seen: Mapping[str, Sequence[str]] | None) -> Finding:
    """A part of the model that comes trained has seen no held-out scene.

    `seen`: ids that it was trained on ("train") and chosen by ("validation"); None where nobody knows.
    """
    check = "input autoencoder"
    if seen is None:
        return Finding(check, "warning", f"{name} has no card: nobody can say which scenes it was trained on")
    leaks = []
    for part, held_out in (("train", ("validation", "test")), ("validation", ("test",))):
        numbers = {observation_number(i) for i in seen.get(part, ())}
        leaks += [r for r in records if r.split in held_out and r.number in numbers and r not in leaks]
    if leaks:
        worst = f"{counted(len(leaks), 'scene')} held out here: {shown(map(str, leaks))}"
        return _finding(check, "leak", f"{name} was trained on, or chosen by, {worst}", [leaks])
    held = sum(r.split != "train" for r in records)
    return Finding(check, "ok", f"{name} was trained on none of the {counted(held, 'scene')} held out here")


def observations(records: Sequence[Record]) -> Finding:
    """No observation in two splits, also under another class or in another case."""
    groups = _grouped(records, lambda r: r.number)
    leaks = [g for g in groups if len({r.split for r in g}) > 1]
    twice = [g for g in groups if len(g) > 1 and g not in leaks]
    says = f"{len(records)} scenes are {len(groups)} observations"
    if leaks:
        return _finding(
            "observations", "leak",
            f"{says}; {len(leaks)} in two splits (a number is one observation in any class): {_groups_shown(leaks)}",
            leaks,
        )  # fmt: skip
    if twice:
        return _finding("observations", "warning", f"{says}; twice in one split: {_groups_shown(twice)}", twice)
    return Finding("observations", "ok", f"{says}, each in one split")


def footprints(records: Sequence[Record]) -> Finding:
    """No train scene overlaps a validation or test scene on the ground."""
    without = [r for r in records if r.footprint is None]
    found = [(records[o.first], records[o.second], o.share) for o in overlaps([r.footprint for r in records])]
    across = [(a, b, s) for a, b, s in found if a.split != b.split and a.number != b.number]
    across.sort(key=lambda entry: -entry[2])
    leaks = [entry for entry in across if "train" in (entry[0].split, entry[1].split)]
    unknown = f"; unknown for {len(without)} of {len(records)} scenes, which have no footprint" if without else ""
    worst = shown(f"{a} and {b} {s:.1%}" for a, b, s in leaks or across)
    pairs = [(a, b) for a, b, _ in leaks or across]
    if leaks:
        says = (
            f"overlap (share of the smaller) of {counted(len(leaks), 'pair')} of a train and a held-out scene: {worst}"
        )
        return _finding("footprints", "leak", says + unknown, pairs)
    if across:
        says = (
            f"overlap (share of the smaller) of {counted(len(across), 'pair')} of validation and test scenes: {worst}"
        )
        return _finding("footprints", "warning", says + unknown, pairs)
    if without:
        return _finding("footprints", "unknown", "no overlap found" + unknown, [without])
    return Finding("footprints", "ok", f"no overlap between splits; {counted(len(found), 'pair')} within a split")


def places(records: Sequence[Record]) -> Finding:
    """What centre coordinates say of scenes without a footprint."""
    from scipy.spatial import cKDTree

    blind = [r for r in records if r.footprint is None]
    known = [r for r in records if r.place is not None]
    if not blind:
        return Finding("places", "ok", "every scene has a footprint, which says more than its centre")
    lost = [r for r in blind if r.place is None]
    unknown = f"; neither footprint nor coordinates: {shown(map(str, lost))}" if lost else ""
    groups = _grouped(known, lambda r: r.place)
    shared = [g for g in groups if len({r.split for r in g}) > 1 and any(r.footprint is None for r in g)]
    near: list[tuple[Record, Record, float]] = []
    if groups:
        # One point a coordinate: hundreds of scenes may share one.
        points = _unit_vectors([g[0].place for g in groups if g[0].place])
        tree = cKDTree(points)
        for i, j in sorted(tree.query_pairs(2.0 * np.sin(SCENE_KM / MARS_RADIUS_KM / 2.0))):
            km = 2.0 * MARS_RADIUS_KM * float(np.arcsin(np.linalg.norm(points[i] - points[j]) / 2.0))
            near += [
                (a, b, km) for a in groups[i] for b in groups[j]
                if "train" in (a.split, b.split) and a.split != b.split and None in (a.footprint, b.footprint)
            ]  # fmt: skip
    near.sort(key=lambda entry: entry[2])
    says = []
    if near:
        pairs = shown(f"{a} and {b} {km:.1f} km" for a, b, km in near)
        says.append(
            f"centres within {SCENE_KM:g} km, so that scenes may overlap, in {counted(len(near), 'pair')} of a train "
            f"and a held-out scene: {pairs}"
        )
    for group in shared:
        counts = Counter(r.split for r in group)
        assert group[0].place is not None
        says.append(
            f"{len(group)} scenes in several splits ({_counted(counts)}) share one coordinate "
            f"({group[0].place[0]:g} E, {group[0].place[1]:g} N), likely a nominal one: whether they overlap is unknown"
        )
    concerned: list[Sequence[Record]] = [(a, b) for a, b, _ in near] + [tuple(g) for g in shared]
    if says:
        return _finding("places", "warning", "; ".join(says) + unknown, concerned)
    if lost:
        return _finding("places", "unknown", f"no centres within {SCENE_KM:g} km across splits{unknown}", [lost])
    return Finding("places", "ok", f"no centre of a held-out scene lies within {SCENE_KM:g} km of a train scene's")


def duplicates(records: Sequence[Record], bits: int) -> list[Finding]:
    """Equal images, nearly equal ones (also flipped or turned), and what looks like the same ground."""
    equal: dict[tuple[int, int], str] = {}
    digests = {"input": [r.image.digest for r in records], "target": [r.target_digest for r in records]}
    for name, of_scenes in digests.items():
        by_digest: dict[str, list[int]] = defaultdict(list)
        for index, digest in enumerate(of_scenes):
            if digest is not None:
                by_digest[digest].append(index)
        for same in by_digest.values():
            # A chain says it all: every pair of a thousand copies would be half a million.
            for pair in pairwise(same):
                equal.setdefault(pair, name)
    likes = alike([r.image for r in records], max(bits, SAME_GROUND_BITS), SAME_GROUND)
    near = [x for x in likes if x.bits <= bits and x.correlation >= SAME_IMAGE]
    ground = [x for x in likes if x not in near and x.orientation == 0]
    said = [(records[i], records[j], f"{name} equal") for (i, j), name in equal.items()]
    nearly = [
        (records[x.first], records[x.second],
         f"{x.bits} bits, correlation {x.correlation:.2f}{', flipped or turned' if x.orientation else ''}")
        for x in near
    ]  # fmt: skip
    seen = [(records[x.first], records[x.second], f"{x.bits} bits, correlation {x.correlation:.2f}") for x in ground]
    return [
        _pairs_finding("duplicates", "leak", "equal images", said),
        _pairs_finding("near-duplicates", "leak", f"images alike to {bits} of 64 bits", nearly),
        _pairs_finding("same ground", "warning", "images that look like one place seen twice", seen),
    ]


def class_balance(records: Sequence[Record], balanced: int) -> Finding:
    """Carbonate-bearing and barren scenes in every split, and enough in the balanced test set."""
    says, missing = [], []
    for name in PARTS:
        counts = Counter(r.kind for r in records if r.split == name)
        says.append(f"{name} {sum(counts.values())} ({_counted(counts)})")
        missing += [f"{name} has no {kind} scene" for kind in ("carbonate", "barren") if not counts[kind]]
    says.append(f"balanced test {balanced}")
    if balanced < SMALL_TEST:
        # Half the width of the 95 % interval of a share of one half.
        width = 0.98 / max(balanced, 1) ** 0.5
        missing.append(f"{balanced} scenes in the balanced test set are few: a share is known to ±{width:.0%} at best")
    return Finding("class balance", "warning" if missing else "ok", "; ".join([", ".join(says), *missing]))


def saturated(records: Sequence[Record], channels: Sequence[str], share: float) -> Finding:
    """Channels with many valid pixels at an end of their range."""
    over = [[r for r in records if r.saturated[c] > share] for c in range(len(channels))]
    says = [
        f"{name} in {len(scenes)} ({_worst(scenes, c)})"
        for c, (name, scenes) in enumerate(zip(channels, over, strict=True)) if scenes
    ]  # fmt: skip
    if says:
        message = f"scenes with over {share:.1%} of their valid pixels at 0 or 1: {', '.join(says)}"
        return _finding("saturated channels", "warning", message, over)
    highest = max((max(r.saturated) for r in records), default=0.0)
    return Finding("saturated channels", "ok", f"at most {highest:.1%} of a channel's valid pixels at 0 or 1")


def crushed(records: Sequence[Record], channels: Sequence[str]) -> Finding:
    """Channels in which an outlier leaves few grey levels to nearly all pixels.

    Only of image-wise stretched scenes: in a fixed range few levels are what a bland scene has.
    """
    over = [[r for r in records if r.crushed[c]] for c in range(len(channels))]
    says = [
        f"{name} in {len(scenes)} ({shown(r.observation_id for r in scenes)})"
        for name, scenes in zip(channels, over, strict=True) if scenes
    ]  # fmt: skip
    if says:
        message = (
            f"scenes stretched to an outlier, 98 % of their pixels within {CRUSHED:.0%} of the scale: {', '.join(says)}"
        )
        return _finding("crushed channels", "warning", message, over)
    return Finding("crushed channels", "ok", "no channel crushed by an outlier")


def no_data(records: Sequence[Record]) -> Finding:
    """Share of pixels without data, by split."""
    says = []
    for name in PARTS:
        shares = [r.no_data for r in records if r.split == name]
        if shares:
            says.append(f"{name} {np.mean(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})")
    empty = [r for r in records if r.no_data > MOSTLY_NO_DATA]
    if empty:
        says.append(f"over {MOSTLY_NO_DATA:.0%} in {shown(map(str, empty))}")
    return _finding("no data", "warning" if empty else "ok", ", ".join(says), [empty])


def regions(records: Sequence[Record]) -> Finding:
    """Which regions stand in one split only (information)."""
    held: dict[str, set[str]] = defaultdict(set)
    for record in records:
        held[record.region].add(record.split)
    single = [f"{name}: {shown(sorted(r for r, s in held.items() if s == {name}))}"
              for name in PARTS if {name} in held.values()]  # fmt: skip
    says = f"{len(held)} regions; in one split only: {'; '.join(single)}" if single else f"{len(held)} regions"
    return Finding("regions", "ok", says if single else f"{says}, each in several splits")


def counted(count: int, what: str) -> str:
    """1 pair, 2 pairs."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def shown(items: Iterable[str], most: int = 6) -> str:
    """Items in a sentence, the first ones where they are many."""
    words = list(items)
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _pairs_finding(check: str, worst: Verdict, what: str, said: Sequence[tuple[Record, Record, str]]) -> Finding:
    # Two ids of one observation are told by the first check.
    said = [entry for entry in said if entry[0].number != entry[1].number]
    across = [entry for entry in said if entry[0].split != entry[1].split]
    within = len(said) - len(across)
    if not said:
        return Finding(check, "ok", f"no {what}")
    says = shown(f"{a} and {b} ({why})" for a, b, why in across or said)
    also = f" and {within} within one" if within else ""
    message = f"{counted(len(across), 'pair')} of {what} across splits{also}: {says}"
    return _finding(check, worst if across else "warning", message, [(a, b) for a, b, _ in across or said])


def _finding(check: str, verdict: Verdict, message: str, groups: Iterable[Sequence[Record]]) -> Finding:
    return Finding(check, verdict, message, tuple(dict.fromkeys(r.observation_id for group in groups for r in group)))


def _grouped(records: Iterable[Record], key: Callable[[Record], object]) -> list[list[Record]]:
    groups: dict[object, list[Record]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return list(groups.values())


def _groups_shown(groups: Sequence[Sequence[Record]]) -> str:
    return shown(" = ".join(map(str, group)) for group in groups)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _worst(scenes: Sequence[Record], channel: int) -> str:
    worst = max(scenes, key=lambda r: r.saturated[channel])
    return f"most {worst.observation_id} {worst.saturated[channel]:.1%}"


def _unit_vectors(degrees: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
    longitude, latitude = np.radians(np.array(degrees, dtype=np.float64)).T
    x, y = np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude)
    return np.column_stack([x, y, np.sin(latitude)])
