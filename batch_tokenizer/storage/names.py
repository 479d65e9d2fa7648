"""Locations: strings that say where bytes lie. This module reads and makes them, and touches no storage.

    audio/a.flac                          a file
    s3://bucket/a.flac, https://…         an object, through fsspec
    tar://1536+48044/a.flac::x.tar        48,044 bytes from byte 1,536 of the tar x.tar, which may be a URL too
    targz://7/a.flac::x.tar.gz            the eighth regular member of a tar that can only be read from its beginning:
                                          a compressed one, or what a ``pipe:`` command prints
    cell://7/audio::x.parquet             the audio in row 7, counted from 0, and column ``audio`` of a parquet or Arrow
                                          file
    parquet://7::x.parquet                row 7, counted from 0, of a parquet file: its tokens or its audio, as is asked
    jsonl://1536+480::x.jsonl             the line of 480 bytes from byte 1,536 on, which has tokens in it

The member's name in a location is for people and for telling formats apart; it opens nothing.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from urllib.parse import unquote, urlsplit, urlunsplit

from batch_tokenizer.records import printable

#: What begins a shell command whose output is a tar, as webdataset writes it.
PIPE = "pipe:"

#: What follows a token file's name, or a row's name in a tar, in the name of its hidden states.
HIDDEN_STATES_ENDING = ".hidden.npy"

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_-]+")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_TAR_MEMBER = re.compile(r"tar://(\d{1,18})\+(\d{1,18})/([^:]*)::(.+)", re.DOTALL)
_STREAMED_MEMBER = re.compile(r"targz://(\d{1,18})/([^:]*)::(.+)", re.DOTALL)
_JSON_LINE = re.compile(r"jsonl://(\d{1,18})\+(\d{1,18})::(.+)", re.DOTALL)
_CELL = re.compile(r"cell://(\d{1,12})/([^:]*)::(.+)", re.DOTALL)
_PARQUET_ROW = re.compile(r"parquet://(\d{1,12})::(.+)", re.DOTALL)

_LEADING_DOT = re.compile(r"^(\./+)+")

#: Characters of a member's name that are written as %XX in a location.
_ESCAPED = re.compile(r"[%:\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member by its place: ``size`` bytes from byte ``offset`` of ``archive``."""

    offset: int
    size: int
    name: str
    archive: str


@dataclass(frozen=True, slots=True)
class StreamedMember:
    """A member by its number among the regular members of ``archive``, counted from 0."""

    number: int
    name: str
    archive: str


@lru_cache(64)  # one opening asks several times
def parse_member(location: str) -> TarMember | StreamedMember | None:
    """The tar member that a location names; None where it names something else."""
    if match := _TAR_MEMBER.fullmatch(location):
        return TarMember(int(match[1]), int(match[2]), unquote(match[3]), match[4])
    if match := _STREAMED_MEMBER.fullmatch(location):
        return StreamedMember(int(match[1]), unquote(match[2]), match[3])
    return None


def location_of(member: TarMember | StreamedMember) -> str:
    """The location of a tar member, which ``parse_member`` reads."""
    name = _escaped(member.name)
    if isinstance(member, TarMember):
        return f"tar://{member.offset}+{member.size}/{name}::{member.archive}"
    return f"targz://{member.number}/{name}::{member.archive}"


def _escaped(name: str) -> str:
    return _ESCAPED.sub(lambda match: f"%{ord(match[0]):02X}", name)


def cell_location(path: str, row: int, column: str) -> str:
    """The location of the audio in a row, counted from 0, and a column of a parquet or Arrow file."""
    return f"cell://{row}/{_escaped(column)}::{path}"


def parse_cell_location(location: str) -> tuple[str, int, str] | None:
    """(path, row, column) of a location that ``cell_location`` made; None for any other."""
    match = _CELL.fullmatch(location) if location.startswith("cell://") else None
    return None if match is None else (match[3], int(match[1]), unquote(match[2]))


def row_location(path: str, row: int) -> str:
    """The location of a row, counted from 0, of a parquet file."""
    return f"parquet://{row}::{path}"


