"""``TokenDataset``: stored tokens as a torch ``IterableDataset``, split over ranks and workers, and resumable."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from batch_tokenizer.audio.decoding import decode_bytes
from batch_tokenizer.dataset.epoch_order import EpochOrder, Range, count, remaining, share_of_rank
from batch_tokenizer.records import RowError, RunError
from batch_tokenizer.runs.indexed_rows import IndexedRows
from batch_tokenizer.runs.stored_rows import StoredRow

#: Blocks whose rows are mixed with each other by ``shuffle=True``: 8,192 rows, or row groups of parquet, which are held
#: in memory.
_WINDOW_BLOCKS, _WINDOW_GROUPS = 32, 4

#: What must be the same when a state is loaded as when it was saved.
_SAME = ("num_rows", "shuffle", "seed", "drop_uneven")

#: Also this, in the state of one of several DataLoader workers.
_SAME_OF_WORKERS = ("world_size", "rank", "num_workers", "batch_size")


class TokenDataset(IterableDataset[dict[str, Any]]):
    """Every row of stored tokens once an epoch, over all ranks and DataLoader workers.

    ``source`` is a run folder, shards (``"out/*.parquet"``), a folder of shards or of token files, a manifest of token
    files, or what ``batch_tokenizer convert`` wrote. A row is a dictionary:

    - ``key``: str, the utterance's name
    - ``codes``: int64 (T, K), T frames of K codebooks
    - ``other_codes``: where the run had ``--audio_fields``, int64 (T, K) of the row's other audio, by their name
    - ``fields``: dict, what is stored of the row: the fields of its manifest, and codec, sample rate and so on
    - ``audio``, ``sample_rate``: where the row has audio, float32 (S,), or (channels, S) of several channels, and Hz
    - ``hidden_states``: where the row has some, float16 (T, d), those from which the codes were made

    Ranks get contiguous parts of an epoch's order whose sizes differ by one row at most. A rank's workers take turns,
    ``batch_size`` rows each, so that with the DataLoader's own ``batch_size`` its batches are the same for any number
    of workers.

    ``set_epoch(n)`` before each epoch gives it an order of its own. ``state_dict`` and ``load_state_dict`` continue an
    epoch with the row after the last one, in one of two ways:

    - Without workers, or with ``state_dict(consumed=rows)``, the state is that of a rank. All ranks have to have
      consumed equally many rows, and any of their states can be loaded on all of them, whatever their number is then.
    - In torchdata's ``StatefulDataLoader`` with workers, each worker has a state; it is loaded with the same numbers of
      ranks and workers.

    Args:
        source: a path, a glob, or several with braces.
        shuffle: True puts blocks of rows (256, or a row group of parquet) in a random order and mixes the rows of
            neighbouring blocks; ``"rows"`` permutes all rows, which is slow for parquet and takes 8 bytes a row.
        seed: with the epoch's number decides the order.
        batch_size: that of the DataLoader.
        drop_uneven: leave out up to ``world_size - 1`` rows an epoch, so that all ranks have equally many.
        audio: read audio and hidden states where there are some.
        rank, world_size: which part is read; by default torch.distributed's where a process group is initialised, else
            RANK and WORLD_SIZE of the environment, else everything.

    Raises:
        ValueError: the source cannot be read, or an argument is impossible. Iterating raises it for a row that cannot
            be read. The message names the file.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        shuffle: bool | Literal["rows"] = False,
        seed: int = 0,
        batch_size: int = 1,
        drop_uneven: bool = False,
        audio: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        if shuffle not in (False, True, "rows"):
            raise ValueError(f'shuffle={shuffle!r}: must be False, True or "rows"')
        if seed < 0 or batch_size < 1:
            raise ValueError(f"seed={seed}, batch_size={batch_size}: must be at least 0 and 1")
        self.rank, self.world_size = _find_rank(rank, world_size)
        self.shuffle, self.seed = shuffle, seed
        self.batch_size, self.drop_uneven = batch_size, drop_uneven
        self._audio = audio
        try:
            self._rows = IndexedRows.open(os.fspath(source))
        except RunError as error:
            raise ValueError(str(error)) from error
        self._block_starts = np.append(self._rows.block_starts(), len(self._rows))
        # Workers that outlive an epoch see the next one's number; they in turn leave a mark that it is they who read.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._read_by_workers = torch.zeros((), dtype=torch.bool).share_memory_()
        # A loaded state: its epoch, what was left of it, and the rows that this worker has had of that.
        self._resumed: tuple[int, tuple[Range, ...], int] | None = None
        self._resumed_worker: int | None = None
        # The epoch that is being read, and the rows that this worker has had of it.
        self._progress: tuple[int, int] | None = None

    @property
    def epoch(self) -> int:
        """The number that ``set_epoch`` gave, or the loaded state's."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration, which begins at its first row unless a state of it was loaded.

        Raises:
            ValueError: ``epoch`` is negative.
        """
        if epoch < 0:
            raise ValueError(f"epoch {epoch}: must be at least 0")
        self._epoch.fill_(epoch)

    @property
    def num_rows(self) -> int:
        """Rows of the source."""
        return len(self._rows)

    def __len__(self) -> int:
        """Rows that this rank reads in a whole epoch."""
        return count(self._share(((0, len(self._rows)),)))

    @cached_property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes of each of the K codebooks, as the first row says.

        Raises:
            ValueError: it does not say.
        """
        row = self._read(0, with_audio=False)
        sizes = row.info.get("codebook_sizes")
        width = 0 if row.codes is None else row.codes.shape[1]
        if not isinstance(sizes, list) or len(sizes) < width or not all(isinstance(size, int) for size in sizes):
            raise ValueError(f"{self._rows.source}: row {row.key} does not say how large its codebooks are")
        return tuple(sizes[:width])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows of this rank and worker, from the loaded state on, or from the epoch's beginning."""
        worker, num_workers = _find_worker()
        self._read_by_workers.fill_(get_worker_info() is not None)
        if self._resumed_worker not in (None, worker):
            raise ValueError(f"worker {worker} has the state of worker {self._resumed_worker}")
        epoch = self.epoch
        ranges, had = self._begin()
        self._progress = epoch, had
        window = _WINDOW_GROUPS if self._rows.has_row_groups else _WINDOW_BLOCKS
        blocks = {False: None, True: window, "rows": len(self._block_starts)}[self.shuffle]
        order = EpochOrder(self._block_starts, blocks, self.seed, epoch)
        own = 0
        for place, row in enumerate(order.rows(self._share(ranges))):
            if place // self.batch_size % num_workers != worker:
                continue
            own += 1
            if own <= had:
                continue
            sample = self._sample(self._read(row, with_audio=self._audio))
            self._progress = epoch, own
            yield sample

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """JSON values from which ``load_state_dict`` goes on.

        Args:
            consumed: rows that this rank has had in this iteration, all its workers together, with the DataLoader's
                ``batch_size``; None for those that this process has read itself.

        Raises:
            ValueError: None is given, and DataLoader workers read the rows, so that this process does not know.
        """
        worker, num_workers = _find_worker()
        ranges, had = self._begin()
        if consumed is not None:
            worker, num_workers = 0, 1
        elif get_worker_info() is None and bool(self._read_by_workers):
            raise ValueError(
                "DataLoader workers read the rows: call state_dict(consumed=rows that this rank has had), "
                "or use torchdata's StatefulDataLoader"
            )
        else:
            consumed = self._progress[1] if self._progress and self._progress[0] == self.epoch else had
        return {
            **{name: getattr(self, name) for name in (*_SAME, "epoch", "world_size", "rank", "batch_size")},
            "num_workers": num_workers,
            "worker": worker,
            "ranges": [list(positions) for positions in ranges],
            "consumed": consumed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was saved, from the next ``iter`` on.

        Raises:
            ValueError: it is no such state, or one of another dataset, order or number of workers.
        """
        here = {name: getattr(self, name) for name in (*_SAME, "world_size", "rank", "batch_size")}
        here["num_workers"] = _find_worker()[1]
        try:
            of_worker = state["num_workers"] > 1
            for name in (*_SAME, *(_SAME_OF_WORKERS if of_worker else ())):
                if state[name] != here[name]:
                    raise ValueError(f"the state was saved with {name} {state[name]}, here it is {here[name]}")
            ranges = tuple((int(begin), int(end)) for begin, end in state["ranges"])
            epoch, consumed = int(state["epoch"]), int(state["consumed"])
            if of_worker:
                self._resumed_worker = int(state["worker"])
                self._resumed = epoch, ranges, consumed
            else:
                left = remaining(ranges, consumed, int(state["world_size"]), drop_uneven=self.drop_uneven)
                self._resumed_worker = None
                self._resumed = epoch, left, 0
        except (KeyError, TypeError) as error:
            raise ValueError(f"no state of a TokenDataset: {error}") from error
        self._progress = None
        self._epoch.fill_(epoch)

    def _begin(self) -> tuple[tuple[Range, ...], int]:
        """What was left of the epoch when this iteration began, and the rows of it that this worker had then."""
        if self._resumed is not None and self._resumed[0] == self.epoch:
            return self._resumed[1:]
        return ((0, len(self._rows)),), 0

    def _share(self, ranges: tuple[Range, ...]) -> tuple[Range, ...]:
        return share_of_rank(ranges, self.rank, self.world_size, drop_uneven=self.drop_uneven)

    def _read(self, row: int, *, with_audio: bool) -> StoredRow:
        try:
            return self._rows.read(row, with_audio=with_audio)
        except RowError as error:
            raise ValueError(error.reason) from error

    def _sample(self, row: StoredRow) -> dict[str, Any]:
        if row.codes is None:
            raise ValueError(f"{self._rows.source}: row {row.key} has no tokens")
        sample: dict[str, Any] = {
            "key": row.key,
            "codes": torch.from_numpy(row.codes.astype(np.int64)),
            "fields": dict(row.info),
        }
        if row.other_codes:
            others = {name: torch.from_numpy(codes.astype(np.int64)) for name, codes in row.other_codes.items()}
            sample["other_codes"] = others
        if not self._audio:
            return sample
        if row.hidden_states is not None:
            sample["hidden_states"] = torch.from_numpy(row.hidden_states.copy())
        if row.audio is not None:
            try:
                samples, rate = decode_bytes(row.audio, f"{row.key}.{row.audio_format}")
            except RowError as error:
                raise ValueError(f"{self._rows.source}: {error.reason}") from error
            sample["audio"] = torch.from_numpy(samples[0] if len(samples) == 1 else samples)
            sample["sample_rate"] = rate
        return sample


def _find_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """
    Raises:
        ValueError: one is given without the other, or they are impossible.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank={rank}, world_size={world_size}: give both or none")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            named = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
            try:
                rank, world_size = int(named[0]), int(named[1])
            except ValueError as error:
                raise ValueError(f"RANK={named[0]} and WORLD_SIZE={named[1]} are no numbers") from error
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}: must be 0 to {world_size - 1}")
    return rank, world_size


def _find_worker() -> tuple[int, int]:
    """The number of this DataLoader worker, and how many there are; (0, 1) where the process is none."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
