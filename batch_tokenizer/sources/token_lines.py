"""Rows of JSON lines that have codes in them, as the ``jsonl`` sink writes them and trainers read them.

A row names the place of its line, and its codes stay there: a manifest of them would be as large as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from batch_tokenizer.manifest.row import REFUSED
from batch_tokenizer.records import RowError
from batch_tokenizer.sources.sidecars import own_fields
from batch_tokenizer.storage.jsonl_rows import codes_field_of, line_info, numbered_lines, parse_line
from batch_tokenizer.storage.names import display_name, file_name, line_location
from batch_tokenizer.storage.row_info import split_info


def token_line_rows(location: str) -> Iterator[dict[str, Any]]:
    """Rows with ``key``, ``quantized_tokens`` and the fields of the lines; refused ones for lines that are none, and
    for a file that cannot be read to its end."""
    try:
        for number, (begin, line) in enumerate(numbered_lines(location), 1):
            yield _row(location, number, begin, line)
    except RowError as error:
        yield {"key": location, REFUSED: error.reason}


def _row(location: str, number: int, begin: int, line: bytes) -> dict[str, Any]:
    name = f"{display_name(location)}: line {number}"
    try:
        row = parse_line(line, name)
    except RowError as error:
        return {"key": f"{location}:{number}", REFUSED: error.reason}
    key = next((str(row[field]) for field in ("key", "id", "utt_id") if _is_name(row.get(field))), None)
    if key is None:  # rows of trainers need no name
        stem = file_name(location).rpartition("/")[2].removesuffix(".jsonl")
        key = f"{stem}-{number}"
    codes_field = codes_field_of(row)
    if codes_field is None:
        return {"key": key, REFUSED: f"{name} has no field with codes"}
    fields, _ = split_info(line_info(row, codes_field))
    return {"key": key, "quantized_tokens": line_location(location, begin, len(line)), **own_fields(fields)}


def _is_name(value: object) -> bool:
    return (isinstance(value, str) and value != "") or type(value) is int
