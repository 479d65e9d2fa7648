"""Rows of parquet files of tokens, as this package writes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from batch_tokenizer.manifest.row import REFUSED
from batch_tokenizer.records import RowError
from batch_tokenizer.sources.sidecars import own_fields
from batch_tokenizer.storage.names import row_location
from batch_tokenizer.storage.parquet_rows import TokenParquet


def parquet_rows(location: str) -> Iterator[dict[str, Any]]:
    """Rows with ``key`` and ``quantized_tokens``; a refused one for a shard that cannot be read, or not to its end."""
    try:
        parquet = TokenParquet.open(location, must_have_codes=True)
    except RowError as error:
        yield {"key": location, REFUSED: error.reason}
        return
    try:
        for first, table in parquet.all_windows(parquet.there(["key", "info", *parquet.fields])):
            for number in range(len(table)):
                yield _row(parquet, location, table, number, first + number)
    except RowError as error:
        yield {"key": location, REFUSED: error.reason}
    finally:
        parquet.close()


def _row(parquet: TokenParquet, location: str, table: Any, number: int, row: int) -> dict[str, Any]:
    place = row_location(location, row)
    key = table.column("key")[number].as_py() if "key" in table.column_names else None
    if not isinstance(key, str) or not key:
        return {"key": place, REFUSED: f"{parquet.name}: row {row} has no key"}
    return {"key": key, "quantized_tokens": place, **own_fields(parquet.parts_of(table, number)[0])}
