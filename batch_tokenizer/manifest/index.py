"""The index of a manifest: byte offsets, hashes and states of all lines in numpy columns, built once and cached."""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import orjson

from batch_tokenizer.manifest.row import MAX_LINE, LineState, RefusedLine, RowNames, check_line, duration_of, row_names
from batch_tokenizer.records import CUT_FIELDS, RowForm, RunError
from batch_tokenizer.storage.json_lines import parse_json
from batch_tokenizer.storage.npy import NpyWriter

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

_INDEX_VERSION = 4

BLOCK_BYTES = 8 * 2**20

_CHECKSUMS = "checksums.json"

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

#: An index of an earlier state of the manifest is removed only after this many seconds: another job may still map it.
_STALE_SECONDS = 24 * 3600.0


def hash_bytes(data: bytes) -> bytes:
    """The 64-bit hash of a line or a key."""
    # Of the hashes in the standard library, BLAKE2b has the least cost a call (0.5 us a key, 0.8 us a line).
    return blake2b(data, digest_size=8).digest()


#: For output paths, whose hashes never leave the process that builds an index: 0.04 us instead of 0.6.
_hash_path: Callable[[str], int] = hash


def _lines_by_block(stream: IO[bytes], start: int, size: int) -> Iterator[tuple[npt.NDArray[np.int64], list[bytes]]]:
    """The lines from byte ``start`` to byte ``size``, some thousands at a time: their offsets, and their bytes.

    A line comes without its newline and cut to ``MAX_LINE + 1`` bytes, enough to see that it is too long.
    """
    position = begin = start
    unfinished = b""
    while position < size:
        block = stream.read(min(BLOCK_BYTES, size - position))
        if not block:
            raise RunError("it became shorter while it was read", exit_code=1)
        # The first part continues the line that the block before left unfinished, the last part is unfinished itself.
        lines = block.split(b"\n")
        ends = position + np.cumsum(np.fromiter(map(len, lines), np.int64, len(lines)) + 1)
        position += len(block)
        if len(unfinished) <= MAX_LINE:
            unfinished = (unfinished + lines[0])[: MAX_LINE + 1]
        if len(lines) == 1:
            continue
        lines[0], unfinished = unfinished, lines.pop()
        yield np.concatenate(([begin], ends[:-2])), lines
        begin = int(ends[-2])
    if begin < size:
        yield np.array([begin]), [unfinished]


_COLUMNS: dict[str, np.dtype[Any]] = {
    "offsets": np.dtype(np.uint64),
    "digests": np.dtype(np.uint64),
    "key_hashes": np.dtype(np.uint64),
    "durations": np.dtype(np.float32),
    "states": np.dtype(np.uint8),
}


def map_column(path: Path) -> npt.NDArray[Any]:
    """A column's file, mapped for reading."""
    return np.asarray(np.load(path, mmap_mode="r"))


def map_index(index: Path) -> dict[str, npt.NDArray[Any]]:
    """The columns of a finished index by name, and the rows that are ``duplicates``.

    Raises:
        OSError, ValueError: a file of the index is missing, cut short or damaged.
    """
    return {name: map_column(index / f"{name}.npy") for name in (*_COLUMNS, "duplicates")}


def check_index(index: Path) -> None:
    """Reads the index once and compares it with the checksums that it was written with.

    Raises:
        OSError, ValueError: a file of the index is missing, cut short or damaged.
    """
    recorded = orjson.loads((index / _CHECKSUMS).read_bytes())
    if recorded != {name: _checksum(index / f"{name}.npy") for name in (*_COLUMNS, "duplicates")}:
        raise ValueError("its checksums differ")


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return value


