"""The lines of a ledger: one ``LedgerEntry`` each, written as JSON and read back as columns.

    {"line":0,"digest":"…","key":"a","status":"done","num_samples":24000,"frames":25,"checksums":{"codes":…},"check":"…"}

``check`` is the CRC-32 of all before it, so a line that was damaged in any way counts as unreadable, and costs
its row and nothing else. The ledger file of a shard ends with a trailer, the number of its lines and the CRC-32 of all
of them: it is read whole or, like a file that is not there, not at all.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from batch_tokenizer.records import LedgerEntry
from batch_tokenizer.runtime.run_files import LEDGER_PATTERNS, LedgerFile, ledger_files
from batch_tokenizer.storage.atomic import os_error_ends_run

logger = logging.getLogger(__name__)

#: Within an attempt the greater wins. A ``redo`` takes back what earlier attempts did, not what its own attempt does.
PRIORITY = {"redo": 1, "failed": 2, "done": 3}

_CHECK = b',"check":"%08x"}'
_CHECK_BYTES = len(_CHECK % 0)
_BLOCK = 8 * 2**20
_NONE: Mapping[str, int] = {}
#: Longer than any entry can be: a key is part of a manifest line, which has 16 MiB at most.
_MAX_LINE = 32 * 2**20


def encode_entry(entry: LedgerEntry) -> bytes:
    """The entry as its line, newline included."""
    fields: dict[str, Any] = {"line": entry.line, "digest": entry.digest, "key": entry.key, "status": entry.status}
    if entry.status == "done":
        fields |= {"num_samples": entry.num_samples, "frames": entry.frames, "checksums": entry.checksums}
    elif entry.status == "failed":
        # A reason may quote a file name that is not UTF-8, which JSON cannot hold.
        reason = None if entry.reason is None else entry.reason.encode("utf-8", "replace").decode("utf-8")
        fields |= {"stage": entry.stage, "reason": reason}
    return _with_check(fields)


def _with_check(fields: dict[str, Any]) -> bytes:
    text = orjson.dumps(fields)[:-1]
    return text + _CHECK % zlib.crc32(text) + b"\n"


def _is_whole(line: bytes) -> bool:
    """Whether a line without its newline is what ``_with_check`` made."""
    return line[-_CHECK_BYTES:] == _CHECK % zlib.crc32(line[:-_CHECK_BYTES])


def decode_entry(line: bytes) -> LedgerEntry:
    """The entry of a line that ``parse_lines`` or ``read_shard_lines`` found whole."""
    fields = orjson.loads(line)
    del fields["check"]
    return LedgerEntry(**fields)


def encode_shard(entries: Sequence[LedgerEntry]) -> bytes:
    """The content of a shard's ledger file, in the order of the shard's rows."""
    lines = b"".join(map(encode_entry, entries))
    return lines + _with_check({"num_lines": len(entries), "crc32": zlib.crc32(lines)})


def read_shard_lines(path: Path) -> list[bytes] | None:
    """The lines of a shard's ledger file without its trailer; None if it is missing, torn or damaged.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    lines = content.split(b"\n")
    if len(lines) < 2 or lines.pop() or not _is_whole(trailer := lines.pop()):
        return None
    fields = orjson.loads(trailer)
    size = len(content) - len(trailer) - 1
    expected = {"num_lines": len(lines), "crc32": zlib.crc32(memoryview(content)[:size])}
    del fields["check"]
    return lines if fields == expected else None


class Entries(NamedTuple):
    """Entries as columns of equal length.

    Attributes:
        lines: int64, the manifest's lines when the entries were written.
        digests: uint64, of those lines.
        priorities: int32, see ``PRIORITY``.
        num_samples, frames: int64 and uint32, of rows that are done, else 0.
        at_manifest: bool, whether the manifest itself refused the row.
        checksums: of the row's outputs, as in ``LedgerEntry``.
        keys: of the rows, where they have one.
    """

    lines: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint64]
    priorities: npt.NDArray[np.int32]
    num_samples: npt.NDArray[np.int64]
    frames: npt.NDArray[np.uint32]
    at_manifest: npt.NDArray[np.bool_]
    checksums: list[Mapping[str, int]]
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
        checks = _from_hex([item["check"] for item in items], ">u4")
        crcs = np.fromiter((zlib.crc32(line[:-_CHECK_BYTES]) for line in full), np.uint32, len(full))
        if np.array_equal(checks, crcs):
            return _columns(items), kept, 0
    except (KeyError, TypeError, ValueError):
        pass  # some line is damaged: look at each
    whole = [number for number in kept if _is_whole(lines[number])]
    return _columns([orjson.loads(lines[number]) for number in whole]), whole, len(kept) - len(whole)


def _from_hex(texts: Sequence[str], kind: str) -> npt.NDArray[Any]:
    """Hexadecimal numbers of the width that an array of ``kind`` has."""
    return np.frombuffer(bytes.fromhex("".join(texts)), kind, len(texts))


def _columns(items: Sequence[dict[str, Any]]) -> Entries:
    return Entries(
        np.array([item["line"] for item in items], np.int64),
        _from_hex([item["digest"] for item in items], ">u8").astype(np.uint64),
        np.array([PRIORITY[item["status"]] for item in items], np.int32),
        np.array([item.get("num_samples", 0) for item in items], np.int64),
        np.array([item.get("frames", 0) for item in items], np.uint32),
        np.array([item.get("stage") == "manifest" for item in items], np.bool_),
        [item.get("checksums", _NONE) for item in items],
        [item["key"] for item in items],
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
    with os_error_ends_run(f"ledger in {run_dir} cannot be read"):
        for file in ledger_files(run_dir):
            yield from _blocks_of_file(file)


def has_done_rows(run_dir: Path) -> bool:
    """Whether a row of the ledger is done or may have been: its line is damaged, or its shard is not published yet.

    Raises:
        RunError: a ledger file cannot be read (exit code 1).
    """
    if any(run_dir.glob(LEDGER_PATTERNS[0])):
        return True
    for block in read_blocks(run_dir):
        entries, _, num_damaged = parse_lines(block.lines)
        if num_damaged or (entries.priorities == PRIORITY["done"]).any():
            return True
    return False


def _blocks_of_file(file: LedgerFile) -> Iterator[LineBlock]:
    if file.shard is not None:
        whole = read_shard_lines(file.path)
        if whole is None:
            logger.warning("%s is damaged: the rows of its shard are done again", file.path)
        elif whole:
            yield LineBlock(file, _starts(whole, 0), whole)
        return
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
                yield LineBlock(file, _starts(lines, begin), lines)
        if unfinished:
            yield LineBlock(file, np.array([position - len(unfinished)]), [unfinished])


def _starts(lines: Sequence[bytes], begin: int) -> npt.NDArray[np.int64]:
    """Where each line begins, newlines counted."""
    ends = begin + np.cumsum(np.fromiter(map(len, lines), np.int64, len(lines)) + 1)
    return np.concatenate(([begin], ends[:-1]))
