"""``wav_bytes``: float samples enter, the bytes of a PCM-16 mono wav file leave."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from batch_tokenizer.records import RowError

_HEADER_BYTES = 44

#: A RIFF chunk states its size in 32 bits, and counts the header less its own first eight bytes.
_MOST_DATA_BYTES = 2**32 - 1 - (_HEADER_BYTES - 8)

_PIECE_SAMPLES = 1 << 20


def wav_bytes(samples: npt.NDArray[np.float32], sample_rate: int) -> bytes:
    """A wav file of ``samples`` (S,), S >= 0, at ``sample_rate`` Hz.

    A sample x becomes x * 32768, rounded to the nearest integer (of two, the even one) and clipped to [-32768, 32767],
    as ffmpeg does it. Reading divides by 32768, so PCM-16 audio survives a round trip bit for bit.

    Raises:
        RowError: in stage ``decode`` if a sample is not a number or infinite, which only a model that has gone wrong
            makes; in stage ``write`` if the samples do not fit into a wav file (4 GiB).
    """
    return b"".join(wav_pieces(samples, sample_rate))


def wav_pieces(samples: npt.NDArray[np.float32], sample_rate: int) -> Iterator[bytes]:
    """The bytes of ``wav_bytes`` one piece after the other, for samples that need not be in memory.

    Raises:
        RowError: as ``wav_bytes``, from the piece on where it shows.
    """
    if samples.nbytes // 2 > _MOST_DATA_BYTES:
        hours = len(samples) / sample_rate / 3600
        raise RowError("write", f"{hours:.1f} hours of audio at {sample_rate} Hz do not fit into a wav file (4 GiB)")
    data_bytes = 2 * len(samples)
    riff = struct.pack("<4sI4s", b"RIFF", _HEADER_BYTES - 8 + data_bytes, b"WAVE")
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, sample_rate * 2, 2, 16)
    yield b"".join((riff, layout, struct.pack("<4sI", b"data", data_bytes)))
    for start in range(0, len(samples), _PIECE_SAMPLES):
        piece = samples[start : start + _PIECE_SAMPLES]
        if not np.isfinite(piece).all():
            count = sum(
                int((~np.isfinite(samples[place : place + _PIECE_SAMPLES])).sum())
                for place in range(start, len(samples), _PIECE_SAMPLES)
            )
            raise RowError("decode", f"the codec made {count} of {len(samples)} samples NaN or infinite")
        scaled = np.clip(piece, -1, 1)
        scaled *= 32768
        yield np.rint(scaled).clip(max=32767).astype("<i2").tobytes()
