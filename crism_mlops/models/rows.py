"""A data set as a training step reads it: rows of tensors, gathered into batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]
# A data set is kept on a GPU where it takes less than this share of what is free there.
RESIDENT_SHARE = 0.25


class Rows:
    """Blocks of tensors (each with one row a sample, most of them mapped into memory), one after the other.

    `labels` names each row's observation. `tables` are shared by rows: NAME U x ..., of which a batch's
    row has the one that the blocks' column NAME_row (int64) says.
    """

    def __init__(
        self,
        blocks: Sequence[Mapping[str, torch.Tensor]],
        labels: Sequence[str] | None = None,
        tables: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._blocks = tuple(blocks)
        self._places = [(b, r) for b, block in enumerate(blocks) for r in range(len(next(iter(block.values()))))]
        self.labels = tuple(map(str, range(len(self._places)))) if labels is None else tuple(labels)
        self.tables = dict(tables or {})

    def __len__(self) -> int:
        return len(self._places)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, tables aside."""
        return sum(t.nbytes for block in self._blocks for t in block.values())

    def only(self, kept: torch.Tensor) -> Rows:
        """The rows where `kept`, N bool, is set."""
        chosen = [i for i, keep in enumerate(kept.tolist()) if keep]
        rows = Rows(self._blocks, self.labels, self.tables)
        rows._places = [self._places[i] for i in chosen]
        rows.labels = tuple(self.labels[i] for i in chosen)
        return rows

    def batch(self, rows: Sequence[int] | torch.Tensor) -> Tensors:
        """The tensors of some rows, in their order."""
        import torch

        places = [self._places[int(i)] for i in rows]
        names = self._blocks[0].keys()
        tensors = {name: torch.stack([self._blocks[b][name][r] for b, r in places]) for name in names}
        for name, table in self.tables.items():
            tensors[name] = table[tensors.pop(f"{name}_row")]
        return tensors

    def resident(self, device: str) -> Rows:
        """These rows on a GPU where there is room for them; else themselves."""
        import torch

        if not device.startswith("cuda"):
            return self
        free, _ = torch.cuda.mem_get_info(device)
        if self.nbytes > RESIDENT_SHARE * free:
            return self
        blocks = [{name: tensor.to(device) for name, tensor in block.items()} for block in self._blocks]
        rows = Rows(blocks, self.labels, {name: table.to(device) for name, table in self.tables.items()})
        rows._places = self._places
        return rows


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch's rows and tensors, on the device."""

    rows: torch.Tensor
    tensors: Tensors


def batches(data: Rows, order: Iterable[torch.Tensor], device: str) -> Iterator[Batch]:
    """The batches of some rows each, on the device; for a GPU the next one is gathered while one is computed with.

    One thread is enough: a batch is copied, not decoded. On a CPU it has none of its own: torch keeps a pool of
    threads for each thread that computes, and two pools on the same cores made a step a tenth slower (measured).
    """

    def gather(rows: torch.Tensor) -> Batch:
        return Batch(rows, {name: tensor.to(device, non_blocking=True) for name, tensor in data.batch(rows).items()})

    if device == "cpu":
        yield from map(gather, order)
        return
    with ThreadPoolExecutor(1) as pool:
        coming: Future[Batch] | None = None
        for rows in order:
            following = pool.submit(gather, rows)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()
