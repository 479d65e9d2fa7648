"""Samples to the bytes of a FLAC file."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import soundfile


def flac_bytes(samples: npt.NDArray[np.float32], sample_rate: int) -> bytes:
    """Float samples (S,) as 16-bit FLAC; what is beyond full scale is clipped, as in a wav file."""
    stream = io.BytesIO()
    clipped = np.clip(samples, -1.0, 32767 / 32768)
    soundfile.write(stream, clipped, sample_rate, format="FLAC", subtype="PCM_16")
    return stream.getvalue()
