"""Rows that earlier runs stored, read back one after the other with their codes and audio.

The source may be a run folder, shards, a manifest of token files, or a folder of shards or token files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonlines
import numpy as np
import numpy.typing as npt
import orjson

from batch_tokenizer.data.token_files import parse_tokens, read_any_tokens
from batch_tokenizer.records import TASKS, ManifestRow, RowError, RunError, first_line
from batch_tokenizer.runs.finished_run import FinishedRun
from batch_tokenizer.runtime.ledger import RowStatus, read_ledger
from batch_tokenizer.runtime.run_files import parse_shard_name
from batch_tokenizer.sources.listing import lines_of
from batch_tokenizer.sources.patterns import find_sources
from batch_tokenizer.storage.files import open_file
from batch_tokenizer.storage.json_lines import json_lines_reader
from batch_tokenizer.storage.names import display_name, member_name, split_member_name
from batch_tokenizer.storage.parquet_rows import TokenParquet, row_info
from batch_tokenizer.storage.tar import SeekableByteStream, TornTar, walk

#: Bytes that one member of a row may have.
_MOST_MEMBER = 1 << 32

_TOKENS = ("tokens.npy", "npy")

_AUDIO = ("wav", "flac")


@dataclass(frozen=True, slots=True)
class StoredRow:
    """What is stored of a row.

    Attributes:
        codes: uint16 (T, K); None where the shard has none.
        info: what the shard says of it.
        audio: an audio file's bytes; None where the shard has none.
        audio_format: ``wav`` or ``flac``, of those bytes.
        stored: of a row of a shard, its bytes by the names under which the ledger keeps their checksums.
    """

    key: str
    codes: npt.NDArray[np.uint16] | None
    info: Mapping[str, Any]
    audio: bytes | None = None
    audio_format: str = "wav"
    stored: Mapping[str, bytes] = field(default_factory=dict)


def shard_rows(path: str) -> Iterator[StoredRow]:
    """The rows of ``x.tar`` or ``x.parquet``, in order.

    Raises:
        RowError: it cannot be read to its end, or has what is no row.
    """
    return _parquet_rows(path) if path.endswith(".parquet") else _tar_rows(path)


@dataclass(slots=True)
class _Group:
    """Consecutive members of one name."""

    base: str
    members: dict[str, bytes] = field(default_factory=dict)


def _tar_rows(path: str) -> Iterator[StoredRow]:
    name = display_name(path)
    group = _Group("")
    with open_file(path, "a tar") as (file, _):
        stream = SeekableByteStream.of_file(file)
        try:
            for member in walk(stream, lambda kind, name: None):
                base, ending = split_member_name(member.name) or (member.name, "")
                if base != group.base:
                    if group.members:
                        yield _tar_row(name, group)
                    group = _Group(base)
                if member.size > _MOST_MEMBER:
                    raise RowError("load", f"{name}: member {member.name!a} of {member.size:,} bytes is too large")
                if ending in group.members:
                    raise RowError("load", f"{name}: member {member.name!a} is there twice")
                group.members[ending] = stream.read(member.size)
        except TornTar as error:
            raise RowError("load", f"{name}: {error}") from error
        except OSError as error:
            raise RowError("load", f"{name}: cannot be read: {error.strerror}") from error
        if group.members:
            yield _tar_row(name, group)


def _tar_row(name: str, group: _Group) -> StoredRow:
    members = group.members
    info: Any = {}
    if "json" in members:
        try:
            info = orjson.loads(members["json"])
        except orjson.JSONDecodeError as error:
            raise RowError("load", f"{name}: {group.base}.json is not JSON: {error}") from error
        if not isinstance(info, dict):
            raise RowError("load", f"{name}: {group.base}.json is no object")
    said = info.get("key")
    key = said if isinstance(said, str) and member_name(said) == group.base else group.base
    codes = None
    for ending in _TOKENS:
        if ending in members:
            codes, _ = parse_tokens(members[ending], f"{name}: {group.base}.{ending}")
            break
    audio_format = next((ending for ending in _AUDIO if ending in members), None)
    if codes is None and audio_format is None:
        raise RowError("load", f"{name}: {group.base} has neither tokens (.tokens.npy) nor audio (.wav, .flac)")
    if audio_format is None:
        return StoredRow(key, codes, info, stored=members)
    return StoredRow(key, codes, info, members[audio_format], audio_format, members)


def _parquet_rows(path: str) -> Iterator[StoredRow]:
    parquet = TokenParquet.open(path, must_have_codes=False)
    try:
        for group in range(parquet.num_groups):
            table = parquet.read_group(group, ["key", "codes", "num_frames", "info", "audio"])
            if "key" not in table.column_names:
                raise RowError("load", f"{parquet.name}: has no column key")
            for number in range(len(table)):
                yield _parquet_row(parquet, table, number)
    finally:
        parquet.close()


def _parquet_row(parquet: TokenParquet, table: Any, number: int) -> StoredRow:
    key = table.column("key")[number].as_py()
    if not isinstance(key, str):
        raise RowError("load", f"{parquet.name}: a row has no key")
    codes = None
    if "codes" in table.column_names:
        values = parquet.codes_of(table, number)
        if values.size and (values.min() < 0 or values.max() > 0xFFFF):
            raise RowError("load", f"{parquet.name}: row {key!a} has codes beyond 16 bits")
        codes = values.astype(np.uint16)
    info = {**parquet.run_info, "key": key, **row_info(table, number)}
    audio = table.column("audio")[number].as_py() if "audio" in table.column_names else None
    if not isinstance(audio, dict) or not isinstance(audio.get("bytes"), bytes):
        return StoredRow(key, codes, info)
    ending = os.path.splitext(str(audio.get("path")))[1].removeprefix(".")
    audio_format = ending if ending in _AUDIO else "wav"
    return StoredRow(key, codes, info, audio["bytes"], audio_format, {"audio": audio["bytes"]})


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
        yield from _run_rows(FinishedRun.open(folder), key)
    else:
        yield from _folder_rows(folder, key)


def _run_rows(run: FinishedRun, key: str | None) -> Iterator[StoredRow]:
    if run.has_shards:
        wanted = None if key is None else orjson.dumps(key)
        for shard in run.shards():
            if wanted is None or wanted in shard.ledger.read_bytes():
                yield from shard_rows(shard.location)
        return
    manifest = run.manifest()
    done = read_ledger(run.path, manifest).status == RowStatus.DONE
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
    """The rows of a manifest, which may be of any origin."""
    with json_lines_reader(lines_of(location)) as reader:
        try:
            for number, row in enumerate(reader.iter(skip_empty=True)):
                if not isinstance(row, dict) or not isinstance(row.get("key"), str):
                    raise RunError(f"{location}: row {number + 1} is no object with a key")
                yield row
        except jsonlines.InvalidLineError as error:
            raise RunError(
                f"{location}: line {error.lineno} is not JSON: {first_line(error.__cause__ or error)}"
            ) from error


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
    with open_file(path) as (file, _):
        return file.read()
