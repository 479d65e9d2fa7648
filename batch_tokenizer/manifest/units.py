"""Units of work: consecutive pending rows of about equal cost, which processes claim one by one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.manifest.row import LineState
from batch_tokenizer.records import RunError


@dataclass(frozen=True, slots=True)
class Units:
    """Ranges of manifest lines, each claimed and worked on as one, in the order in which they are claimed.

    Attributes:
        starts, stops: int64 (U,), first line, and the line after the last, of each unit.
    """

    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, unit: int) -> tuple[int, int]:
        """(first line, line after the last) of a unit."""
        return int(self.starts[unit]), int(self.stops[unit])


#: Most rows and most known seconds of audio of a unit (one last row may pass the seconds).
_UNIT_ROWS = 64

_UNIT_SECONDS = 600.0

#: Units that a process should get at least, where there are rows enough, so that the last ones even out.
_UNITS_PER_PROCESS = 8

#: Blocks that a shard should get at least, where there are rows enough.
_BLOCKS_PER_SHARD = 64

#: A run of finished lines as long as this ends a unit: they would be read for nothing.
_UNIT_GAP = 16

_WEIGHT_ONE = 2**20


def _shard_blocks(manifest: Manifest, lines: npt.NDArray[np.int64], num_shards: int) -> npt.NDArray[np.int64] | None:
    """The block that each line lies in, block b being shard b % num_shards; None where there is one shard."""
    if num_shards == 1:
        return None
    return lines // max(1, min(_UNIT_ROWS, manifest.num_lines // (num_shards * _BLOCKS_PER_SHARD)))


def in_shard(manifest: Manifest, num_shards: int, shard: int) -> npt.NDArray[np.bool_]:
    """Bool (num_lines,): the lines, blank ones included, that ``plan_units`` gives to a shard."""
    blocks = _shard_blocks(manifest, np.arange(manifest.num_lines), num_shards)
    if blocks is None:
        return np.ones(manifest.num_lines, np.bool_)
    return blocks % num_shards == shard


def plan_units(
    manifest: Manifest,
    *,
    world_size: int,
    num_shards: int = 1,
    shard: int = 0,
    pending: npt.NDArray[np.bool_] | None = None,
) -> Units:
    """Cut the lines of one job into units. Every pending line of the shard lies in exactly one, and the answer
    depends on nothing but the arguments, so every process of the job finds the same.

    The longest units come first where durations are known, so that the last ones to be claimed are short. Units with
    a row of unknown duration may be long and come before those, in the manifest's order.

    Args:
        world_size: processes of this job.
        num_shards, shard: blocks of at most 64 lines are dealt to the shards in turn. This depends on the manifest and
            ``num_shards`` only, never on ``world_size`` or ``pending``: jobs that do not know of each other agree on
            it.
        pending: bool (num_lines,), the lines still to do, the same in every process of the job; None means all that
            are not blank. A unit may enclose lines that are not pending, which the caller skips.

    Raises:
        RunError: ``pending`` was made for another state of the manifest (exit code 1).
    """
    if pending is not None and len(pending) != manifest.num_lines:
        raise RunError(f"manifest {manifest.path} is not the same in all processes: is it still growing?", exit_code=1)
    lines = np.flatnonzero(~manifest.is_blank if pending is None else pending)
    blocks = _shard_blocks(manifest, lines, num_shards)
    if blocks is not None:
        mine = blocks % num_shards == shard
        lines, blocks = lines[mine], blocks[mine]
    if not len(lines):
        return Units(np.empty(0, np.int64), np.empty(0, np.int64))

    # 1. What each line costs. A refused one costs nothing, whatever its duration.
    seconds = np.where(manifest.states[lines] == LineState.ROW, manifest.durations[lines], 0.0).astype(np.float64)
    shares = world_size * _UNITS_PER_PROCESS
    most_rows = max(1, min(_UNIT_ROWS, len(lines) // shares))
    most_seconds = max(1e-3, min(_UNIT_SECONDS, float(np.nansum(seconds)) / shares or _UNIT_SECONDS))
    # 2. Cut where a unit is full: a row weighs its share of a full unit, by count or by seconds, and a unit ends where
    #    the running sum passes a whole number. Integers, as rounding must not let one row too many into a unit.
    weights = np.fmin(np.nan_to_num(seconds / most_seconds), 1.0) * _WEIGHT_ONE
    weights = np.maximum(weights.astype(np.int64), -(-_WEIGHT_ONE // most_rows))
    number = (np.cumsum(weights) - weights) // _WEIGHT_ONE
    # 3. Cut also at long runs of finished lines, and where the next block belongs to another shard.
    cuts = (np.diff(number) != 0) | (np.diff(lines) > _UNIT_GAP)
    if blocks is not None:
        cuts |= np.diff(blocks) != 0
    first = np.concatenate(([0], np.flatnonzero(cuts) + 1))
    last = np.concatenate((first[1:], [len(lines)])) - 1
    # 4. Longest first; a unit with a row of unknown duration sums to NaN and counts as longest.
    total = np.add.reduceat(seconds, first)
    order = np.argsort(-np.where(np.isnan(total), np.inf, total), kind="stable")
    return Units(lines[first][order], lines[last][order] + 1)
