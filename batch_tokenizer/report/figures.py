"""Figures for the page: inline ``<svg>`` that reads on a light and on a dark ground; and the picture of ``inspect``.

matplotlib draws in one ink that is then replaced by ``currentColor``, so that axes and words take the colour of the
text around them; marks are in middle tones. Words stay words: a screen reader finds them, and they scale.
"""

from __future__ import annotations

import html
import io
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_tokenizer.quality.codebooks import bit_rate
from batch_tokenizer.quality.metrics import METRICS, Scores, level_db, mel_db
from batch_tokenizer.quality.recordings import Recording
from batch_tokenizer.records import RunError
from batch_tokenizer.storage.atomic import os_error_ends_run

#: Stands for the page's text colour until the figure is finished; no mark has it.
_INK = "#010203"

BLUE, ORANGE, GREEN, PURPLE, GREY = "#3987c9", "#d97f2c", "#3f9c6b", "#9a6fc4", "#8a8f98"
_CYCLE = (BLUE, ORANGE, GREEN, PURPLE, GREY)

#: dB of mel magnitude between which spectrograms are coloured.
_MEL_RANGE = (-80.0, 20.0)

#: Codebooks that are drawn large: the codes of later ones follow nothing that an eye could see.
_LARGE_CODEBOOKS = 3

#: Change of level in dB from which the picture names it.
_LEVEL_CHANGE = 3.0


