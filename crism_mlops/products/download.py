"""Found observations -> FOLDER/observation_id/: what to fetch, whether there is room, several at a time."""

from __future__ import annotations

import errno
import queue
import re
import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from crism_mlops.products.mtrdr import parse_name
from crism_mlops.products.ode import Observation
from crism_mlops.products.service import ArchiveError, Service, new_session, shown
from crism_mlops.products.transfer import (
    DiskFullError,
    OnBytes,
    Record,
    Transfer,
    WantedFile,
    check_product,
    free_bytes,
    require_bytes,
)

KINDS = ("if", "de", "sr")
MAX_JOBS = 8
# Images last: header and label say what the image must be.
_SUFFIXES = ("hdr", "lbl", "tab", "txt", "img")
# How long threads are waited for when the download is called off.
_FAREWELL_S = 1.0


@dataclass(frozen=True, slots=True)
class Selection:
    """What is wanted of an observation: files by product, in the order of fetching; what the archive
    does not list (a line each); and what is left out (reason of each file)."""

    products: tuple[tuple[WantedFile, ...], ...]
    missing: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def files(self) -> tuple[WantedFile, ...]:
        return tuple(file for product in self.products for file in product)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A download before it starts: `bytes` as announced (approximate), of which `here_bytes` are there;
    `unknown` files have no announced size."""

    observations: int
    files: int
    bytes: int
    here_bytes: int
    unknown: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class DownloadReport:
    """What became of a download: files `fetched` and `there` before, `bytes` received, a line for each
    file that `failed`, and how many were left out for what reason."""

    fetched: int
    there: int
    bytes: int
    failed: tuple[str, ...]
    left_out: tuple[tuple[str, int], ...]

    @property
    def complete(self) -> bool:
        return not self.failed


def select(observation: Observation, kinds: Sequence[str] = KINDS) -> Selection:
    """The files of the wanted product kinds (`br` is every browse product).

    A name is taken as a file name only where it is that of a CRISM product of this observation with
    a plain suffix. Raises ArchiveError for a kind that cannot be one.
    """
    for kind in kinds:
        if re.fullmatch(r"[a-z]{2}([a-z0-9]{3})?", kind) is None:
            raise ArchiveError(f"{shown(kind, 40)!r} is not a kind of product; kinds are if, de, sr, su, in, wv, br")
    wanted: dict[str, dict[str, WantedFile]] = {}
    left_out: list[str] = []
    for announced in (file for product in observation.products for file in product.files):
        name = announced.name.lower()
        stem, _, suffix = name.partition(".")
        product = parse_name(Path(stem))
        if re.fullmatch(r"[a-z0-9][a-z0-9_.]*", name) is None:
            left_out.append("a name that is not a plain file name")
        elif product is None:
            left_out.append("not the name of a CRISM product")
        elif product.observation_id != observation.observation_id:
            left_out.append("of another observation")
        elif not any(product.kind == kind or (kind == "br" and product.kind.startswith("br")) for kind in kinds):
            left_out.append("of another kind")
        elif suffix not in _SUFFIXES:
            left_out.append("a suffix that is not kept")
        elif name in wanted.get(stem, {}):
            left_out.append("listed twice")
        else:
            wanted.setdefault(stem, {})[name] = WantedFile(name, announced.url, announced.bytes)
    missing = []
    for stem, files in sorted(wanted.items()):
        if f"{stem}.img" not in files:
            missing.append(f"{stem}.img: the archive does not list it under a name and of a kind that can be used")
        if not {f"{stem}.hdr", f"{stem}.lbl"} & set(files):
            missing.append(f"{stem}.hdr: the archive lists neither header nor label of that name")
    if not wanted:
        missing.append(f"{observation.observation_id}: the archive lists no product of {', '.join(kinds)}")
    ordered = (
        tuple(sorted(files.values(), key=lambda f: _SUFFIXES.index(f.name.rpartition(".")[2])))
        for _, files in sorted(wanted.items())
    )
    return Selection(tuple(ordered), tuple(missing), tuple(left_out))


def estimate(found: Sequence[Observation], folder: Path, kinds: Sequence[str] = KINDS) -> Estimate:
    """Count and size of what `download` would fetch, and the room there is.

    Raises ArchiveError where the folder cannot be looked at.
    """
    files = [(one.observation_id, file) for one in found for file in select(one, kinds).files]
    here = 0
    try:
        for identity, file in files:
            part = folder / identity / f".{file.name}.part"
            if (folder / identity / file.name).is_file():
                here += file.bytes or 0
            elif part.is_file():
                here += min(part.stat().st_size, file.bytes or 0)
        free = free_bytes(folder)
    except OSError as error:
        raise ArchiveError(f"{folder}: cannot be used ({error.strerror or error}); give another with -o") from error
    total = sum(file.bytes or 0 for _, file in files)
    return Estimate(len(found), len(files), total, here, sum(file.bytes is None for _, file in files), free)


def require_room(plan: Estimate, folder: Path) -> None:
    """Raises DiskFullError, with both figures, where the disk has no room for a download."""
    require_bytes(plan.bytes - plan.here_bytes, plan.free_bytes, folder)


def download(
    found: Sequence[Observation],
    folder: Path,
    service: Service | None = None,
    kinds: Sequence[str] = KINDS,
    jobs: int = 2,
    on_bytes: OnBytes | None = None,
    on_observation: Callable[[str, DownloadReport], None] | None = None,
) -> DownloadReport:
    """Fetch observations into `folder`/observation_id/, `jobs` (1 to 8) at a time.

    A file that cannot be had is in the report, and the others go on. `on_bytes(change)` follows the
    bytes that are on disk (from any thread; negative where a part has to be thrown away),
    `on_observation(id, report)` comes after each one. Raises ArchiveError where nothing can be fetched
    at all: no room, no such kind. Ctrl-C leaves parts that the next call goes on with.
    """
    if not 1 <= jobs <= MAX_JOBS:
        raise ArchiveError(f"{jobs} jobs; expected 1 to {MAX_JOBS}, the archive is everyone's")
    require_room(estimate(found, folder, kinds), folder)
    stop = threading.Event()

    def task(one: Observation) -> tuple[str, DownloadReport]:
        return one.observation_id, _fetch(one, folder, service or Service(), kinds, on_bytes or _ignore, stop)

    reports = []
    with closing(_in_threads(task, found, jobs, stop)) as results:
        for identity, report in results:
            reports.append(report)
            if on_observation is not None:
                on_observation(identity, report)
    return _together(reports)


def fetch_observation(
    found: Observation, folder: Path, service: Service, kinds: Sequence[str] = KINDS, on_bytes: OnBytes | None = None
) -> Path:
    """One observation's folder below `folder`, complete; what is there already is not fetched again.

    Raises ArchiveError that names the files where one is missing.
    """
    report = _fetch(found, folder, service, kinds, on_bytes or _ignore, threading.Event())
    if report.failed:
        more = f" (and {len(report.failed) - 1} more)" if len(report.failed) > 1 else ""
        raise ArchiveError(f"{found.observation_id} is not complete: {report.failed[0]}{more}")
    return folder / found.observation_id


def _fetch(
    observation: Observation,
    root: Path,
    service: Service,
    kinds: Sequence[str],
    on_bytes: OnBytes,
    stop: threading.Event,
) -> DownloadReport:
    from filelock import FileLock

    selection = select(observation, kinds)
    failed = list(selection.missing)
    fetched, there, received = 0, 0, 0
    try:
        folder = _own_folder(root, observation.observation_id)
        # Two downloads of one folder would write to the same parts: the second one waits.
        with FileLock(folder / ".download.lock"), new_session() as session:
            record = Record(folder)
            for product in selection.products:
                for file in product:
                    transfer = Transfer(file, folder, record, session, service, on_bytes, stop)
                    try:
                        if transfer.fetch():
                            fetched += 1
                        else:
                            there += 1
                    except DiskFullError:
                        raise
                    except ArchiveError as error:
                        failed.append(str(error))
                    received += transfer.received
                problem = check_product([file.name for file in product], folder, record)
                if problem is not None:
                    failed.append(problem)
    except NotImplementedError as error:
        raise ArchiveError(f"{root}: its file system has no locks; give another folder with -o") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"{root}: the disk is full; what was fetched is kept, free space and run the same command again"
            ) from error
        failed.append(f"{observation.observation_id}: {error.filename or root}: {error.strerror or error}")
    except DiskFullError:
        raise
    except ArchiveError as error:
        failed.append(str(error))
    counted = tuple(sorted(Counter(selection.left_out).items()))
    return DownloadReport(fetched, there, received, tuple(failed), counted)


def _own_folder(root: Path, identity: str) -> Path:
    folder = root / identity
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve().parent != root.resolve():
        raise ArchiveError(f"{folder}: a link out of {root}; remove it, or give another folder with -o")
    return folder


def _together(reports: Sequence[DownloadReport]) -> DownloadReport:
    left_out: Counter[str] = Counter()
    for report in reports:
        left_out.update(dict(report.left_out))
    return DownloadReport(
        sum(r.fetched for r in reports),
        sum(r.there for r in reports),
        sum(r.bytes for r in reports),
        tuple(failure for r in reports for failure in r.failed),
        tuple(sorted(left_out.items())),
    )


def _ignore(change: int) -> None:
    pass


def _in_threads(
    task: Callable[[Observation], tuple[str, DownloadReport]],
    found: Sequence[Observation],
    jobs: int,
    stop: threading.Event,
) -> Generator[tuple[str, DownloadReport], None, None]:
    """Results of `task` as they come; what it raises, and Ctrl-C, ends the others soon."""
    if jobs == 1 or len(found) < 2:
        yield from map(task, found)
        return
    todo: queue.SimpleQueue[Observation] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[str, DownloadReport] | BaseException] = queue.SimpleQueue()
    for one in found:
        todo.put(one)

    def work() -> None:
        try:
            while not stop.is_set():
                done.put(task(todo.get_nowait()))
        except queue.Empty:
            pass
        except BaseException as error:
            done.put(error)

    # Not an executor: its threads are waited for at exit, and one that hangs on a dead server would
    # hold Ctrl-C up until the timeout.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(jobs, len(found)))]
    for thread in threads:
        thread.start()
    try:
        for _ in found:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stop.set()
        for thread in threads:
            thread.join(_FAREWELL_S / len(threads))
