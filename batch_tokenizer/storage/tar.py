"""Tars read from the front: where each member lies, in what order, and what is wrong with the archive.

``walk`` reads a tar as a ``ByteStream`` (a file or an object, or the output of a decompressor) and yields its members
one after the other. A tar is untrusted input: a header is believed only if its checksum holds, member sizes only as far
as the stream goes, and members that are no plain files (links, devices, sparse files) are reported, never read. Nothing
is ever written to where a member's name says.

Archives that were appended to each other (``cat``) are read to the end of the last one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

HEADER = 512

#: Most bytes of a header that carries a long name or further fields, and members of a kind that a message names.
_MOST_EXTENSION = 1 << 20

#: Sizes are 12 octal digits, or binary; a member beyond this has a damaged or a forged header.
MOST_MEMBER = 1 << 40

_REGULAR = (b"0", b"\0", b"7")
_KINDS = {b"1": "hard links", b"2": "symbolic links", b"3": "devices", b"4": "devices", b"6": "pipes"}

#: Bytes that are taken from a stream at once.
_PIECE = 1 << 20


class TornTar(Exception):
    """The archive cannot be read on from here. ``str`` gives the reason; all members before it are good."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar.

    Attributes:
        number: among the regular files, from 0.
        name: as it stands there; bytes that are not UTF-8 are written ``\\xff``.
        offset: of its first byte, from the (uncompressed) archive's beginning.
        size: bytes.
    """

    number: int
    name: str
    offset: int
    size: int


class ByteStream:
    """Bytes from the front to the end, which can be read or skipped.

    Attributes:
        position: bytes read or skipped so far.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        """
        Args:
            read: at most so many of the next bytes, none at the end.
        """
        self._read = read
        self.position = 0

    def read(self, size: int) -> bytes:
        """``size`` bytes, fewer only at the end."""
        parts: list[bytes] = []
        missing = size
        while missing and (part := self._read(min(missing, _PIECE))):
            parts.append(part)
            missing -= len(part)
            self.position += len(part)
        return b"".join(parts)

    def skip(self, size: int) -> int:
        """Goes on by ``size`` bytes; returns by how many, fewer only at the end."""
        missing = size
        while missing and (part := self._read(min(missing, _PIECE))):
            missing -= len(part)
            self.position += len(part)
        return size - missing


class SeekableByteStream(ByteStream):
    """Over something that gives bytes by their place, so that skipping reads nothing. Read a block at a time."""

    def __init__(self, read_at: Callable[[int, int], bytes], size: int, block: int = 1 << 16) -> None:
        """
        Args:
            read_at: (offset, bytes) to bytes, fewer only at the end.
        """
        super().__init__(lambda count: b"")
        self._read_at = read_at
        self._size = size
        self._block_bytes = block
        self._begin = 0
        self._block = b""

    @classmethod
    def of_file(cls, file: BinaryIO) -> SeekableByteStream:
        """Over an open file that can seek."""

        def read_at(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size)

        return cls(read_at, file.seek(0, os.SEEK_END))

    def read(self, size: int) -> bytes:
        """``size`` bytes, fewer only at the end."""
        size = max(0, min(size, self._size - self.position))
        start = self.position - self._begin
        if start < 0 or start + size > len(self._block):
            wanted = min(max(size, self._block_bytes), self._size - self.position)
            self._block, self._begin, start = self._read_at(self.position, wanted), self.position, 0
        data = self._block[start : start + size]
        self.position += len(data)
        return data

    def skip(self, size: int) -> int:
        """Goes on by ``size`` bytes; returns by how many, fewer only at the end."""
        skipped = min(size, self._size - self.position)
        self.position += skipped
        return skipped