def _index_lines(lines: Sequence[bytes], form: RowForm) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.int64]]:
    """The columns of some lines, less the offsets, and the hash of each output path (lines, output fields).

    This loop runs once a line of the whole manifest. It recognises most good rows with few operations and passes
    everything else to ``check_line``, so that it accepts exactly what that function accepts.
    """
    required = form.required
    num_outputs = len(form.outputs)
    first_output = len(required) - num_outputs
    required_values = itemgetter(*required)
    no_outputs = (0,) * num_outputs
    separators = len(required) - 1
    texts = list(map(bytes.strip, lines))
    states = bytearray(len(texts))
    key_digests: list[bytes] = []
    durations: list[float] = []
    output_hashes: list[int] = []
    no_key = bytes(8)
    for number, text in enumerate(texts):
        key: str | None = None
        duration: Any = None
        hashes: Sequence[int] = no_outputs
        if not text:
            states[number] = LineState.BLANK
        else:
            # 1. The fast path: required fields are plain strings, and paths are normalised as they stand.
            row: Any = None
            try:
                row = orjson.loads(text)
                values = required_values(row)
                joined = "\0".join(values)
                plain = (
                    "" not in values
                    and joined.count("\0") == separators
                    and not ("//" in joined or "/." in joined or "./" in joined or "/\0" in joined or joined[-1] == "/")
                    and len(text) <= MAX_LINE
                    and len(set(values[1:])) == separators
                    and CUT_FIELDS.isdisjoint(row)
                )
            except (orjson.JSONDecodeError, KeyError, TypeError):
                plain = False
            # 2. Everything else: the full check, whose reason is made again when the line is read.
            if plain:
                key = values[0]
                hashes = [_hash_path(path) for path in values[first_output:]]
                duration = row.get("duration")
            else:
                try:
                    row = check_line(text, form)
                    key, outputs = row_names(row, form)
                    hashes = [_hash_path(path) for path in outputs]
                    duration = duration_of(row)
                except RefusedLine as refused:
                    states[number] = LineState.MALFORMED
                    key = refused.key
        # 3. The columns.
        key_digests.append(no_key if key is None else hash_bytes(key.encode()))
        durations.append(duration if type(duration) is float or type(duration) is int else math.nan)
        output_hashes.extend(hashes)
    seconds = np.array(durations, dtype=np.float64)
    seconds[~((seconds >= 0) & (seconds < 1e9))] = np.nan
    columns: dict[str, npt.NDArray[Any]] = {
        "digests": np.frombuffer(b"".join(map(hash_bytes, texts)), dtype=">u8"),
        "key_hashes": np.frombuffer(b"".join(key_digests), dtype=">u8"),
        "durations": seconds.astype(np.float32),
        "states": np.frombuffer(bytes(states), dtype=np.uint8),
    }
    return columns, np.array(output_hashes, dtype=np.int64).reshape(len(texts), num_outputs)


