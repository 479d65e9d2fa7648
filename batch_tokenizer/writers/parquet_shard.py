"""Parquet shards: a file of columns, which ``datasets``, polars and duckdb read as it is.

    key         string
    codes       list<uint16>, a row's codes (T, K) frame by frame; K is in the metadata. Absent without tokens.
    num_frames  int32, T
    duration    double, seconds of audio
    text        string, where the row has one
    info        string, JSON: the row's other fields
    audio       struct<bytes: binary, path: string>. Absent without audio.

The schema's metadata names what is the same for all rows, a string each (``codec``, ``fingerprint``, ``sample_rate``,
``frame_rate``, ``num_quantizers``, ``version`` …), and all of it as JSON under ``batch_tokenizer``. Row groups are
small enough for readers that stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from batch_tokenizer.records import RowError, RunError
from batch_tokenizer.writers.row_encoding import EncodedRow, json_bytes

#: A row group ends at so many rows or bytes, whichever is first.
ROWS_PER_GROUP, BYTES_PER_GROUP = 1024, 16 * 2**20


#: A group's audio is counted in 31 bits, and a row may come on top of a group that is nearly full.
_MOST_AUDIO_BYTES = 2**31 - 1 - BYTES_PER_GROUP


class ParquetRow(NamedTuple):
    """A row's columns."""

    key: str
    codes: npt.NDArray[np.uint16] | None
    num_frames: int
    duration: float | None
    text: str | None
    info: str
    audio: dict[str, Any] | None
    num_bytes: int


class ParquetShard:
    """A parquet file that is being written.

    Args:
        common: what is the same for all rows, ``num_quantizers`` (K) among it where there are tokens.
        has_tokens, has_audio: what rows have.
    """

    suffix = "parquet"

    def __init__(self, stream: BinaryIO, common: Mapping[str, Any], *, has_tokens: bool, has_audio: bool) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        fields = [("key", pa.string()), ("num_frames", pa.int32()), ("duration", pa.float64())]
        if has_tokens:
            fields.insert(1, ("codes", pa.list_(pa.uint16())))
        fields += [("text", pa.string()), ("info", pa.string())]
        if has_audio:
            fields.append(("audio", pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
        metadata = {name: value if isinstance(value, str) else json_bytes(value) for name, value in common.items()}
        self._schema = pa.schema(fields, metadata={**metadata, "batch_tokenizer": json_bytes(common)})
        self._stream = stream
        # Codes of a codebook are few, so a dictionary packs them into as many bits as they need.
        dictionary = ["codes.list.element"] if has_tokens else False
        compression = dict.fromkeys(("key", "num_frames", "duration", "text", "info"), "zstd")
        if has_tokens:
            compression["codes.list.element"] = "zstd"
        if has_audio:
            compression |= {"audio.bytes": "none", "audio.path": "zstd"}
        self._writer = pq.ParquetWriter(
            stream, self._schema, use_dictionary=dictionary, compression=compression, write_page_checksum=True
        )
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
        self._writer.close()

    def _write_group(self) -> None:
        import pyarrow as pa

        rows = self._rows
        columns = []
        for field in self._schema:
            if field.name == "codes":
                flat = [row.codes.reshape(-1) for row in rows if row.codes is not None]
                ends = np.cumsum([0, *map(len, flat)], dtype=np.int32)
                columns.append(pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(flat))))
            else:
                columns.append(pa.array([getattr(row, field.name) for row in rows], field.type))
        self._writer.write_table(pa.table(columns, schema=self._schema), row_group_size=len(rows))
        self._rows = []
        self._waiting = 0


def parquet_row(row: EncodedRow, common: Mapping[str, Any]) -> ParquetRow:
    """The row's columns; what the metadata has, ``common``, is left out of its ``info``.

    Raises:
        RowError: its info is nested too deeply to be written, or its audio is too large.
    """
    if row.audio is not None and len(row.audio) > _MOST_AUDIO_BYTES:
        raise RowError("write", f"audio of {len(row.audio):,} bytes does not fit into parquet (2 GiB): use --sink tar")
    kept = {name: value for name, value in row.info.items() if name not in common or common[name] != value}
    info = json_bytes(kept)
    text = row.info.get("text")
    text = text if isinstance(text, str) and not any("\ud800" <= letter <= "\udfff" for letter in text) else None
    rate, num_samples = row.info.get("sample_rate"), row.info.get("num_samples")
    audio = None if row.audio is None else {"bytes": row.audio, "path": f"{row.key}.{row.audio_format}"}
    num_codes = 0 if row.codes is None else row.codes.size
    return ParquetRow(
        row.key,
        row.codes,
        int(row.about.get("num_frames", 0)),
        num_samples / rate if isinstance(num_samples, int) and isinstance(rate, int) and rate > 0 else None,
        text,
        info.decode(),
        audio,
        2 * num_codes + len(info) + len(row.audio or b"") + 100,
    )


def require_pyarrow() -> None:
    """
    Raises:
        RunError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise RunError("parquet needs pyarrow: pip install 'batch_tokenizer[parquet]'") from error
