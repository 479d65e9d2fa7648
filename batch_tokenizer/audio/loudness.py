"""Loudness normalisation as published models' own data preparation does it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: What the mean power is brought towards, in dB of full scale, and by how much at most.
TARGET_DB, MOST_DB = -20.0, 3.0


def moss_tts_loudness(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Samples (S,) or (channels, S) as MOSS-TTS's processor gives them to its codec.

    The gain is -20 dB less the mean power of all channels together, between -3 and 3 dB: silence is raised by 3 dB.
    The logarithm is taken in float32 and the gain in float64, as published. Nothing is clipped.
    """
    if not samples.size:
        return samples
    power = np.mean(np.square(samples, dtype=np.float32), dtype=np.float32)
    level = np.float32(10.0) * np.log10(power + np.float32(1e-9), dtype=np.float32)
    gain = float(np.clip(np.float32(TARGET_DB) - level, np.float32(-MOST_DB), np.float32(MOST_DB)))
    return samples * np.float32(10.0 ** (gain / 20.0))
