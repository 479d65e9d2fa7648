"""JSON lines read and written one by one: jsonlines for the format, orjson for speed.

The manifest's index and the ledger's reader have readers of their own, as they need byte offsets and must get past
torn lines.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, Any

import jsonlines
import orjson


def json_lines_writer(file: IO[bytes]) -> jsonlines.Writer:
    """A writer of one JSON value a line to a binary file, which stays open when the writer is closed."""
    return jsonlines.Writer(file, dumps=_dumps)


def json_lines_reader(lines: Iterable[bytes] | IO[bytes]) -> jsonlines.Reader:
    """A reader of one JSON value a line.

    Its iteration raises ``jsonlines.InvalidLineError``, which names the line's number, for a line that is no JSON.
    """
    return jsonlines.Reader(lines, loads=orjson.loads)


def _dumps(value: Any) -> bytes:
    # Keys that are not strings, as in a mapping of codebooks, are written as strings.
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)
