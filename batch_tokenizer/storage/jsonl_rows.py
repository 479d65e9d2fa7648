"""JSON lines that have codes in them: which field has them, what else a line says, and lines by their place in a file.

They are those of the ``jsonl`` sink, or rows of other programs with the codes as lists (T, K) under one of
``CODES_FIELDS``.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, cast

from batch_tokenizer.records import CODES_FIELD, RowError, first_line
from batch_tokenizer.storage.files import open_file
from batch_tokenizer.storage.json_lines import parse_json
from batch_tokenizer.storage.names import display_name, is_url
from batch_tokenizer.storage.remote import StorageError, read_range
from batch_tokenizer.storage.row_info import HIDDEN, join_info, other_names

#: What a line says of the codes in fields of their own.
TOP_LEVEL = ("num_frames", "codec", "fingerprint")

#: The object that has the rest of what the run says, and the name of the field with the codes.
ABOUT = "batch_tokenizer"

#: Fields in which codes are looked for where a line does not name one, in this order.
CODES_FIELDS = (CODES_FIELD, "codes", "quantized_tokens")

#: Stands in place of the frames while the rest of a large JSON text is parsed.
FRAMES_MARK = "the frames, which are parsed by themselves 6f1c5a0e"

#: Largest line that is read.
_MOST_LINE = 1 << 30


def codes_field_of(row: Mapping[str, Any]) -> str | None:
    """The field of a row that has its codes; None where none has.

    A row that names a file of tokens has its codes there. Others in it are what it had before those were made.
    """
    about = row.get(ABOUT)
    named = about.get("codes_field") if isinstance(about, Mapping) else None
    if named is None and isinstance(row.get("quantized_tokens"), str) and row["quantized_tokens"] != FRAMES_MARK:
        return None
    for name in (named, *CODES_FIELDS):
        value = row.get(name) if isinstance(name, str) else None
        if isinstance(name, str) and (value == FRAMES_MARK or (isinstance(value, list) and _may_be_codes(value))):
            return name
    return None


def _may_be_codes(value: list[Any]) -> bool:
    return not value or isinstance(value[0], list)


def line_info(row: Mapping[str, Any], codes_field: str) -> dict[str, Any]:
    """All that a line says beside its codes, as ``join_info`` has it."""
    about = row.get(ABOUT)
    if not isinstance(about, Mapping):  # of another program
        return {name: value for name, value in row.items() if name != codes_field}
    rest = {name: value for name, value in about.items() if name != "codes_field"}
    ours = {name: row[name] for name in TOP_LEVEL if name in row}
    ours |= {name: row[name] for name in other_names(rest | ours) if name in row}
    fields = {name: value for name, value in row.items() if name not in (codes_field, ABOUT, HIDDEN, *ours)}
    hidden = row.get(HIDDEN)
    return join_info(fields | (hidden if isinstance(hidden, dict) else {}), {**rest, **ours})


def numbered_lines(location: str) -> Iterator[tuple[int, bytes]]:
    """The byte at which each line that is not blank begins, and the line without its line end.

    Raises:
        RowError: the file cannot be read, or a line is longer than 1 GiB.
    """
    name = display_name(location)
    begin = 0
    with open_file(location, "JSON lines") as (file, _):
        reader = io.BufferedReader(cast(io.RawIOBase, file), 1 << 20)
        while True:
            try:
                line = reader.readline(_MOST_LINE + 1)
            except OSError as error:
                raise RowError("load", f"{name}: cannot be read: {error.strerror}") from error
            if not line:
                return
            if len(line) > _MOST_LINE:
                raise RowError("load", f"{name}: the line at byte {begin:,} is longer than {_MOST_LINE >> 30} GiB")
            if line.strip():
                yield begin, line.rstrip(b"\r\n")
            begin += len(line)


def holds_codes(location: str) -> bool:
    """Whether the first line of a file has codes in one of its fields; False for what cannot be read."""
    try:
        return any(
            codes_field_of(parse_line(line, location)) is not None for _, line in islice(numbered_lines(location), 1)
        )
    except RowError:
        return False


def read_line(path: str, begin: int, size: int) -> bytes:
    """``size`` bytes of a file or an object, from byte ``begin`` on.

    Raises:
        RowError: it cannot be read, or is shorter.
    """
    name = display_name(path)
    try:
        if is_url(path):
            content = read_range(path, begin, begin + size)
        else:
            with open_file(path, "JSON lines") as (file, _):
                file.seek(begin)
                content = file.read(size)
    except StorageError as error:
        raise RowError("load", error.reason) from error
    except OSError as error:
        raise RowError("load", f"{name}: cannot be read: {error.strerror}") from error
    if len(content) != size or b"\n" in content:
        raise RowError("load", f"{name}: has no line of {size:,} bytes at byte {begin:,}: it has changed")
    return content


def parse_line(content: bytes, name: str) -> dict[str, Any]:
    """The object of a line.

    Raises:
        RowError: it is none.
    """
    try:
        row = parse_json(content)
    except ValueError as error:
        raise RowError("load", f"{name}: not JSON: {first_line(error)}") from error
    if not isinstance(row, dict):
        raise RowError("load", f"{name}: not a JSON object")
    return row
