"""Recordings of any length, and the memory that a process needs for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile


def write_recording(path: Path, seconds: float, rate: int, channels: int = 1) -> None:
    """Tones in noise, PCM-16, written ten seconds at a time."""
    generator = np.random.default_rng(1)
    time_axis = np.arange(10 * rate) / rate
    tones = np.stack([np.sin(2 * np.pi * 220 * (c + 1) * time_axis) for c in range(channels)], 1)
    block = 0.3 * tones + 0.05 * generator.standard_normal(tones.shape)
    left = round(seconds * rate)
    with soundfile.SoundFile(path, "w", rate, channels, "PCM_16") as file:
        while left:
            file.write(block[: min(left, len(block))] * (0.6 + 0.4 * np.sin(left)))
            left -= min(left, len(block))


def anonymous_bytes(process_id: int) -> int:
    """Memory of a process that no file backs (Linux); 0 of one that has ended."""
    try:
        status = Path(f"/proc/{process_id}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(lines[0].split()[1]) * 1024 if lines else 0