def _repeated(hashes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The values that occur more than once, sorted."""
    ordered = np.sort(hashes)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


def _positions(values: npt.NDArray[Any], ordered: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Where each of ``values`` stands in the sorted array ``ordered``; -1 where it does not."""
    if not len(ordered):
        return np.full(len(values), -1, np.int64)
    found = np.searchsorted(ordered, values)
    found[found == len(ordered)] = 0
    return np.where(ordered[found] == values, found, -1)


class _Owners:
    """Who owns each name that may occur more than once, in the order of the lines.

    Names are known by a hash, and a hash may stand for several names, so a match is believed only after the owner's
    line was read again. Owners are in an array, as a manifest that was appended to itself has millions of them.
    """

    def __init__(self, num_hashes: int, same_name: Callable[[int, str], bool]) -> None:
        self._owner = np.full(num_hashes, -1, np.int64)
        self._further_owners: dict[int, list[int]] = {}
        self._same_name = same_name

    def owner(self, position: int, name: str) -> int | None:
        """The line that owns ``name``, or None."""
        if position < 0 or self._owner[position] < 0:
            return None
        for line in (int(self._owner[position]), *self._further_owners.get(position, ())):
            if self._same_name(line, name):
                return line
        return None

    def add(self, position: int, line: int) -> None:
        """Make ``line`` the owner of a name that has none."""
        if position < 0:
            return
        if self._owner[position] < 0:
            self._owner[position] = line
        else:
            self._further_owners.setdefault(position, []).append(line)


def _find_duplicates(
    key_hashes: npt.NDArray[Any],
    output_hashes: npt.NDArray[np.int64],
    rows: npt.NDArray[np.bool_],
    names_of: Callable[[int], RowNames],
) -> npt.NDArray[np.int64]:
    """Rows that share a key or an output path with an earlier row: (n, 3), line, what is shared, the earlier line.

    What is shared is 0 for the key and 1 + i for output field i. A row refused here owns nothing, so that the earlier
    line named is always one that is worked on.
    """
    # 1. Candidates by hash: without any, which is the usual case, no line is read again.
    repeated_keys = _repeated(key_hashes[rows])
    repeated_outputs = _repeated(output_hashes[rows].ravel())
    if not len(repeated_keys) and not len(repeated_outputs):
        return np.empty((0, 3), np.int64)
    key_positions = _positions(key_hashes, repeated_keys)
    output_positions = _positions(output_hashes.ravel(), repeated_outputs).reshape(output_hashes.shape)
    candidates = np.flatnonzero(rows & ((key_positions >= 0) | (output_positions >= 0).any(axis=1)))
    # 2. Their names, read again line by line: equal hashes may be of different names.
    keys = _Owners(len(repeated_keys), lambda line, name: names_of(line).key == name)
    outputs = _Owners(len(repeated_outputs), lambda line, name: name in names_of(line).outputs)
    found: list[npt.NDArray[np.int64]] = []
    for line in map(int, candidates):
        names = names_of(line)
        positions = output_positions[line].tolist()
        first = keys.owner(int(key_positions[line]), names.key)
        shared = 0
        for field, (position, path) in enumerate(zip(positions, names.outputs, strict=True)):
            if first is None:
                first = outputs.owner(position, path)
                shared = 1 + field
        # 3. A line without an earlier owner of one of its names becomes their owner.
        if first is not None:
            found.append(np.array((line, shared, first), np.int64))
            continue
        keys.add(int(key_positions[line]), line)
        for position in positions:
            outputs.add(position, line)
    return np.array(found, np.int64).reshape(-1, 3)


def file_identity(stream: IO[bytes], form: RowForm) -> str:
    """Hexadecimal digest of what the index depends on: form, file size, modification time, both ends of the file."""
    status = os.fstat(stream.fileno())
    if not os.path.isfile(stream.fileno()):
        raise ValueError("it is not a regular file")
    ends = 65536
    stream.seek(0)
    head = stream.read(ends)
    stream.seek(max(0, status.st_size - ends))
    tail = stream.read(ends)
    fields = f"{_INDEX_VERSION} {form} {status.st_size} {status.st_mtime_ns} {MAX_LINE}".encode()
    return blake2b(b"\0".join((fields, head, tail)), digest_size=12).hexdigest()


def build_index(path: Path, form: RowForm, index: Path, report: Progress) -> None:
    """Write the index into the folder ``index``, which is complete or not there.

    Raises:
        RunError: the manifest is empty, or changes while it is read.
        OSError: it cannot be read, or the index cannot be written.
    """
    aside = index.with_name(f"building-{socket.gethostname()}-{os.getpid()}-{time.monotonic_ns()}")
    aside.mkdir()
    try:
        with path.open("rb") as stream:
            _write_columns(stream, path, form, aside, report)
            checksums = {name: _checksum(aside / f"{name}.npy") for name in (*_COLUMNS, "duplicates")}
            (aside / _CHECKSUMS).write_bytes(orjson.dumps(checksums))
            if f"{form.task}-{file_identity(stream, form)}" != index.name:
                raise RunError(f"manifest {path} changes while it is read: wait until it is complete", exit_code=1)
        try:
            aside.rename(index)
        except OSError as error:
            # Without a lock, another process may have finished the same index first. Then its index serves.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for other in index.parent.glob(f"{form.task}-*"):
        if other != index and time.time() - other.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(other, ignore_errors=True)


def _write_columns(stream: IO[bytes], path: Path, form: RowForm, folder: Path, report: Progress) -> None:
    size = os.fstat(stream.fileno()).st_size
    start = len(_BYTE_ORDER_MARK) if stream.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK else 0
    stream.seek(start)
    # 1. One pass over the lines. Hashes of output paths are needed for duplicates only and not kept.
    dtypes = _COLUMNS | {"output_hashes": np.dtype(np.int64)}
    columns = {name: NpyWriter(folder / f"{name}.npy", dtype) for name, dtype in dtypes.items()}
    report(0, size)
    reported = time.monotonic()
    for offsets, lines in _lines_by_block(stream, start, size):
        values, paths = _index_lines(lines, form)
        columns["offsets"].append(offsets)
        for name, column in values.items():
            columns[name].append(column)
        columns["output_hashes"].append(paths.ravel())
        if time.monotonic() - reported > 0.5:
            report(int(offsets[-1]), size)
            reported = time.monotonic()
    columns["offsets"].append(np.array([size]))
    for column_file in columns.values():
        column_file.close()
    finished = {name: map_column(folder / f"{name}.npy") for name in columns}
    states = finished["states"]
    hashes = finished["output_hashes"].reshape(len(states), len(form.outputs))
    if not np.any(states != LineState.BLANK):
        raise RunError(f"manifest {path} is empty: it has blank lines only")

    # 2. Duplicates, which only the hashes of all lines together show.
    def names_of(line: int) -> RowNames:
        begin, end = map(int, finished["offsets"][line : line + 2])
        text = os.pread(stream.fileno(), min(end - begin, MAX_LINE + 1), begin).strip()
        return row_names(parse_json(text), form)

    duplicates = _find_duplicates(finished["key_hashes"], hashes, states == LineState.ROW, names_of)
    marked = np.load(folder / "states.npy", mmap_mode="r+")
    marked[duplicates[:, 0]] = LineState.DUPLICATE
    marked.flush()
    np.save(folder / "duplicates.npy", duplicates)
    (folder / "output_hashes.npy").unlink()
    report(size, size)
