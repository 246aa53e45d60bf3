"""Content-addressed files, written once: built scenes and data sets, in a folder or at an fsspec URL.

A name says what is in the file (a digest of all that it was made from), so a file never changes,
and it appears under its name when all of it is written. What the disk itself turns round in it
afterwards is not looked for.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crism_mlops.errors import StoreError, UntrustedError, one_line
from crism_mlops.redact import remembered
from crism_mlops.untrusted import tensor_shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Left free on the disk by whoever writes: a full disk takes other programs down as well.
RESERVE_BYTES = 256 << 20


class Store:
    """Files under a folder or an fsspec URL (s3://bucket/prefix, memory://...).

    `mirror` is a local folder: what lies elsewhere is fetched there once, to be mapped into
    memory. An instance is cheap and can be pickled. Raises StoreError for a URL that is of no use.
    """

    def __init__(self, url: str, mirror: Path) -> None:
        self.url = remembered(url)
        self.mirror = mirror

    @cached_property
    def _place(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        try:
            system, root = url_to_fs(os.path.expanduser(self.url))
        except Exception as error:  # each protocol's package has its own
            raise StoreError(
                f"data.store {self.url}: {one_line(error)}; give a folder, or a URL whose fsspec package is installed "
                "(pip install 'crism-mlops[s3]' for s3://)"
            ) from error
        return system, root

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "mirror": self.mirror}

    @property
    def is_local(self) -> bool:
        """Whether the store is a folder of this machine."""
        from fsspec.implementations.local import LocalFileSystem

        return isinstance(self._place[0], LocalFileSystem)

    @property
    def folder(self) -> Path:
        """Where the store's files (or their copies) lie on this machine."""
        if self.is_local:
            return Path(self._place[1])
        from crism_mlops.config import digest_of

        return self.mirror / "stores" / digest_of(self.url)

    def exists(self, name: str) -> bool:
        """Whether a file is in the store; where that lies elsewhere, a copy here says nothing."""
        if self.is_local:
            return (self.folder / name).is_file()
        system, root = self._place
        with self._remote(f"look for {name}"):
            # Another process may have written it since the listing that fsspec remembers.
            system.invalidate_cache()
            return bool(system.isfile(f"{root}/{name}"))

    def names(self, folder: str) -> set[str]:
        """Names of all files below a folder of the store, in one listing."""
        if self.is_local:
            with self._errors(f"list {folder}"):
                files = (self.folder / folder).rglob("*.*") if (self.folder / folder).is_dir() else iter(())
                return {p.relative_to(self.folder).as_posix() for p in files if not p.name.startswith(".")}
        system, root = self._place
        with self._remote(f"list {folder}"):
            system.invalidate_cache()
            prefix = f"{root}/".lstrip("/")
            return {str(p).lstrip("/").removeprefix(prefix) for p in system.find(f"{root}/{folder}")}

    def path(self, name: str) -> Path:
        """A local path of a stored file; fetched first where the store lies elsewhere."""
        local = self.folder / name
        if local.is_file() or self.is_local:
            return local
        system, root = self._place
        with self._errors(f"fetch {name}"), self._partial(local) as partial:
            with self._remote(f"fetch {name}"):
                system.get_file(f"{root}/{name}", str(partial))
            partial.replace(local)
        return local

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """`path` around making sense of a stored file: what is wrong with its content is a StoreError.

        It names the file, or where the store lies elsewhere the object there; its copy here is then
        removed, so that it is fetched again.
        """
        path = self.path(name)
        try:
            yield path
        except (_DamagedError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            place = str(path)
            if not self.is_local:
                path.unlink(missing_ok=True)
                place = f"data.store {self.url}: {name}"
            raise StoreError(
                f"{place}: damaged ({one_line(error)}); remove it, then run the same command again to build it anew"
            ) from error

    def check_size(self, name: str) -> None:
        """Raises StoreError where a file of a store that lies elsewhere has not the size of its copy here."""
        if self.is_local:
            return
        system, root = self._place
        with self._remote(f"look for {name}"):
            system.invalidate_cache()
            size = int(system.size(f"{root}/{name}") or 0)
        if size != self.path(name).stat().st_size:
            raise StoreError(
                f"data.store {self.url}: {name}: damaged (it has {size} bytes, its copy here "
                f"{self.path(name).stat().st_size}); remove it, then run the same command again to build it anew"
            )

    def put(self, name: str, write: Callable[[Path], None]) -> Path:
        """The local path of a file, written by `write(path)` unless it is there already.

        Written under a temporary name and renamed, so that a killed process leaves nothing
        half-written; of several processes on a machine one writes and the others wait for it.
        """
        from filelock import FileLock

        if self.exists(name):
            return self.path(name)
        local = self.folder / name
        with self._errors(f"write {name}"):
            local.parent.mkdir(parents=True, exist_ok=True)
            locks = self.folder / ".locks"
            locks.mkdir(exist_ok=True)
            with FileLock(locks / f"{local.stem}.lock"):
                if self.exists(name):
                    return self.path(name)
                # Who holds the lock is alone: these are of processes that were killed.
                for stale in local.parent.glob(f".{local.name}.*.partial"):
                    stale.unlink(missing_ok=True)
                if not local.is_file():
                    self.need(0)
                    with self._partial(local) as partial:
                        write(partial)
                        partial.replace(local)
                if not self.is_local:
                    system, root = self._place
                    with self._remote(f"write {name}"):
                        # An object store shows an object when all of it has arrived.
                        system.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
                        system.put_file(str(local), f"{root}/{name}")
        return local

    def need(self, size: int) -> None:
        """Raises StoreError where the disk has no room for `size` bytes more, and a reserve."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < size + RESERVE_BYTES:
            raise StoreError(
                f"{self.folder}: {free / 1e9:.2f} GB free, {(size + RESERVE_BYTES) / 1e9:.2f} GB needed (with a "
                f"reserve of {RESERVE_BYTES / 1e9:.2f}); free space or set data.store to another disk, then run the "
                "same command again: what is built is kept"
            )

    @contextmanager
    def _partial(self, local: Path) -> Iterator[Path]:
        """A temporary name beside `local`, removed if it is still there at the end."""
        local.parent.mkdir(parents=True, exist_ok=True)
        partial = local.with_name(f".{local.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._error(doing, error) from error

    @contextmanager
    def _remote(self, doing: str) -> Iterator[None]:
        """Around nothing but calls of the store's file system: those of botocore and the like raise
        exceptions that have no common root."""
        try:
            yield
        except Exception as error:
            raise self._error(doing, error) from error

    def _error(self, doing: str, error: Exception) -> StoreError:
        what = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
        return StoreError(
            f"data.store {self.url}: cannot {doing} ({what}); check the folder or the URL, its permissions and its "
            "free space, then run the same command again: what is built is kept"
        )


class _DamagedError(StoreError):
    """A safetensors file that cannot be read as one."""


def write_arrays(path: Path, arrays: dict[str, NDArray[Any]], facts: dict[str, str]) -> None:
    """Arrays and facts (text by text) as one safetensors file."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, str(path), metadata=facts)
    except SafetensorError as error:
        # A full disk, in safetensors' words.
        raise StoreError(
            f"{path.parent}: cannot be written ({one_line(error)}); free space or set data.store to another disk, then "
            "run the same command again: what is built is kept"
        ) from error


def read_facts(path: Path) -> dict[str, str]:
    """The facts of a safetensors file, without its arrays; to be called within `Store.reading`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as handle:
            return dict(handle.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _DamagedError(one_line(error)) from error


def map_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file, mapped into memory: pages are read when they are looked at.

    To be called within `Store.reading`, which names the file if it is damaged.
    """
    return {name: tensor.numpy() for name, tensor in map_tensors(path).items()}


def map_tensors(path: Path) -> dict[str, Any]:
    """As `map_arrays`, torch tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        tensor_shapes(path)
        # torch maps the file; the numpy reader would copy all of it.
        with safe_open(str(path), framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 -- not a dict
    except (UntrustedError, SafetensorError, OSError, MemoryError) as error:
        raise _DamagedError(one_line(error)) from error


def content_digest(arrays: Sequence[NDArray[Any]]) -> str:
    """Digest of arrays' shapes, types and bytes: 16 hex digits."""
    import numpy as np

    content = blake2b(digest_size=8)
    for array in arrays:
        content.update(f"{array.shape} {array.dtype.str}".encode())
        content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()
