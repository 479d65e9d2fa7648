"""Where a run's shards have its rows: digests of rows enter, locations of their tokens and audio leave, which open like
any other. Nothing is unpacked.

A shard has the rows of its ledger file, in that order (``verify`` looks whether it does). So only shards with a wanted
row are touched: of a tar the headers up to the last row wanted, of a parquet file nothing before a row is read.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from batch_tokenizer.manifest.row import REFUSED
from batch_tokenizer.records import OUTPUT_FIELDS, RowError, RunError, Task
from batch_tokenizer.runtime.shard_ledger import shard_of_ledger_file
from batch_tokenizer.sources.tar_rows import tar_rows
from batch_tokenizer.storage.names import spoken
from batch_tokenizer.storage.parquet_rows import row_location
from batch_tokenizer.writers.shard_folder import shard_folder


@dataclass(frozen=True, slots=True)
class StoredPlace:
    """Where a row's outputs lie.

    Attributes:
        tokens, audio: their locations; None of what the task does not make.
        info: what a tar says of the row beside its tokens; parquet has it with them.
    """

    tokens: str | None
    audio: str | None
    info: Mapping[str, Any]


def run_shards(run_dir: Path, task: Task, settings: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """(ledger file, location) of each shard that a run has published, earliest first."""
    folder = shard_folder(str(settings.get("output_dir")))
    for path in sorted((run_dir / "ledger").glob("*.jsonl")):
        name = shard_of_ledger_file(path.name, task, settings["sink"])
        if name is not None:
            yield path, folder.location(name)


def find_places(
    run_dir: Path, settings: Mapping[str, Any], digests: Container[str]
) -> Iterator[tuple[str, StoredPlace | RowError]]:
    """The place of each row that is done and whose digest is among ``digests``, shard by shard, or why it has none.

    Raises:
        RunError: a ledger file cannot be read, or a shard's storage does not answer (exit code 1).
    """
    task: Task = settings["task"]
    for path, shard in run_shards(run_dir, task, settings):
        try:
            entries = [orjson.loads(line) for line in path.read_bytes().splitlines()]
            wanted = {number: entry for number, entry in enumerate(entries) if entry["digest"] in digests}
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error.strerror}", exit_code=1) from error
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged: batch_tokenizer verify says what to do", exit_code=1) from error
        if not wanted:
            continue
        if settings["sink"] == "tar":
            yield from _in_tar(shard, OUTPUT_FIELDS[task], wanted)
            continue
        for number, entry in wanted.items():
            yield entry["digest"], _place(dict.fromkeys(OUTPUT_FIELDS[task], row_location(shard, number)), {})


def _place(locations: Mapping[str, str], info: Mapping[str, Any]) -> StoredPlace:
    return StoredPlace(locations.get("quantized_tokens"), locations.get("reconstructed_wav"), info)


def _in_tar(
    shard: str, outputs: tuple[str, ...], wanted: dict[int, Mapping[str, Any]]
) -> Iterator[tuple[str, StoredPlace | RowError]]:
    inputs = ["wav" if name == "reconstructed_wav" else name for name in outputs]
    trouble = f"{spoken(shard)}: ends before this row: batch_tokenizer verify says what is wrong"
    for number, parts in enumerate(zip(*(tar_rows(shard, name, lambda *_: None) for name in inputs), strict=False)):
        refused = [part[REFUSED] for part in parts if REFUSED in part]
        trouble = refused[0] if refused else trouble
        entry = wanted.pop(number, None)
        if entry is None:
            continue
        if refused:
            yield entry["digest"], RowError("load", trouble)
        elif any(part["key"] != entry["key"] for part in parts):
            what = f"{spoken(shard)}: has another row in its place: batch_tokenizer verify says what is wrong"
            yield entry["digest"], RowError("load", what)
        else:
            locations = {name: part[field] for name, field, part in zip(outputs, inputs, parts, strict=True)}
            yield entry["digest"], _place(locations, parts[0])
        if not wanted:
            return
    for entry in wanted.values():
        yield entry["digest"], RowError("load", trouble)
