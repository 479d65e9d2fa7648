"""The manifest: JSON lines read by byte offset, so that memory grows neither with rows nor with workers.

What enters is a text file with one JSON object a line and the task, which says which fields a line must have. What
leaves are rows of any range of lines (``Manifest.read``), a few memory-mapped arrays with one element a line
(``durations``, ``digests``, ...), and ``plan_units``, which cuts the lines still to do into the units that processes
claim.

The arrays are the index. It is built in one pass, kept in a folder of its own and mapped by every process that opens
the same manifest for the same task, so that the pages are shared between processes and start-up after the first time
takes no reading. Everything that can be wrong with a line alone or between lines (duplicates) is found while it is
built; the words for it are made only when the line is read. Lines are counted from 0 in code and from 1 in messages.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from batch_tokenizer.records import (
    CUT_FIELDS,
    REQUIRED_FIELDS,
    AudioCut,
    ManifestRow,
    RowFailure,
    RowForm,
    RunError,
    Sink,
    Task,
)

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

#: Longest line in bytes, without its line end. A longer one fails instead of filling the memory.
MAX_LINE = 16 * 2**20

#: A field in which whoever wrote the line says why it is no row. It counts where a required field is missing.
REFUSED = "__refused__"

_INDEX_VERSION = 3
_BLOCK = 8 * 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
#: An index of an earlier state of the manifest is removed only after this many seconds: another job may still map it.
_STALE_SECONDS = 24 * 3600.0


class LineState(IntEnum):
    """What the index knows of a line. Only ``ROW`` is worked on; ``MALFORMED`` and ``DUPLICATE`` end as failed."""

    ROW = 0
    BLANK = 1
    MALFORMED = 2
    DUPLICATE = 3


class _Refused(Exception):
    """A line cannot be a row. ``key`` is its key, where that much could be read."""

    def __init__(self, reason: str, key: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.key = key


def _hash_bytes(data: bytes) -> bytes:
    # Of the hashes in the standard library, BLAKE2b has the least cost a call (0.5 us a key, 0.8 us a line).
    return blake2b(data, digest_size=8).digest()


#: For output paths, whose hashes never leave the process that builds an index: 0.04 us instead of 0.6.
_hash_path: Callable[[str], int] = hash


def _normalise(path: str) -> str:
    """``os.path.normpath``, without its cost for a path that it would not change."""
    if "//" in path or "/." in path or "./" in path or path.endswith("/"):
        return os.path.normpath(path)
    return path


# ---------------------------------------------------------------------------------------------------------------- lines


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _explain_json(text: bytes, error: orjson.JSONDecodeError) -> _Refused:
    """Why orjson refused ``text``: not UTF-8, half a surrogate pair (with its field), or the parser's own words."""
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as wrong:
        return _Refused(f"not UTF-8: byte 0x{text[wrong.start]:02x} at column {wrong.start + 1}")
    try:
        row = json.loads(decoded)
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, dict):
        for name, value in row.items():
            if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
                key = row.get("key")
                readable = isinstance(key, str) and key and not re.search("[\ud800-\udfff]", key)
                return _Refused(f"field {_quote(name)} has half a surrogate pair", key if readable else None)
    return _Refused(f"not valid JSON: {error.msg} at column {error.colno}")


def _quote(name: str) -> str:
    return json.dumps(name)


