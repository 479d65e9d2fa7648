"""Parquet and Arrow files: rows a window at a time, and rows by their number.

Rows are asked for one by one but lie in groups: parquet's row groups, Arrow's record batches. A group of parquet may
have gigabytes, so it is read a window of limited size after the other, from its beginning; a process keeps the last
few windows, and its place behind them. Arrow files are mapped, and nothing of them is read that is not asked for.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from batch_tokenizer.records import RowError, first_line
from batch_tokenizer.storage.files import open_file
from batch_tokenizer.storage.names import display_name, is_url
from batch_tokenizer.storage.remote import RangeFile, StorageError

if TYPE_CHECKING:
    from typing_extensions import Self

#: Files, and windows of rows, that a process keeps.
_CACHED_FILES, _CACHED_WINDOWS = 8, 4

#: Bytes of a window that is read for single values.
_WINDOW_BYTES = 32 * 2**20

#: Bytes that are read of a column at once.
_READ_BYTES, _REMOTE_READ_BYTES = 1 << 20, 8 << 20


class Window(NamedTuple):
    """Consecutive rows of a file: the number of the first, and a table of them."""

    first_row: int
    table: Any

    def holds(self, row: int) -> bool:
        """Whether a row of the file is among them."""
        return self.first_row <= row < self.first_row + len(self.table)


@dataclass
class TableFile:
    """An open parquet or Arrow file.

    Attributes:
        name: for messages.
        schema: ``pyarrow.Schema`` of its columns.
        first_rows: int64 (G + 1,), the first row of each group, then the number of rows.
        torn: why there are no rows behind the last one, although there should be.
    """

    name: str
    schema: Any
    first_rows: npt.NDArray[np.int64]
    torn: str | None
    _parquet: Any
    _batches: Sequence[Any]
    _closing: ExitStack

    @classmethod
    def open(cls, path: str) -> Self:
        """Opens a file, of which only the description is read. A name that ends in ``.arrow`` is an Arrow file.

        Raises:
            RowError: it cannot be read, or pyarrow is not installed.
        """
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise RowError("load", "parquet needs pyarrow: pip install 'batch_tokenizer[parquet]'") from error
        name = display_name(path)
        with ExitStack() as stack, _reasons(name, "cannot be read"):
            if path.endswith(".arrow"):
                batches, torn, schema = _map_batches(path, name, stack)
                first_rows = np.cumsum([0, *map(len, batches)], dtype=np.int64)
                return cls(name, schema, first_rows, torn, None, batches, stack.pop_all())
            if is_url(path):
                stream: Any = stack.enter_context(RangeFile(path))
            else:
                stream, _ = stack.enter_context(open_file(path, "a parquet file"))
            size = _REMOTE_READ_BYTES if is_url(path) else _READ_BYTES
            file = pq.ParquetFile(stream, buffer_size=size, pre_buffer=False, page_checksum_verification=True)
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            first_rows = np.cumsum([0, *sizes], dtype=np.int64)
            return cls(name, file.schema_arrow, first_rows, None, file, (), stack.pop_all())

    def __len__(self) -> int:
        """Rows."""
        return int(self.first_rows[-1])

    @property
    def num_groups(self) -> int:
        """Groups of rows."""
        return len(self.first_rows) - 1

    @property
    def window_bytes(self) -> int:
        """Bytes of a window's columns as they are in memory, which one large row may pass."""
        return _WINDOW_BYTES

    def windows(self, group: int, columns: Sequence[str]) -> Iterator[Window]:
        """The rows of a group, in order.

        Args:
            columns: names; ``a.b`` is the field b of a column a of structs.

        Raises:
            RowError: they cannot be read.
        """
        first = int(self.first_rows[group])
        if self._parquet is None:
            yield Window(first, self._batches[group].select(list({name.split(".")[0]: None for name in columns})))
            return
        about = self._parquet.metadata.row_group(group)
        leaves = [about.column(number) for number in range(about.num_columns)]
        wanted = [leaf for leaf in leaves if any(_is_part(leaf.path_in_schema, name) for name in columns)]
        row_bytes = sum(leaf.total_uncompressed_size for leaf in wanted) / max(1, about.num_rows)
        rows = max(1, min(about.num_rows, int(self.window_bytes // max(1.0, row_bytes))))
        with _reasons(self.name, "rows cannot be read"):
            for batch in self._parquet.iter_batches(rows, row_groups=[group], columns=list(columns), use_threads=False):
                batch.validate(full=True)
                yield Window(first, batch)
                first += len(batch)

    def all_windows(self, columns: Sequence[str]) -> Iterator[Window]:
        """The rows of all groups, in order; as ``windows``."""
        for group in range(self.num_groups):
            yield from self.windows(group, columns)

    def close(self) -> None:
        """Close the file."""
        self._batches = ()
        self._closing.close()


def _map_batches(path: str, name: str, stack: ExitStack) -> tuple[list[Any], str | None, Any]:
    """(record batches, why the last ones are missing, schema) of a mapped Arrow file or stream."""
    import pyarrow as pa

    if is_url(path):
        raise RowError("load", f"{name}: Arrow files are read on a local disk only: download it, or use parquet")
    with open_file(path, "an Arrow file") as (file, _):
        is_stream = file.read(6) != b"ARROW1"
    mapped = stack.enter_context(pa.memory_map(path))
    if not is_stream:
        reader = pa.ipc.open_file(mapped)
        return [reader.get_batch(number) for number in range(reader.num_record_batches)], None, reader.schema
    stream = pa.ipc.open_stream(mapped)
    batches: list[Any] = []
    try:
        batches.extend(stream)
    except (pa.ArrowException, OSError, ValueError) as error:
        torn = f"{name}: its rows from {sum(map(len, batches)):,} on are lost: {first_line(error)}"
        return batches, torn, stream.schema
    return batches, None, stream.schema


def _is_part(leaf: str, column: str) -> bool:
    return leaf == column or leaf.startswith(f"{column}.")


@contextmanager
def _reasons(name: str, what: str) -> Iterator[None]:
    """What a library or a store has against a file, as a RowError."""
    try:
        yield
    except StorageError as error:
        raise RowError("load", error.reason) from error
    except (OSError, ValueError, MemoryError) as error:  # of which pyarrow's are
        raise RowError("load", f"{name}: {what}: {first_line(error)}") from error


class _Place(NamedTuple):
    """Which windows are read one after the other."""

    path: str
    group: int
    columns: tuple[str, ...]


File = TypeVar("File", bound=TableFile)

_lock = threading.Lock()
_files: OrderedDict[tuple[type[TableFile], str], TableFile] = OrderedDict()
_readers: OrderedDict[_Place, Iterator[Window]] = OrderedDict()
_windows: OrderedDict[tuple[_Place, int], Window] = OrderedDict()


def _forget_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    _forget()  # a forked child shares its parent's place in a file


def _forget() -> None:
    _files.clear()
    _readers.clear()
    _windows.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def close_table_files() -> None:
    """Closes what ``find_row`` keeps open, so that files that were replaced are read anew."""
    with _lock:
        _forget()


def find_row(kind: type[File], path: str, row: int, columns: Callable[[File], Sequence[str]]) -> tuple[File, Any, int]:
    """The file, a table with columns of some of its rows, and the place of a row in it.

    Args:
        kind: opens the file.
        columns: the names of the columns, which must be there.

    Raises:
        RowError: they cannot be read, or there is no such row.
    """
    with _lock:
        file = _files.pop((kind, path), None) or kind.open(path)
        assert isinstance(file, kind)
        _files[kind, path] = file
        while len(_files) > _CACHED_FILES:
            (_, old), _ = _files.popitem(last=False)
            for place in [place for place in _readers if place.path == old]:
                del _readers[place]
        if row >= len(file):
            raise RowError("load", file.torn or f"{file.name}: has {len(file):,} rows, and no row {row}")
        group = int(np.searchsorted(file.first_rows, row, side="right")) - 1
        window = _find_window(file, _Place(path, group, tuple(columns(file))), row)
        return file, window.table, row - window.first_row


def read_cell(path: str, row: int, column: str) -> bytes | str:
    """The audio of a row: the bytes of the file that it holds, or the path of one.

    Raises:
        RowError: it cannot be read, or there is none.
    """

    def columns(file: TableFile) -> tuple[str]:
        if column not in file.schema.names:
            raise RowError("load", f"{file.name}: has no column {column}: it has changed")
        return (column,)

    file, table, number = find_row(TableFile, path, row, columns)
    with _reasons(file.name, f"row {row} cannot be read"):
        cell = table.column(column).slice(number, 1)
        cell.validate(full=True)
        value = cell[0].as_py()
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, (bytes, str)) or not value:
        raise RowError("load", f"{file.name}: row {row} has no audio in column {column}")
    return value


def _find_window(file: TableFile, place: _Place, row: int) -> Window:
    for name, window in _windows.items():
        if name[0] == place and window.holds(row):
            _windows.move_to_end(name)
            return window
    reader = _readers.pop(place, None)
    for _ in range(2):  # what was read on from there, and if the row lies before it, the group from its beginning
        for window in reader or ():
            _windows[place, window.first_row] = window
            while len(_windows) > _CACHED_WINDOWS:
                _windows.popitem(last=False)
            if window.first_row > row:
                break
            if window.holds(row):
                assert reader is not None
                _readers[place] = reader
                while len(_readers) > _CACHED_WINDOWS:
                    _readers.popitem(last=False)
                return window
        reader = file.windows(place.group, place.columns)
    raise RowError("load", f"{file.name}: row {row} is not in its group of rows: it is damaged")
