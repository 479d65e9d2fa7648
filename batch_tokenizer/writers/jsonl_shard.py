"""JSON-lines shards: a row a line, as trainers of speech models read them.

    {"key": …, "text": …, "audio_codes": [[K ints] × T], "num_frames": T, "codec": …, "fingerprint": …,
     "batch_tokenizer": {…}}

The fields of the manifest's row stand at the top level as they were, then the codes under ``--codes_field``, and those
of other audio under their names; what else the run says of the row (sample rate, codebook sizes, number of samples …)
is one object under ``batch_tokenizer``. A field of the row that has one of our names and says something else is kept
under ``manifest_row``.
``storage/jsonl_rows.py`` reads such lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from batch_tokenizer.storage.jsonl_rows import ABOUT, TOP_LEVEL
from batch_tokenizer.storage.row_info import merge_hiding, other_names
from batch_tokenizer.writers.row_encoding import EncodedRow, json_bytes


class JsonlShard:
    """A file of JSON lines that is being written."""

    suffix = "jsonl"

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all lines so far."""
        return self._num_bytes

    def append(self, line: bytes) -> None:
        """Write a line that ``jsonl_line`` made.

        Raises:
            OSError: the stream cannot be written.
        """
        self._stream.write(line + b"\n")
        self._num_bytes += len(line) + 1

    def finish(self) -> None:
        """Nothing stands after the last line. The stream stays open."""


def jsonl_line(row: EncodedRow, codes_field: str) -> bytes:
    """The row as a line, without its line end.

    Args:
        codes_field: under which the codes (T, K) stand.

    Raises:
        RowError: its fields are nested too deeply to be written.
    """
    rest = {name: value for name, value in row.about.items() if name not in TOP_LEVEL}
    ours: dict[str, Any] = {
        codes_field: object(),  # equal to no field of the row
        **{name: row.about[name] for name in TOP_LEVEL if name in row.about},
        ABOUT: {"codes_field": codes_field, **rest},
    }
    arrays = {codes_field: np.ascontiguousarray(row.codes)}
    arrays |= {name: np.ascontiguousarray(codes) for name, codes in row.other_codes.items()}
    reserved = frozenset(other_names(row.about))
    document: Mapping[str, Any] = merge_hiding(row.fields, ours, reserved) | arrays
    return json_bytes(document)
