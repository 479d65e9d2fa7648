"""Rows of parquet files by their number: the codes and info of a row, or its audio.

Rows are asked for one by one but lie in groups, so each process caches the last few groups that it has read.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from batch_tokenizer.records import RowError, first_line
from batch_tokenizer.storage.files import open_file
from batch_tokenizer.storage.json_lines import parse_json
from batch_tokenizer.storage.names import display_name

#: Files, and groups of rows, that a process caches.
_KEPT_FILES, _KEPT_GROUPS = 8, 4

#: Codes of one group, unpacked.
_MOST_GROUP_BYTES = 1 << 30


@dataclass(slots=True)
class TokenParquet:
    """An open parquet file.

    Attributes:
        name: for messages.
        first_rows: int64 (G + 1,), the first row of each group, then the number of rows.
        run_info: what the metadata says of all rows.
        num_quantizers: K by the metadata; None where it does not say.
    """

    name: str
    file: Any
    first_rows: npt.NDArray[np.int64]
    run_info: Mapping[str, Any]
    num_quantizers: int | None
    _closing: ExitStack

    @classmethod
    def open(cls, path: str, *, must_have_codes: bool = True) -> TokenParquet:
        """
        Raises:
            RowError: it cannot be read, its column ``codes`` is none of lists of integers, or is not there although it
                must be; or pyarrow is not installed.
        """
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise RowError("load", "parquet needs pyarrow: pip install 'batch_tokenizer[parquet]'") from error
        name = display_name(path)
        with ExitStack() as stack:
            stream, _ = stack.enter_context(open_file(path, "a parquet file"))
            try:
                file = pq.ParquetFile(stream, page_checksum_verification=True)
                about = file.metadata
                sizes = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
                schema = file.schema_arrow
            except (pa.ArrowException, OSError, ValueError) as error:
                raise RowError("load", f"{name}: not a parquet file that can be read: {first_line(error)}") from error
            field = schema.field("codes") if "codes" in schema.names else None
            is_codes = field is not None and pa.types.is_list(field.type) and pa.types.is_integer(field.type.value_type)
            if not is_codes and (must_have_codes or field is not None):
                raise RowError("load", f"{name}: has no column codes of lists of integers")
            metadata = schema.metadata or {}
            try:
                run_info = orjson.loads(metadata.get(b"batch_tokenizer", b"{}"))
                width = metadata.get(b"num_quantizers")
                num_quantizers = None if width is None else int(width)
            except ValueError as error:
                raise RowError("load", f"{name}: its schema's metadata is damaged") from error
            if not isinstance(run_info, dict) or (num_quantizers is not None and num_quantizers < 1):
                raise RowError("load", f"{name}: its schema's metadata is damaged")
            first_rows = np.cumsum([0, *sizes], dtype=np.int64)
            return cls(name, file, first_rows, run_info, num_quantizers, stack.pop_all())

    def __len__(self) -> int:
        """Rows."""
        return int(self.first_rows[-1])

    @property
    def num_groups(self) -> int:
        """Groups of rows."""
        return len(self.first_rows) - 1

    def read_group(self, group: int, columns: list[str]) -> Any:
        """Columns of a group of rows, as a table; those that the file does not have are left out.

        Raises:
            RowError: they cannot be read.
        """
        import pyarrow as pa

        about = self.file.metadata.row_group(group)
        paths = [about.column(number) for number in range(about.num_columns)]
        size = sum(column.total_uncompressed_size for column in paths if column.path_in_schema.split(".")[0] in columns)
        if size > _MOST_GROUP_BYTES:
            raise RowError("load", f"{self.name}: a group of rows of {size:,} bytes is too large")
        there = [name for name in columns if name in self.file.schema_arrow.names]
        try:
            table = self.file.read_row_group(group, columns=there, use_threads=False)
            table.validate(full=True)
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise RowError("load", f"{self.name}: rows cannot be read: {first_line(error)}") from error
        return table

    def codes_of(self, table: Any, number: int) -> npt.NDArray[Any]:
        """Integers (T, K) of a row of a table; checked for nothing but their count.

        Raises:
            RowError: the row has none, or not as many as its frames take.
        """
        row = table.column("codes")[number]
        if not row.is_valid:
            raise RowError("load", f"{self.name}: a row has no codes")
        if row.values.null_count:
            raise RowError("load", f"{self.name}: a row has codes that are null")
        flat = row.values.to_numpy(zero_copy_only=False)
        frames = table.column("num_frames")[number].as_py() if "num_frames" in table.column_names else None
        width = self.num_quantizers or (len(flat) // frames if isinstance(frames, int) and frames > 0 else 0)
        if width < 1 or len(flat) % width or (isinstance(frames, int) and frames * width != len(flat)):
            raise RowError("load", f"{self.name}: a row has {len(flat)} codes, where it should have {frames} × {width}")
        return np.asarray(flat).reshape(-1, width)

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        self._closing.close()


_lock = threading.Lock()
_files: OrderedDict[str, TokenParquet] = OrderedDict()
_groups: OrderedDict[tuple[str, int, tuple[str, ...]], Any] = OrderedDict()


def _forget_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    _files.clear()  # a forked child shares its parent's place in a file
    _groups.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def read_row(path: str, row: int) -> tuple[npt.NDArray[Any], Mapping[str, Any]]:
    """Integers (T, K) of a row, and what is known of it.

    Raises:
        RowError: it cannot be read.
    """
    parquet, table, number = find_row(path, row, ("key", "codes", "num_frames", "info"))
    if "codes" not in table.column_names:
        raise RowError("load", f"{parquet.name}: has no column codes of lists of integers")
    return parquet.codes_of(table, number), {**parquet.run_info, **row_info(table, number)}


def read_audio(path: str, row: int) -> bytes:
    """The audio file that a row holds.

    Raises:
        RowError: it cannot be read, or there is none.
    """
    parquet, table, number = find_row(path, row, ("audio",))
    audio = table.column("audio")[number].as_py() if table.column_names else None
    if not isinstance(audio, dict) or not isinstance(audio.get("bytes"), bytes):
        raise RowError("load", f"{parquet.name}: row {row} has no audio")
    return audio["bytes"]


def find_row(path: str, row: int, columns: tuple[str, ...]) -> tuple[TokenParquet, Any, int]:
    """The file, those columns of the row's group, and the row's number in the group.

    Raises:
        RowError: they cannot be read, or there is no such row.
    """
    with _lock:
        parquet = _files.pop(path, None) or TokenParquet.open(path, must_have_codes=False)
        _files[path] = parquet
        while len(_files) > _KEPT_FILES:
            _files.popitem(last=False)[1].close()
        if row >= len(parquet):
            raise RowError("load", f"{parquet.name}: has {len(parquet):,} rows, and no row {row}")
        group = int(np.searchsorted(parquet.first_rows, row, side="right")) - 1
        table = _groups.pop((path, group, columns), None)
        if table is None:
            table = parquet.read_group(group, list(columns))
        _groups[path, group, columns] = table
        while len(_groups) > _KEPT_GROUPS:
            _groups.popitem(last=False)
        return parquet, table, row - int(parquet.first_rows[group])


def row_info(table: Any, number: int) -> dict[str, Any]:
    """What the ``info`` column says of a row; nothing where that is no JSON object."""
    if "info" not in table.column_names:
        return {}
    text = table.column("info")[number].as_py()
    try:
        info = parse_json(text) if isinstance(text, str) else None
    except ValueError:
        return {}
    return info if isinstance(info, dict) else {}
