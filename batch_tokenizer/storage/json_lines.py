"""JSON as rows of manifests and outputs hold it: orjson for speed, Python's own where orjson would change a value.

Programs write NaN and Infinity, which are no JSON, and integers of more than 64 bits, which orjson rounds. Both pass
here: NaN and Infinity are read as null, and integers keep their digits.

``json_lines_writer`` and ``json_lines_reader`` are for files that are read or written value by value. The manifest's
index and the ledger's reader have readers of their own, as they need byte offsets and must get past torn lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import IO, Any

import jsonlines
import orjson

#: Every digit to 0, all else to a blank: 19 digits in a row, the least that may not fit into 64 bits, are found ten
#: times faster in the result than by a regular expression.
_DIGITS = bytes(ord("0") if chr(byte).isascii() and chr(byte).isdigit() else ord(" ") for byte in range(256))
_MANY_DIGITS = b"0" * 19


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, or has half a surrogate pair in it. It is a ``json.JSONDecodeError``.
    """
    content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        try:
            value = json.loads(content, parse_constant=lambda name: None)
            # Python's parser accepts half a surrogate pair, which no output could hold.
            json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            raise error from None
        return value
    if _MANY_DIGITS in content.translate(_DIGITS):
        try:
            return json.loads(content, parse_constant=lambda name: None)
        except RecursionError:
            return value
    return value


def dump_json(value: Any) -> bytes:
    """A value as JSON on one line. NaN and infinity are written as null, keys that are not strings as strings.

    Raises:
        TypeError: it holds something that is no JSON.
        ValueError: it is nested too deeply, or has half a surrogate pair in it.
    """
    try:
        return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:
        # Integers of more than 64 bits are the one thing that Python writes and orjson does not.
        try:
            return json.dumps(without_nan(value), ensure_ascii=False, allow_nan=False).encode()
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


def without_nan(value: Any) -> Any:
    """A JSON value with null in place of NaN and infinity, and strings as keys."""
    if isinstance(value, dict):
        return {str(name): without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))) else value


def json_lines_writer(file: IO[bytes]) -> jsonlines.Writer:
    """A writer of one JSON value a line to a binary file, which stays open when the writer is closed."""
    return jsonlines.Writer(file, dumps=dump_json)


def json_lines_reader(lines: Iterable[bytes] | IO[bytes]) -> jsonlines.Reader:
    """A reader of one JSON value a line.

    Its iteration raises ``jsonlines.InvalidLineError``, which names the line's number, for a line that is no JSON.
    """
    return jsonlines.Reader(lines, loads=parse_json)
