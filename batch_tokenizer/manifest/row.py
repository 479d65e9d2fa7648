"""One line of a manifest: its checks, and what a bad line's reason says."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, NamedTuple

from batch_tokenizer.records import CUT_FIELDS, AudioCut, RowForm, short_repr
from batch_tokenizer.storage.json_lines import parse_json
from batch_tokenizer.storage.names import PIPE, is_url, scheme_of

#: Longest line in bytes, without its line end. A longer one fails instead of filling the memory.
MAX_LINE = 16 * 2**20

#: Field with the reason why a source refused a line. It counts only where a required field is missing.
REFUSED = "__refused__"


class LineState(IntEnum):
    """What the index knows of a line. Only ``ROW`` is worked on; ``MALFORMED`` and ``DUPLICATE`` end as failed."""

    ROW = 0
    BLANK = 1
    MALFORMED = 2
    DUPLICATE = 3


class RefusedLine(Exception):
    """A line cannot be a row. ``key`` is its key, where that much could be read."""

    def __init__(self, reason: str, key: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.key = key


def normalised_path(path: str) -> str:
    """``os.path.normpath``, without its cost for a path that it would not change."""
    if "//" in path or "/." in path or "./" in path or path.endswith("/"):
        return os.path.normpath(path)
    return path


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _explain_json(text: bytes, error: json.JSONDecodeError) -> RefusedLine:
    """Why ``text`` is no JSON: not UTF-8, half a surrogate pair (with its field), or the parser's own words."""
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as wrong:
        return RefusedLine(f"not UTF-8: byte 0x{text[wrong.start]:02x} at column {wrong.start + 1}")
    try:
        row = json.loads(decoded)
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, dict):
        for name, value in row.items():
            if _has_half_pair(value):
                key = row.get("key")
                readable = isinstance(key, str) and key and not _has_half_pair(key)
                return RefusedLine(f"field {quoted(name)} has half a surrogate pair", key if readable else None)
    return RefusedLine(f"not valid JSON: {error.msg} at column {error.colno}")


def _has_half_pair(value: object) -> bool:
    """Whether a string in the value, as Python's parser reads it, has half a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def quoted(name: str) -> str:
    """A name between quotation marks, on one line."""
    return json.dumps(name)


def check_line(text: bytes, form: RowForm) -> dict[str, Any]:
    """A stripped line that is not blank as its object.

    Raises:
        RefusedLine: it cannot be a row, whatever the other lines are; the reason says why.
    """
    # 1. An object.
    if len(text) > MAX_LINE:
        raise RefusedLine(f"the line is longer than {MAX_LINE // 2**20} MiB")
    try:
        row = parse_json(text)
    except json.JSONDecodeError as error:
        raise _explain_json(text, error) from None
    if not isinstance(row, dict):
        raise RefusedLine(f"not a JSON object but {_type_name(row)}")
    # 2. With the required fields. The key is read first, so that every later reason is reported under it.
    key = row.get("key")
    key = key if isinstance(key, str) and key else None
    for name in form.required:
        if name not in row:
            refusal = row.get(REFUSED)
            raise RefusedLine(refusal if isinstance(refusal, str) else f'field "{name}" is missing', key)
        value = row[name]
        if not isinstance(value, str):
            expected = "" if value is None else ", not a string"
            raise RefusedLine(f'field "{name}" is {_type_name(value)}{expected}', key)
        if not value:
            raise RefusedLine(f'field "{name}" is empty', key)
        if "\0" in value:
            raise RefusedLine(f'field "{name}" has a NUL character', key)
    # 3. That name different files: an output would replace the input.
    seen: dict[str, str] = {}
    for name in form.required[1:]:
        path = normalised_path(row[name])
        if path in seen:
            raise RefusedLine(f'fields "{seen[path]}" and "{name}" name one file, {path}', key)
        seen[path] = name
    for name in form.outputs:
        path = row[name]
        if ("://" in path and scheme_of(path) is not None and not is_url(path)) or path.startswith(PIPE):
            raise RefusedLine(
                f'field "{name}" is {short_repr(path)}: outputs are files, and no members or commands', key
            )
    try:
        cut_of(row)
    except ValueError as error:
        raise RefusedLine(str(error), key) from None
    return row


def cut_of(row: Mapping[str, Any]) -> AudioCut | None:
    """The part of its file that a row means: ``start`` or ``offset``, then ``end`` or ``duration``, ``channel`` and
    ``audio_stream``.

    ``duration`` alone is the length of a whole file. Fields that are null count as absent.

    Raises:
        ValueError: the fields are not such numbers, or contradict each other.
    """
    if CUT_FIELDS.isdisjoint(row):
        return None
    start, offset, end, duration = (_seconds(row, name) for name in ("start", "offset", "end", "duration"))
    channel, stream = (_index(row, name) for name in ("channel", "audio_stream"))
    if start is not None and offset is not None and start != offset:
        raise ValueError('fields "start" and "offset" say different things')
    begin = start if start is not None else offset
    if end is None and begin is not None and duration is not None:
        end = begin + duration
    if end is not None and end <= (begin or 0.0):
        raise ValueError(f"the segment ends at {end:g} s, where it has not begun")
    if begin is None and end is None and channel is None and stream is None:
        return None
    return AudioCut(begin or 0.0, end, channel, stream)


def _index(row: Mapping[str, Any], name: str) -> int | None:
    value = row.get(name)
    if value is not None and (type(value) is not int or value < 0):
        raise ValueError(f'field "{name}" is {short_repr(value)}, not a number from 0')
    return value


def _seconds(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value < 1e9:
        if name == "duration":
            return None
        raise ValueError(f'field "{name}" is {short_repr(value)}, not seconds')
    return float(value)


def duration_of(row: Mapping[str, Any]) -> float:
    """Seconds of the row's audio, so far as the row says; NaN where it does not, and where order counts for more:
    members of a compressed tar and rows of a table are read one after the other, not the longest first."""
    if str(row.get("wav")).startswith(("targz://", "cell://")):
        return math.nan
    cut = cut_of(row)
    if cut is not None and cut.end is not None:
        return cut.end - cut.start
    value = row.get("duration")
    return value if type(value) is float or type(value) is int else math.nan


class RowNames(NamedTuple):
    """What no two rows may share: the key, and the normalised path of each output."""

    key: str
    outputs: tuple[str, ...]


def row_names(row: dict[str, Any], form: RowForm) -> RowNames:
    """The names of a row that ``check_line`` accepted."""
    return RowNames(row["key"], tuple(normalised_path(row[name]) for name in form.outputs))
