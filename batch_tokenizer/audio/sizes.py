"""Where the samples of an uncompressed file lie, and whether its header's size of them can be believed.

After a recorder lost power its file has a size of 0 or of an earlier moment, and 32 bits hold no size beyond 4 GiB. A
decoder that believes such a size drops the rest silently. Here the chunks behind the samples are read: a size is right
if it ends at the file's end or where further chunks begin.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

from batch_tokenizer.records import RowError
from batch_tokenizer.storage.files import read_at


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a container's chunks are written.

    Attributes:
        first: the place of the first chunk.
        id_bytes: of a chunk's name.
        size: struct format of a chunk's size.
        counts_itself: the size includes name and size.
        align: chunks begin at multiples of it.
        samples: name of the chunk with the samples.
        lead: bytes of that chunk before the samples.
    """

    first: int
    id_bytes: int
    size: str
    counts_itself: bool
    align: int
    samples: bytes
    lead: int


_W64_DATA = b"data" + bytes.fromhex("f3acd3118cd100c04f8edb8a")

_LAYOUTS: dict[bytes, _Layout] = {
    b"RIFF": _Layout(12, 4, "<I", False, 2, b"data", 0),
    b"RF64": _Layout(12, 4, "<I", False, 2, b"data", 0),
    b"BW64": _Layout(12, 4, "<I", False, 2, b"data", 0),
    b"RIFX": _Layout(12, 4, ">I", False, 2, b"data", 0),
    b"FORM": _Layout(12, 4, ">I", False, 2, b"SSND", 8),
    b"caff": _Layout(8, 4, ">q", False, 1, b"data", 4),
    b"riff": _Layout(40, 16, "<Q", True, 8, _W64_DATA, 0),
}

#: What may follow a file's last chunk without being one: tags of mp3 players.
_TRAILERS = (b"TAG", b"ID3", b"APETAGEX")

#: Chunks that begin another recording, or more of this one.
_MORE_AUDIO = (b"RIFF", b"RF64", b"RIFX", b"FORM", b"riff", b"caff")

_MOST_CHUNKS = 10_000

#: Bytes that are read at first, which hold all chunks before the samples of most files.
HEAD_BYTES = 4096


@dataclass(frozen=True, slots=True)
class SampleBytes:
    """Samples whose size in the header is wrong: they begin at byte ``offset``, and ``stated`` bytes are promised of
    ``there``. FFmpeg reads a wav whose size is 0 on to its end."""

    offset: int
    stated: int
    there: int
    is_wav: bool


def find_stale_size(file: BinaryIO, size: int, name: str, head: bytes) -> SampleBytes | None:
    """Where the samples lie if the header's size of them cuts some off; None if it does not.

    Args:
        size: of the file, in bytes.
        head: its first ``HEAD_BYTES``.

    Raises:
        RowError: another recording follows.
    """
    if head[:4] == b".snd" and len(head) >= 12:
        offset, stated = struct.unpack(">II", head[4:12])
        there = size - offset
        return None if stated == 2**32 - 1 or stated >= there else SampleBytes(offset, stated, there, False)
    if head[36:40] == b"data" and int.from_bytes(head[40:44], "little") == size - 44:
        return None  # the header that nearly every wav has
    # 1. Find the chunk with the samples. RF64 states its true size in a chunk before it.
    layout = _LAYOUTS.get(head[:4])
    if layout is None:
        return None
    is_wav = layout.samples == b"data" and layout.size == "<I"
    begin, long_size = layout.first, None
    for _ in range(_MOST_CHUNKS):
        chunk = _parse_chunk(head[begin : begin + 24], begin, layout)
        if chunk is None and begin + 24 > len(head):
            chunk = _parse_chunk(read_at(file, begin, 24), begin, layout)
        if chunk is None:
            return None
        identity, content, length = chunk
        if identity == b"ds64":
            long_size = int.from_bytes(read_at(file, content + 8, 8), "little")
        if identity == layout.samples:
            break
        begin = _aligned(content + length, layout)
        if not content <= begin < size:
            return None
    else:
        return None
    # 2. Compare its size with what the file has from there on.
    if length == 2**32 - 1 and long_size is not None:
        length = long_size
    offset, stated, there = content + layout.lead, length - layout.lead, size - content - layout.lead
    if (layout.size == ">q" and length == -1) or stated >= there:
        # Promising too much is a habit of programs that write to a pipe, and decoders take what is there. But a size
        # of 32 bits is also all that they take.
        is_beyond = layout.size.endswith("I") and long_size is None and there >= 2**32 - 1
        return SampleBytes(offset, stated, there, is_wav) if is_beyond else None
    # 3. The file goes on behind the samples: with further chunks, or with samples that the size cuts off.
    end = content + length
    if any(_is_chunks(file, place, size, layout, name) for place in dict.fromkeys((_aligned(end, layout), end))):
        return None
    return SampleBytes(offset, max(0, stated), there, is_wav)


def _is_chunks(file: BinaryIO, begin: int, size: int, layout: _Layout, name: str) -> bool:
    """Whether the bytes from ``begin`` to the end are chunks, or so few that they are none."""
    for _ in range(_MOST_CHUNKS):
        if size - begin < layout.align + 1:
            return True
        head = read_at(file, begin, 24)
        if head.startswith(_TRAILERS):
            return True
        chunk = _parse_chunk(head, begin, layout)
        if chunk is None:
            return False
        identity, content, length = chunk
        readable = identity[:4]
        if not all(32 <= byte < 127 for byte in readable) or length < 0 or content + length > size + 1:
            return False
        if readable in _MORE_AUDIO or identity == layout.samples:
            raise RowError("load", f"{name}: has another recording at byte {begin:,}: split it into files")
        begin = _aligned(content + length, layout)
    return True


def _parse_chunk(head: bytes, begin: int, layout: _Layout) -> tuple[bytes, int, int] | None:
    """(name, place of its content, bytes of its content) of the chunk at ``begin``, which ``head`` is the beginning of;
    None where that is too short."""
    count = layout.id_bytes + struct.calcsize(layout.size)
    if len(head) < count:
        return None
    [length] = struct.unpack(layout.size, head[layout.id_bytes : count])
    return head[: layout.id_bytes], begin + count, length - count if layout.counts_itself else length


def _aligned(place: int, layout: _Layout) -> int:
    return -(-place // layout.align) * layout.align
