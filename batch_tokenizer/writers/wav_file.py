"""``wav_bytes``: float samples enter, the bytes of a PCM-16 mono wav file leave."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from batch_tokenizer.records import RowError

_HEADER_BYTES = 44

#: A RIFF chunk states its size in 32 bits, and counts the header less its own first eight bytes.
_MOST_DATA_BYTES = 2**32 - 1 - (_HEADER_BYTES - 8)


def wav_bytes(samples: npt.NDArray[np.float32], sample_rate: int) -> bytes:
    """A wav file of ``samples`` (S,), S >= 0, at ``sample_rate`` Hz.

    A sample x becomes x * 32768, rounded to the nearest integer (of two, the even one) and clipped to [-32768, 32767],
    as ffmpeg does it. Reading divides by 32768, so PCM-16 audio survives a round trip bit for bit.

    Raises:
        RowError: in stage ``decode`` if a sample is not a number or infinite, which only a model that has gone wrong
            makes; in stage ``write`` if the samples do not fit into a wav file (4 GiB).
    """
    if samples.nbytes // 2 > _MOST_DATA_BYTES:
        hours = len(samples) / sample_rate / 3600
        raise RowError("write", f"{hours:.1f} hours of audio at {sample_rate} Hz do not fit into a wav file (4 GiB)")
    if not np.isfinite(samples).all():
        count = int((~np.isfinite(samples)).sum())
        raise RowError("decode", f"the codec made {count} of {len(samples)} samples NaN or infinite")
    scaled = np.clip(samples, -1, 1)
    scaled *= 32768
    data = np.rint(scaled).clip(max=32767).astype("<i2").tobytes()
    riff = struct.pack("<4sI4s", b"RIFF", _HEADER_BYTES - 8 + len(data), b"WAVE")
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, sample_rate * 2, 2, 16)
    return b"".join((riff, layout, struct.pack("<4sI", b"data", len(data)), data))
