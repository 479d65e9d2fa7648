"""Columns of parquet shards for the fields of manifest rows: their types, and which values go into them.

A field gets a column of the kind that most of its values have in the rows that decide: text, whole numbers, numbers,
true or false, lists of one of these, or objects of certain fields. A value goes into its column only where it comes out
as it was. All others (null, another kind, an integer beyond 64 bits, a field without a column) stay with their row in
the column ``info``, so nothing is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

#: Rows of a run's manifest that decide about columns, so that all shards of the run have the same ones.
DECIDING_ROWS = 1000

#: More fields than this are no columns of a table.
_MOST_COLUMNS = 500

#: ``string``, ``int64``, ``double``, ``bool``, ``{"list": type}`` or ``{"struct": {name: type}}``; plain JSON, as it is
#: kept in the run folder.
ColumnType = str | dict[str, Any]

_LARGEST, _LARGEST_EXACT = 2**63, 2**53


def column_types(rows: Iterable[Mapping[str, Any]], reserved: Iterable[str]) -> dict[str, ColumnType]:
    """The fields that get a column, and its type.

    Args:
        rows: fields of rows.
        reserved: names of other columns.
    """
    values: dict[str, list[Any]] = {}
    others = {"", *reserved}
    for row in rows:
        for name, value in row.items():
            if name not in others:
                values.setdefault(name, []).append(value)
    found = ((name, _type_of(of_field)) for name, of_field in values.items())
    types = {name: type_ for name, type_ in found if type_ is not None}
    return dict(list(types.items())[:_MOST_COLUMNS])


def _type_of(values: Iterable[Any]) -> ColumnType | None:
    """The type of most of the values; None where none holds them. Nulls say nothing."""
    by_kind: dict[type, list[Any]] = {}
    for value in values:
        if value is not None:
            by_kind.setdefault(float if type(value) is int else type(value), []).append(value)
    if not by_kind:
        return None
    kind, most = max(by_kind.items(), key=lambda item: len(item[1]))  # of several, the first
    if kind is str or kind is bool:
        return "string" if kind is str else "bool"
    if kind is float:
        whole = all(type(value) is int for value in most)
        return "double" if not whole else "int64" if any(fits(value, "int64") for value in most) else None
    if kind is list:
        inner = _type_of(chain.from_iterable(most))
        return None if inner is None else {"list": inner}
    names = Counter(tuple(sorted(value)) for value in most).most_common(1)[0][0] if kind is dict else ()
    same = [value for value in most if tuple(sorted(value)) == names]
    fields = {name: _type_of([value[name] for value in same]) for name in (same[0] if names else ())}
    return None if not fields or None in fields.values() or "" in fields else {"struct": fields}


def fits(value: Any, type_: ColumnType) -> bool:
    """Whether a value that is not null comes out of a column of this type as it was."""
    if isinstance(type_, str):
        if type_ == "double":
            return type(value) is float or (type(value) is int and -_LARGEST_EXACT <= value <= _LARGEST_EXACT)
        if type_ == "int64":
            return type(value) is int and -_LARGEST <= value < _LARGEST
        return type(value) is (bool if type_ == "bool" else str)
    if "list" in type_:
        return type(value) is list and all(item is None or fits(item, type_["list"]) for item in value)
    fields = type_["struct"]
    return (
        type(value) is dict
        and value.keys() == fields.keys()
        and all(item is None or fits(item, fields[name]) for name, item in value.items())
    )


def arrow_type(type_: ColumnType) -> Any:
    """As pyarrow has it."""
    import pyarrow as pa

    if isinstance(type_, str):
        return {"string": pa.string(), "int64": pa.int64(), "double": pa.float64(), "bool": pa.bool_()}[type_]
    if "list" in type_:
        return pa.list_(arrow_type(type_["list"]))
    return pa.struct([(name, arrow_type(inner)) for name, inner in type_["struct"].items()])


def leaves(name: str, type_: ColumnType) -> Iterator[str]:
    """The paths of a column's values in a parquet file, by which its compression is set."""
    if isinstance(type_, str):
        yield name
    elif "list" in type_:
        yield from leaves(f"{name}.list.element", type_["list"])
    else:
        for field, inner in type_["struct"].items():
            yield from leaves(f"{name}.{field}", inner)


def texts_of(name: str, type_: ColumnType) -> Iterator[str]:
    """Of those, the paths of text, which often repeats."""
    if type_ == "string":
        yield name
    elif isinstance(type_, dict) and "list" in type_:
        yield from texts_of(f"{name}.list.element", type_["list"])
    elif isinstance(type_, dict):
        for field, inner in type_["struct"].items():
            yield from texts_of(f"{name}.{field}", inner)
