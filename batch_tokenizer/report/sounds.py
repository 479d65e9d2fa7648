"""A recording as a data URL that a browser plays: FLAC, since it is exact and every browser takes it."""

from __future__ import annotations

import base64
import io

import numpy as np
import soundfile

from batch_tokenizer.quality.recordings import Recording


def data_url(sound: Recording) -> str:
    """``data:audio/flac;base64,…`` of 16-bit samples; what is beyond full scale is clipped, as in a wav file."""
    stream = io.BytesIO()
    samples = np.clip(sound.samples, -1.0, 32767 / 32768)
    soundfile.write(stream, samples, sound.sample_rate, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(stream.getvalue()).decode()
