"""A parquet shard to rows of tokens: its path enters, a row for each of its rows leaves, in order.

A row names its place in the shard (``parquet://ROW::PATH``) and carries the fields of the ``info`` column. Codes are
not read here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from batch_tokenizer.manifest.manifest import REFUSED
from batch_tokenizer.records import RowError
from batch_tokenizer.sources.foreign_rows import Refused
from batch_tokenizer.sources.sidecars import sidecar_fields
from batch_tokenizer.storage.parquet_rows import TokenParquet, row_info, row_location


def parquet_rows(location: str) -> Iterator[dict[str, Any]]:
    """Rows with ``key`` and ``quantized_tokens``; a refused one for a shard that cannot be read, or not to its end."""
    try:
        parquet = TokenParquet.open(location)
    except RowError as error:
        yield {"key": location, REFUSED: error.reason}
        return
    try:
        first = 0
        for group in range(parquet.num_groups):
            table = parquet.read_group(group, ["key", "info"])
            for number in range(len(table)):
                yield _row(parquet, location, table, number, first + number)
            first += len(table)
    except RowError as error:
        yield {"key": location, REFUSED: error.reason}
    finally:
        parquet.close()


def _row(parquet: TokenParquet, location: str, table: Any, number: int, row: int) -> dict[str, Any]:
    place = row_location(location, row)
    key = table.column("key")[number].as_py() if "key" in table.column_names else None
    if not isinstance(key, str) or not key:
        return {"key": place, REFUSED: f"{parquet.name}: row {row} has no key"}
    try:
        fields = sidecar_fields(orjson.dumps(row_info(table, number)), None)
    except Refused as refused:
        return {"key": key, REFUSED: f"{parquet.name}: row {row}: {refused.reason}"}
    return {"key": key, "quantized_tokens": place, **fields}
