"""What earlier runs stored, wherever they did: a run folder, shards, a manifest of token files or a folder of them
enters; its rows leave, codes and all, one after the other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from batch_tokenizer.data.stored_rows import StoredRow, shard_rows
from batch_tokenizer.data.token_files import read_any_tokens
from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.records import SHARD_SINKS, TASKS, ManifestRow, RowError, RunError
from batch_tokenizer.runs.shards import run_shards
from batch_tokenizer.runs.source import find_manifest
from batch_tokenizer.runtime.ledger import RowStatus, read_ledger
from batch_tokenizer.runtime.run_folder import read_settings
from batch_tokenizer.runtime.shard_ledger import parse_shard_name
from batch_tokenizer.sources.listing import lines_of
from batch_tokenizer.sources.patterns import find_sources
from batch_tokenizer.storage.opening import opened

_SHARD_ENDINGS = (".tar", ".parquet")
_FILE_ENDINGS = (".json", ".npy")


def stored_rows(source: str, key: str | None = None) -> Iterator[StoredRow]:
    """The rows of a source, in its order: of a run folder, those that are done.

    Args:
        key: only rows of this key; the others' tokens are not read where that can be avoided.

    Raises:
        RunError: the source is none, or a row of it cannot be read.
    """
    try:
        for row in _rows(source, key):
            if key is None or row.key == key:
                yield row
    except RowError as error:
        raise RunError(error.reason, exit_code=1) from error


def _rows(source: str, key: str | None) -> Iterator[StoredRow]:
    folder = Path(source)
    if not folder.is_dir():
        for found in find_sources(source):
            if found.kind in ("tar", "parquet"):
                yield from shard_rows(found.location)
            elif found.kind == "rows":
                yield from _manifest_rows(_objects(found.location), key)
            else:
                yield from _folder_rows(Path(found.location), key)
    elif (folder / "run.json").exists():
        yield from _run_rows(folder, key)
    else:
        yield from _folder_rows(folder, key)


def _run_rows(run_dir: Path, key: str | None) -> Iterator[StoredRow]:
    settings = read_settings(run_dir) or {}
    task, sink = settings.get("task"), settings.get("sink", "json")
    if task not in TASKS:
        raise RunError(f"{run_dir / 'run.json'} is damaged: it names no task")
    if sink in SHARD_SINKS:
        wanted = None if key is None else orjson.dumps(key)
        for path, shard in run_shards(run_dir, task, settings):
            if wanted is None or wanted in path.read_bytes():
                yield from shard_rows(shard)
        return
    manifest = Manifest.open(find_manifest(run_dir, None), task, run_dir / "index", sink=sink)
    done = read_ledger(run_dir, manifest).status == RowStatus.DONE
    if key is not None:
        done &= manifest.key_hashes == manifest.hash_key(key)
    for line in done.nonzero()[0].tolist():
        for item in manifest.read(line, line + 1):
            if isinstance(item, ManifestRow):
                yield from _manifest_rows(iter([dict(item.fields)]), key)


def _folder_rows(folder: Path, key: str | None) -> Iterator[StoredRow]:
    """A folder of shards, of what ``convert`` wrote, or of token files."""
    names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    shards = [name for name in names if name.endswith(_SHARD_ENDINGS)]
    if shards:
        _refuse_mixture(folder, shards)
        for name in shards:
            yield from shard_rows(str(folder / name))
    elif "data.jsonl" in names:
        yield from _manifest_rows(_objects(str(folder / "data.jsonl")), key)
    else:
        found = False
        for path in _token_files(folder):
            found = True
            codes, info = read_any_tokens(str(path))
            said = info.get("key")
            yield StoredRow(
                said if isinstance(said, str) else str(path.relative_to(folder).with_suffix("")), codes, info
            )
        if not found:
            raise RunError(f"{folder}: has neither shards (.tar, .parquet) nor token files (.json, .npy)")


def _refuse_mixture(folder: Path, shards: list[str]) -> None:
    """Several runs may share a folder of shards; their rows are not one source."""
    tasks = {task for name in shards for task in TASKS if parse_shard_name(task, name) is not None}
    if len(tasks) > 1:
        raise RunError(
            f"{folder}: has shards of several tasks: name those of one, such as '{folder}/{sorted(tasks)[0]}-*'"
        )


def _token_files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.endswith(_FILE_ENDINGS) and not name.startswith("."):
                yield Path(place) / name


def _objects(location: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines_of(location)):
        if line.strip():
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise RunError(f"{location}: line {number + 1} is not JSON: {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get("key"), str):
                raise RunError(f"{location}: line {number + 1} is no object with a key")
            yield row


def _manifest_rows(rows: Iterator[dict[str, Any]], key: str | None) -> Iterator[StoredRow]:
    for row in rows:
        if key is not None and row["key"] != key:
            continue
        tokens, audio = row.get("quantized_tokens"), row.get("reconstructed_wav")
        if not isinstance(tokens, str):
            raise RunError(f"row {row['key']}: has no quantized_tokens")
        codes, info = read_any_tokens(tokens)
        about = {**row, **info}
        if isinstance(audio, str) and os.path.exists(audio):
            content = _read(audio)
            yield StoredRow(row["key"], codes, about, content, "flac" if content[:4] == b"fLaC" else "wav")
        else:
            yield StoredRow(row["key"], codes, about)


def _read(path: str) -> bytes:
    with opened(path) as (descriptor, _), open(descriptor, "rb", closefd=False) as stream:
        return stream.read()
