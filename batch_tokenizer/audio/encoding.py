"""Samples to the bytes of an audio file in memory."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import soundfile

_SUBTYPES = {"wav": "PCM_16", "flac": "PCM_16", "mp3": "MPEG_LAYER_III"}


def encoded_bytes(samples: npt.NDArray[np.float32], sample_rate: int, form: str) -> bytes:
    """Float samples (S,) as ``wav`` or ``flac`` of 16 bits, or ``mp3``; what is beyond full scale is clipped."""
    stream = io.BytesIO()
    clipped = np.clip(samples, -1.0, 32767 / 32768)
    soundfile.write(stream, clipped, sample_rate, format=form.upper(), subtype=_SUBTYPES[form])
    return stream.getvalue()


def flac_bytes(samples: npt.NDArray[np.float32], sample_rate: int) -> bytes:
    """Float samples (S,) as 16-bit FLAC; what is beyond full scale is clipped, as in a wav file."""
    return encoded_bytes(samples, sample_rate, "flac")
