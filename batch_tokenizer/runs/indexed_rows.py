"""The rows of a source: in order (``stored_rows``), or by their number (``IndexedRows``), each read from its place.

Tars and JSON lines are read once from the front, to see where each row begins. Parquet says how many rows it has; of
token files the names are listed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.records import ManifestRow, RowError, RunError
from batch_tokenizer.runs.finished_run import FinishedRun
from batch_tokenizer.runs.source_parts import Part, find_parts, token_files
from batch_tokenizer.runs.stored_rows import (
    StoredRow,
    jsonl_row,
    line_row,
    line_rows,
    manifest_row,
    parquet_row_at,
    shard_rows,
    tar_stream_rows,
    token_file_row,
)
from batch_tokenizer.runs.token_stream import StoredStream
from batch_tokenizer.runtime.ledger import RowStatus, read_ledger
from batch_tokenizer.storage.files import close_archives, open_file, read_bytes
from batch_tokenizer.storage.names import display_name, split_member_name
from batch_tokenizer.storage.parquet_rows import TokenParquet
from batch_tokenizer.storage.remote import StorageError
from batch_tokenizer.storage.streams import GZIP_MAGIC
from batch_tokenizer.storage.table_files import close_table_files
from batch_tokenizer.storage.tar import HEADER, SeekableByteStream, TornTar, walk

#: Rows that are best read one after the other, where the file does not say.
BLOCK_ROWS = 256

#: Zero bytes that end a tar.
_TAR_END = 2 * HEADER

_PIECE_BYTES = 1 << 24


class RowFile(ABC):
    """A part of a source. Picklable: it holds no open file."""

    @abstractmethod
    def __len__(self) -> int:
        """Rows."""

    def block_starts(self) -> npt.NDArray[np.int64]:
        """The first row of each block of rows that are best read one after the other; the first is 0."""
        return np.arange(0, len(self), BLOCK_ROWS, dtype=np.int64)

    def rows(self, key: str | None) -> Iterator[StoredRow]:
        """All rows in order, or those of a key and perhaps others; errors as in ``read``."""
        del key
        for number in range(len(self)):
            yield self.read(number, with_audio=True)

    @abstractmethod
    def read(self, number: int, *, with_audio: bool) -> StoredRow:
        """Row ``number``, counted from 0.

        Raises:
            RowError, RunError: it cannot be read.
        """


@dataclass(frozen=True, slots=True)
class IndexedRows:
    """All rows of a source, numbered in its order.

    Attributes:
        files: its parts that have rows.
        first_rows: int64 (len(files) + 1,), the first row of each, then the number of rows.
    """

    source: str
    files: tuple[RowFile, ...]
    first_rows: npt.NDArray[np.int64]

    @classmethod
    def open(cls, source: str) -> IndexedRows:
        """Whatever ``stored_rows`` reads, read in the same order.

        Raises:
            RunError: the source is none, has no rows, or a part of it cannot be read.
        """
        # A file that was replaced since this process read it must not be read through what was opened then.
        close_archives()
        close_table_files()
        try:
            files = tuple(file for file in map(_open_part, find_parts(source)) if len(file))
        except RowError as error:
            raise RunError(error.reason, exit_code=1) from error
        if not files:
            raise RunError(f"{source}: has no rows")
        return cls(source, files, np.cumsum([0, *map(len, files)], dtype=np.int64))

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def block_starts(self) -> npt.NDArray[np.int64]:
        """The first row of each block of rows that are best read one after the other."""
        return np.concatenate(
            [first + file.block_starts() for first, file in zip(self.first_rows, self.files, strict=False)]
        )

    @property
    def has_row_groups(self) -> bool:
        """Whether blocks are read as a whole, so that reading from many at a time takes memory."""
        return any(isinstance(file, ParquetFile) for file in self.files)

    def read(self, row: int, *, with_audio: bool = True) -> StoredRow:
        """
        Raises:
            RowError: the row cannot be read; the reason names its file.
        """
        place = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        try:
            return self.files[place].read(row - int(self.first_rows[place]), with_audio=with_audio)
        except RunError as error:
            raise RowError("load", str(error)) from error
        except StorageError as error:
            raise RowError("load", error.reason) from error


def _open_part(part: Part) -> RowFile:
    if part.kind == "tar":
        return TarFile.open(part.location)
    if part.kind == "parquet":
        return ParquetFile.open(part.location)
    if part.kind == "jsonl" or part.kind == "lines":
        return LinesFile.open(part.location, hold_codes=part.kind == "jsonl")
    if part.kind == "stream":
        return StreamFile(StoredStream.open(Path(part.location)))
    if part.kind == "run":
        return RunFiles.open(Path(part.location))
    return TokenFiles(part.location, tuple(token_files(part.location)))


def stored_rows(source: str, key: str | None = None) -> Iterator[StoredRow]:
    """The rows of a source, in its order, each part read from its beginning: of a run folder, those that are done.

    Args:
        key: only rows of this key; the others' tokens are not read where that can be avoided.

    Raises:
        RunError: the source is none, or a row of it cannot be read.
    """
    try:
        for row in _rows(source, key):
            if key is None or row.key == key:
                yield row
    except RowError as error:
        raise RunError(error.reason, exit_code=1) from error


def _rows(source: str, key: str | None) -> Iterator[StoredRow]:
    wanted = None if key is None else orjson.dumps(key)
    for part in find_parts(source):
        if part.kind in ("tar", "parquet", "jsonl"):
            if wanted is None or part.ledger is None or wanted in part.ledger.read_bytes():
                yield from shard_rows(part.location, part.kind)
        elif part.kind == "lines":  # which may be compressed, and then have no places
            yield from line_rows(part.location, key)
        else:
            file = _open_part(part)
            if part.kind == "files" and not len(file):
                raise RunError(f"{part.location}: has neither shards (.tar, .parquet) nor token files (.json, .npy)")
            yield from file.rows(key)


@dataclass(frozen=True, slots=True)
class TarFile(RowFile):
    """Rows of a tar.

    Attributes:
        starts: int64 (N + 1,), the first byte of each row's first header, then that behind the last row.
    """

    path: str
    starts: npt.NDArray[np.int64]

    @classmethod
    def open(cls, path: str) -> TarFile:
        """
        Raises:
            RowError: it cannot be read to its end.
        """
        starts: list[int] = []
        base, end = None, 0
        with open_file(path, "a tar") as (file, _):
            try:
                for member in walk(SeekableByteStream.of_file(file), lambda kind, name: None):
                    name, _ending = split_member_name(member.name) or (member.name, "")
                    if name != base:
                        starts.append(end)
                        base = name
                    end = member.offset + member.size + -member.size % HEADER
            except TornTar as error:
                raise RowError("load", f"{display_name(path)}: {error}") from error
            except OSError as error:
                raise RowError("load", f"{display_name(path)}: cannot be read: {error.strerror}") from error
        return cls(path, np.array([*starts, end], np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def read(self, number: int, *, with_audio: bool) -> StoredRow:
        begin, stop = self.starts[number : number + 2].tolist()

        def read_at(offset: int, size: int) -> bytes:
            there = max(0, min(size, stop - begin - offset))
            return read_bytes(self.path, begin + offset, begin + offset + there).ljust(size, b"\0")

        stream = SeekableByteStream(read_at, stop - begin + _TAR_END)
        for row in tar_stream_rows(stream, display_name(self.path), with_audio=with_audio):
            return row
        raise RowError("load", f"{display_name(self.path)}: has changed while it was read")


@dataclass(frozen=True, slots=True)
class ParquetFile(RowFile):
    """Rows of a parquet file; its row groups are the blocks.

    Attributes:
        first_rows: int64 (G + 1,), the first row of each group, then the number of rows.
    """

    path: str
    first_rows: npt.NDArray[np.int64]

    @classmethod
    def open(cls, path: str) -> ParquetFile:
        """
        Raises:
            RowError: it cannot be read, or has no tokens.
        """
        parquet = TokenParquet.open(path, must_have_codes=True)
        try:
            return cls(path, parquet.first_rows)
        finally:
            parquet.close()

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def block_starts(self) -> npt.NDArray[np.int64]:
        return np.unique(self.first_rows[:-1])

    def read(self, number: int, *, with_audio: bool) -> StoredRow:
        return parquet_row_at(self.path, number, with_audio=with_audio)


@dataclass(frozen=True, slots=True)
class LinesFile(RowFile):
    """Rows of a file of JSON lines; blank lines are none.

    Attributes:
        hold_codes: the lines have codes in them; otherwise they name token files.
        starts, stops: int64 (N,), the bytes of each row's line.
    """

    path: str
    hold_codes: bool
    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]

    @classmethod
    def open(cls, path: str, *, hold_codes: bool) -> LinesFile:
        """
        Raises:
            RowError: it cannot be read, or is compressed.
        """
        name = display_name(path)
        ends = []
        position, last = 0, b"\n"
        with open_file(path, "a file of JSON lines") as (file, _):
            try:
                while piece := file.read(_PIECE_BYTES):
                    if position == 0 and piece.startswith(GZIP_MAGIC):
                        raise RowError("load", f"{name}: is compressed, so that rows have no places: gunzip it first")
                    values = np.frombuffer(piece, np.uint8)
                    ends.append(position + 1 + np.flatnonzero(values == ord("\n")))
                    position, last = position + len(piece), piece[-1:]
            except OSError as error:
                raise RowError("load", f"{name}: cannot be read: {error.strerror}") from error
        stops = np.concatenate([*ends, [position]] if last != b"\n" else ends).astype(np.int64)
        starts = np.concatenate([[0], stops[:-1]]).astype(np.int64)
        filled = stops - starts > 2  # shorter lines hold no object
        return cls(path, hold_codes, starts[filled], stops[filled])

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, number: int, *, with_audio: bool) -> StoredRow:
        begin, stop = int(self.starts[number]), int(self.stops[number])
        name = f"{display_name(self.path)}: the line at byte {begin:,}"
        line = read_bytes(self.path, begin, stop).rstrip()
        return jsonl_row(line, name) if self.hold_codes else line_row(line, name, with_audio=with_audio)


@dataclass(frozen=True, slots=True)
class StreamFile(RowFile):
    """Rows of a stream of tokens."""

    stream: StoredStream

    def __len__(self) -> int:
        return len(self.stream)

    def rows(self, key: str | None) -> Iterator[StoredRow]:
        for number in range(len(self)):
            if key is None or self.stream.key(number) == key:
                yield self.read(number, with_audio=True)

    def read(self, number: int, *, with_audio: bool) -> StoredRow:
        del with_audio  # a stream has none
        key, codes, info = self.stream.read(number)
        return StoredRow(key, codes, {**info, "num_frames": codes.shape[0], "num_quantizers": codes.shape[1]})


@dataclass(frozen=True, slots=True)
class TokenFiles(RowFile):
    """Token files below a folder, a row each."""

    folder: str
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, number: int, *, with_audio: bool) -> StoredRow:
        return token_file_row(self.folder, self.paths[number], with_audio=with_audio)


@dataclass(frozen=True, slots=True)
class RunFiles(RowFile):
    """Rows that a run folder has as done, and whose outputs are files.

    Attributes:
        lines: int64 (N,), of the manifest.
    """

    manifest: Manifest
    lines: npt.NDArray[np.int64]

    @classmethod
    def open(cls, run_dir: Path) -> RunFiles:
        """
        Raises:
            RunError: the run or its manifest cannot be read.
        """
        manifest = FinishedRun.open(run_dir).manifest()
        return cls(manifest, (read_ledger(run_dir, manifest).status == RowStatus.DONE).nonzero()[0])

    def __len__(self) -> int:
        return len(self.lines)

    def rows(self, key: str | None) -> Iterator[StoredRow]:
        has_key = self.manifest.key_hashes[self.lines] == (0 if key is None else self.manifest.hash_key(key))
        for number in range(len(self)):
            if key is None or has_key[number]:
                yield self.read(number, with_audio=True)

    def read(self, number: int, *, with_audio: bool) -> StoredRow:
        line = int(self.lines[number])
        row = self.manifest.row(line)
        if isinstance(row, ManifestRow):
            return manifest_row(row.fields, with_audio=with_audio)
        raise RunError(f"manifest {self.manifest.path}: line {line + 1} is no row")
