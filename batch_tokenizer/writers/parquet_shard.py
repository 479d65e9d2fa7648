"""Parquet shards: a file of columns, which ``datasets``, polars and duckdb read as it is.

    key          string
    audio_codes  list<list<uint16>>, a row's codes (T, K), under ``--codes_field``. Absent without tokens.
    …            likewise, codes of rows' other audio (``--audio_fields``); null where a row has none
    num_frames   int32, T
    num_samples  int64, samples of input at the codec's rate
    duration     double, seconds of audio, where rows have no field of this name
    …            a column for each field of the rows (``writers/parquet_columns.py``)
    info         string, JSON: what is known of the row and has no column; null where there is nothing
    audio        struct<bytes: binary, path: string>, which ``datasets`` plays. Absent without audio.
    hidden_states  binary, float16 (T, d) frame by frame, little-endian, where a run keeps them; not every reader of
                 parquet has a type for float16

The schema's metadata names what is the same for all rows, a string each (``codec``, ``fingerprint``, ``sample_rate``,
``frame_rate``, ``num_quantizers``, ``version`` …), and all of it as JSON under ``batch_tokenizer``, with the columns of
other codes as ``other_audio``; ``fields`` are the columns that are fields of the rows. Row groups are small enough for
readers that stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from batch_tokenizer.records import CODES_FIELD, RowError, RunError
from batch_tokenizer.storage.json_lines import dump_json
from batch_tokenizer.storage.row_info import join_info, other_names
from batch_tokenizer.writers.parquet_columns import ColumnType, arrow_type, column_types, fits, leaves, texts_of
from batch_tokenizer.writers.row_encoding import EncodedRow, json_bytes

#: A row group ends at so many rows or bytes, whichever is first.
ROWS_PER_GROUP, BYTES_PER_GROUP = 1024, 16 * 2**20


#: The bytes of a group's column are counted in 31 bits, and a row may come on top of a group that is nearly full.
_MOST_BINARY_BYTES = 2**31 - 1 - BYTES_PER_GROUP

#: ``datasets`` takes a column for audio that it decodes where the metadata says so.
_AUDIO_FEATURE = {"info": {"features": {"audio": {"_type": "Audio"}}}}


@dataclass(slots=True)
class ParquetForm:
    """What all shards of a run have in common.

    Attributes:
        common: what is the same for all rows, ``num_quantizers`` (K) among it where there are tokens, and
            ``hidden_states`` where there are such.
        has_tokens, has_audio: what rows have.
        codes_field: the name of the codes' column.
        fields: the fields of rows that have a column, with its type; None until rows decide about it.
    """

    common: Mapping[str, Any]
    has_tokens: bool
    has_audio: bool
    codes_field: str = CODES_FIELD
    fields: Mapping[str, ColumnType] | None = None
    #: Names that columns for fields cannot have.
    reserved: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self.reserved = reserved_columns((self.codes_field, *other_names(self.common)))

    @property
    def codes_columns(self) -> tuple[str, ...]:
        """The columns of codes, that of rows' own ones first."""
        return (self.codes_field, *other_names(self.common)) if self.has_tokens else ()

    def decide(self, rows: Iterable[Mapping[str, Any]]) -> Mapping[str, ColumnType]:
        """The columns for fields, decided by the first rows that are asked about."""
        if self.fields is None:
            self.fields = column_types(rows, self.reserved)
        return self.fields


def reserved_columns(codes_columns: Iterable[str]) -> frozenset[str]:
    """Columns that fields of rows cannot have, given those of codes."""
    return frozenset(("key", *codes_columns, "num_frames", "num_samples", "info", "audio", "hidden_states"))


class ParquetRow(NamedTuple):
    """A row's columns, with its fields still together.

    Attributes:
        codes: by their columns.
        about: what the run says of the row alone and has no column.
        num_bytes: about what it takes.
    """

    key: str
    codes: Mapping[str, npt.NDArray[np.uint16]]
    num_frames: int | None
    num_samples: int | None
    fields: Mapping[str, Any]
    about: Mapping[str, Any]
    audio: dict[str, Any] | None
    hidden_states: bytes | None
    num_bytes: int


