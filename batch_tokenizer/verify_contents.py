"""What outputs must be, by their content alone: each check takes bytes or codes and what is expected of them, and
raises ``Wrong`` with the first thing that is not so. Knows nothing of where the content lies.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

#: Bytes of an audio file's beginning that the checks want.
AUDIO_HEADER_BYTES = 4096

_STREAM_INFO_BYTES = 34


class Wrong(Exception):
    """An output is not what it should be. ``kind`` is one of ``verify.KINDS``."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(kind, what)
        self.kind = kind
        self.what = what


def check_audio(audio_format: str, head: bytes, size: int, *, sample_rate: int, num_samples: int) -> None:
    """Whether ``wav`` or ``flac`` content is mono, of 16 bits and of ``num_samples`` samples, by its header.

    Args:
        head: its first ``AUDIO_HEADER_BYTES``.
        size: of all of it, in bytes.

    Raises:
        Wrong: it is not.
    """
    check = _check_wav if audio_format == "wav" else _check_flac
    check(head, size, sample_rate, num_samples)


def _check_wav(head: bytes, size: int, sample_rate: int, num_samples: int) -> None:
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        raise Wrong("unreadable", f"not a wav file ({size} bytes)")
    chunks: dict[bytes, tuple[int, int]] = {}
    at = 12
    while b"data" not in chunks and at + 8 <= len(head):
        name, length = struct.unpack_from("<4sI", head, at)
        chunks[name] = at + 8, length
        at += 8 + length + length % 2
    if b"data" not in chunks or b"fmt " not in chunks or chunks[b"fmt "][0] + 16 > len(head):
        raise Wrong("unreadable", f"not a wav file that can be read: its header is damaged ({size} bytes)")
    tag, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", head, chunks[b"fmt "][0])
    if (tag, channels, bits) != (1, 1, 16):
        raise Wrong("content", f"format {tag}, {channels} channels, {bits} bits, and not PCM, 1 channel, 16 bits")
    if rate != sample_rate:
        raise Wrong("content", f"{rate} Hz, not {sample_rate} Hz")
    begin, length = chunks[b"data"]
    if begin + length > size:
        raise Wrong("length", f"cut short: {size - begin} of {length} bytes of audio are there")
    if length != 2 * num_samples:
        raise Wrong("length", f"{length / 2:.16g} samples where {num_samples} are expected")
    (promised,) = struct.unpack_from("<I", head, 4)
    if begin + length != size or promised + 8 != size:
        raise Wrong("content", f"{size} bytes, and not the {begin + length} that its header implies")


def _check_flac(head: bytes, size: int, sample_rate: int, num_samples: int) -> None:
    """By the first metadata block, which states the stream's length. The frames after it are not looked at."""
    if head[:4] != b"fLaC":
        raise Wrong("unreadable", f"not a flac file ({size} bytes)")
    info = head[8 : 8 + _STREAM_INFO_BYTES]
    if head[4] & 0x7F != 0 or len(info) < _STREAM_INFO_BYTES:
        raise Wrong("unreadable", f"not a flac file that can be read: its header is damaged ({size} bytes)")
    fields = int.from_bytes(info[10:18], "big")
    rate, channels, bits = fields >> 44, (fields >> 41 & 7) + 1, (fields >> 36 & 31) + 1
    if (channels, bits) != (1, 16):
        raise Wrong("content", f"{channels} channels, {bits} bits, and not 1 channel, 16 bits")
    if rate != sample_rate:
        raise Wrong("content", f"{rate} Hz, not {sample_rate} Hz")
    length = fields & (1 << 36) - 1
    if length != num_samples:
        raise Wrong("length", f"{length} samples where {num_samples} are expected")


def check_codes(codes: npt.NDArray[Any], codebook_sizes: tuple[int, ...], *, num_samples: int, num_frames: int) -> None:
    """Whether integers (T, K) are ``num_frames`` frames of one code for each codebook.

    Args:
        num_samples: for the message.

    Raises:
        Wrong: they are not.
    """
    if len(codes) != num_frames:
        raise Wrong("length", f"{len(codes)} frames where {num_samples} samples make {num_frames}")
    if codes.ndim != 2 or codes.shape[1] != len(codebook_sizes):
        raise Wrong("content", f"codes of shape {codes.shape}, not ({num_frames}, {len(codebook_sizes)})")
    if codes.dtype.kind not in "iu":
        raise Wrong("content", "codes that are not integers")
    outside = (codes < 0) | (codes >= np.array(codebook_sizes))
    if outside.any():
        frame, codebook = map(int, np.argwhere(outside)[0])
        raise Wrong(
            "content",
            f"frame {frame}, codebook {codebook}: code {codes[frame, codebook]} is outside "
            f"0 to {codebook_sizes[codebook] - 1}",
        )


def check_info(info: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Whether what an output says of itself has these values.

    Raises:
        Wrong: it has not.
    """
    for name, value in expected.items():
        if name not in info or info[name] != value:
            found = info.get(name, "absent")
            raise Wrong("content", f"its info has {name} {found}, not {value}")