def walk(stream: ByteStream, note: Callable[[str, str], None]) -> Iterator[Member]:
    """The regular members, in order. When a member is yielded, the stream stands at its first byte; the caller may
    read from it as far as the member goes.

    Args:
        note: called with (kind, name) of each member that is left out.

    Raises:
        TornTar: the archive ends before its end, or what follows is no tar.
    """
    number = 0
    ended = False
    long_name: str | None = None
    fields: dict[str, str] = {}
    while True:
        # 1. A header, or zeros, which mark the end. Archives that were joined by ``cat`` have several such marks.
        begin = stream.position
        header = stream.read(HEADER)
        if not header:
            if ended:
                return
            raise TornTar("it is empty" if not begin else f"it ends at byte {begin:,}, without the mark of its end")
        if len(header) < HEADER:
            if ended and not any(header):
                return
            raise TornTar(f"it ends within a header, at byte {begin + len(header):,}")
        if header[0] == 0 and not any(header):
            ended = True
            continue
        if not _is_header(header):
            if ended:
                note("bytes behind the end", f"at byte {begin:,}")
                return
            raise TornTar(f"its header at byte {begin:,} is damaged" if begin else "it is no tar")
        # 2. Extensions (GNU, PAX) carry a long name or further fields of the member that follows them.
        ended = False
        kind = header[156:157]
        size = _number(header[124:136])
        if size < 0:
            raise TornTar(f"its header at byte {begin:,} has an impossible size")
        if kind in (b"L", b"K", b"x", b"X", b"g"):
            content = _extension(stream, size, begin)
            if kind == b"L":
                long_name = _text(content.split(b"\0", 1)[0])
            elif kind in (b"x", b"X"):
                fields = _pax_fields(content)
            continue
        # 3. The member itself. What the extensions say wins over its header, and holds for this member alone.
        name = fields.get("path") or long_name or _name(header)
        sparse = kind == b"S" or any(field.startswith("GNU.sparse") for field in fields)
        if "size" in fields:
            size = int(fields["size"]) if fields["size"].isdecimal() and len(fields["size"]) < 19 else -1
        long_name, fields = None, {}
        if not 0 <= size <= MOST_MEMBER:
            raise TornTar(f"member {_short(name)} at byte {begin:,} has an impossible size")
        # 4. Old GNU sparse files have further headers, the map of their holes, before the content.
        if kind == b"S":
            extended = header[482]
            while extended:
                more = stream.read(HEADER)
                if len(more) < HEADER:
                    raise TornTar(f"it ends within a header, at byte {stream.position:,}")
                extended = more[504]
        # 5. Yield it or note it, then skip what the caller did not read, and the padding to the next header.
        offset = stream.position
        if kind in _REGULAR and not sparse and not name.endswith("/"):
            yield Member(number, name, offset, size)
            number += 1
        elif sparse:
            note("sparse files", name)
        elif kind in _KINDS:
            note(_KINDS[kind], name)
            size = 0  # a link may state the size of what it points to, and brings no content
        elif kind != b"5" and not name.endswith("/"):
            note(f"members of type {kind!r}", name)
        missing = offset + size - stream.position
        if stream.skip(missing) < missing:
            raise TornTar(f"it ends at byte {stream.position:,}, within member {_short(name)}")
        stream.skip(-size % HEADER)


def is_member_header(header: bytes, size: int) -> bool:
    """Whether 512 bytes are the header of a regular member of ``size`` bytes."""
    stated = _number(header[124:136]) if len(header) == HEADER else -1
    return _is_header(header) and header[156:157] in _REGULAR and (stated == size or size >= 8**11)


def _is_header(header: bytes) -> bool:
    if len(header) != HEADER:
        return False
    stated = _number(header[148:156])
    field = sum(header[148:156])
    unsigned = sum(header) - field + 8 * 32
    if stated == unsigned:
        return True
    # Some old programs added up signed bytes.
    above = sum(1 for byte in header[:148] + header[156:] if byte > 127)
    return bool(above) and stated == unsigned - 256 * above


def _number(field: bytes) -> int:
    """Octal digits, or, where the first bit is set, a binary number; -1 for anything else."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if not digits:
        return 0
    try:
        return int(digits, 8) if digits.isdigit() else -1
    except ValueError:  # 8 or 9
        return -1


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    # Only POSIX headers have a prefix; GNU's old ones keep times there.
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _extension(stream: ByteStream, size: int, begin: int) -> bytes:
    if size > _MOST_EXTENSION:
        raise TornTar(f"its header at byte {begin:,} has a name or fields of {size:,} bytes")
    content = stream.read(size)
    if len(content) < size or stream.skip(-size % HEADER) < -size % HEADER:
        raise TornTar(f"it ends within a header, at byte {stream.position:,}")
    return content


def _pax_fields(content: bytes) -> dict[str, str]:
    """``LENGTH NAME=VALUE\\n`` one after the other; what is malformed ends them."""
    fields: dict[str, str] = {}
    at = 0
    while at < len(content):
        head, space, _ = content[at : at + 20].partition(b" ")
        length = int(head) if space and head.isdigit() else 0
        record = content[at + len(head) + 1 : at + length - 1]
        name, equals, value = record.partition(b"=")
        if length <= 0 or at + length > len(content) or not equals:
            break
        fields[_text(name)] = _text(value)
        at += length
    return fields


def _short(name: str) -> str:
    return ascii(name[:100] + "…" if len(name) > 100 else name)
