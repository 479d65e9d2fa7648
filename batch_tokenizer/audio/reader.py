"""Parts of audio files: a path enters, float32 samples (channels, n) of a stretch of it leave, and no more is held.

The samples of a part are those of the whole decoded file (``decode_audio``), to the bit. libsndfile seeks exactly in
every format but mp3, where the first samples after a seek depend on frames that were skipped; FFmpeg does in containers
that count samples, such as m4a, when it begins some frames early. All else is decoded from the beginning, and what
lies before the part is dropped; such a file stays open, so that parts of it that are read one after the other take
one decoding in all.
"""

from __future__ import annotations

import os
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
from batch_tokenizer.audio.resampling import Piece
from batch_tokenizer.records import RowError

#: Samples that libsndfile decodes at a time.
_BLOCK = 1 << 18

#: Samples that FFmpeg decodes ahead of a part: what an AAC frame takes over from those before it, amply.
_WARM_UP = 1 << 14


class _Behind(Exception):
    """The part that is asked for was passed already."""


class AudioReader(ABC):
    """An open file, of which a part is read. Made by ``open_audio``.

    Attributes:
        header: what the file says of itself.
        seeks: whether any part can be read at any time. Otherwise parts must follow each other.
    """

    def __init__(self, name: str, header: AudioHeader, seeks: bool) -> None:
        self._name = name
        self.header = header
        self.seeks = seeks
        self._rest = self._decode(0, None)
        self._recent: deque[tuple[int, Samples]] = deque()

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
            wanted = block if channel is None else block[channel : channel + 1]
            wanted = wanted[:, max(0, start - position) : None if stop is None else max(0, stop - position)]
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

    def _blocks(self, start: int, stop: int | None) -> Iterator[tuple[int, Samples]]:
        """As ``_decode``, which is called once only where it cannot seek."""
        if self.seeks:
            yield from self._decode(start, stop)
            return
        if self._recent and start < self._recent[0][0]:
            raise _Behind
        yield from tuple(self._recent)
        for position, block in self._rest:
            self._recent.append((position, block))
            while len(self._recent) > 1 and self._recent[1][0] < position - _WARM_UP:
                self._recent.popleft()
            yield position, block

    @abstractmethod
    def _decode(self, start: int, stop: int | None) -> Iterator[tuple[int, Samples]]:
        """Positions and samples (channels, n) one after the other, from ``start`` or before it, to ``stop`` or behind
        it, or to the end."""


def read_piece(path: str, plan: Callable[[AudioHeader], Piece], channel: int | None = None) -> tuple[Samples, Piece]:
    """The samples that a piece of a file is made from, and the piece, which its header decides.

    Raises:
        RowError: as ``AudioReader.read``, or that ``plan`` raises.
    """
    try:
        with _opened_or_kept(path) as audio:
            piece = plan(audio.header)
            return audio.read(piece.start, piece.stop, channel), piece
    except _Behind:  # of a file that was kept open, and now is not
        return read_piece(path, plan, channel)


class _Kept(threading.local):
    """The file that a thread has read a part of, where it does not seek."""

    identity: object = None
    reader: AudioReader | None = None
    closing: ExitStack | None = None


_kept = _Kept()


@contextmanager
def open_audio(path: str) -> Iterator[AudioReader]:
    """The file's reader, at its beginning.

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


@contextmanager
def _opened_or_kept(path: str) -> Iterator[AudioReader]:
    """As ``open_audio``; a file that does not seek is kept for the next call."""
    identity = _identity(path)
    reader, closing = _kept.reader, _kept.closing
    if reader is None or closing is None or identity is None or _kept.identity != identity:
        if closing is not None:
            closing.close()
        _kept.identity = _kept.reader = _kept.closing = None
        closing = ExitStack()
        reader = closing.enter_context(open_audio(path))
    _kept.identity = _kept.reader = _kept.closing = None
    try:
        yield reader
    except BaseException:
        # What opened the file has the words for what its decoder raises.
        if not closing.__exit__(*sys.exc_info()):
            raise
    else:
        if reader.seeks or identity is None:
            closing.close()
        else:
            _kept.identity, _kept.reader, _kept.closing = identity, reader, closing


def _identity(path: str) -> object:
    """What stays the same as long as a file does; None for what is no plain file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class _LibsndfileReader(AudioReader):
    def __init__(self, name: str, file: soundfile.SoundFile) -> None:
        super().__init__(name, AudioHeader(file.frames, file.samplerate, file.channels), file.format != "MP3")
        self._file = file

    def length(self) -> int:
        return super().length() if self._file.format == "MP3" else self._file.frames

    def _decode(self, start: int, stop: int | None) -> Iterator[tuple[int, Samples]]:
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
        # Time stamps can be relied upon where they count samples, and where the container has an index.
        seeks = header.frames is not None and stream.time_base == Fraction(1, header.sample_rate)
        super().__init__(name, header, seeks)
        self._container = container
        self._stream = stream

    def _decode(self, start: int, stop: int | None) -> Iterator[tuple[int, Samples]]:
        stream, rate = self._stream, self.header.sample_rate
        stream.codec_context.thread_count = 1
        origin = stream.start_time or 0
        begin = start - _WARM_UP
        seeks = self.seeks and begin > _WARM_UP
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
