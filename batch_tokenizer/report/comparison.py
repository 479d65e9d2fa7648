"""``draw_comparison``: the picture of one recording beside what a codec makes of it, for ``inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_tokenizer.quality.codebooks import bit_rate
from batch_tokenizer.quality.metrics import METRICS, Scores, level_db, mel_db
from batch_tokenizer.quality.recordings import Recording
from batch_tokenizer.report.figures import draw_codes, draw_mel, draw_waveform
from batch_tokenizer.storage.atomic import os_error_ends_run

#: Codebooks that are drawn large: the codes of later ones follow nothing that an eye could see.
_LARGE_CODEBOOKS = 3

#: Change of level in dB from which the picture names it.
_LEVEL_CHANGE = 3.0


def draw_comparison(
    path: Path,
    title: str,
    original: Recording,
    made: Recording,
    codes: npt.NDArray[np.uint16],
    sizes: Sequence[int],
    frame_rate: float,
    scores: Scores,
) -> bool:
    """Writes waveforms on one scale, spectrograms in Hz and codes, under a title with the model and the scores.

    Args:
        title: the recording and the model.
        codes: (T, K).
        sizes: entries of the K codebooks.
        frame_rate: Hz.

    Returns:
        Whether it was drawn: False where matplotlib is not installed.

    Raises:
        RunError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    frames, used = codes.shape
    large = min(used, _LARGE_CODEBOOKS)
    heights = [1.0, 1.0, 2.0, 2.0, 0.35 * large, *([0.6] if used > large else [])]
    drawing = Figure(figsize=(9, 1.6 + sum(heights)), layout="constrained", facecolor="white")
    drawing.suptitle(f"{title}\n{_scores_text(scores)}", x=0.01, ha="left", fontsize=11, linespacing=1.6)
    panels: list[Any] = list(drawing.subplots(len(heights), 1, sharex=True, height_ratios=heights))
    # 1. Waveforms on one scale: a level that changed shows at once.
    peak = 1.05 * max(float(np.max(np.abs(side.samples), initial=0.0)) for side in (original, made)) or 1.0
    for axes, what, side in ((panels[0], "original", original), (panels[1], "reconstruction", made)):
        draw_waveform(axes, side, peak)
        axes.set_title(f"{what}, {_level(side)}", loc="left", fontsize=9)
    if abs(change := scores.values.get("level_change", 0.0)) >= _LEVEL_CHANGE:
        word = "louder" if change > 0 else "quieter"
        panels[1].set_title(f"{abs(change):.1f} dB {word} than the original", loc="right", fontsize=9, color="#b3261e")
    # 2. Spectrograms.
    for axes, what, side in ((panels[2], "original", original), (panels[3], "reconstruction", made)):
        draw_mel(axes, mel_db(side), side)
        axes.set_title(what, loc="left", fontsize=9)
    # 3. Codes.
    draw_codes(panels[4], codes[:, :large], sizes[:large], frame_rate, 1)
    rate = f"{frame_rate:g} Hz, {bit_rate(sizes, frame_rate) / 1000:.2f} kbit/s"
    panels[4].set_title(
        f"codes of {used} codebooks: {frames} frames, {rate} (colour: index in the codebook)", loc="left", fontsize=9
    )
    if used > large:
        draw_codes(panels[5], codes[:, large:], sizes[large:], frame_rate, large + 1)
    for axes in panels:
        axes.tick_params(labelsize=8)
    panels[-1].set_xlim(0, original.seconds)
    panels[-1].set_xlabel("seconds", fontsize=9)
    with os_error_ends_run(f"{path} cannot be written"):
        drawing.savefig(path, dpi=100)
    return True


def _level(side: Recording) -> str:
    return f"{level_db(side.samples):.1f} dB" if side.samples.any() else "silent"


def _scores_text(scores: Scores) -> str:
    shown = [name for name in ("pesq_wb", "sim", "stoi", "mos", "level_change") if name in scores.values]
    return "   ".join(METRICS[name].named(scores.values[name]) for name in shown)