def _check_line(text: bytes, form: RowForm) -> dict[str, Any]:
    """A stripped, non-blank line as its object, or ``_Refused`` with the words for what is wrong with it alone."""
    if len(text) > MAX_LINE:
        raise _Refused(f"the line is longer than {MAX_LINE // 2**20} MiB")
    try:
        row = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise _explain_json(text, error) from None
    if not isinstance(row, dict):
        raise _Refused(f"not a JSON object but {_type_name(row)}")
    key = row.get("key")
    key = key if isinstance(key, str) and key else None
    for name in form.required:
        if name not in row:
            refusal = row.get(REFUSED)
            raise _Refused(refusal if isinstance(refusal, str) else f'field "{name}" is missing', key)
        value = row[name]
        if not isinstance(value, str):
            expected = "" if value is None else ", not a string"
            raise _Refused(f'field "{name}" is {_type_name(value)}{expected}', key)
        if not value:
            raise _Refused(f'field "{name}" is empty', key)
        if "\0" in value:
            raise _Refused(f'field "{name}" has a NUL character', key)
    seen: dict[str, str] = {}
    for name in form.required[1:]:
        path = _normalise(row[name])
        if path in seen:
            raise _Refused(f'fields "{seen[path]}" and "{name}" name one file, {path}', key)
        seen[path] = name
    try:
        cut_of(row)
    except ValueError as error:
        raise _Refused(str(error), key) from None
    return row


def cut_of(row: Mapping[str, Any]) -> AudioCut | None:
    """The part of its file that a row means: ``start`` or ``offset``, then ``end`` or ``duration``, and ``channel``.

    ``duration`` alone is the length of a whole file. Fields that are null count as absent.

    Raises:
        ValueError: the fields are not such numbers, or contradict each other.
    """
    if CUT_FIELDS.isdisjoint(row):
        return None
    start, offset, end, duration = (_seconds(row, name) for name in ("start", "offset", "end", "duration"))
    channel = row.get("channel")
    if channel is not None and (type(channel) is not int or channel < 0):
        raise ValueError(f'field "channel" is {channel!r}, not a number from 0')
    if start is not None and offset is not None and start != offset:
        raise ValueError('fields "start" and "offset" say different things')
    begin = start if start is not None else offset
    if end is None and begin is not None and duration is not None:
        end = begin + duration
    if end is not None and end <= (begin or 0.0):
        raise ValueError(f"the segment ends at {end:g} s, where it has not begun")
    if begin is None and end is None and channel is None:
        return None
    return AudioCut(begin or 0.0, end, channel)


def _seconds(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value < 1e9:
        if name == "duration":
            return None
        raise ValueError(f'field "{name}" is {value!r}, not seconds')
    return float(value)


def _duration(row: Mapping[str, Any]) -> float:
    """Seconds of the row's audio, so far as the row says; NaN where it does not, and where order counts for more:
    members of a compressed tar are read one after the other, not the longest first."""
    if str(row.get("wav")).startswith("targz://"):
        return math.nan
    cut = cut_of(row)
    if cut is not None and cut.end is not None:
        return cut.end - cut.start
    value = row.get("duration")
    return value if type(value) is float or type(value) is int else math.nan


class _Names(NamedTuple):
    """What no two rows may share: the key, and the normalised path of each output."""

    key: str
    outputs: tuple[str, ...]


def _names(row: dict[str, Any], form: RowForm) -> _Names:
    return _Names(row["key"], tuple(_normalise(row[name]) for name in form.outputs))


def _lines_by_block(stream: IO[bytes], start: int, size: int) -> Iterator[tuple[npt.NDArray[np.int64], list[bytes]]]:
    """The lines from byte ``start`` to byte ``size``, some thousands at a time: their offsets, and their bytes.

    A line comes without its newline and cut to ``MAX_LINE + 1`` bytes, enough to see that it is too long.
    """
    position = begin = start
    unfinished = b""
    while position < size:
        block = stream.read(min(_BLOCK, size - position))
        if not block:
            raise RunError("it became shorter while it was read", exit_code=1)
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


# --------------------------------------------------------------------------------------------------- building the index

_COLUMNS: dict[str, np.dtype[Any]] = {
    "offsets": np.dtype(np.uint64),
    "digests": np.dtype(np.uint64),
    "key_hashes": np.dtype(np.uint64),
    "durations": np.dtype(np.float32),
    "states": np.dtype(np.uint8),
}


class _ColumnFile:
    """A one-dimensional ``.npy`` file written a piece at a time; its header gets the length at the end."""

    _HEADER_BYTES = 128

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any]) -> None:
        self.path = folder / f"{name}.npy"
        self._dtype = dtype
        self._length = 0
        self._file = self.path.open("wb")
        self._file.write(b"\0" * self._HEADER_BYTES)

    def append(self, values: npt.NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).data)
        self._length += len(values)

    def finish(self) -> npt.NDArray[Any]:
        """Close the file and map it."""
        self._file.seek(0)
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        assert self._file.tell() == self._HEADER_BYTES
        self._file.close()
        return _map(self.path)


