"""Parts of audio files: a path enters, float32 samples (channels, n) of a stretch of it leave, and no more is held.

The samples of a part are those of the whole decoded file (``decode_audio``), to the bit. libsndfile seeks exactly in
every format but mp3, where the first samples after a seek depend on frames that were skipped; FFmpeg does in containers
that count samples, such as m4a, when it begins some frames early. All else is decoded from the beginning, and what
lies before the part is dropped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import soundfile

from batch_tokenizer.audio.decoding import (
    MP3_TOLERANCE,
    AudioHeader,
    Samples,
    check_finite,
    check_plausible,
    check_sample_rate,
    ffmpeg_header,
    float_samples,
    is_cut_short_by_libsndfile,
    libsndfile_cause,
    open_regular,
    open_with_ffmpeg,
    printable_path,
)
from batch_tokenizer.records import RowError

#: Samples that libsndfile decodes at a time.
_BLOCK = 1 << 18

#: Samples that FFmpeg decodes ahead of a part: what an AAC frame takes over from those before it, amply.
_WARM_UP = 1 << 14


class AudioReader(ABC):
    """An open file, of which one part is read. Made by ``open_audio``.

    Attributes:
        header: what the file says of itself.
    """

    def __init__(self, name: str, header: AudioHeader) -> None:
        self._name = name
        self.header = header

    def read(self, start: int, stop: int | None = None, channel: int | None = None) -> Samples:
        """Samples ``start`` up to ``stop``, or as far as there are any; ``stop`` None is the end.

        Args:
            channel: the only one to return, counted from 0; None returns all.

        Returns:
            float32 (channels, n), contiguous and finite.

        Raises:
            RowError: they cannot be decoded, or there is no such channel.
        """
        channels = self.header.channels
        if channel is not None and channel >= channels:
            raise RowError("load", f"{self._name}: has {channels} channels, so none with number {channel} from 0")
        kept = []
        for position, block in self._blocks(start, stop):
            if stop is not None and position >= stop:
                break
            wanted = block if channel is None else block[channel : channel + 1]
            wanted = wanted[:, max(0, start - position) : None if stop is None else stop - position]
            if wanted.shape[1]:
                kept.append(wanted)
            if stop is not None and position + block.shape[1] >= stop:
                break
        if not kept:
            return np.empty((channels if channel is None else 1, 0), np.float32)
        samples = np.ascontiguousarray(kept[0]) if len(kept) == 1 else np.concatenate(kept, axis=1)
        check_finite(self._name, samples)
        return samples

    def length(self) -> int:
        """Samples of each channel that decoding yields. Decodes as much of the file as it takes to be sure."""
        end = 0
        for position, block in self._blocks(max(0, (self.header.frames or 0) - _WARM_UP), None):
            end = position + block.shape[1]
        return end

    @abstractmethod
    def _blocks(self, start: int, stop: int | None) -> Iterator[tuple[int, Samples]]:
        """Positions and samples (channels, n) one after the other, from ``start`` or before it, to ``stop`` or behind
        it, or to the end."""


@contextmanager
def open_audio(path: str) -> Iterator[AudioReader]:
    """The file's reader.

    Raises:
        RowError: as ``probe_audio``.
    """
    name = printable_path(path)
    with open_regular(path, name) as (descriptor, size):
        libsndfile_said = None
        try:
            file = soundfile.SoundFile(descriptor, closefd=False)
        except soundfile.LibsndfileError as error:
            libsndfile_said = libsndfile_cause(error)
        else:
            with file:
                if not is_cut_short_by_libsndfile(file, descriptor, size):
                    check_sample_rate(name, file.samplerate)
                    check_plausible(name, file.frames, size)
                    yield _LibsndfileReader(name, file)
                    return
        with open_with_ffmpeg(descriptor, name, libsndfile_said) as (container, stream):
            yield _FFmpegReader(name, container, stream, ffmpeg_header(stream, name, libsndfile_said))


class _LibsndfileReader(AudioReader):
    def __init__(self, name: str, file: soundfile.SoundFile) -> None:
        super().__init__(name, AudioHeader(file.frames, file.samplerate, file.channels))
        self._file = file

    def length(self) -> int:
        return super().length() if self._file.format == "MP3" else self._file.frames

    def _blocks(self, start: int, stop: int | None) -> Iterator[tuple[int, Samples]]:
        file, promised = self._file, self._file.frames
        end = promised if stop is None else min(stop, promised)
        position = 0
        try:
            if file.format != "MP3":
                position = min(start, promised)
                file.seek(position)
            while position < end:
                block = file.read(min(_BLOCK, end - position), dtype="float32", always_2d=True)
                if not len(block):
                    break
                yield position, block.T
                position += len(block)
        except soundfile.LibsndfileError as error:
            raise RowError("load", f"{self._name}: damaged or cut short ({libsndfile_cause(error)})") from error
        tolerance = MP3_TOLERANCE if file.format == "MP3" else 0
        if position < end - tolerance:
            raise RowError("load", f"{self._name}: damaged or cut short, {position} of {promised} samples decode")


class _FFmpegReader(AudioReader):
    def __init__(self, name: str, container: Any, stream: Any, header: AudioHeader) -> None:
        super().__init__(name, header)
        self._container = container
        self._stream = stream

    def _blocks(self, start: int, stop: int | None) -> Iterator[tuple[int, Samples]]:
        stream, rate = self._stream, self.header.sample_rate
        stream.codec_context.thread_count = 1
        # Time stamps in samples, of a stream whose container has an index: those can be relied upon.
        counts_samples = self.header.frames is not None and stream.time_base == Fraction(1, rate)
        origin = stream.start_time or 0
        begin = start - _WARM_UP
        seeks = counts_samples and begin > _WARM_UP
        if seeks:
            self._container.seek(origin + begin, stream=stream, backward=True)
        position = 0
        for index, frame in enumerate(self._container.decode(stream)):
            block = float_samples(frame, self._name)
            if index == 0 and seeks:
                position = frame.pts - origin
            if frame.sample_rate != rate or len(block) != self.header.channels:
                raise RowError("load", f"{self._name}: its sample rate or number of channels changes part-way")
            yield position, block
            position += block.shape[1]
