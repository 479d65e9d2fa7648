"""``Recording``: samples that several metrics look at, each at the sample rate it needs; and how two are aligned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_tokenizer.audio.loading import load_samples, measure_samples
from batch_tokenizer.audio.reader import AudioTooLong
from batch_tokenizer.audio.resampling import Resampler, resample
from batch_tokenizer.records import AudioCut, RowError

#: Longer recordings are scored on their first seconds. The row says how many.
MOST_SECONDS = 120.0

#: Seconds by which two recordings of one utterance may differ in length: a codec rounds up to whole frames.
LENGTH_TOLERANCE = 0.5

#: Root mean square, relative to full scale, below which a recording counts as silent: -80 dB.
SILENT_LEVEL = 1e-4


@dataclass(frozen=True)
class Recording:
    """One side of a comparison.

    Attributes:
        samples: float32 (S,), finite.
        sample_rate: Hz.
    """

    samples: npt.NDArray[np.float32]
    sample_rate: int
    _derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def seconds(self) -> float:
        """Duration."""
        return len(self.samples) / self.sample_rate

    @property
    def is_silent(self) -> bool:
        """Whether there is nothing to hear."""
        return (
            len(self.samples) == 0 or float(np.sqrt(np.mean(np.square(self.samples, dtype=np.float64)))) < SILENT_LEVEL
        )

    def at(self, sample_rate: int) -> npt.NDArray[np.float32]:
        """The samples at ``sample_rate`` Hz."""
        if sample_rate == self.sample_rate:
            return self.samples
        return self.derived(
            f"{sample_rate} Hz", lambda: resample(self.samples[None], self.sample_rate, sample_rate, "soxr")[0]
        )

    def derived(self, name: str, compute: Callable[[], Any]) -> Any:
        """What ``compute`` makes of this recording, made once: an original is compared with several reconstructions."""
        if name not in self._derived:
            self._derived[name] = compute()
        return self._derived[name]


def load_beginning(
    path: str, sample_rate: int, resampler: Resampler, cut: AudioCut | None = None
) -> tuple[npt.NDArray[np.float32], int]:
    """Samples as ``load_samples`` has them, of a long recording the first ``MOST_SECONDS``; and how many all are.

    Raises:
        RowError: see ``load_samples``.
    """
    most = int(MOST_SECONDS * sample_rate)
    try:
        samples = load_samples(path, sample_rate, resampler, cut=cut, max_samples=most)
        return samples, len(samples)
    except AudioTooLong:
        whole = cut or AudioCut()
        beginning = replace(whole, end=whole.start + MOST_SECONDS)
        samples = load_samples(path, sample_rate, resampler, cut=beginning)
        return samples, measure_samples(path, sample_rate, resampler, cut=cut)


def align(
    original: npt.NDArray[np.float32],
    reconstructions: Sequence[npt.NDArray[np.float32]],
    sample_rate: int,
    lengths: Sequence[int] | None = None,
) -> tuple[Recording, list[Recording]]:
    """Recordings of equal length, from samples (S_i,) at ``sample_rate`` Hz that begin together.

    Args:
        lengths: samples of the original and of each reconstruction, where not all of them are given.

    Raises:
        RowError: a reconstruction is empty, has samples that are no numbers, or its length is another utterance's.
    """
    whole, *others = lengths or [len(original), *map(len, reconstructions)]
    for samples, other in zip(reconstructions, others, strict=True):
        difference = (other - whole) / sample_rate
        if len(samples) == 0:
            raise RowError("decode", "the reconstruction has no samples")
        if not np.isfinite(samples).all():
            raise RowError("decode", "the reconstruction has samples that are NaN or infinite")
        if abs(difference) > LENGTH_TOLERANCE:
            raise RowError(
                "decode",
                f"the reconstruction lasts {other / sample_rate:.2f} s, the original "
                f"{whole / sample_rate:.2f} s: another utterance, or another sample rate",
            )
    length = min(len(original), *map(len, reconstructions), int(MOST_SECONDS * sample_rate))
    return Recording(original[:length], sample_rate), [
        Recording(made[:length], sample_rate) for made in reconstructions
    ]