class ParquetShard:
    """A parquet file that is being written."""

    suffix = "parquet"

    def __init__(self, stream: BinaryIO, form: ParquetForm) -> None:
        self._stream = stream
        self._form = form
        self._schema: Any = None
        self._writer: Any = None
        self._rows: list[ParquetRow] = []
        self._waiting = 0

    @property
    def num_bytes(self) -> int:
        """Written so far, and about to be."""
        return self._stream.tell() + self._waiting

    def append(self, row: ParquetRow) -> None:
        """Take in what ``encode`` made."""
        self._rows.append(row)
        self._waiting += row.num_bytes
        if len(self._rows) >= ROWS_PER_GROUP or self._waiting >= BYTES_PER_GROUP:
            self._write_group()

    def finish(self) -> None:
        """Write what waits and the end of the file. The stream stays open."""
        if self._rows:
            self._write_group()
        if self._writer is not None:
            self._writer.close()

    def _open(self, types: Mapping[str, ColumnType]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        form = self._form
        codes: ColumnType = {"list": {"list": "uint16"}}
        columns: dict[str, Any] = {"key": pa.string()}
        columns |= dict.fromkeys(form.codes_columns, pa.list_(pa.list_(pa.uint16())))
        columns |= {"num_frames": pa.int32(), "num_samples": pa.int64()}
        if "duration" not in types:
            columns["duration"] = pa.float64()
        columns |= {name: arrow_type(type_) for name, type_ in types.items()}
        columns["info"] = pa.string()
        packed = [path for name in columns if name not in types for path in leaves(name, "string")]
        packed += [path for name, type_ in types.items() for path in leaves(name, type_)]
        # Codes of a codebook are few, so a dictionary packs them into as many bits as they need; likewise speakers.
        dictionary = [path for name, type_ in types.items() for path in texts_of(name, type_)]
        of_codes = [path for name in form.codes_columns for path in leaves(name, codes)]
        dictionary += of_codes
        packed += of_codes
        compression = dict.fromkeys(packed, "zstd")
        metadata = {name: value if isinstance(value, str) else json_bytes(value) for name, value in form.common.items()}
        metadata |= {"batch_tokenizer": json_bytes(form.common), "fields": dump_json(list(types))}
        if form.has_tokens:
            metadata["codes_field"] = form.codes_field
        if form.has_audio:
            columns["audio"] = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            compression |= {"audio.bytes": "none", "audio.path": "zstd"}
            metadata["huggingface"] = json_bytes(_AUDIO_FEATURE)
        if form.common.get("hidden_states"):
            columns["hidden_states"] = pa.binary()
            compression["hidden_states"] = "none"
        self._schema = pa.schema(list(columns.items()), metadata=metadata)
        self._writer = pq.ParquetWriter(
            self._stream,
            self._schema,
            use_dictionary=dictionary or False,
            compression=compression,
            write_page_checksum=True,
        )

    def _write_group(self) -> None:
        import pyarrow as pa

        rows = self._rows
        types = self._form.decide(row.fields for row in rows)
        if self._writer is None:
            self._open(types)
        of_codes = self._form.codes_columns
        columns: dict[str, list[Any]] = {name: [] for name in self._schema.names if name not in of_codes}
        for row in rows:
            own: dict[str, Any] = {
                "key": row.key,
                "num_frames": row.num_frames,
                "num_samples": row.num_samples,
                "audio": row.audio,
                "hidden_states": row.hidden_states,
            }
            left = {}
            for name, value in row.fields.items():
                if value is not None and name in types and fits(value, types[name]):
                    own[name] = value
                elif name != "key":
                    left[name] = value
            if "duration" not in types:
                own["duration"] = self._seconds(row)
            info = join_info(left, row.about)
            own["info"] = json_bytes(info).decode() if info else None
            for name, values in columns.items():
                values.append(own.get(name))
        arrays = {name: pa.array(values, self._schema.field(name).type) for name, values in columns.items()}
        arrays |= {name: _codes_array([row.codes.get(name) for row in rows]) for name in of_codes}
        table = pa.table([arrays[name] for name in self._schema.names], schema=self._schema)
        self._writer.write_table(table, row_group_size=len(rows))
        self._rows = []
        self._waiting = 0

    def _seconds(self, row: ParquetRow) -> float | None:
        rate = self._form.common.get("sample_rate", row.about.get("sample_rate"))
        if row.num_samples is None or not isinstance(rate, int) or rate <= 0:
            return None
        return row.num_samples / rate


def _codes_array(codes: list[npt.NDArray[np.uint16] | None]) -> Any:
    """Codes of rows, (T, K) each, as list<list<uint16>>; null for a row that has none."""
    import pyarrow as pa

    missing = [array is None for array in codes]
    present = [np.zeros((0, 1), np.uint16) if array is None else array for array in codes]
    num_frames = [len(array) for array in present]
    widths = np.repeat([array.shape[1] for array in present], num_frames)
    frames = pa.ListArray.from_arrays(
        pa.array(np.concatenate(([0], np.cumsum(widths))).astype(np.int32)),
        pa.array(np.concatenate([array.reshape(-1) for array in present])),
    )
    ends = pa.array(np.cumsum([0, *num_frames], dtype=np.int32))
    return pa.ListArray.from_arrays(ends, frames, mask=pa.array(missing) if any(missing) else None)


def parquet_row(row: EncodedRow, form: ParquetForm) -> ParquetRow:
    """The row's columns; what the metadata has is left out.

    Raises:
        RowError: its fields are nested too deeply to be written, or its audio or hidden states are
            too large.
    """
    hidden = None if row.hidden_states is None else row.hidden_states.astype("<f2").tobytes()
    for what, content in (("audio", row.audio), ("hidden states", hidden)):
        if content is not None and len(content) > _MOST_BINARY_BYTES:
            raise RowError("write", f"{what} of {len(content):,} bytes do not fit into parquet (2 GiB): use --sink tar")
    fields_bytes = len(json_bytes(row.fields))
    own = {"num_frames": row.about.get("num_frames"), "num_samples": row.about.get("num_samples")}
    counts = {name: value if type(value) is int and 0 <= value < 2**31 else None for name, value in own.items()}
    about = {
        name: value
        for name, value in row.about.items()
        if counts.get(name) is None and not (name in form.common and form.common[name] == value)
    }
    audio = None if row.audio is None else {"bytes": row.audio, "path": f"{row.key}.{row.audio_format}"}
    codes = dict(row.other_codes) if row.codes is None else {form.codes_field: row.codes, **row.other_codes}
    return ParquetRow(
        row.key,
        codes,
        counts["num_frames"],
        counts["num_samples"],
        row.fields,
        about,
        audio,
        hidden,
        sum(array.nbytes for array in codes.values()) + fields_bytes + len(row.audio or b"") + len(hidden or b"") + 100,
    )


def parquet_stored(row: ParquetRow) -> dict[str, bytes | memoryview]:
    """The row's bytes in the file, by name."""
    stored: dict[str, bytes | memoryview] = {}
    if row.audio is not None:
        stored["audio"] = row.audio["bytes"]
    if row.hidden_states is not None:
        stored["hidden_states"] = row.hidden_states
    return stored


def require_pyarrow() -> None:
    """
    Raises:
        RunError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise RunError("parquet needs pyarrow: pip install 'batch_tokenizer[parquet]'") from error
