"""``StoredRow``: what earlier runs stored of a row, read from a shard, a line, a manifest's files or a token file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jsonlines
import numpy as np
import numpy.typing as npt

from batch_tokenizer.data.other_codes import check_other_names, read_other_codes, take_other_codes
from batch_tokenizer.data.token_files import parse_codes_line, parse_hidden_states, parse_tokens, read_any_tokens
from batch_tokenizer.records import RowError, RunError, first_line
from batch_tokenizer.runs.source_parts import shard_kind
from batch_tokenizer.sources.lines import lines_of
from batch_tokenizer.storage.files import open_file
from batch_tokenizer.storage.json_lines import json_lines_reader, parse_json
from batch_tokenizer.storage.jsonl_rows import numbered_lines, parse_line
from batch_tokenizer.storage.names import (
    HIDDEN_STATES_ENDING,
    display_name,
    member_name,
    parse_member,
    parse_row_location,
    split_member_name,
)
from batch_tokenizer.storage.opening import open_location
from batch_tokenizer.storage.parquet_rows import AUDIO_COLUMNS, TokenParquet, find_tokens
from batch_tokenizer.storage.row_info import join_info, other_names
from batch_tokenizer.storage.tar import ByteStream, SeekableByteStream, TornTar, walk

#: Bytes that one member of a row may have.
_MOST_MEMBER = 1 << 32

_TOKENS = ("tokens.npy", "npy")

_HIDDEN = HIDDEN_STATES_ENDING.removeprefix(".")

_AUDIO = ("wav", "flac")


@dataclass(frozen=True, slots=True)
class StoredRow:
    """What is stored of a row.

    Attributes:
        codes: uint16 (T, K); None where the shard has none.
        info: what the shard says of it.
        audio: an audio file's bytes; None where the shard has none.
        audio_format: ``wav`` or ``flac``, of those bytes.
        hidden_states: float16 (T, d); None where there are none.
        other_codes: uint16 (T, K) of the row's other audio, by name; ``info`` does not have them.
        stored: of a row of a shard, its bytes by the names under which the ledger keeps their checksums.
    """

    key: str
    codes: npt.NDArray[np.uint16] | None
    info: Mapping[str, Any]
    audio: bytes | None = None
    audio_format: str = "wav"
    stored: Mapping[str, bytes] = field(default_factory=dict)
    hidden_states: npt.NDArray[np.float16] | None = None
    other_codes: Mapping[str, npt.NDArray[np.uint16]] = field(default_factory=dict)


def shard_rows(path: str, kind: str | None = None) -> Iterator[StoredRow]:
    """The rows of a shard, in order.

    Args:
        kind: ``tar``, ``parquet`` or ``jsonl``; None for what the name ends in.

    Raises:
        RowError: it cannot be read to its end, or has what is no row.
    """
    kind = kind or shard_kind(path)
    if kind == "jsonl":
        return _jsonl_rows(path)
    return _parquet_rows(path) if kind == "parquet" else _tar_rows(path)


def _jsonl_rows(path: str) -> Iterator[StoredRow]:
    name = display_name(path)
    for number, (_, line) in enumerate(numbered_lines(path), 1):
        yield jsonl_row(line, f"{name}: line {number}")


def jsonl_row(line: bytes, name: str) -> StoredRow:
    """The row of a line of JSON that has codes in it.

    Args:
        name: for messages.

    Raises:
        RowError: it is no such line.
    """
    codes, info = parse_codes_line(line, name)
    key = info.get("key")
    if not isinstance(key, str):
        raise RowError("load", f"{name} has no key")
    info, other_codes = take_other_codes(info, name)
    return StoredRow(key, codes, info, stored={"line": line}, other_codes=other_codes)


@dataclass(slots=True)
class _Group:
    """Consecutive members of one name."""

    base: str
    members: dict[str, bytes] = field(default_factory=dict)


def _tar_rows(path: str) -> Iterator[StoredRow]:
    with open_file(path, "a tar") as (file, _):
        yield from tar_stream_rows(SeekableByteStream.of_file(file), display_name(path))


def tar_stream_rows(stream: ByteStream, name: str, *, with_audio: bool = True) -> Iterator[StoredRow]:
    """The rows of a tar, or of a part of one that begins with a row's first member and has the mark of a tar's end.

    Args:
        name: for messages.

    Raises:
        RowError: it cannot be read to its end, or has what is no row.
    """
    group = _Group("")
    try:
        for member in walk(stream, lambda kind, name: None):
            base, ending = split_member_name(member.name) or (member.name, "")
            if base != group.base:
                if group.members:
                    yield _tar_row(name, group)
                group = _Group(base)
            if ending in (*_AUDIO, _HIDDEN) and not with_audio:
                continue
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
            info = parse_json(members["json"])
        except ValueError as error:
            raise RowError("load", f"{name}: {group.base}.json is not JSON: {error}") from error
        if not isinstance(info, dict):
            raise RowError("load", f"{name}: {group.base}.json is no object")
    stated = info.get("key")
    key = stated if isinstance(stated, str) and member_name(stated) == group.base else group.base
    codes = None
    for ending in _TOKENS:
        if ending in members:
            codes, _ = parse_tokens(members[ending], f"{name}: {group.base}.{ending}")
            break
    hidden = None
    if _HIDDEN in members:
        hidden = parse_hidden_states(members[_HIDDEN], f"{name}: {group.base}.{_HIDDEN}")
    audio_format = next((ending for ending in _AUDIO if ending in members), None)
    if codes is None and audio_format is None:
        raise RowError("load", f"{name}: {group.base} has neither tokens (.tokens.npy) nor audio (.wav, .flac)")
    others = {
        other: parse_tokens(members[f"{other}.npy"], f"{name}: {group.base}.{other}.npy")[0]
        for other in other_names(info)
        if f"{other}.npy" in members
    }
    check_other_names(info, others, f"{name}: {group.base}")
    if audio_format is None:
        return StoredRow(key, codes, info, stored=members, hidden_states=hidden, other_codes=others)
    return StoredRow(key, codes, info, members[audio_format], audio_format, members, hidden, others)


def _parquet_rows(path: str) -> Iterator[StoredRow]:
    parquet = TokenParquet.open(path)
    try:
        columns = [*parquet.token_columns, *AUDIO_COLUMNS, *parquet.other_codes_columns]
        for _, table in parquet.all_windows(parquet.there(columns)):
            for number in range(len(table)):
                yield _parquet_row(parquet, table, number)
    finally:
        parquet.close()


def parquet_row_at(path: str, number: int, *, with_audio: bool = True) -> StoredRow:
    """Row ``number``, counted from 0, of a parquet file. Rows of one group are best asked for one after the other.

    Raises:
        RowError: it cannot be read, or is no row.
    """
    return _parquet_row(*find_tokens(path, number, with_audio=with_audio, with_other_codes=True))


def _parquet_row(parquet: TokenParquet, table: Any, number: int) -> StoredRow:
    if "key" not in table.column_names:
        raise RowError("load", f"{parquet.name}: has no column key")
    key = table.column("key")[number].as_py()
    if not isinstance(key, str):
        raise RowError("load", f"{parquet.name}: a row has no key")
    name = f"{parquet.name}: row {key!a}"
    codes = None
    if parquet.codes_column is not None:
        codes = _in_16_bits(parquet.codes_of(table, number), name)
    others = {column: _in_16_bits(values, name) for column, values in parquet.other_codes_of(table, number).items()}
    info = join_info(*parquet.parts_of(table, number))
    check_other_names(info, others, name)
    stored: dict[str, bytes] = {}
    hidden, audio_format = None, "wav"
    content = table.column("hidden_states")[number].as_py() if "hidden_states" in table.column_names else None
    if isinstance(content, bytes):
        stored["hidden_states"] = content
        frames = 0 if codes is None else len(codes)
        if not frames or len(content) % (2 * frames):
            raise RowError("load", f"{parquet.name}: row {key!a} has hidden states that are not float16 (T, d)")
        hidden = np.frombuffer(content, "<f2").reshape(frames, -1)
    audio = table.column("audio")[number].as_py() if "audio" in table.column_names else None
    if isinstance(audio, dict) and isinstance(audio.get("bytes"), bytes):
        stored["audio"] = audio["bytes"]
        ending = os.path.splitext(str(audio.get("path")))[1].removeprefix(".")
        audio_format = ending if ending in _AUDIO else "wav"
    return StoredRow(key, codes, info, stored.get("audio"), audio_format, stored, hidden, others)


def _in_16_bits(values: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint16]:
    if values.size and (values.min() < 0 or values.max() > 0xFFFF):
        raise RowError("load", f"{name} has codes beyond 16 bits")
    return values.astype(np.uint16)


def token_file_row(location: str, path: str, *, with_audio: bool = True) -> StoredRow:
    """The row of a token file that was found at ``location``; its key is the file's, or its path there without ending.
    Its audio is what the file names as ``reconstructed_wav``, there or beside the file.

    Raises:
        RowError: it cannot be read, or is no token file.
    """
    codes, info = read_any_tokens(path)
    said = info.get("key")
    name = os.path.basename(path) if path == location else os.path.relpath(path, location)
    key = said if isinstance(said, str) else os.path.splitext(name)[0]
    audio = info.get("reconstructed_wav")
    if isinstance(audio, str) and not os.path.exists(audio):  # of a folder that was moved
        audio = os.path.join(os.path.dirname(path), os.path.basename(audio))
    info, others = take_other_codes(info, display_name(path))
    return _with_others(StoredRow(key, codes, info, other_codes=others), path, audio, with_audio=with_audio)


def line_rows(location: str, key: str | None) -> Iterator[StoredRow]:
    """The rows of a manifest of token files, which may be of any origin; of a key, if one is given.

    Raises:
        RunError: a line is no row, or the manifest cannot be read.
        RowError: a file that it names cannot be read.
    """
    with json_lines_reader(lines_of(location)) as reader:
        try:
            for number, row in enumerate(reader.iter(skip_empty=True)):
                if not isinstance(row, dict) or not isinstance(row.get("key"), str):
                    raise RunError(f"{location}: row {number + 1} is no object with a key")
                if key is None or row["key"] == key:
                    yield manifest_row(row)
        except jsonlines.InvalidLineError as error:
            raise RunError(
                f"{location}: line {error.lineno} is not JSON: {first_line(error.__cause__ or error)}"
            ) from error


def line_row(line: bytes, name: str, *, with_audio: bool = True) -> StoredRow:
    """The row of a line of JSON.

    Args:
        name: for messages.

    Raises:
        RowError, RunError: it is no row, or a file that it names cannot be read.
    """
    row = parse_line(line, name)
    if not isinstance(row.get("key"), str):
        raise RowError("load", f"{name} is no object with a key")
    return manifest_row(row, with_audio=with_audio)


def manifest_row(row: Mapping[str, Any], *, with_audio: bool = True) -> StoredRow:
    """The row of a manifest's line, with what its files have.

    Raises:
        RunError: it names no token file.
        RowError: a file cannot be read.
    """
    tokens, audio = row.get("quantized_tokens"), row.get("reconstructed_wav")
    if not isinstance(tokens, str):
        raise RunError(f"row {row['key']}: has no quantized_tokens")
    codes, info = read_any_tokens(tokens)
    known = info or row  # of tokens in a tar, the row says what the tar does
    others = read_other_codes(tokens, known)
    beside = {name: value for name, value in {**row, **info}.items() if name not in other_names(known)}
    stored = StoredRow(row["key"], codes, beside, other_codes=others)
    return _with_others(stored, tokens, audio, with_audio=with_audio)


def _with_others(row: StoredRow, tokens: str, audio: object, *, with_audio: bool) -> StoredRow:
    """The row with its audio file and with the hidden states beside its token file, those of them that are there."""
    if not with_audio:
        return row
    hidden = tokens + HIDDEN_STATES_ENDING
    if row.info.get("hidden_states") is True and os.path.exists(hidden):
        row = replace(row, hidden_states=parse_hidden_states(_read(hidden), hidden))
    if isinstance(audio, str) and (os.path.exists(audio) or parse_member(audio) or parse_row_location(audio)):
        content = _read(audio)
        row = replace(row, audio=content, audio_format="flac" if content[:4] == b"fLaC" else "wav")
    return row


def _read(path: str) -> bytes:
    with open_location(path) as (file, _):
        return file.read()
