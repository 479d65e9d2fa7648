"""The ledger: how each row ended, one line a row in append-only files, and what all of them together say.

``LedgerWriter`` takes a ``LedgerEntry`` after the row's outputs are published. Every process of every attempt has a
file of its own, ``ledger/<attempt>-<rank>.jsonl``, so writers need no locks and nothing that was written is ever
changed; rows in shards have one for each shard, ``<attempt>-<rank>.<number>.jsonl`` (``shard_ledger.py``).
``read_ledger`` turns all files into a ``LedgerState``: one status a manifest line. It alone decides what a resumed run
does.

A line torn by a crash, a file of zero bytes, a tail of NUL bytes after a power loss: ignored, counted, told. Their rows
are done again, which is harmless, as publishing the same row twice yields the same file.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import orjson

from batch_tokenizer.records import LedgerEntry, RunError

logger = logging.getLogger(__name__)


class RowStatus(IntEnum):
    """How a manifest line stands. ``BLANK`` lines are no rows."""

    PENDING = 0
    DONE = 1
    FAILED = 2
    BLANK = 3


class LineIndex(Protocol):
    """What reading a ledger needs of the manifest. Arrays have one element a line, blank lines included."""

    num_lines: int
    digests: npt.NDArray[np.uint64]
    key_hashes: npt.NDArray[np.uint64]

    @property
    def is_row(self) -> npt.NDArray[np.bool_]:
        """Lines that are worked on."""

    @property
    def is_blank(self) -> npt.NDArray[np.bool_]:
        """Lines that are no rows."""

    def hash_key(self, key: str) -> int:
        """The hash that ``key_hashes`` holds for a key."""


# ----------------------------------------------------------------------------------------------------------- writing


def ledger_file(run_dir: Path, attempt: int, rank: int) -> Path:
    """The file of one process of one attempt."""
    return run_dir / "ledger" / f"{attempt:06d}-{rank:05d}.jsonl"


def shard_ledger_file(run_dir: Path, attempt: int, rank: int, number: int) -> Path:
    """The file of the rows of one shard."""
    return run_dir / "ledger" / f"{attempt:06d}-{rank:05d}.{number:06d}.jsonl"


class LedgerWriter:
    """Appends entries to one file; used from several threads.

    An entry is one write of one whole line, so a crash tears at most the last line. There is no retry and no
    ``fsync``: a disk that is full stops the run, and lines lost with the power are rows that are done again.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            RunError: the file cannot be opened.
        """
        self.path = path
        self._lock = threading.Lock()
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            size = os.fstat(self._descriptor).st_size
            # A process restarted within the attempt goes on in the file of the one before it, which may end in
            # mid-line.
            self._torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"
        except OSError as error:
            raise self._failure(error) from error

    def append(self, entry: LedgerEntry) -> None:
        """Write ``entry``. After it returns, the row counts as ended even if this process is killed.

        Raises:
            RunError: the line could not be written (exit code 1); the row does not count as ended.
        """
        line = encode_entry(entry)
        with self._lock:
            try:
                if os.fstat(self._descriptor).st_nlink == 0:
                    raise OSError(errno.ENOENT, "removed while the run wrote to it")
                if self._torn:
                    line = b"\n" + line
                self._torn = True
                written = os.write(self._descriptor, line)
                while written < len(line):
                    written += os.write(self._descriptor, line[written:])
                self._torn = False
            except OSError as error:
                raise self._failure(error) from error

    def _failure(self, error: OSError) -> RunError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space there and start the same command again; finished rows are kept"
        elif error.errno in (errno.ENOENT, errno.ESTALE):
            remedy = "bring the run folder back, or start again without it"
        else:
            remedy = "make it writable and start the same command again; finished rows are kept"
        return RunError(f"cannot write {self.path} ({error.strerror}): {remedy}", exit_code=1)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> LedgerWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def encode_entry(entry: LedgerEntry) -> bytes:
    """The entry as its line, newline included."""
    fields: dict[str, Any] = {"line": entry.line, "digest": entry.digest, "key": entry.key, "status": entry.status}
    if entry.status == "done":
        fields |= {"num_samples": entry.num_samples, "frames": entry.frames}
    elif entry.status == "failed":
        fields |= {"stage": entry.stage, "reason": _text(entry.reason)}
    return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)


def _text(reason: str | None) -> str | None:
    # A reason may quote a file name that is not UTF-8, which JSON cannot hold.
    return None if reason is None else reason.encode("utf-8", "replace").decode("utf-8")


# ----------------------------------------------------------------------------------------------------------- reading

#: Within an attempt the greater wins. A ``redo`` takes back what earlier attempts did, not what its own attempt does.
_PRIORITY = {"redo": 1, "failed": 2, "done": 3}
_STATUS_OF_PRIORITY = np.array([RowStatus.PENDING, RowStatus.PENDING, RowStatus.FAILED, RowStatus.DONE], np.uint8)
_PRIORITIES = 4

_FILE_NAME = re.compile(r"(\d{6,8})-(\d{5,8})(?:\.(\d{6,8}))?\.jsonl")
_DIGEST = re.compile(r"[0-9a-f]{16}")
_BLOCK = 8 * 2**20
#: Longer than any entry can be: a key is part of a manifest line, which has 16 MiB at most.
_MAX_LINE = 32 * 2**20
#: How many keys of changed rows are remembered for the message.
_KEYS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class LedgerState:
    """What all ledger files together say about a manifest.

    Attributes:
        status: uint8 (num_lines,) of ``RowStatus``.
        num_samples: int64 (num_lines,), input length in samples of rows that are done, else 0.
        frames: uint32 (num_lines,), token frames of rows that are done, else 0.
        num_done, num_failed, num_pending: rows; together the manifest's rows.
        num_changed: keys of the manifest that are done in the ledger, but with another line than the manifest's.
        changed_keys: some of them.
        num_removed: entries of rows that the manifest no longer has.
        num_unreadable: lines of the ledger that were ignored.
    """

    status: npt.NDArray[np.uint8]
    num_samples: npt.NDArray[np.int64]
    frames: npt.NDArray[np.uint32]
    num_done: int
    num_failed: int
    num_pending: int
    num_changed: int
    changed_keys: tuple[str, ...]
    num_removed: int
    num_unreadable: int
    _weights: npt.NDArray[np.int32]

    @property
    def pending(self) -> npt.NDArray[np.bool_]:
        """Bool (num_lines,): rows that are neither done nor failed."""
        return self.status == RowStatus.PENDING


class _Entries(NamedTuple):
    """Parsed lines of one file, as columns."""

    lines: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint64]
    priorities: npt.NDArray[np.int32]
    num_samples: npt.NDArray[np.int64]
    frames: npt.NDArray[np.uint32]
    at_manifest: npt.NDArray[np.bool_]
    keys: list[str | None]


def _columns(items: Sequence[dict[str, Any]]) -> _Entries:
    """Raises KeyError, TypeError, ValueError or OverflowError if any item is not an entry."""
    lines = [item["line"] for item in items]
    digests = [item["digest"] for item in items]
    keys = [item["key"] for item in items]
    num_samples = [item.get("num_samples", 0) for item in items]
    frames = [item.get("frames", 0) for item in items]
    if not {*map(type, lines), *map(type, num_samples), *map(type, frames)} <= {int} or not {*map(type, keys)} <= {
        str,
        type(None),
    }:
        raise TypeError
    if not set(map(len, digests)) <= {16}:
        raise ValueError
    return _Entries(
        np.array(lines, np.int64),
        np.frombuffer(bytes.fromhex("".join(digests)), ">u8", len(items)).astype(np.uint64),
        np.array([_PRIORITY[item["status"]] for item in items], np.int32),
        np.array(num_samples, np.int64),
        np.array(frames, np.uint32),
        np.array([item.get("stage") == "manifest" for item in items], np.bool_),
        keys,
    )


def _is_entry(line: bytes) -> bool:
    try:
        item = orjson.loads(line)
        return (
            isinstance(item, dict)
            and _DIGEST.fullmatch(item["digest"]) is not None
            and len(_columns([item]).lines) == 1
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return False


def _parse(lines: Sequence[bytes]) -> tuple[_Entries, list[int], int]:
    """Entries of some ledger lines, which lines they are, and how many lines are none. Empty lines count as nothing."""
    kept = [number for number, line in enumerate(lines) if line]
    full = [lines[number] for number in kept]
    # One call for all is twice as fast as one each. It cannot make an entry of two torn lines: an object within an
    # object is never where a name has to be.
    try:
        items = orjson.loads(b"[" + b",".join(full) + b"]")
        if len(items) == len(full):
            return _columns(items), kept, 0
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        pass  # some line is torn: look at each
    good = [number for number in kept if _is_entry(lines[number])]
    return _columns([orjson.loads(lines[number]) for number in good]), good, len(kept) - len(good)


class _Block(NamedTuple):
    attempt: int
    file: int
    offsets: npt.NDArray[np.int64]
    lines: list[bytes]


def _ledger_files(run_dir: Path) -> list[tuple[int, Path]]:
    """(attempt, path) of the ledger's files, earliest first."""
    files: list[tuple[int, Path]] = []
    try:
        for path in sorted((run_dir / "ledger").iterdir()):
            if match := _FILE_NAME.fullmatch(path.name):
                files.append((int(match[1]), path))
            else:
                logger.warning("%s is no ledger file: ignored", path)
    except FileNotFoundError:
        return []
    return files


