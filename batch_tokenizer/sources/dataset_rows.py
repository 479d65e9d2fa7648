"""Rows of parquet and Arrow files that hold audio, as data sets on the Hub and ``datasets.save_to_disk`` have them.

The audio is in a column of ``struct<bytes, path>``, of bytes, or of paths; all other columns are fields of the row.
Only these are read here: a row names its file, its number and the column, and its audio stays there until it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

import orjson

from batch_tokenizer.manifest.row import REFUSED
from batch_tokenizer.records import REQUIRED_FIELDS, RowError, RunError
from batch_tokenizer.sources.foreign_rows import AUDIO_FIELDS, KEY_FIELDS, MADE_KEY
from batch_tokenizer.sources.sidecars import own_fields
from batch_tokenizer.sources.tar_rows import Note
from batch_tokenizer.storage.names import cell_location, display_name, file_name
from batch_tokenizer.storage.table_files import TableFile

#: Columns whose names mean something else in a row.
_RESERVED = frozenset(REQUIRED_FIELDS["wav2token2wav"])


def dataset_rows(
    location: str,
    audio_column: str | None,
    note: Note,
    audio_field: str = "wav",
    other_fields: tuple[str, ...] = (),
) -> Iterator[dict[str, Any]]:
    """The rows of one file, in its order; a refused one for a file that cannot be read, or not to its end.

    Args:
        audio_column: the column with the audio; None to find it.
        audio_field: the column that has it where none is given, if it is not called ``wav`` and is there.
        other_fields: columns with the rows' other audio.

    Raises:
        RunError: no column holds audio, or several do.
    """
    try:
        file = TableFile.open(location)
    except RowError as error:
        yield {"key": location, REFUSED: error.reason}
        return
    try:
        if audio_column is None and audio_field != "wav" and audio_field in file.schema.names:
            audio_column = audio_field
        column = find_audio_column(file, audio_column, other_fields)
        yield from _rows(file, location, column, note, other_fields)
        if file.torn is not None:
            yield {"key": location, REFUSED: file.torn}
    except RowError as error:
        yield {"key": location, REFUSED: error.reason}
    finally:
        file.close()


def find_audio_column(file: TableFile, asked: str | None, other_fields: tuple[str, ...] = ()) -> str:
    """The column of a file that holds audio: the one that was asked for, or that the file declares as such, or the only
    one of structs with bytes, or one of paths or bytes with a usual name; none of ``other_fields``.

    Raises:
        RunError: there is none, or there are several.
    """
    import pyarrow as pa

    schema, columns = file.schema, ", ".join(file.schema.names)
    if asked is not None:
        if asked not in schema.names:
            raise RunError(f"--audio_column {asked}: {file.name} has the columns {columns}")
        kind = schema.field(asked).type
        if not _is_audio(kind):
            raise RunError(f"--audio_column {asked}: in {file.name} it has {kind}, neither audio files nor paths")
        return asked
    declared = [name for name in _declared_audio(schema) if name in schema.names and _is_audio(schema.field(name).type)]
    structs = [item.name for item in schema if pa.types.is_struct(item.type) and _is_audio(item.type)]
    usual = [name for name in ("wav", *AUDIO_FIELDS) if name in schema.names and _is_audio(schema.field(name).type)]
    for candidates in (declared, structs):
        found = [name for name in candidates if name not in other_fields]
        preferred = [name for name in usual if name in found] or found
        if len(preferred) > 1 and preferred is found:
            raise RunError(f"{file.name}: columns {', '.join(found)} hold audio: choose one with --audio_column")
        if preferred:
            return preferred[0]
    if usual:
        return usual[0]
    raise RunError(f"{file.name}: no column is known to hold audio: name it with --audio_column ({columns})")


def _is_audio(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(item.name == "bytes" and _is_bytes(item.type) for item in kind)
    return _is_bytes(kind) or _is_text(kind)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _declared_audio(schema: Any) -> list[str]:
    """Columns that ``datasets`` declared as audio when it wrote the file."""
    try:
        about = orjson.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = about["info"]["features"]
        return [name for name, feature in features.items() if feature.get("_type") == "Audio"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _rows(
    file: TableFile, location: str, column: str, note: Note, other_fields: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = file.schema.field(column).type
    is_path = _is_text(kind)
    has_path = pa.types.is_struct(kind) and "path" in [item.name for item in kind]
    path_column = [column] if is_path else [f"{column}.path"] if has_path else []
    # 1. Columns that a JSON object can hold, and of which only some fields can be.
    fields: list[str] = []
    leaves: list[str] = []
    others: list[str] = []  # of audio, of which is read whether it is there
    for item in file.schema:
        is_other = item.name in other_fields and _is_audio(item.type) and not _is_text(item.type)
        if is_other and item.name != column:
            others.append(item.name)
            leaves += list(_leaves(item.name, item.type))[:1] or [item.name]
        elif item.name != column:
            parts = list(_leaves(item.name, item.type))
            if item.name in _RESERVED - {"key"} or not parts:
                note("columns that no row can hold", f"{item.name} ({item.type})")
                continue
            fields.append(item.name)
            leaves += parts
    # 2. Where nothing but the audio is there, some column is read for the number of rows alone.
    stem = file_name(location).rpartition("/")[2].rpartition(".")[0]
    for group in range(file.num_groups):
        if not leaves and not path_column:
            size = int(file.first_rows[group + 1] - file.first_rows[group])
            tables: Iterator[tuple[int, int, Any]] = iter([(int(file.first_rows[group]), size, None)])
        else:
            tables = ((first, len(table), table) for first, table in file.windows(group, [*leaves, *path_column]))
        for first, count, table in tables:
            paths = [None] * count
            if path_column:
                found = table.column(column)
                paths = (found if is_path else pc.struct_field(found, "path")).to_pylist()
            values = [map(_plain, table.column(name).to_pylist()) for name in fields]
            there = {name: table.column(name).is_valid().to_pylist() for name in others}
            for number in range(count):
                row = dict(zip(fields, (next(column_values) for column_values in values), strict=True))
                for name, is_there in there.items():
                    row[name] = cell_location(location, first + number, name) if is_there[number] else None
                yield _row(location, column, first + number, row, paths[number], stem, is_path=is_path)


def _row(
    location: str, column: str, number: int, fields: dict[str, Any], path: str | None, stem: str, *, is_path: bool
) -> dict[str, Any]:
    key, named = fields.get("key"), next((fields[name] for name in KEY_FIELDS if _is_name(fields.get(name))), None)
    if is_path:
        fields = {name: value for name, value in fields.items() if name != "key"}
        if path is None:
            reason = f"row {number} of {display_name(location)} has no path in column {column}"
            return {"key": str(named or f"{stem}-{number}"), REFUSED: reason}
    elif named is None:
        named = (path or "").rpartition("/")[2].rpartition(".")[0] or f"{stem}-{number}"
    # An ``id`` need not be the row's: in some data sets, several recordings of a sentence have the same.
    names = {} if named is None else {"key" if _is_name(key) else MADE_KEY: str(named)}
    if is_path:
        return {**names, "wav": path, **({} if column == "wav" else {column: path}), **fields}
    return {**names, "wav": cell_location(location, number, column), **own_fields(fields)}


def _is_name(value: object) -> bool:
    return type(value) in (str, int) and value != ""


def _leaves(name: str, kind: Any) -> Iterator[str]:
    """What is read of a column: all of it, or of a struct those fields that are no bytes."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        for item in kind:
            yield from _leaves(f"{name}.{item.name}", item.type)
    elif not _has_bytes(kind):
        yield name


def _has_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_nested(kind):
        return any(_has_bytes(kind.field(number).type) for number in range(kind.num_fields))
    return _is_bytes(kind) or pa.types.is_fixed_size_binary(kind)


def _plain(value: Any) -> Any:
    """A value as JSON has it: times in ISO 8601, durations in seconds, decimals as text."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items() if not isinstance(item, bytes)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return str(value) if isinstance(value, Decimal) else value
