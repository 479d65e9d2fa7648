"""The lines of a ledger: one ``LedgerEntry`` each, written as JSON and read back as columns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from batch_tokenizer.records import LedgerEntry, RunError
from batch_tokenizer.runtime.run_files import LedgerFile, ledger_files

#: Within an attempt the greater wins. A ``redo`` takes back what earlier attempts did, not what its own attempt does.
PRIORITY = {"redo": 1, "failed": 2, "done": 3}

_DIGEST = re.compile(r"[0-9a-f]{16}")
_BLOCK = 8 * 2**20
#: Longer than any entry can be: a key is part of a manifest line, which has 16 MiB at most.
_MAX_LINE = 32 * 2**20

#: What parsing a damaged line can raise.
_NO_ENTRY = (KeyError, TypeError, ValueError, OverflowError, AttributeError)


def encode_entry(entry: LedgerEntry) -> bytes:
    """The entry as its line, newline included."""
    fields: dict[str, Any] = {"line": entry.line, "digest": entry.digest, "key": entry.key, "status": entry.status}
    if entry.status == "done":
        fields |= {"num_samples": entry.num_samples, "frames": entry.frames}
    elif entry.status == "failed":
        # A reason may quote a file name that is not UTF-8, which JSON cannot hold.
        reason = None if entry.reason is None else entry.reason.encode("utf-8", "replace").decode("utf-8")
        fields |= {"stage": entry.stage, "reason": reason}
    return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)


class Entries(NamedTuple):
    """Entries as columns of equal length.

    Attributes:
        lines: int64, the manifest's lines when the entries were written.
        digests: uint64, of those lines.
        priorities: int32, see ``PRIORITY``.
        num_samples, frames: int64 and uint32, of rows that are done, else 0.
        at_manifest: bool, whether the manifest itself refused the row.
        keys: of the rows, where they have one.
    """

    lines: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint64]
    priorities: npt.NDArray[np.int32]
    num_samples: npt.NDArray[np.int64]
    frames: npt.NDArray[np.uint32]
    at_manifest: npt.NDArray[np.bool_]
    keys: list[str | None]


def parse_lines(lines: Sequence[bytes]) -> tuple[Entries, list[int], int]:
    """Entries of some ledger lines, which of ``lines`` they are, and how many are damaged. Empty lines count as
    nothing."""
    kept = [number for number, line in enumerate(lines) if line]
    full = [lines[number] for number in kept]
    # One call for all is twice as fast as one each. It cannot make an entry of two torn lines: an object within an
    # object is never where a name has to be.
    try:
        items = orjson.loads(b"[" + b",".join(full) + b"]")
        if len(items) == len(full):
            return _columns(items), kept, 0
    except _NO_ENTRY:
        pass  # some line is torn: look at each
    good = [number for number in kept if _is_entry(lines[number])]
    return _columns([orjson.loads(lines[number]) for number in good]), good, len(kept) - len(good)


def _is_entry(line: bytes) -> bool:
    try:
        item = orjson.loads(line)
        return _DIGEST.fullmatch(item["digest"]) is not None and len(_columns([item]).lines) == 1
    except _NO_ENTRY:
        return False


def _columns(items: Sequence[dict[str, Any]]) -> Entries:
    """Raises one of ``_NO_ENTRY`` if any item is not an entry."""
    lines = [item["line"] for item in items]
    digests = [item["digest"] for item in items]
    keys = [item["key"] for item in items]
    num_samples = [item.get("num_samples", 0) for item in items]
    frames = [item.get("frames", 0) for item in items]
    if not {*map(type, lines), *map(type, num_samples), *map(type, frames)} <= {int}:
        raise TypeError
    if not {*map(type, keys)} <= {str, type(None)}:
        raise TypeError
    if not set(map(len, digests)) <= {16}:
        raise ValueError
    return Entries(
        np.array(lines, np.int64),
        np.frombuffer(bytes.fromhex("".join(digests)), ">u8", len(items)).astype(np.uint64),
        np.array([PRIORITY[item["status"]] for item in items], np.int32),
        np.array(num_samples, np.int64),
        np.array(frames, np.uint32),
        np.array([item.get("stage") == "manifest" for item in items], np.bool_),
        keys,
    )


class LineBlock(NamedTuple):
    """Consecutive lines of one ledger file, without their newlines, and the byte at which each begins."""

    file: LedgerFile
    offsets: npt.NDArray[np.int64]
    lines: list[bytes]


def read_blocks(run_dir: Path) -> Iterator[LineBlock]:
    """All lines of the ledger, some ten thousand at a time, earliest attempt first.

    Raises:
        RunError: a ledger file cannot be read (exit code 1).
    """
    try:
        for file in ledger_files(run_dir):
            yield from _blocks_of_file(file)
    except OSError as error:
        raise RunError(f"ledger in {run_dir} cannot be read: {error.strerror}", exit_code=1) from error


def _blocks_of_file(file: LedgerFile) -> Iterator[LineBlock]:
    with file.path.open("rb") as stream:
        position = 0
        unfinished = b""
        while block := stream.read(_BLOCK):
            begin = position - len(unfinished)
            position += len(block)
            lines = (unfinished + block).split(b"\n")
            # What is too long for an entry, such as NUL bytes without end, is cut: it is garbage in any case.
            unfinished = lines.pop()
            if len(unfinished) > _MAX_LINE:
                unfinished = unfinished[-_MAX_LINE:]
            if lines:
                ends = begin + np.cumsum(np.fromiter(map(len, lines), np.int64, len(lines)) + 1)
                yield LineBlock(file, np.concatenate(([begin], ends[:-1])), lines)
        if unfinished:
            yield LineBlock(file, np.array([position - len(unfinished)]), [unfinished])
