"""Samples to the bytes of an audio file in memory."""

from __future__ import annotations

import io
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile

from batch_tokenizer.records import RowError

_PIECE_SAMPLES = 1 << 20

_SUBTYPES = {"wav": "PCM_16", "flac": "PCM_16", "mp3": "MPEG_LAYER_III"}


def encoded_bytes(samples: npt.NDArray[np.float32], sample_rate: int, form: str) -> bytes:
    """Float samples (S,) or (channels, S) as ``wav`` or ``flac`` of 16 bits, or ``mp3``, clipped at full scale."""
    stream = io.BytesIO()
    clipped = np.clip(samples, -1.0, 32767 / 32768).T
    soundfile.write(stream, clipped, sample_rate, format=form.upper(), subtype=_SUBTYPES[form])
    return stream.getvalue()


def write_flac(file: BinaryIO, samples: npt.NDArray[np.float32], sample_rate: int) -> None:
    """As ``encoded_bytes`` of ``flac`` into a file, for samples that need not be in memory.

    Raises:
        RowError: a sample is NaN or infinite.
    """
    channels, length = (1, len(samples)) if samples.ndim == 1 else samples.shape
    with soundfile.SoundFile(file, "w", sample_rate, channels, "PCM_16", format="FLAC") as flac:
        for start in range(0, length, _PIECE_SAMPLES):
            piece = samples[..., start : start + _PIECE_SAMPLES]
            if not np.isfinite(piece).all():
                raise RowError("decode", f"the codec made some of {samples.size} samples NaN or infinite")
            flac.write(np.clip(piece, -1.0, 32767 / 32768).T)
