"""All rows of a shard, one after the other: a tar's or parquet file's path enters, what it has of each row leaves.

Only what is needed of other programs' shards is asked for: codes as ``KEY.tokens.npy`` or ``KEY.npy`` in a tar, and a
column ``codes`` in parquet. Shards are read from the front, in memory that does not depend on their size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from batch_tokenizer.data.token_files import parse_tokens
from batch_tokenizer.records import RowError
from batch_tokenizer.storage.member_names import member_name
from batch_tokenizer.storage.names import spoken
from batch_tokenizer.storage.opening import opened
from batch_tokenizer.storage.parquet_rows import TokenParquet, row_info
from batch_tokenizer.storage.tar import TornTar, file_tape, walk

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
    """

    key: str
    codes: npt.NDArray[np.uint16] | None
    info: Mapping[str, Any]
    audio: bytes | None = None
    audio_format: str = "wav"


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
    name = spoken(path)
    group = _Group("")
    with opened(path, "a tar") as (descriptor, _):
        tape = file_tape(descriptor)
        try:
            for member in walk(tape, lambda kind, name: None):
                folder, slash, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")
                base = folder + slash + stem
                if base != group.base:
                    if group.members:
                        yield _tar_row(name, group)
                    group = _Group(base)
                if member.size > _MOST_MEMBER:
                    raise RowError("load", f"{name}: member {member.name!a} of {member.size:,} bytes is too large")
                if ending in group.members:
                    raise RowError("load", f"{name}: member {member.name!a} is there twice")
                group.members[ending] = tape.read(member.size)
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
        return StoredRow(key, codes, info)
    return StoredRow(key, codes, info, members[audio_format], audio_format)


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
    return StoredRow(key, codes, info, audio["bytes"], ending if ending in _AUDIO else "wav")