def _map(path: Path) -> npt.NDArray[Any]:
    return np.asarray(np.load(path, mmap_mode="r"))


def _index_lines(lines: Sequence[bytes], form: RowForm) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.int64]]:
    """The columns of some lines, less the offsets, and the hash of each output path (lines, output fields).

    This loop runs once a line of the whole manifest. It recognises good rows with few operations and leaves
    everything else to ``_check_line``; what it lets pass is exactly what that function accepts.
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
            if plain:
                key = values[0]
                hashes = [_hash_path(path) for path in values[first_output:]]
                duration = row.get("duration")
            else:
                try:
                    row = _check_line(text, form)
                    key, outputs = _names(row, form)
                    hashes = [_hash_path(path) for path in outputs]
                    duration = _duration(row)
                except _Refused as refused:
                    states[number] = LineState.MALFORMED
                    key = refused.key
        key_digests.append(no_key if key is None else _hash_bytes(key.encode()))
        durations.append(duration if type(duration) is float or type(duration) is int else math.nan)
        output_hashes.extend(hashes)
    seconds = np.array(durations, dtype=np.float64)
    seconds[~((seconds >= 0) & (seconds < 1e9))] = np.nan
    columns: dict[str, npt.NDArray[Any]] = {
        "digests": np.frombuffer(b"".join(map(_hash_bytes, texts)), dtype=">u8"),
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


class _Claims:
    """Who owns each name that may occur more than once, in the order of the lines.

    Names are known by a hash, and a hash may stand for several names, so a match is believed only after the owner's
    line was read again. Owners lie in an array, as a manifest that somebody appended to itself has millions of them.
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

    def claim(self, position: int, line: int) -> None:
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
    names_of: Callable[[int], _Names],
) -> npt.NDArray[np.int64]:
    """Rows that share a key or an output path with an earlier row: (n, 3), line, what is shared, the earlier line.

    What is shared is 0 for the key and 1 + i for output field i. A row refused here owns nothing, so that the earlier
    line named is always one that is worked on.
    """
    repeated_keys = _repeated(key_hashes[rows])
    repeated_outputs = _repeated(output_hashes[rows].ravel())
    if not len(repeated_keys) and not len(repeated_outputs):
        return np.empty((0, 3), np.int64)
    key_positions = _positions(key_hashes, repeated_keys)
    output_positions = _positions(output_hashes.ravel(), repeated_outputs).reshape(output_hashes.shape)
    candidates = np.flatnonzero(rows & ((key_positions >= 0) | (output_positions >= 0).any(axis=1)))
    keys = _Claims(len(repeated_keys), lambda line, name: names_of(line).key == name)
    outputs = _Claims(len(repeated_outputs), lambda line, name: name in names_of(line).outputs)
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
        if first is not None:
            found.append(np.array((line, shared, first), np.int64))
            continue
        keys.claim(int(key_positions[line]), line)
        for position in positions:
            outputs.claim(position, line)
    return np.array(found, np.int64).reshape(-1, 3)