def _blocks(files: Sequence[tuple[int, Path]]) -> Iterator[_Block]:
    """All lines of the ledger, some ten thousand at a time."""
    for number, (attempt, path) in enumerate(files):
        with path.open("rb") as stream:
            position = 0
            unfinished = b""
            while block := stream.read(_BLOCK):
                begin = position - len(unfinished)
                position += len(block)
                block = unfinished + block
                lines = block.split(b"\n")
                # What is too long for an entry, such as NUL bytes without end, is cut: it is garbage in any case.
                unfinished = lines.pop()
                if len(unfinished) > _MAX_LINE:
                    unfinished = unfinished[-_MAX_LINE:]
                if lines:
                    ends = begin + np.cumsum(np.fromiter(map(len, lines), np.int64, len(lines)) + 1)
                    yield _Block(attempt, number, np.concatenate(([begin], ends[:-1])), lines)
            if unfinished:
                yield _Block(attempt, number, np.array([position - len(unfinished)]), [unfinished])


class _Matcher:
    """Finds the manifest line that an entry speaks of."""

    def __init__(self, manifest: LineIndex) -> None:
        self._manifest = manifest
        self._is_row = manifest.is_row
        self._order: npt.NDArray[np.int64] | None = None
        self._ordered = manifest.digests

    def match(self, entries: _Entries) -> npt.NDArray[np.int64]:
        """int64 (entries,): the line; -1 where no line has the digest, -2 where the entry no longer applies to it.

        The line of the entry's own number, if it has the digest; otherwise, as rows may have been inserted or moved,
        the first that has it. A failure found in the manifest applies as long as the manifest still refuses that
        line, any other entry as long as it does not.
        """
        num_lines = self._manifest.num_lines
        lines = np.where((entries.lines >= 0) & (entries.lines < num_lines), entries.lines, 0)
        moved = np.flatnonzero((lines != entries.lines) | (self._manifest.digests[lines] != entries.digests))
        if len(moved):
            lines[moved] = self._search(entries.digests[moved])
        applies = self._is_row[lines] != entries.at_manifest
        lines[(lines >= 0) & ~applies] = -2
        return lines

    def _search(self, digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        if self._order is None:
            self._order = np.argsort(self._manifest.digests, kind="stable")
            self._ordered = self._manifest.digests[self._order]
        found = np.searchsorted(self._ordered, digests)
        found[found == len(self._ordered)] = 0
        return np.where(self._ordered[found] == digests, self._order[found], -1)


def read_ledger(run_dir: Path, manifest: LineIndex, *, idle: Callable[[], None] | None = None) -> LedgerState:
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
    matcher = _Matcher(manifest)
    known_keys: npt.NDArray[np.uint64] | None = None
    changed: list[npt.NDArray[np.uint64]] = []
    changed_keys: dict[str, None] = {}
    num_removed = num_unreadable = 0
    files = _ledger_files(run_dir)
    try:
        for block in _blocks(files):
            if idle is not None:
                idle()
            entries, _, unreadable = _parse(block.lines)
            if unreadable:
                num_unreadable += unreadable
                logger.warning("%s: %d unreadable lines ignored", files[block.file][1], unreadable)
            lines = matcher.match(entries)
            entry_weights = block.attempt * _PRIORITIES + entries.priorities
            # Ascending, as of several assignments to one line the last one stays.
            order = np.argsort(entry_weights, kind="stable")
            order = order[lines[order] >= 0]
            order = order[entry_weights[order] > weights[lines[order]]]
            weights[lines[order]] = entry_weights[order]
            num_samples[lines[order]] = entries.num_samples[order]
            frames[lines[order]] = entries.frames[order]

            missing = np.flatnonzero(lines == -1)
            if len(missing):
                if known_keys is None:
                    known_keys = np.unique(manifest.key_hashes)
                keys = [entries.keys[number] for number in missing]
                hashes = np.array([0 if key is None else manifest.hash_key(key) for key in keys], np.uint64)
                at = np.minimum(np.searchsorted(known_keys, hashes), max(0, len(known_keys) - 1))
                known = (hashes != 0) & (known_keys[at] == hashes)
                num_removed += int(np.count_nonzero(~known))
                other = np.flatnonzero(known & (entries.priorities[missing] == _PRIORITY["done"]))
                changed.append(hashes[other])
                for number in other[: _KEYS_SHOWN - len(changed_keys)]:
                    changed_keys[str(keys[number])] = None
    except OSError as error:
        raise RunError(f"ledger in {run_dir} cannot be read: {error.strerror}", exit_code=1) from error

    status = _STATUS_OF_PRIORITY[weights % _PRIORITIES]
    status[manifest.is_blank] = RowStatus.BLANK
    num_samples[status != RowStatus.DONE] = 0
    frames[status != RowStatus.DONE] = 0
    counts = np.bincount(status, minlength=len(RowStatus))
    return LedgerState(
        status=status,
        num_samples=num_samples,
        frames=frames,
        num_done=int(counts[RowStatus.DONE]),
        num_failed=int(counts[RowStatus.FAILED]),
        num_pending=int(counts[RowStatus.PENDING]),
        num_changed=len(np.unique(np.concatenate(changed))) if changed else 0,
        changed_keys=tuple(changed_keys),
        num_removed=num_removed,
        num_unreadable=num_unreadable,
        _weights=weights,
    )


class MatchedEntries(NamedTuple):
    """Entries of one file that apply to rows of the manifest, as columns of equal length.

    Attributes:
        attempt: that wrote them.
        lines: int64, the manifest's lines that they speak of.
        num_samples, frames: int64 and uint32, as in ``LedgerEntry``.
    """

    attempt: int
    lines: npt.NDArray[np.int64]
    num_samples: npt.NDArray[np.int64]
    frames: npt.NDArray[np.uint32]


def matched_entries(
    run_dir: Path, manifest: LineIndex, status: Literal["done", "failed", "redo"]
) -> Iterator[MatchedEntries]:
    """All entries of one status, overruled ones too, earliest attempt first, some ten thousand lines at a time.

    Raises:
        RunError: a ledger file cannot be read (exit code 1).
    """
    matcher = _Matcher(manifest)
    word = f'"{status}"'.encode()
    try:
        for block in _blocks(_ledger_files(run_dir)):
            entries, _, _ = _parse([line for line in block.lines if word in line])
            lines = matcher.match(entries)
            kept = (lines >= 0) & (entries.priorities == _PRIORITY[status])
            yield MatchedEntries(block.attempt, lines[kept], entries.num_samples[kept], entries.frames[kept])
    except OSError as error:
        raise RunError(f"ledger in {run_dir} cannot be read: {error.strerror}", exit_code=1) from error


# ---------------------------------------------------------------------------------------------------------- failures


def iter_failures(run_dir: Path, manifest: LineIndex, state: LedgerState) -> Iterator[LedgerEntry]:
    """The entries that made rows ``failed`` in ``state``, in the order of the manifest, ``line`` being today's line.

    Raises:
        RunError: a ledger file cannot be read (exit code 1).
    """
    files = _ledger_files(run_dir)
    matcher = _Matcher(manifest)
    places: list[npt.NDArray[np.int64]] = []
    try:
        for block in _blocks(files):
            candidates = [number for number, line in enumerate(block.lines) if b'"status":"failed"' in line]
            entries, kept, _ = _parse([block.lines[number] for number in candidates])
            numbers = [candidates[number] for number in kept]
            lines = matcher.match(entries)
            failed = np.flatnonzero((lines >= 0) & (entries.priorities == _PRIORITY["failed"]))
            weight = block.attempt * _PRIORITIES + _PRIORITY["failed"]
            failed = failed[state._weights[lines[failed]] == weight]
            starts = block.offsets[np.array(numbers, np.int64)[failed]]
            lengths = np.array([len(block.lines[numbers[number]]) for number in failed], np.int64)
            places.append(np.stack([lines[failed], np.full(len(failed), block.file), starts, lengths], axis=1))
        if not places:
            return
        table = np.concatenate(places)
        _, first = np.unique(table[:, 0], return_index=True)
        for line, file, start, length in table[first].tolist():
            with files[file][1].open("rb") as stream:
                item = orjson.loads(os.pread(stream.fileno(), length, start))
            stage, reason = item.get("stage"), item.get("reason")
            yield LedgerEntry(line, item["digest"], item["key"], "failed", stage=stage, reason=reason)
    except OSError as error:
        raise RunError(f"ledger in {run_dir} cannot be read: {error.strerror}", exit_code=1) from error


def write_failures(run_dir: Path, manifest: LineIndex, state: LedgerState) -> Path:
    """Write ``failures.jsonl``, a line for each failed row: line (from 1), key, stage, reason. Returns its path.

    Raises:
        RunError: the file cannot be written, or the ledger not be read (exit code 1).
    """
    path = run_dir / "failures.jsonl"
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as stream:
            for entry in iter_failures(run_dir, manifest, state):
                row = {"line": entry.line + 1, "key": entry.key, "stage": entry.stage, "reason": entry.reason}
                stream.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        aside.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path} ({error.strerror})", exit_code=1) from error
    finally:
        aside.unlink(missing_ok=True)
    return path
