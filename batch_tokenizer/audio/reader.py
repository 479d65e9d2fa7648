"""``AudioReader``: an open audio file, of which all samples or a part are decoded. One subclass for each decoder.

The samples of a part are those of the whole decoded file, to the bit. That takes more than a seek: most decoders carry
state from frame to frame, some of it random. A reader therefore seeks only where a format is known to allow it; all
else is decoded from the beginning, and what lies before the part is dropped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batch_tokenizer.records import AudioCut, RowError

#: Hz. Outside of these a header is damaged: no recording is made at such rates, and resampling would explode or vanish.
LOWEST_SAMPLE_RATE, HIGHEST_SAMPLE_RATE = 100, 1_000_000

#: No codec packs more samples of one channel than this into a byte on average, not even digital silence (flac: 4,400).
_MOST_SAMPLES_PER_BYTE = 10_000

#: Samples before the place that was read last that a reader which does not seek can still go back to.
_KEPT_SAMPLES = 5 << 17

Samples = npt.NDArray[np.float32]

#: The position of a block in the file's audio, and its samples (channels, n).
Block = tuple[int, Samples]


class AudioTooLong(RowError):
    """There is more audio than the caller takes."""


class AlreadyPassed(Exception):
    """A reader that does not seek is asked for samples that it has passed and dropped."""


@dataclass(frozen=True, slots=True)
class AudioHeader:
    """What a file says of itself.

    Attributes:
        frames: samples per channel, or None where the header does not say (or says it so roughly that it misleads).
        sample_rate: Hz.
        channels: at least 1.
        exact: whether decoding yields just that many frames, where the file is not damaged.
    """

    frames: int | None
    sample_rate: int
    channels: int
    exact: bool = False

    def seconds(self, cut: AudioCut | None = None) -> float | None:
        """Length of the file, or of the part that ``cut`` names; None where the header does not say."""
        if cut is not None and cut.end is not None:
            return cut.end - cut.start
        if self.frames is None:
            return None
        return max(0.0, self.frames / self.sample_rate - (0.0 if cut is None else cut.start))


def check_sample_rate(name: str, sample_rate: int) -> None:
    """
    Raises:
        RowError: no recording has this rate.
    """
    if not LOWEST_SAMPLE_RATE <= sample_rate <= HIGHEST_SAMPLE_RATE:
        raise RowError("load", f"{name}: sample rate of {sample_rate} Hz; the header is damaged")


def check_plausible(name: str, frames: int, size: int) -> None:
    """
    Raises:
        RowError: so many samples do not fit into a file of ``size`` bytes.
    """
    if frames > _MOST_SAMPLES_PER_BYTE * size:
        raise RowError("load", f"{name}: its header promises {frames} samples, which {size} bytes cannot hold")


def check_length(name: str, frames: int, sample_rate: int, max_seconds: float | None) -> None:
    """
    Raises:
        AudioTooLong: so many samples are more than ``max_seconds``.
    """
    # Half a sample of slack, so that a limit which is not a whole number of samples does not refuse the last one.
    if max_seconds is not None and frames > max_seconds * sample_rate + 0.5:
        raise AudioTooLong(
            "load", f"{name}: too long, at least {frames / sample_rate:.2f} s where {max_seconds:.2f} s is the most"
        )


def check_finite(name: str, samples: Samples) -> None:
    """
    Raises:
        RowError: a sample is NaN or infinite.
    """
    if not np.isfinite(samples).all():
        raise RowError("load", f"{name}: NaN or infinite samples")


class AudioReader(ABC):
    """An open file. Made by ``decoding.open_audio``.

    Attributes:
        name: for messages.
        header: what the file says of itself.
        seeks: whether any part can be read at any time. Otherwise parts must follow each other.
    """

    def __init__(self, name: str, header: AudioHeader, seeks: bool) -> None:
        self.name = name
        self.header = header
        self.seeks = seeks
        self._rest: Iterator[Block] | None = None
        self._recent: deque[Block] = deque()

    @abstractmethod
    def _decode(self, start: int, stop: int | None) -> Iterator[Block]:
        """Blocks one after the other, from ``start`` or before it, to ``stop`` or behind it, or to the end.

        Raises (while iterating):
            RowError: the audio is damaged.
        """

    def decode_all(self, max_seconds: float | None = None) -> Samples:
        """All samples, float32 (channels, S), contiguous and finite. For a reader that nothing was read from.

        Raises:
            RowError: they cannot be decoded, or there are none.
            AudioTooLong: they are longer than ``max_seconds``.
        """
        blocks: list[Samples] = []
        decoded = 0
        for _, block in self._decode(0, None):
            decoded += block.shape[1]
            check_length(self.name, decoded, self.header.sample_rate, max_seconds)
            blocks.append(block)
        if not decoded:
            raise RowError("load", f"{self.name}: no samples")
        samples = np.concatenate(blocks, axis=1)
        check_finite(self.name, samples)
        return samples

    def read(self, start: int, stop: int | None = None, channel: int | None = None) -> Samples:
        """Samples ``start`` up to ``stop``, or as far as there are any; ``stop`` None is the end.

        Args:
            channel: the only one to return, counted from 0; None returns all.

        Returns:
            float32 (channels, n), contiguous and finite.

        Raises:
            RowError: they cannot be decoded, or there is no such channel.
            AlreadyPassed: the reader does not seek, and was read from behind ``start`` already.
        """
        channels = self.header.channels
        if channel is not None and channel >= channels:
            raise RowError("load", f"{self.name}: has {channels} channels, so none with number {channel} from 0")
        kept = []
        for position, block in self._blocks(start, stop):
            wanted = block if channel is None else block[channel : channel + 1]
            wanted = wanted[:, max(0, start - position) : None if stop is None else max(0, stop - position)]
            if wanted.shape[1]:
                kept.append(wanted)
            if stop is not None and position + block.shape[1] >= stop:
                break
        if not kept:
            return np.empty((channels if channel is None else 1, 0), np.float32)
        samples = np.ascontiguousarray(kept[0]) if len(kept) == 1 else np.concatenate(kept, axis=1)
        check_finite(self.name, samples)
        return samples

    def length(self) -> int:
        """Samples of each channel that decoding yields. Decodes all of the file unless the header is exact."""
        if self.header.exact and self.header.frames is not None:
            return self.header.frames
        first = self._recent[0][0] if self._recent else 0
        return max((position + block.shape[1] for position, block in self._blocks(first, None)), default=0)

    def length_up_to(self, most: int) -> int | None:
        """The length where it is at most ``most``; None where the file is longer.

        Args:
            most: less than a reader that does not seek can go back.
        """
        if self.header.exact:
            length = self.header.frames
        elif self.seeks and (self.header.frames or 0) > 2 * most:
            length = None  # no header is that wrong
        elif self._recent and self._recent[0][0] > 0:
            length = None  # so much was passed already
        else:
            length = 0
            for position, block in self._blocks(0, most + 1):
                length = position + block.shape[1]
                if length > most:
                    return None
        return None if length is None or length > most else length

    def _blocks(self, start: int, stop: int | None) -> Iterator[Block]:
        """As ``_decode``; a reader that does not seek goes on from its position, after the blocks it still has."""
        if self.seeks:
            yield from self._decode(start, stop)
            return
        if self._recent and start < self._recent[0][0]:
            raise AlreadyPassed
        yield from tuple(self._recent)
        if self._rest is None:
            self._rest = self._decode(0, None)
        for position, block in self._rest:
            self._recent.append((position, block))
            while len(self._recent) > 1 and self._recent[1][0] + _KEPT_SAMPLES < position:
                self._recent.popleft()
            yield position, block
