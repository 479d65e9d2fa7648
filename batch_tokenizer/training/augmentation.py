"""Augmentation of training examples: speed, level, equalization, rooms, noise, mixtures and silences.

The augmented example is both the model's input and its target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batch_tokenizer.audio.resampling import resample

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """Chances and ranges of each change. The chances are independent of each other.

    Attributes:
        speed_chance, slowest, fastest: resampled to another speed, which moves pitch and formants as well.
        level_low, level_high: range of the root mean square in dB of full scale, drawn uniformly.
        keep_level_chance: the level is left as recorded.
        tilt_chance, tilt: a slope of up to ``tilt`` dB per octave around 1 kHz, and two resonances of up to 9 dB.
        band_chance: a low-pass between 3.2 and 8 kHz, half of the time with a high-pass between 100 and 300 Hz.
        room_chance: an exponentially decaying room response, 0.1 to 0.6 s long.
        noise_chance: coloured noise, 15 to 45 dB below the example.
        mix_chance: another example, such as another speaker or music, 5 to 30 dB below.
        silence_chance: silence, or noise below -70 dB of full scale, in place of 0.1 to 0.5 s.
    """

    speed_chance: float = 0.7
    slowest: float = 0.72
    fastest: float = 1.4
    level_low: float = -66.0
    level_high: float = -12.0
    keep_level_chance: float = 0.35
    tilt_chance: float = 0.4
    tilt: float = 3.0
    band_chance: float = 0.1
    room_chance: float = 0.12
    noise_chance: float = 0.12
    mix_chance: float = 0.04
    silence_chance: float = 0.08


def augment(
    draw: Callable[[int], Samples], length: int, sample_rate: int, rng: np.random.Generator, how: Augmentation
) -> Samples:
    """One example float32 (``length``,), without clipping. ``draw(n)`` returns n samples of a random recording."""
    samples = _at_speed(draw, length, sample_rate, rng, how)
    if rng.random() < how.mix_chance:
        samples = _add(samples, draw(length), rng.uniform(5, 30))
    samples = _filtered(samples, sample_rate, rng, how)
    if rng.random() < how.noise_chance:
        samples = _add(samples, _noise(length, rng), rng.uniform(15, 45))
    if rng.random() < how.silence_chance:
        samples = _with_silence(samples, sample_rate, rng)
    return _at_level(samples, rng, how)


def _at_speed(
    draw: Callable[[int], Samples], length: int, sample_rate: int, rng: np.random.Generator, how: Augmentation
) -> Samples:
    if rng.random() >= how.speed_chance:
        return draw(length)
    rate = int(sample_rate * math.exp(rng.uniform(math.log(how.slowest), math.log(how.fastest))))
    samples = resample(draw(length * rate // sample_rate + 64)[None], rate, sample_rate, "soxr")[0, :length]
    return np.pad(samples, (0, length - len(samples)))


def _filtered(samples: Samples, sample_rate: int, rng: np.random.Generator, how: Augmentation) -> Samples:
    """Equalisation, band limits and room, as one product of spectra."""
    chances = rng.random(3) < (how.tilt_chance, how.band_chance, how.room_chance)
    if not chances.any():
        return samples
    length = len(samples)
    size = 1 << (length + sample_rate // 2 - 1).bit_length()
    frequencies = np.fft.rfftfreq(size, 1 / sample_rate)
    octaves = np.log2(np.maximum(frequencies, 50) / 1000)
    response: npt.NDArray[np.complex128] = np.ones(len(frequencies), np.complex128)
    # 1. Tilt and two resonances: microphones and voices.
    if chances[0]:
        decibels = rng.uniform(-how.tilt, how.tilt) * octaves
        for _ in range(2):
            centre, width = rng.uniform(-3, 3), rng.uniform(0.2, 1.0)
            decibels = decibels + rng.uniform(-9, 9) * np.exp(-0.5 * ((octaves - centre) / width) ** 2)
        response *= 10 ** (decibels.clip(-24, 12) / 20)
    # 2. Band limits, as of telephones: Butterworth magnitudes without a phase.
    if chances[1]:
        response /= np.sqrt(1 + (frequencies / rng.uniform(3200, 8000)) ** 24)
        if rng.random() < 0.5:
            response /= np.sqrt(1 + (rng.uniform(100, 300) / np.maximum(frequencies, 1)) ** 8)
    # 3. A room: noise that decays by 60 dB, behind the direct sound.
    if chances[2]:
        count = int(rng.uniform(0.1, 0.6) * sample_rate)
        decay = np.exp(np.linspace(0, -math.log(1000), count))
        tail = rng.standard_normal(count) * decay
        tail *= math.sqrt(10 ** (rng.uniform(-20, -3) / 10) / (tail**2).sum())
        tail[0] += 1
        response *= np.fft.rfft(tail, size)
    return np.fft.irfft(np.fft.rfft(samples, size) * response, size)[:length].astype(np.float32)


def _noise(length: int, rng: np.random.Generator) -> Samples:
    """Noise whose power falls with frequency by 0 to 6 dB per octave."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    return np.fft.irfft(spectrum / np.arange(1, len(spectrum) + 1) ** rng.uniform(0, 1), length).astype(np.float32)


def _level(samples: Samples) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


def _add(samples: Samples, other: Samples, below: float) -> Samples:
    """``other`` mixed in, ``below`` dB under ``samples``."""
    gain = _level(samples) / max(_level(other), 1e-6) * 10 ** (-below / 20)
    return samples + other * np.float32(gain)


def _with_silence(samples: Samples, sample_rate: int, rng: np.random.Generator) -> Samples:
    count = min(len(samples), int(rng.uniform(0.1, 0.5) * sample_rate))
    start = int(rng.integers(0, len(samples) - count + 1))
    samples = samples.copy()
    floor = 0.0 if rng.random() < 0.3 else 10 ** (rng.uniform(-90, -70) / 20)
    samples[start : start + count] = floor * rng.standard_normal(count)
    return samples


def _at_level(samples: Samples, rng: np.random.Generator, how: Augmentation) -> Samples:
    peak = max(float(np.abs(samples).max()), 1e-5)
    gain = 1.0
    if rng.random() >= how.keep_level_chance:
        gain = 10 ** (rng.uniform(how.level_low, how.level_high) / 20) / max(_level(samples), 1e-5)
    return (samples * min(gain, 0.99 / peak)).astype(np.float32)