@contextmanager
def alone(lock_path: Path, idle: Callable[[], None]) -> Iterator[None]:
    """Hold the lock on building an index. Where the file system has no locks, go on: building twice is harmless."""
    with lock_path.open("ab") as lock:
        told = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    logger.info("another process is indexing the manifest; waiting for it")
                    told = True
                idle()
                time.sleep(0.2)
                continue
            except OSError as error:
                logger.warning("%s cannot be locked (%s): indexing without a lock", lock_path, error.strerror)
            break
        yield


# ------------------------------------------------------------------------------------------------------------- Manifest


class Manifest:
    """A manifest opened for one task. Made by ``open``; picklable: the process that receives it opens it again.

    Attributes:
        path: the JSON-lines file.
        form: which fields a row must have and which of them are outputs.
        num_lines: lines, blank ones included.
        offsets: uint64 (num_lines + 1,), first byte of each line, and the file's size.
        digests: uint64 (num_lines,), hash of the line's bytes without surrounding white space.
        key_hashes: uint64 (num_lines,), hash of the key; 0 where the line has no readable key.
        durations: float32 (num_lines,), seconds from the row's ``duration`` field; NaN where it has no usable one.
        states: uint8 (num_lines,) of ``LineState``.
    """

    def __init__(self, path: Path, form: RowForm, index: Path) -> None:
        """Map the finished index in the folder ``index``. ``Manifest.open`` is the way in."""
        self.path = path
        self.form = form
        self._index = index
        self._file: IO[bytes] | None = None
        self.offsets: npt.NDArray[np.uint64] = _map(index / "offsets.npy")
        self.digests: npt.NDArray[np.uint64] = _map(index / "digests.npy")
        self.key_hashes: npt.NDArray[np.uint64] = _map(index / "key_hashes.npy")
        self.durations: npt.NDArray[np.float32] = _map(index / "durations.npy")
        self.states: npt.NDArray[np.uint8] = _map(index / "states.npy")
        self._duplicates: npt.NDArray[np.int64] = _map(index / "duplicates.npy")
        self.num_lines = len(self.states)
        self._num_rows = int(np.count_nonzero(self.states != LineState.BLANK))

    @classmethod
    def open(
        cls,
        path: Path | str,
        task: Task,
        index_dir: Path | str,
        *,
        sink: Sink = "json",
        progress: Progress | None = None,
    ) -> Manifest:
        """Open ``path``, building its index in ``index_dir`` unless one of this very file, task and kind of sink is
        there.

        Args:
            progress: called now and then with (bytes done, bytes in all) while the index is built, and with (0, bytes
                in all) while another process builds it. An exception that it raises ends the opening and leaves
                nothing behind.

        Raises:
            RunError: the manifest is missing, not a file, not readable, without rows, or changes while it is read; or
                ``index_dir`` cannot be written.
        """
        path, index_dir = Path(path), Path(index_dir)
        form = RowForm.of(task, sink)
        try:
            with path.open("rb") as stream:
                identity = _identity(stream, form)
                size = os.fstat(stream.fileno()).st_size
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        if size == 0:
            raise RunError(f"manifest {path} is empty")
        index = index_dir / f"{task}-{identity}"
        report = progress or (lambda done, total: None)
        try:
            if not index.is_dir():
                index_dir.mkdir(parents=True, exist_ok=True)
                with alone(index_dir / "lock", lambda: report(0, size)):
                    if not index.is_dir():
                        _build(path, form, index, report)
            manifest = cls(path, form, index)
        except OSError as error:
            raise RunError(f"index of the manifest in {index_dir}: {_words(error)}", exit_code=1) from error
        return manifest

    def __len__(self) -> int:
        """Lines that are not blank: the rows that end as done or failed."""
        return self._num_rows

    def __reduce__(self) -> tuple[Any, ...]:
        return Manifest, (self.path, self.form, self._index)

    @property
    def task(self) -> Task:
        """What the rows are for."""
        return self.form.task

    @property
    def is_row(self) -> npt.NDArray[np.bool_]:
        """Bool (num_lines,): lines that are worked on, neither blank nor refused."""
        return self.states == LineState.ROW

    @property
    def is_blank(self) -> npt.NDArray[np.bool_]:
        """Bool (num_lines,): lines without content, which count as no row."""
        return self.states == LineState.BLANK

    @staticmethod
    def hash_key(key: str) -> int:
        """The hash that ``key_hashes`` holds for ``key``."""
        return int.from_bytes(_hash_bytes(key.encode("utf-8", "surrogatepass")), "big")

    def read(self, first_line: int, last_line: int) -> list[ManifestRow | RowFailure]:
        """The rows of lines ``first_line`` up to, not including, ``last_line``, in order; blank lines are left out.

        Raises:
            RunError: the manifest cannot be read, or is no longer what it was when it was indexed.
        """
        items: list[ManifestRow | RowFailure] = []
        digests, states = (array[first_line:last_line].tolist() for array in (self.digests, self.states))
        lines = self._raw_lines(first_line, last_line)
        for line, raw, digest, state in zip(range(first_line, last_line), lines, digests, states, strict=True):
            text = raw.strip()
            if _hash_bytes(text) != digest.to_bytes(8, "big"):
                raise RunError(
                    f"line {line + 1} of manifest {self.path} changed during the run: start the same command again",
                    exit_code=1,
                )
            if state != LineState.BLANK:
                items.append(self._item(line, text, f"{digest:016x}", state == LineState.DUPLICATE))
        return items

    def _item(self, line: int, text: bytes, digest: str, duplicate: bool) -> ManifestRow | RowFailure:
        try:
            row = _check_line(text, self.form)
        except _Refused as refused:
            return RowFailure(line, digest, refused.key, "manifest", refused.reason)
        if duplicate:
            return RowFailure(line, digest, row["key"], "manifest", self._explain_duplicate(line, row))
        paths = {
            name: row[name] if isinstance(row.get(name), str) else None for name in REQUIRED_FIELDS["wav2token2wav"][1:]
        }
        return ManifestRow(
            line,
            digest,
            row["key"],
            paths["wav"],
            paths["quantized_tokens"],
            paths["reconstructed_wav"],
            row,
            cut_of(row),
        )

    def _explain_duplicate(self, line: int, row: dict[str, Any]) -> str:
        _, shared, first = self._duplicates[np.searchsorted(self._duplicates[:, 0], line)]
        if shared == 0:
            return f"duplicate key {_quote(row['key'])}: first on line {first + 1}"
        field = self.form.outputs[shared - 1]
        return f'output path {_normalise(row[field])} of field "{field}" is taken: first on line {first + 1}'

    def _raw_lines(self, first_line: int, last_line: int) -> Iterator[bytes]:
        """Lines without newline, cut to ``MAX_LINE + 1`` bytes; read together as far as that stays below ``_BLOCK``."""
        try:
            if self._file is None:
                self._file = self.path.open("rb")
            descriptor = self._file.fileno()
            offsets = self.offsets[first_line : last_line + 1].astype(np.int64)
            line, count = 0, last_line - first_line
            while line < count:
                together = int(np.searchsorted(offsets, offsets[line] + _BLOCK, side="right")) - 1
                stop = min(max(together, line + 1), count)
                length = min(int(offsets[stop] - offsets[line]), max(_BLOCK, MAX_LINE + 2))
                data = os.pread(descriptor, length, int(offsets[line]))
                for begin, end in pairwise((offsets[line : stop + 1] - offsets[line]).tolist()):
                    yield data[begin:end].removesuffix(b"\n")[: MAX_LINE + 1]
                line = stop
        except OSError as error:
            raise RunError(f"manifest {self.path}: {_words(error)}", exit_code=1) from error


