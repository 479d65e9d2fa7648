"""Where a run's shards have its rows. The locations of tokens and audio open like any other; nothing is unpacked.

A shard has the rows of its ledger file, in that order (``verify`` checks whether it does). So only shards with a wanted
row are touched: of a tar the headers up to the last row wanted, of a parquet file nothing before a row is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from batch_tokenizer.manifest.row import REFUSED
from batch_tokenizer.records import OUTPUT_FIELDS, RowError, RunError
from batch_tokenizer.runs.finished_run import FinishedRun
from batch_tokenizer.runtime.ledger_lines import read_shard_lines
from batch_tokenizer.sources.tar_rows import tar_rows
from batch_tokenizer.storage.atomic import os_error_ends_run
from batch_tokenizer.storage.jsonl_rows import numbered_lines
from batch_tokenizer.storage.names import display_name, line_location, row_location


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

    @classmethod
    def of(cls, locations: Mapping[str, str], info: Mapping[str, Any]) -> StoredPlace:
        """The place whose locations are given by output field."""
        return cls(locations.get("quantized_tokens"), locations.get("reconstructed_wav"), info)


def shard_entries(ledger: Path) -> list[dict[str, Any]]:
    """The entries of a shard's ledger file, in the order of the shard's rows.

    Raises:
        RunError: the file cannot be read, or is damaged (exit code 1).
    """
    with os_error_ends_run(f"{ledger} cannot be read"):
        lines = read_shard_lines(ledger)
    if lines is None:
        raise RunError(f"{ledger} is damaged: the next start of the run does its rows again", exit_code=1)
    return [orjson.loads(line) for line in lines]


def find_places(run: FinishedRun, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, StoredPlace | RowError]]:
    """The place of each row that is done and whose digest is wanted, shard by shard, or why it has none.

    Raises:
        RunError: a ledger file cannot be read, or a shard's storage does not answer (exit code 1).
    """
    outputs = OUTPUT_FIELDS[run.task]
    for shard in run.shards():
        entries = enumerate(shard_entries(shard.ledger))
        wanted = {number: entry for number, entry in entries if is_wanted(entry["digest"])}
        if not wanted:
            continue
        if run.sink == "tar":
            yield from _in_tar(shard.location, outputs, wanted)
            continue
        if run.sink == "jsonl":
            yield from _in_lines(shard.location, wanted)
            continue
        for number, entry in wanted.items():
            locations = dict.fromkeys(outputs, row_location(shard.location, number))
            yield entry["digest"], StoredPlace.of(locations, {})


def _in_lines(shard: str, wanted: dict[int, dict[str, Any]]) -> Iterator[tuple[str, StoredPlace | RowError]]:
    trouble = RowError(
        "load", f"{display_name(shard)}: ends before this row: batch_tokenizer verify says what is wrong"
    )
    try:
        for number, (begin, line) in enumerate(numbered_lines(shard)):
            if (entry := wanted.pop(number, None)) is not None:
                yield entry["digest"], StoredPlace(line_location(shard, begin, len(line)), None, {})
            if not wanted:
                return
    except RowError as error:
        trouble = error
    for entry in wanted.values():
        yield entry["digest"], trouble


def _in_tar(
    shard: str, outputs: tuple[str, ...], wanted: dict[int, dict[str, Any]]
) -> Iterator[tuple[str, StoredPlace | RowError]]:
    inputs = ["wav" if name == "reconstructed_wav" else name for name in outputs]
    trouble = f"{display_name(shard)}: ends before this row: batch_tokenizer verify says what is wrong"
    for number, parts in enumerate(zip(*(tar_rows(shard, name, lambda *_: None) for name in inputs), strict=False)):
        refused = [part[REFUSED] for part in parts if REFUSED in part]
        trouble = refused[0] if refused else trouble
        entry = wanted.pop(number, None)
        if entry is None:
            continue
        if refused:
            yield entry["digest"], RowError("load", trouble)
        elif any(part["key"] != entry["key"] for part in parts):
            what = f"{display_name(shard)}: has another row in its place: batch_tokenizer verify says what is wrong"
            yield entry["digest"], RowError("load", what)
        else:
            locations = {name: part[field] for name, field, part in zip(outputs, inputs, parts, strict=True)}
            yield entry["digest"], StoredPlace.of(locations, parts[0])
        if not wanted:
            return
    for entry in wanted.values():
        yield entry["digest"], RowError("load", trouble)
