"""``open_location``: anything that a row may name, opened as a binary file object that can seek."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager, nullcontext
from typing import BinaryIO

from batch_tokenizer.storage.files import open_file
from batch_tokenizer.storage.names import parse_row_location
from batch_tokenizer.storage.parquet_rows import read_audio


def open_location(location: str) -> AbstractContextManager[tuple[BinaryIO, int]]:
    """As ``open_file``; the location may also be a row of a parquet file, whose audio is opened.

    Raises:
        RowError: it cannot be read; the reason names it and the cause.
    """
    row = parse_row_location(location)
    if row is None:
        return open_file(location)
    content = read_audio(*row)
    return nullcontext((io.BytesIO(content), len(content)))
