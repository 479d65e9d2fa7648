"""Locations: strings that say where bytes lie. This module reads and makes them, and touches no storage.

    audio/a.flac                          a file
    s3://bucket/a.flac, https://…         an object, through fsspec
    tar://1536+48044/a.flac::x.tar        48,044 bytes from byte 1,536 of the tar x.tar, which may be a URL too
    targz://7/a.flac::x.tar.gz            the eighth regular member of a tar that can only be read from its beginning:
                                          a compressed one, or what a ``pipe:`` command prints
    parquet://7::x.parquet                row 7, counted from 0, of a parquet file: its tokens or its audio, as is asked

The member's name in a location is for people and for telling formats apart; it opens nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from urllib.parse import unquote, urlsplit, urlunsplit

_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,80}")

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")


def member_name(key: str) -> str:
    """The key itself if it is 1 to 80 of ``A-Z a-z 0-9 _ -``; otherwise as much of it as is, ``~`` and a hash of all
    of it, which no plain key can be."""
    if _PLAIN.fullmatch(key):
        return key
    digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=10).hexdigest()
    return f"{_UNSAFE.sub('_', key)[:48]}~{digest}"


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")

_MEMBER = re.compile(r"tar://(\d{1,18})\+(\d{1,18})/([^:]*)::(.+)", re.DOTALL)

_STREAMED = re.compile(r"targz://(\d{1,18})/([^:]*)::(.+)", re.DOTALL)

_ESCAPED = re.compile(r"[%:\x00-\x1f\x7f]")

#: What begins a shell command whose output is a tar, as webdataset writes it.
PIPE = "pipe:"


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
    """The member that a location means; None where it means something else."""
    if match := _MEMBER.fullmatch(location):
        return TarMember(int(match[1]), int(match[2]), unquote(match[3]), match[4])
    if match := _STREAMED.fullmatch(location):
        return StreamedMember(int(match[1]), unquote(match[2]), match[3])
    return None


def location_of(member: TarMember | StreamedMember) -> str:
    """What ``parse_member`` reads."""
    name = _ESCAPED.sub(lambda match: f"%{ord(match[0]):02X}", member.name)
    if isinstance(member, TarMember):
        return f"tar://{member.offset}+{member.size}/{name}::{member.archive}"
    return f"targz://{member.number}/{name}::{member.archive}"


def scheme_of(location: str) -> str | None:
    """``s3`` of ``s3://bucket/key``, in lower case; None where the location does not begin so."""
    match = _SCHEME.match(location)
    return match[1].lower() if match else None


def is_url(location: str) -> bool:
    """Whether fsspec has to fetch it: it begins with a scheme, but not with one of the tar locations' own."""
    return scheme_of(location) not in (None, "tar", "targz")


def file_name(location: str) -> str:
    """The path or member name whose ending tells the format: ``a.flac`` for ``tar://0+9/a.flac::x.tar``."""
    member = parse_member(location)
    if member is not None:
        return member.name
    return urlsplit(location).path if scheme_of(location) in ("http", "https") else location


@lru_cache(64)  # whoever opens one asks beforehand, and so does who is asked
def spoken(location: str) -> str:
    """The location as a message may show it: on one line, in characters that any report can hold, and without what
    opens doors (passwords and signatures in a URL)."""
    member = parse_member(location)
    if member is not None:
        return f"{_printable(member.name)} in {spoken(member.archive)}"
    if scheme_of(location) is not None:
        try:
            parts = urlsplit(location)
            place = parts.netloc.rpartition("@")[2]
            location = urlunsplit((parts.scheme, place, parts.path, "…" if parts.query else "", ""))
        except ValueError:
            pass  # an address that is none is shown as it stands
    return _printable(location)


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)
