"""Audio read by FFmpeg, through PyAV: all that libsndfile cannot open, such as m4a, aac, webm and video, or that it
would not read whole.

Opus is decoded by libopus, as libsndfile and the published models' loaders do, and not by FFmpeg's own decoder, whose
samples differ as much as another bit rate's. Parts are read after a seek where a codec has no state from frame to frame
and time stamps count samples. AAC and AC-3 have such state, part of it random, so they are decoded from the beginning.

A file is untrusted input: FFmpeg may not open anything else on its behalf (playlists name files and hosts).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from batch_tokenizer.audio.reader import AudioHeader, AudioReader, Block, Samples, check_sample_rate
from batch_tokenizer.records import RowError, first_line

if TYPE_CHECKING:
    import av

#: Integer sample formats of FFmpeg: what full scale is, and where zero is.
_INTEGER_SCALE: dict[str, tuple[float, float]] = {
    "u8": (2.0**7, 2.0**7),
    "s16": (2.0**15, 0.0),
    "s32": (2.0**31, 0.0),
    "s64": (2.0**63, 0.0),
}

#: Samples that are decoded before a part, as seeks end at a packet's beginning.
_WARM_UP = 1 << 14


@contextmanager
def open_with_ffmpeg(
    file: BinaryIO, name: str, *, stream: int | None = None, libsndfile_error: str | None = None, one_link: bool = True
) -> Iterator[FFmpegReader]:
    """The reader of an audio stream. What FFmpeg raises in the body becomes a ``RowError`` too.

    Args:
        stream: the number of the audio stream, from 0; None for the one that FFmpeg plays by default.
        libsndfile_error: why libsndfile did not open it, for messages.
        one_link: it is not a chain of several recordings, so that its time stamps have no gaps.

    Raises:
        RowError: it is no audio, or damaged.
    """
    import av

    def causes(error: Exception) -> str:
        ffmpeg_error = getattr(error, "strerror", None) or first_line(error)
        return f"libsndfile: {libsndfile_error}; FFmpeg: {ffmpeg_error}" if libsndfile_error else ffmpeg_error

    file.seek(0)
    try:
        container = av.open(_Input(file), mode="r", metadata_errors="replace", options={"protocol_whitelist": "none"})
    except (av.FFmpegError, OSError, ValueError) as error:
        what = "not audio, or its header is damaged or cut short"
        raise RowError("load", f"{name}: {what} ({causes(error)})") from error
    with container:
        chosen = _choose_stream(container, name, stream)
        if chosen.codec_context is None:
            raise RowError("load", f"{name}: no decoder for its audio ({container.format.name})")
        try:
            header = _header(chosen, name, libsndfile_error)
            yield FFmpegReader(name, container, chosen, header, one_link=one_link)
        except (av.FFmpegError, OSError) as error:
            raise RowError("load", f"{name}: damaged or cut short ({causes(error)})") from error


class _Input:
    """What FFmpeg reads a file through. Places that a damaged header makes up are refused by an error code, as an
    exception would be printed by PyAV."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.read = file.read
        self.tell = file.tell

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError, OverflowError):
            return -errno.EINVAL


def _choose_stream(container: Any, name: str, stream: int | None) -> Any:
    streams = container.streams.audio
    if not streams:
        raise RowError("load", f"{name}: no audio in it ({container.format.name}), or its header is damaged")
    if stream is None:
        # As the command ffmpeg does: one that is marked as default, then the one with most channels, then the first.
        return max(streams, key=_preference)
    if stream >= len(streams):
        raise RowError("load", f"{name}: has {len(streams)} audio streams, so none with number {stream} from 0")
    return streams[stream]


def _preference(stream: Any) -> tuple[bool, bool, int]:
    context = stream.codec_context
    can_decode = context is not None
    is_default = bool(stream.disposition & type(stream.disposition).default)
    return can_decode, is_default, context.channels if can_decode else 0


