"""Lists of audio that are not JSON, as rows.

wav.scp          Kaldi: a key and a path a line, or a key and a command that ends in ``|``; where a file ``segments``
                 lies beside it, its parts of these recordings (key, recording, start, end)
x.csv, x.tsv     a table with a header, whose columns are a row's fields
a list           a path a line
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from typing import Any

from batch_tokenizer.manifest.row import REFUSED
from batch_tokenizer.records import CUT_FIELDS
from batch_tokenizer.storage.names import PIPE

#: Columns of tables that hold numbers.
_NUMBERS = (*CUT_FIELDS, "duration")


def scp_rows(location: str, lines: Iterable[bytes], segments: Iterable[bytes] | None) -> Iterator[dict[str, Any]]:
    """Rows of a ``wav.scp``, or of the ``segments`` of its recordings.

    A command becomes a location of ``pipe:``, which runs where ``--allow_pipe`` says so.
    """
    places: dict[str, str] = {}
    for number, text in _decoded(location, lines):
        key, _, place = (text or "").partition(" ")
        place = place.strip()
        if not key or not place:
            yield _refused(location, number, "no key and path")
            continue
        if place.endswith("|"):
            place = f"{PIPE}{place[:-1].strip()}"
        if segments is None:
            yield {"key": key, "wav": place}
        places[key] = place
    for number, text in _decoded("segments", segments or ()):
        words = (text or "").split()
        try:
            key, recording, start, end = words[0], words[1], float(words[2]), float(words[3])
            yield {"key": key, "wav": places[recording], "start": start, "end": end}
        except (IndexError, ValueError):
            yield _refused("segments", number, "not a key, a recording, a start and an end")
        except KeyError:
            yield {"key": key, REFUSED: f"recording {recording} of this segment is not in {location}"}


def table_rows(location: str, lines: Iterable[bytes], delimiter: str) -> Iterator[dict[str, Any]]:
    """Rows of a table, whose first line names the columns. Empty cells are left out."""
    texts = (f"{text}\n" if text is not None else "\ufffd\n" for _, text in _decoded(location, lines, keep_blank=True))
    reader = csv.DictReader(texts, delimiter=delimiter)
    try:
        for cells in reader:
            row: dict[str, Any] = {}
            for name, cell in cells.items():
                if isinstance(name, str) and isinstance(cell, str) and cell:
                    row[name.strip()] = _number(cell) if name.strip() in _NUMBERS else cell
            if row:
                yield row
    except csv.Error as error:
        yield _refused(location, reader.line_num, f"the table cannot be read on: {error}")


def path_rows(location: str, lines: Iterable[bytes], field_name: str) -> Iterator[dict[str, Any]]:
    """A row for each path."""
    for number, text in _decoded(location, lines):
        yield _refused(location, number, "not UTF-8") if text is None else {field_name: text}


def _decoded(location: str, lines: Iterable[bytes], *, keep_blank: bool = False) -> Iterator[tuple[int, str | None]]:
    """Lines with their numbers from 1; None for one that is not UTF-8."""
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8").removeprefix("\ufeff").rstrip("\r\n")
        except UnicodeDecodeError:
            yield number, None
            continue
        if keep_blank or text.strip():
            yield number, text if keep_blank else text.strip()


def _refused(location: str, number: int, reason: str) -> dict[str, Any]:
    return {"key": f"{location}:{number}", REFUSED: f"line {number} of {location}: {reason}"}


def _number(cell: str) -> Any:
    try:
        return int(cell) if cell.strip().lstrip("-").isdecimal() else float(cell)
    except ValueError:
        return cell
