"""Webdataset shards: rows enter, a tar of ``KEY.json``, ``KEY.tokens.npy`` and ``KEY.wav`` or ``KEY.flac`` leaves.

``KEY`` is the row's key where that is a plain name, otherwise a name made from it (``storage/member_names.py``). The
true key is in ``KEY.json``.

The bytes are those of webdataset's ``TarWriter``, which a test holds, in a tenth of its time: it makes every header
anew through ``tarfile``, and that cost more than all else a short row's output does. Here names are short and plain by
construction, so that only name, size and checksum change from one header to the next.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from batch_tokenizer.records import RowError
from batch_tokenizer.storage.names import member_name
from batch_tokenizer.writers.row_encoding import EncodedRow, json_bytes, npy_bytes

#: Sizes are 11 octal digits.
_MOST_BYTES = 8**11 - 1


def _usual_header() -> bytes:
    member = tarfile.TarInfo()
    member.mode = 0o444
    return member.tobuf(tarfile.USTAR_FORMAT)


_USUAL = _usual_header()

#: The sum of the bytes from the checksum on, itself taken as blanks; the same in all headers.
_REST = 8 * ord(" ") + sum(_USUAL[156:])


class TarShard:
    """A tar that is being written.

    Attributes:
        num_bytes: written so far.
    """

    suffix = "tar"

    def __init__(self, stream: BinaryIO) -> None:
        self.num_bytes = 0
        self._stream = stream

    @staticmethod
    def encode(row: EncodedRow) -> list[bytes | memoryview]:
        """The row's members as they stand in the tar, in pieces.

        Raises:
            RowError: its info is nested too deeply to be written, or its audio too large.
        """
        members: dict[str, bytes | memoryview] = {"json": json_bytes(row.info)}
        if row.codes is not None:
            members["tokens.npy"] = npy_bytes(row.codes)
        if row.audio is not None:
            members[row.audio_format] = row.audio
        name = member_name(row.key)
        return [piece for ending in sorted(members) for piece in _member(f"{name}.{ending}", members[ending])]

    def append(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Write what ``encode`` made."""
        self._stream.writelines(pieces)
        self.num_bytes += sum(map(len, pieces))

    def finish(self) -> None:
        """Write the end of the tar. The stream stays open."""
        end = bytes(2 * tarfile.BLOCKSIZE)
        self._stream.write(end + bytes(-(self.num_bytes + len(end)) % tarfile.RECORDSIZE))


def _member(name: str, content: bytes | memoryview) -> Iterator[bytes | memoryview]:
    """Header, content, padding.

    Args:
        name: at most 100 characters of ASCII.
    """
    size = len(content)
    if size > _MOST_BYTES:
        raise RowError("write", f"{name}: {size:,} bytes, where a tar's member has at most {_MOST_BYTES:,}")
    before = name.encode("ascii").ljust(100, b"\0") + _USUAL[100:124] + b"%011o" % size + _USUAL[135:148]
    checksum = sum(before) + _REST
    yield before + b"%06o\0" % checksum + _USUAL[155:]
    yield content
    yield bytes(-size % tarfile.BLOCKSIZE)
