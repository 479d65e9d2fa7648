"""``open_location``: anything that a row may name, opened as a binary file object that can seek."""

from __future__ import annotations

import io
import os
from contextlib import AbstractContextManager, nullcontext
from typing import BinaryIO

from batch_tokenizer.storage.files import open_file
from batch_tokenizer.storage.names import is_relative, is_url, parse_cell_location, parse_row_location
from batch_tokenizer.storage.parquet_rows import read_audio
from batch_tokenizer.storage.table_files import read_cell


def open_location(location: str, what: str = "an audio file") -> AbstractContextManager[tuple[BinaryIO, int]]:
    """As ``open_file``; the location may also be a row of a parquet or Arrow file, whose audio is opened.

    Raises:
        RowError: it cannot be read; the reason names it and the cause.
    """
    cell = parse_cell_location(location)
    row = parse_row_location(location)
    if cell is not None:
        found = read_cell(*cell)
        if isinstance(found, str):
            return open_file(_beside(cell[0], found), what)
        content = found
    elif row is not None:
        content = read_audio(*row)
    else:
        return open_file(location, what)
    return nullcontext((io.BytesIO(content), len(content)))


def _beside(table: str, path: str) -> str:
    """A path that a table holds: in the working directory or, where it is not there, in the folder of the table."""
    near = os.path.join(os.path.dirname(table), path)
    return near if is_relative(path) and not os.path.exists(path) and (is_url(near) or os.path.exists(near)) else path