def _header(stream: av.AudioStream, name: str, libsndfile_error: str | None) -> AudioHeader:
    sample_rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
    check_sample_rate(name, sample_rate)
    if channels == 0:
        raise RowError("load", f"{name}: its header is damaged ({libsndfile_error or 'no channels'})")
    frames = None
    # Durations of raw streams are guesses from the bit rate. Indexed containers, which count their packets, know.
    if stream.frames and stream.duration is not None and stream.time_base is not None:
        frames = round(stream.duration * stream.time_base * sample_rate)
    return AudioHeader(frames, sample_rate, channels)


class FFmpegReader(AudioReader):
    """A file that FFmpeg has opened."""

    def __init__(self, name: str, container: Any, stream: Any, header: AudioHeader, *, one_link: bool) -> None:
        codec = stream.codec_context.name
        is_stateless = codec.startswith("pcm_") or codec == "alac"
        seeks = is_stateless and header.frames is not None and stream.time_base == Fraction(1, header.sample_rate)
        stream.codec_context.thread_count = 1
        self._container = container
        self._stream = stream
        self._was_read = False
        # The pages of ogg state positions, so that a lost page shows.
        self._has_positions = container.format.name == "ogg" and codec == "opus" and one_link
        super().__init__(name, header, seeks)

    def _decode(self, start: int, stop: int | None) -> Iterator[Block]:
        stream, rate = self._stream, self.header.sample_rate
        origin = stream.start_time or 0
        has_sought = self.seeks and (self._was_read or start > 2 * _WARM_UP)
        if has_sought:
            self._container.seek(origin + max(0, start - _WARM_UP), stream=stream, backward=True)
        self._was_read = True
        # After a seek the first frame's time stamp says where it landed; without one, positions are counted.
        position = 0
        for frame in self._frames():
            block = _float_samples(frame, self.name)
            if has_sought:
                if frame.pts is None:
                    raise RowError("load", f"{self.name}: its frames have no time, so no part of it can be found")
                position, has_sought = frame.pts - origin, False
            if frame.sample_rate != rate or len(block) != self.header.channels:
                raise RowError("load", f"{self.name}: its sample rate or number of channels changes part-way")
            yield position, block
            position += block.shape[1]

    def _frames(self) -> Iterator[av.AudioFrame]:
        if self._stream.codec_context.name != "opus":
            yield from self._container.decode(self._stream)
            return
        decoder = _opus_decoder(self._stream)
        expected: int | None = None
        for packet in self._container.demux(self._stream):
            if self._has_positions and packet.pts is not None:
                if expected is not None and packet.pts != expected:
                    missing = float((packet.pts - expected) * packet.time_base)
                    raise RowError("load", f"{self.name}: damaged or cut short, {missing:.2f} s are missing inside")
                expected = packet.pts + (packet.duration or 0)
            # The last packet is empty: the decoder gives what it still has.
            yield from decoder.decode(packet if packet.size else None)


def _opus_decoder(stream: Any) -> Any:
    import av

    own = stream.codec_context
    if "libopus" not in av.codecs_available:  # a build of PyAV without it
        return own
    decoder = av.CodecContext.create("libopus", "r")
    decoder.extradata = own.extradata
    decoder.layout = own.layout
    decoder.sample_rate = own.sample_rate
    decoder.options = {"request_sample_fmt": "flt"}
    return decoder


def _float_samples(frame: av.AudioFrame, name: str) -> Samples:
    """One of FFmpeg's frames, whatever its type and layout, as float32 (channels, samples) that own their memory."""
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(frame.samples, -1).T
    kind = frame.format.name.removesuffix("p")
    if kind in ("flt", "dbl"):
        return np.array(values, np.float32, order="C")
    if kind not in _INTEGER_SCALE:
        raise RowError("load", f"{name}: unknown sample format {frame.format.name}")
    full_scale, zero = _INTEGER_SCALE[kind]
    return ((values.astype(np.float64) - zero) / full_scale).astype(np.float32, order="C")