def figure(title: str, width: float, height: float, draw: Callable[[Any], None]) -> str:
    """An ``<svg>`` of ``width`` by ``height`` inches at most.

    Args:
        title: what it shows, for those who cannot see it.
        draw: draws into an axes, or into a figure if it takes several: it is given the figure.

    Raises:
        RunError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from cycler import cycler
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RunError("report needs matplotlib: pip install 'batch_tokenizer[report]'") from error
    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif", "font.size": 9,
        "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
        "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9, "axes.titlelocation": "left",
        "axes.prop_cycle": cycler(color=list(_CYCLE)), "legend.frameon": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        drawing = Figure(figsize=(width, height), layout="constrained")
        draw(drawing)
        stream = io.StringIO()
        drawing.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(stream.getvalue(), title)


def _inline(svg: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Names must be unique on a page that has many figures; those of groups refer to nothing.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    prefix = f"f{_number(title):x}"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    svg = svg.replace(_INK, "currentColor").replace("'DejaVu Sans', ", "")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])  # type: ignore[index]
    label = html.escape(title)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}" style="width:{width * 4 / 3:.0f}px"', 1)


def _number(text: str) -> int:
    """The same number for the same text in every process."""
    return zlib.crc32(text.encode())


def histogram(title: str, values: npt.ArrayLike, label: str, *, color: str = BLUE, width: float = 4.4) -> str:
    """How often values occur; the mean is marked."""
    numbers = np.asarray(values, np.float64)

    def draw(drawing: Any) -> None:
        axes = drawing.subplots()
        spread = float(np.ptp(numbers)) > 0
        axes.hist(numbers, bins=min(40, max(8, int(np.sqrt(len(numbers)) * 2))) if spread else 1, color=color)
        axes.axvline(float(numbers.mean()), color=_INK, linewidth=1, linestyle=":")
        axes.set_title(f"mean {numbers.mean():.4g}, median {np.median(numbers):.4g}, n = {len(numbers):,}")
        axes.set_xlabel(label)
        axes.set_ylabel("utterances")
        axes.yaxis.get_major_locator().set_params(integer=True)

    return figure(title, width, 2.4, draw)


def bars(title: str, values: Mapping[str, float], label: str, *, limits: Mapping[str, float] | None = None) -> str:
    """A horizontal bar each, with its number; ``limits`` are drawn behind as what could be."""
    names = list(values)
    places = range(len(names))

    def draw(drawing: Any) -> None:
        axes = drawing.subplots()
        if limits is not None:
            axes.barh(places, [limits[name] for name in names], color=GREY, alpha=0.25)
        drawn = axes.barh(places, [values[name] for name in names], color=BLUE)
        axes.set_yticks(places, names)
        axes.bar_label(drawn, fmt="{:,.4g}", padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.margins(x=0.15)

    return figure(title, 4.6, 0.7 + 0.27 * max(1, len(names)), draw)


def lines(title: str, series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """A line each through its points."""

    def draw(drawing: Any) -> None:
        axes = drawing.subplots()
        for name, points in series.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_ylim(bottom=0)
        if 1 < len(series) <= 10:
            axes.legend(fontsize=8)

    return figure(title, 4.6, 2.8, draw)


def recording(title: str, sound: Recording, *, peak: float) -> str:
    """Waveform above, mel spectrogram below, on one time axis.

    Args:
        peak: amplitude at which the waveform's axis ends, the same for recordings that are compared.
    """
    mel = mel_db(sound)
    step = max(1, mel.shape[1] // 700)
    mel = mel[:, : mel.shape[1] // step * step].reshape(len(mel), -1, step).mean(axis=2)

    def draw(drawing: Any) -> None:
        above, below = drawing.subplots(2, 1, sharex=True, height_ratios=[1, 2])
        draw_waveform(above, sound, peak)
        above.spines[["left", "bottom"]].set_visible(False)
        above.tick_params(bottom=False)
        draw_mel(below, mel, sound)
        below.set_xlabel("seconds")

    return figure(title, 4.6, 2.6, draw)


def draw_waveform(axes: Any, sound: Recording, peak: float) -> None:
    """The least and the greatest sample of each of 500 parts of a recording; ``peak`` as in ``recording``."""
    samples = sound.samples
    edges = np.linspace(0, len(samples), min(500, len(samples)) + 1).astype(int)[:-1]
    low, high = np.minimum.reduceat(samples, edges), np.maximum.reduceat(samples, edges)
    axes.fill_between(edges / sound.sample_rate, low, high, color=BLUE, linewidth=0.4)
    axes.set_ylim(-peak, peak)
    axes.set_yticks([])


def draw_mel(axes: Any, mel: npt.NDArray[np.float32], sound: Recording) -> None:
    """The mel spectrogram (bands, frames) of a recording in dB as an image in matplotlib's axes, labelled in Hz."""
    axes.imshow(
        mel, origin="lower", aspect="auto", cmap="magma", vmin=_MEL_RANGE[0], vmax=_MEL_RANGE[1],
        extent=(0, sound.seconds, 0, len(mel)), interpolation="nearest",
    )  # fmt: skip
    # Bands are centred at even distances of mel, 2595 log10(1 + f / 700) (O'Shaughnessy 1987), inside both ends.
    highest = sound.sample_rate / 2
    shown = [hertz for hertz in (500, 1000, 2000, 4000, 8000, 16000) if hertz < highest]
    places = np.log1p(np.array(shown) / 700) / np.log1p(highest / 700) * (len(mel) + 1) - 0.5
    axes.set_yticks(places, [f"{hertz // 1000} k" if hertz >= 1000 else str(hertz) for hertz in shown])
    axes.set_ylabel("Hz")


def draw_codes(axes: Any, codes: npt.NDArray[np.uint16], sizes: Sequence[int], frame_rate: float, first: int) -> None:
    """Codes (T, K) as an image in matplotlib's axes: time to the right, codebooks upward, each code by its place.

    Args:
        sizes: of these codebooks.
        first: number of the first of them, from 1.
    """
    share = codes.T / np.maximum(1, np.array(sizes)[:, None] - 1)
    axes.imshow(
        share, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest",
        extent=(0, len(codes) / frame_rate, first - 0.5, first + codes.shape[1] - 0.5),
    )  # fmt: skip
    axes.set_yticks(sorted({first, first + codes.shape[1] - 1} | (set(range(1, 4)) if first == 1 else set())))


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
