"""Rows of parquet files by their number: the codes and info of a row, or its audio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import orjson

from batch_tokenizer.records import CODES_FIELD, RowError
from batch_tokenizer.storage.json_lines import parse_json
from batch_tokenizer.storage.row_info import join_info, other_names, split_info
from batch_tokenizer.storage.table_files import TableFile, find_row

if TYPE_CHECKING:
    from typing_extensions import Self

#: Columns in which codes are looked for where the metadata does not name one, in this order.
CODES_COLUMNS = (CODES_FIELD, "codes")

#: Columns of what is stored beside codes.
AUDIO_COLUMNS = ("audio", "hidden_states")

#: Groups up to this size are read as a whole, as rows of a group are asked for in any order.
_WINDOW_BYTES = 1 << 30


@dataclass
class TokenParquet(TableFile):
    """An open parquet file of tokens.

    Attributes:
        run_info: what the metadata says of all rows.
        num_quantizers: K by the metadata; None where it does not say.
        codes_column: the column of codes; None where there is none.
        fields: the columns that are fields of rows.
    """

    run_info: Mapping[str, Any] = field(init=False)
    num_quantizers: int | None = field(init=False)
    codes_column: str | None = field(init=False)
    fields: tuple[str, ...] = field(init=False)

    @classmethod
    def open(cls, path: str, *, must_have_codes: bool = False) -> Self:
        """
        Raises:
            RowError: it cannot be read, has no column of codes although it must, or one that is none of lists of
                integers; or pyarrow is not installed.
        """
        parquet = super().open(path)
        try:
            parquet._read_metadata(must_have_codes)
        except BaseException:
            parquet.close()
            raise
        return parquet

    def _read_metadata(self, must_have_codes: bool) -> None:
        schema = self.schema
        metadata = schema.metadata or {}
        named = metadata.get(b"codes_field", b"").decode("utf-8", "replace")
        codes = next((column for column in (named, *CODES_COLUMNS) if column in schema.names), None)
        if (codes is None and must_have_codes) or (codes is not None and not _holds_codes(schema.field(codes))):
            raise RowError("load", f"{self.name}: has no column {codes or CODES_FIELD} of lists of integers")
        try:
            run_info = orjson.loads(metadata.get(b"batch_tokenizer", b"{}"))
            width = metadata.get(b"num_quantizers")
            self.num_quantizers = None if width is None else int(width)
            self.fields = _field_columns(schema, codes)
        except ValueError as error:
            raise RowError("load", f"{self.name}: its schema's metadata is damaged") from error
        if not isinstance(run_info, dict) or (self.num_quantizers is not None and self.num_quantizers < 1):
            raise RowError("load", f"{self.name}: its schema's metadata is damaged")
        self.run_info, self.codes_column = run_info, codes

    @property
    def window_bytes(self) -> int:
        """As in ``TableFile``."""
        return _WINDOW_BYTES

    @property
    def other_codes_columns(self) -> tuple[str, ...]:
        """The columns of codes of rows' other audio."""
        return other_names(self.run_info)

    @property
    def token_columns(self) -> tuple[str, ...]:
        """The columns of a row's codes and of what is known of it."""
        codes = () if self.codes_column is None else (self.codes_column,)
        return ("key", *codes, "num_frames", "num_samples", "info", *self.fields)

    def there(self, columns: Sequence[str]) -> list[str]:
        """Those of some columns that the file has."""
        return [name for name in columns if name in self.schema.names]

    def other_codes_of(self, table: Any, number: int) -> dict[str, npt.NDArray[Any]]:
        """Integers (T, K) of a row's other audio, as far as it has some, by column; checked for nothing.

        Raises:
            RowError: there is no such column.
        """
        found = {}
        for column in self.other_codes_columns:
            if column not in table.column_names or not _holds_codes(table.schema.field(column)):
                raise RowError("load", f"{self.name}: has no column {column} of lists of integers")
            if table.column(column)[number].is_valid:
                found[column] = self.codes_of(table, number, column)
        return found

    def codes_of(self, table: Any, number: int, column: str | None = None) -> npt.NDArray[Any]:
        """Integers (T, K) of a row of a table; checked for nothing but their count.

        Args:
            column: None for that of rows' own codes.

        Raises:
            RowError: the row has none, or not as many as its frames take.
        """
        row = table.column(column or self.codes_column)[number]
        if not row.is_valid:
            raise RowError("load", f"{self.name}: a row has no codes")
        values = row.values
        widths: set[int] = set()
        if _is_list(values.type):  # of frames
            if values.null_count:
                raise RowError("load", f"{self.name}: a row has frames that are null")
            widths = set(values.value_lengths().to_pylist())
            if len(widths) > 1:
                raise RowError("load", f"{self.name}: a row has frames of {min(widths)} and of {max(widths)} codes")
            values = values.flatten()
        if values.null_count:
            raise RowError("load", f"{self.name}: a row has codes that are null")
        flat = values.to_numpy(zero_copy_only=False)
        if widths:
            return np.asarray(flat).reshape(-1, widths.pop())
        frames = table.column("num_frames")[number].as_py() if "num_frames" in table.column_names else None
        width = self.num_quantizers or (len(flat) // frames if isinstance(frames, int) and frames > 0 else 0)
        if width < 1 or len(flat) % width or (isinstance(frames, int) and frames * width != len(flat)):
            raise RowError("load", f"{self.name}: a row has {len(flat)} codes, where it should have {frames} × {width}")
        return np.asarray(flat).reshape(-1, width)

    def parts_of(self, table: Any, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields of a row of a table, and what is known of its codes; of columns that the table has."""
        about = dict(self.run_info)
        for name in ("num_frames", "num_samples"):
            if name in table.column_names and (count := table.column(name)[number].as_py()) is not None:
                about[name] = count
        if self.num_quantizers is not None:
            about["num_quantizers"] = self.num_quantizers
        there = (name for name in ("key", *self.fields) if name in table.column_names)
        fields = {name: table.column(name)[number].as_py() for name in there}
        more, more_about = split_info(row_info(table, number))
        return {name: value for name, value in fields.items() if value is not None} | more, about | more_about


def _is_list(type_: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def _holds_codes(field: Any) -> bool:
    """Whether a column has lists of integers, frame by frame, or lists of such lists."""
    import pyarrow as pa

    inner = field.type.value_type if _is_list(field.type) else None
    inner = inner.value_type if inner is not None and _is_list(inner) else inner
    return inner is not None and bool(pa.types.is_integer(inner))


def _field_columns(schema: Any, codes: str | None) -> tuple[str, ...]:
    """The columns that are fields of rows: those that the metadata names, or, in files of other programs, all whose
    values JSON can hold."""
    metadata = schema.metadata or {}
    if b"fields" in metadata:
        named = orjson.loads(metadata[b"fields"])
        return tuple(name for name in schema.names if isinstance(named, list) and name in named)
    if b"batch_tokenizer" in metadata:  # of version 0.1, with fields in ``info`` alone
        return ()
    others = ("key", codes, "num_frames", "num_samples", "info", "audio")
    return tuple(field.name for field in schema if field.name not in others and _is_plain(field.type))


def _is_plain(type_: Any) -> bool:
    import pyarrow as pa

    types = pa.types
    if types.is_struct(type_):
        return all(_is_plain(field.type) for field in type_)
    if _is_list(type_):
        return _is_plain(type_.value_type)
    is_text = types.is_string(type_) or types.is_large_string(type_)
    return bool(is_text or types.is_integer(type_) or types.is_floating(type_) or types.is_boolean(type_))


def read_row(path: str, row: int) -> tuple[npt.NDArray[Any], Mapping[str, Any]]:
    """Integers (T, K) of a row, and what is known of it.

    Raises:
        RowError: it cannot be read.
    """
    parquet, table, number = find_tokens(path, row)
    if parquet.codes_column is None:
        raise RowError("load", f"{parquet.name}: has no column {CODES_FIELD} of lists of integers")
    return parquet.codes_of(table, number), join_info(*parquet.parts_of(table, number))


def read_audio(path: str, row: int) -> bytes:
    """The audio file that a row holds.

    Raises:
        RowError: it cannot be read, or there is none.
    """
    parquet, table, number = find_row(TokenParquet, path, row, lambda parquet: parquet.there(["audio"]))
    audio = table.column("audio")[number].as_py() if table.column_names else None
    if not isinstance(audio, dict) or not isinstance(audio.get("bytes"), bytes):
        raise RowError("load", f"{parquet.name}: row {row} has no audio")
    return audio["bytes"]


def read_other_codes(path: str, row: int) -> Mapping[str, npt.NDArray[Any]]:
    """Integers (T, K) of a row's other audio, by their name.

    Raises:
        RowError: they cannot be read.
    """
    parquet, table, number = find_tokens(path, row, with_other_codes=True)
    return parquet.other_codes_of(table, number)


def find_tokens(
    path: str, row: int, *, with_audio: bool = False, with_other_codes: bool = False
) -> tuple[TokenParquet, Any, int]:
    """The file, a table of some of its rows with their codes and what is known of them, and the place of a row in it.

    Args:
        with_audio: whether the table has audio and hidden states, where the file does.
        with_other_codes: whether it has codes of rows' other audio, likewise.

    Raises:
        RowError: they cannot be read, or there is no such row.
    """

    def columns(parquet: TokenParquet) -> list[str]:
        others = parquet.other_codes_columns if with_other_codes else ()
        return parquet.there((*parquet.token_columns, *(AUDIO_COLUMNS if with_audio else ()), *others))

    return find_row(TokenParquet, path, row, columns)


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