def _words(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _unreadable(path: Path, error: OSError | ValueError) -> RunError:
    if isinstance(error, FileNotFoundError):
        return RunError(f"manifest {path} does not exist")
    if isinstance(error, IsADirectoryError):
        return RunError(f"manifest {path} is a folder: --data_list wants the JSON-lines file")
    return RunError(f"manifest {path} cannot be read: {_words(error)}")


def _identity(stream: IO[bytes], form: RowForm) -> str:
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


def _build(path: Path, form: RowForm, index: Path, report: Progress) -> None:
    """Write the index into the folder ``index``, which comes into being complete or not at all."""
    aside = index.with_name(f"building-{socket.gethostname()}-{os.getpid()}-{time.monotonic_ns()}")
    aside.mkdir()
    try:
        with path.open("rb") as stream:
            _write_columns(stream, path, form, aside, report)
            if f"{form.task}-{_identity(stream, form)}" != index.name:
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
    columns = {name: _ColumnFile(folder, name, dtype) for name, dtype in _COLUMNS.items()}
    output_hashes = _ColumnFile(folder, "output_hashes", np.dtype(np.int64))
    report(0, size)
    reported = time.monotonic()
    for offsets, lines in _lines_by_block(stream, start, size):
        values, paths = _index_lines(lines, form)
        columns["offsets"].append(offsets)
        for name, column in values.items():
            columns[name].append(column)
        output_hashes.append(paths.ravel())
        if time.monotonic() - reported > 0.5:
            report(int(offsets[-1]), size)
            reported = time.monotonic()
    columns["offsets"].append(np.array([size]))
    finished = {name: column.finish() for name, column in columns.items()}
    states = finished["states"]
    hashes = output_hashes.finish().reshape(len(states), len(form.outputs))
    if not np.any(states != LineState.BLANK):
        raise RunError(f"manifest {path} is empty: it has blank lines only")

    def names_of(line: int) -> _Names:
        begin, end = map(int, finished["offsets"][line : line + 2])
        text = os.pread(stream.fileno(), min(end - begin, MAX_LINE + 1), begin).strip()
        return _names(orjson.loads(text), form)

    duplicates = _find_duplicates(finished["key_hashes"], hashes, states == LineState.ROW, names_of)
    marked = np.load(folder / "states.npy", mmap_mode="r+")
    marked[duplicates[:, 0]] = LineState.DUPLICATE
    marked.flush()
    np.save(folder / "duplicates.npy", duplicates)
    output_hashes.path.unlink()
    report(size, size)


# ---------------------------------------------------------------------------------------------------------------- units


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
            are not blank. A unit may enclose lines that are not pending. The caller leaves them out.

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

    # A refused line costs nothing, whatever its duration; it is known to be short.
    seconds = np.where(manifest.states[lines] == LineState.ROW, manifest.durations[lines], 0.0).astype(np.float64)
    shares = world_size * _UNITS_PER_PROCESS
    most_rows = max(1, min(_UNIT_ROWS, len(lines) // shares))
    most_seconds = max(1e-3, min(_UNIT_SECONDS, float(np.nansum(seconds)) / shares or _UNIT_SECONDS))
    # A row weighs its share of a full unit, by count or by seconds; a unit ends where the running sum passes a whole
    # number. Integers, as rounding must not let one row too many into a unit.
    weights = np.fmin(np.nan_to_num(seconds / most_seconds), 1.0) * _WEIGHT_ONE
    weights = np.maximum(weights.astype(np.int64), -(-_WEIGHT_ONE // most_rows))
    number = (np.cumsum(weights) - weights) // _WEIGHT_ONE
    cuts = (np.diff(number) != 0) | (np.diff(lines) > _UNIT_GAP)
    if blocks is not None:
        cuts |= np.diff(blocks) != 0
    first = np.concatenate(([0], np.flatnonzero(cuts) + 1))
    last = np.concatenate((first[1:], [len(lines)])) - 1
    total = np.add.reduceat(seconds, first)
    order = np.argsort(-np.where(np.isnan(total), np.inf, total), kind="stable")
    return Units(lines[first][order], lines[last][order] + 1)
