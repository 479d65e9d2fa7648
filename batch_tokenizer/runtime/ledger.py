"""What the ledger says: how each row of the manifest ended, from all its append-only files together.

Every process of every attempt appends to a file of its own (``LedgerWriter``), after the row's outputs are published,
so writers need no locks and nothing that was written is ever changed; rows in shards have one file for each shard
(``shard_ledger.py``). ``read_ledger`` turns all files into a ``LedgerState``, one status a manifest line, which alone
decides what a resumed run does.

A line torn by a crash, a file of zero bytes, a tail of NUL bytes after a power loss: ignored, counted, logged. Their
rows are done again, which is harmless, as publishing the same row twice yields the same file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.records import LedgerEntry
from batch_tokenizer.runtime.ledger_lines import PRIORITY, Entries, decode_entry, parse_lines, read_blocks
from batch_tokenizer.storage.atomic import atomic_write, os_error_ends_run
from batch_tokenizer.storage.json_lines import json_lines_writer

logger = logging.getLogger(__name__)


class RowStatus(IntEnum):
    """How a manifest line stands. ``BLANK`` lines are no rows."""

    PENDING = 0
    DONE = 1
    FAILED = 2
    BLANK = 3


_STATUS_OF_PRIORITY = np.array([RowStatus.PENDING, RowStatus.PENDING, RowStatus.FAILED, RowStatus.DONE], np.uint8)
_PRIORITIES = 4

#: How many keys of changed rows are remembered for the message.
_KEYS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class LedgerState:
    """What all ledger files together say about a manifest.

    Attributes:
        status: uint8 (num_lines,) of ``RowStatus``.
        num_samples: int64 (num_lines,), input length in samples of rows that are done, else 0.
        frames: uint32 (num_lines,), token frames of rows that are done, else 0.
        weights: int32 (num_lines,), attempt and priority of the entry that decided a line's status; 0 without one.
        num_done, num_failed, num_pending: rows; together the manifest's rows.
        num_changed: keys of the manifest that are done in the ledger, but with another line than the manifest's.
        changed_keys: some of them.
        num_removed: entries of rows that the manifest no longer has.
        num_unreadable: lines of the ledger that were ignored.
    """

    status: npt.NDArray[np.uint8]
    num_samples: npt.NDArray[np.int64]
    frames: npt.NDArray[np.uint32]
    weights: npt.NDArray[np.int32]
    num_done: int
    num_failed: int
    num_pending: int
    num_changed: int
    changed_keys: tuple[str, ...]
    num_removed: int
    num_unreadable: int

    @property
    def pending(self) -> npt.NDArray[np.bool_]:
        """Bool (num_lines,): rows that are neither done nor failed."""
        return self.status == RowStatus.PENDING


class _Matcher:
    """Finds the manifest lines that entries apply to."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._is_row = manifest.is_row

    def match(self, entries: Entries) -> npt.NDArray[np.int64]:
        """int64 (entries,): the line; -1 where no line has the digest, -2 where the entry no longer applies to it.

        The line of the entry's own number, if it has the digest; otherwise, as rows may have been inserted or moved,
        the first that has it. A failure found in the manifest applies as long as the manifest still refuses that
        line, any other entry as long as it does not.
        """
        num_lines = self._manifest.num_lines
        lines = np.where((entries.lines >= 0) & (entries.lines < num_lines), entries.lines, 0)
        moved = np.flatnonzero((lines != entries.lines) | (self._manifest.digests[lines] != entries.digests))
        if len(moved):
            lines[moved] = self._manifest.find_lines(entries.digests[moved])
        applies = self._is_row[lines] != entries.at_manifest
        lines[(lines >= 0) & ~applies] = -2
        return lines


