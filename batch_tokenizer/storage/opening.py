"""``open_location``: anything that a row may name, opened as a binary file object that can seek."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from batch_tokenizer.storage.files import open_file
from batch_tokenizer.storage.names import parse_row_location
from batch_tokenizer.storage.parquet_rows import read_audio


@contextmanager
def open_location(location: str, what: str = "an audio file") -> Iterator[tuple[BinaryIO, int]]:
    """As ``open_file``; the location may also be a row of a parquet file, whose audio is opened.

    Raises:
        RowError: it cannot be read; the reason names it and the cause.
    """
    row = parse_row_location(location)
    if row is None:
        with open_file(location, what) as opened:
            yield opened
    else:
        content = read_audio(*row)
        yield io.BytesIO(content), len(content)
