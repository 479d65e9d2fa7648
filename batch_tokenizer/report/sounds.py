"""A recording as a data URL that a browser plays: FLAC, since it is exact and every browser takes it."""

from __future__ import annotations

import base64

from batch_tokenizer.audio.encoding import flac_bytes
from batch_tokenizer.quality.recordings import Recording


def data_url(sound: Recording) -> str:
    """``data:audio/flac;base64,…`` of 16-bit samples."""
    return "data:audio/flac;base64," + base64.b64encode(flac_bytes(sound.samples, sound.sample_rate)).decode()