class _UnknownRows:
    """Counts entries whose digest no line has: rows that were changed in the manifest, or removed from it."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._known: npt.NDArray[np.uint64] | None = None
        self._changed: list[npt.NDArray[np.uint64]] = []
        self.changed_keys: dict[str, None] = {}
        self.num_removed = 0

    def add(self, entries: Entries, numbers: npt.NDArray[np.intp]) -> None:
        """Count the entries of those numbers. Changed are those that were done under a key that the manifest has."""
        if not len(numbers):
            return
        if self._known is None:
            self._known = np.unique(self._manifest.key_hashes)
        keys = [entries.keys[number] for number in numbers]
        hashes = np.array([0 if key is None else self._manifest.hash_key(key) for key in keys], np.uint64)
        at = np.minimum(np.searchsorted(self._known, hashes), max(0, len(self._known) - 1))
        known = (hashes != 0) & (self._known[at] == hashes)
        self.num_removed += int(np.count_nonzero(~known))
        changed = np.flatnonzero(known & (entries.priorities[numbers] == PRIORITY["done"]))
        self._changed.append(hashes[changed])
        for number in changed[: _KEYS_SHOWN - len(self.changed_keys)]:
            self.changed_keys[str(keys[number])] = None

    @property
    def num_changed(self) -> int:
        """Different keys among the changed rows."""
        return len(np.unique(np.concatenate(self._changed))) if self._changed else 0


def read_ledger(run_dir: Path, manifest: Manifest, *, idle: Callable[[], None] | None = None) -> LedgerState:
    """What the ledger in ``run_dir`` says about the manifest; a folder without ledger says that nothing is done.

    A later attempt wins over an earlier one; within an attempt, done wins over failed, and both over redo.

    Args:
        idle: called a few times a second while reading; an exception of its ends the reading.

    Raises:
        RunError: a ledger file cannot be read (exit code 1).
    """
    weights = np.zeros(manifest.num_lines, np.int32)
    num_samples = np.zeros(manifest.num_lines, np.int64)
    frames = np.zeros(manifest.num_lines, np.uint32)
    matcher, unknown = _Matcher(manifest), _UnknownRows(manifest)
    num_unreadable = 0
    for block in read_blocks(run_dir):
        if idle is not None:
            idle()
        # 1. Parse.
        entries, _, unreadable = parse_lines(block.lines)
        if unreadable:
            num_unreadable += unreadable
            logger.warning("%s: %d unreadable lines ignored", block.file.path, unreadable)
        # 2. Find the lines that the entries apply to.
        lines = matcher.match(entries)
        unknown.add(entries, np.flatnonzero(lines == -1))
        # 3. Keep what outweighs the entries before, in ascending order, as of several assignments to one line the last
        #    one stays.
        entry_weights = block.file.attempt * _PRIORITIES + entries.priorities
        order = np.argsort(entry_weights, kind="stable")
        order = order[lines[order] >= 0]
        order = order[entry_weights[order] > weights[lines[order]]]
        weights[lines[order]] = entry_weights[order]
        num_samples[lines[order]] = entries.num_samples[order]
        frames[lines[order]] = entries.frames[order]

    status = _STATUS_OF_PRIORITY[weights % _PRIORITIES]
    status[manifest.is_blank] = RowStatus.BLANK
    num_samples[status != RowStatus.DONE] = 0
    frames[status != RowStatus.DONE] = 0
    counts = np.bincount(status, minlength=len(RowStatus))
    return LedgerState(
        status=status,
        num_samples=num_samples,
        frames=frames,
        weights=weights,
        num_done=int(counts[RowStatus.DONE]),
        num_failed=int(counts[RowStatus.FAILED]),
        num_pending=int(counts[RowStatus.PENDING]),
        num_changed=unknown.num_changed,
        changed_keys=tuple(unknown.changed_keys),
        num_removed=unknown.num_removed,
        num_unreadable=num_unreadable,
    )


class MatchedEntries(NamedTuple):
    """Entries of one file that apply to rows of the manifest, as columns of equal length.

    Attributes:
        attempt: that wrote them.
        lines: int64, the manifest's lines that they apply to.
        num_samples, frames: int64 and uint32, as in ``LedgerEntry``.
    """

    attempt: int
    lines: npt.NDArray[np.int64]
    num_samples: npt.NDArray[np.int64]
    frames: npt.NDArray[np.uint32]


def matched_entries(
    run_dir: Path, manifest: Manifest, status: Literal["done", "failed", "redo"]
) -> Iterator[MatchedEntries]:
    """All entries of one status, overruled ones too, earliest attempt first, some ten thousand lines at a time.

    Raises:
        RunError: a ledger file cannot be read (exit code 1).
    """
    matcher = _Matcher(manifest)
    needle = f'"{status}"'.encode()
    for block in read_blocks(run_dir):
        entries, _, _ = parse_lines([line for line in block.lines if needle in line])
        lines = matcher.match(entries)
        kept = (lines >= 0) & (entries.priorities == PRIORITY[status])
        yield MatchedEntries(block.file.attempt, lines[kept], entries.num_samples[kept], entries.frames[kept])


def read_checksums(run_dir: Path, manifest: Manifest, state: LedgerState) -> dict[str, npt.NDArray[np.int64]]:
    """The checksums of outputs that were recorded with the rows done in ``state``: by name, int64 (num_lines,) of
    CRC-32 values, -1 where there is none.

    Raises:
        RunError: a ledger file cannot be read (exit code 1).
    """
    matcher = _Matcher(manifest)
    columns: dict[str, npt.NDArray[np.int64]] = {}
    for block in read_blocks(run_dir):
        entries, _, _ = parse_lines([line for line in block.lines if b'"status":"done"' in line])
        lines = matcher.match(entries)
        weight = block.file.attempt * _PRIORITIES + PRIORITY["done"]
        for number in np.flatnonzero((lines >= 0) & (entries.priorities == PRIORITY["done"])).tolist():
            line = lines[number]
            if state.weights[line] == weight:
                for name, value in entries.checksums[number].items():
                    if name not in columns:
                        columns[name] = np.full(manifest.num_lines, -1, np.int64)
                    columns[name][line] = value
    return columns


def iter_failures(run_dir: Path, manifest: Manifest, state: LedgerState) -> Iterator[LedgerEntry]:
    """The entries that made rows ``failed`` in ``state``, in the order of the manifest, ``line`` being today's line.

    Raises:
        RunError: a ledger file cannot be read (exit code 1).
    """
    # 1. Where the entries are that decided. Entries themselves would be too many to hold.
    matcher = _Matcher(manifest)
    paths: list[Path] = []
    places: list[npt.NDArray[np.int64]] = []  # rows of (manifest line, number in paths, first byte, bytes)
    for block in read_blocks(run_dir):
        candidates = [number for number, line in enumerate(block.lines) if b'"status":"failed"' in line]
        entries, kept, _ = parse_lines([block.lines[number] for number in candidates])
        numbers = [candidates[number] for number in kept]
        lines = matcher.match(entries)
        failed = np.flatnonzero((lines >= 0) & (entries.priorities == PRIORITY["failed"]))
        weight = block.file.attempt * _PRIORITIES + PRIORITY["failed"]
        failed = failed[state.weights[lines[failed]] == weight]
        starts = block.offsets[np.array(numbers, np.int64)[failed]]
        lengths = np.array([len(block.lines[numbers[number]]) for number in failed], np.int64)
        places.append(np.stack([lines[failed], np.full(len(failed), len(paths)), starts, lengths], axis=1))
        paths.append(block.file.path)
    if not places:
        return
    # 2. Read them again one by one, in the order of the manifest; the first of several for a line.
    table = np.concatenate(places)
    _, first = np.unique(table[:, 0], return_index=True)
    for line, number, start, length in table[first].tolist():
        with os_error_ends_run(f"ledger in {run_dir} cannot be read"), paths[number].open("rb") as stream:
            entry = decode_entry(os.pread(stream.fileno(), length, start))
        yield replace(entry, line=line)


def write_failures(run_dir: Path, manifest: Manifest, state: LedgerState) -> Path:
    """Write ``failures.jsonl``, a line for each failed row: line (from 1), key, stage, reason. Returns its path.

    Raises:
        RunError: the file cannot be written, or the ledger not be read (exit code 1).
    """
    path = run_dir / "failures.jsonl"
    with (
        os_error_ends_run(f"{path} cannot be written"), atomic_write(path) as file, json_lines_writer(file) as writer
    ):  # fmt: skip
        for entry in iter_failures(run_dir, manifest, state):
            writer.write({"line": entry.line + 1, "key": entry.key, "stage": entry.stage, "reason": entry.reason})
    return path