def parse_row_location(location: str) -> tuple[str, int] | None:
    """(path, row) of a location that ``row_location`` made; None for any other."""
    match = _PARQUET_ROW.fullmatch(location) if location.startswith("parquet://") else None
    return None if match is None else (match[2], int(match[1]))


def line_location(path: str, begin: int, size: int) -> str:
    """The location of a line of JSON: ``size`` bytes from byte ``begin`` on."""
    return f"jsonl://{begin}+{size}::{path}"


def parse_line_location(location: str) -> tuple[str, int, int] | None:
    """(path, begin, size) of a location that ``line_location`` made; None for any other."""
    match = _JSON_LINE.fullmatch(location) if location.startswith("jsonl://") else None
    return None if match is None else (match[3], int(match[1]), int(match[2]))


def scheme_of(location: str) -> str | None:
    """``s3`` of ``s3://bucket/key``, in lower case; None where the location does not begin so."""
    match = _SCHEME.match(location)
    return match[1].lower() if match else None


def is_url(location: str) -> bool:
    """Whether fsspec has to fetch it: it begins with a scheme, but not with one of the locations above."""
    return scheme_of(location) not in (None, "tar", "targz", "cell", "parquet", "jsonl")


def is_relative(path: str) -> bool:
    """Whether it is a plain path that begins in some folder."""
    return scheme_of(path) is None and not path.startswith(PIPE) and not os.path.isabs(path)


def file_name(location: str) -> str:
    """The path or member name whose ending tells the format: ``a.flac`` for ``tar://0+9/a.flac::x.tar``."""
    member = parse_member(location)
    if member is not None:
        return member.name
    return urlsplit(location).path if scheme_of(location) in ("http", "https") else location


@lru_cache(64)  # callers ask for the same name before and after an opening
def display_name(location: str) -> str:
    """The location as a message may show it: on one line, printable, and without credentials (passwords and
    signatures in a URL)."""
    member = parse_member(location)
    if member is not None:
        return f"{_quoted_if_odd(member.name)} in {display_name(member.archive)}"
    cell = parse_cell_location(location)
    if cell is not None:
        return f"row {cell[1]} of {display_name(cell[0])}"
    row = parse_row_location(location)
    if row is not None:
        return f"row {row[1]} of {display_name(row[0])}"
    line = parse_line_location(location)
    if line is not None:
        return f"the line at byte {line[1]:,} of {display_name(line[0])}"
    if scheme_of(location) is not None:
        try:
            parts = urlsplit(location)
            host = parts.netloc.rpartition("@")[2]
            location = urlunsplit((parts.scheme, host, parts.path, "…" if parts.query else "", ""))
        except ValueError:
            pass  # a malformed address is shown as it stands
    return _quoted_if_odd(location)


def display_source(data_list: str) -> str:
    """As ``display_name`` for the sources of a run, one a line: the first three of them."""
    first = data_list.split("\n", 3)
    return ", ".join([*map(display_name, first[:3]), *(["…"] if len(first) > 3 else [])])


def _quoted_if_odd(name: str) -> str:
    shown = printable(name)
    return name if shown == name else f"'{shown}'"


def member_name(key: str) -> str:
    """The name of a row's members in a tar that this package writes.

    The key itself if it is 1 to 80 of ``A-Z a-z 0-9 _ -``; otherwise as much of it as is, ``~`` and a hash of all of
    it, which no plain key can be.
    """
    if _PLAIN_KEY.fullmatch(key):
        return key
    digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=10).hexdigest()
    return f"{_NOT_PLAIN.sub('_', key)[:48]}~{digest}"


def split_member_name(name: str) -> tuple[str, str] | None:
    """A tar member's name as webdataset groups members: what stands before the first dot of the file's name, and the
    rest. None for a name that webdataset skips, such as a hidden file's.

    A leading ``./`` is not part of the name. Both parts keep their case.
    """
    prefix, suffix = _base_plus_ext(_LEADING_DOT.sub("", name))
    return None if prefix is None or prefix.endswith("/") else (prefix, suffix)


def _base_plus_ext(name: str) -> tuple[str | None, str]:
    from webdataset.tariterators import base_plus_ext  # takes a second to import, and only readers of tars need it

    parts: tuple[str | None, str] = base_plus_ext(name)
    return parts
