"""Files to samples: a path enters, float32 samples (channels, S) at the file's own rate leave, or one ``RowError``.

libsndfile comes first, because it is the faster by far. FFmpeg (through PyAV) takes what libsndfile cannot open, such
as m4a, aac, webm and video, and the few files that libsndfile opens but would cut short without a word:

- mp3 without an exact length in its first frame, where libsndfile goes by an estimate and stops there;
- chained ogg, of which libsndfile reads the first link;
- flac that was written to a pipe and so does not know its length.

A file that holds less than its header promises:

- wav and its uncompressed kin yield what is there, since programs that write to a pipe promise too much as a habit;
- so do ogg, webm and other containers cut at the end, which promise nothing;
- flac and mp3 that end early, and any stream in which decoding fails part-way, are failures: audio is missing.

A path may be any location that ``storage`` opens. A file is a stranger: its header's sizes are believed only so far as
its bytes could hold them, and FFmpeg may not open anything else on its behalf (playlists name files and hosts).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile

from batch_tokenizer.records import RowError
from batch_tokenizer.storage.names import spoken
from batch_tokenizer.storage.opening import opened

if TYPE_CHECKING:
    import av

#: Hz. Outside of these a header is damaged: no recording is made at such rates, and resampling would explode or vanish.
LOWEST_SAMPLE_RATE, HIGHEST_SAMPLE_RATE = 100, 1_000_000

#: No codec packs more samples of one channel than this into a byte on average, not even digital silence (flac: 4,400).
_MOST_SAMPLES_PER_BYTE = 10_000

#: libsndfile's number of frames for a stream that does not say.
_UNKNOWN_FRAMES = 2**62

#: Encoders differ by a few MPEG frames of 1,152 samples in what they count as an mp3's length.
MP3_TOLERANCE = 4 * 1152

#: Subtypes of uncompressed files that can hold NaN and infinity.
FLOATING_SUBTYPES = ("FLOAT", "DOUBLE")

#: Integer sample formats of FFmpeg: what full scale is, and where zero is.
_INTEGER_SCALE: dict[str, tuple[float, float]] = {
    "u8": (2.0**7, 2.0**7),
    "s16": (2.0**15, 0.0),
    "s32": (2.0**31, 0.0),
    "s64": (2.0**63, 0.0),
}

Samples = npt.NDArray[np.float32]


class AudioTooLong(RowError):
    """There is more audio than the caller takes."""


@dataclass(frozen=True, slots=True)
class AudioHeader:
    """What a file says of itself.

    Attributes:
        frames: samples per channel, or None where the header does not say (or says it so roughly that it misleads).
        sample_rate: Hz.
        channels: at least 1.
    """

    frames: int | None
    sample_rate: int
    channels: int


def decode_audio(path: str, *, max_seconds: float | None = None) -> tuple[Samples, int]:
    """All of a file's audio.

    Args:
        path: relative to the working directory.
        max_seconds: longest audio to accept; checked before decoding where the header knows, and while decoding.

    Returns:
        Samples (channels, S), S >= 1, float32 and finite; integers are scaled so that full scale is 1. And Hz.

    Raises:
        RowError: there is no such audio, whatever the cause; the reason names the file and the cause.
    """
    name = printable_path(path)
    with open_regular(path, name) as (descriptor, size):
        try:
            file = soundfile.SoundFile(descriptor, closefd=False)
        except soundfile.LibsndfileError as error:
            samples, sample_rate = _decode_with_ffmpeg(descriptor, name, max_seconds, libsndfile_cause(error))
        else:
            with file:
                if is_cut_short_by_libsndfile(file, descriptor, size):
                    samples, sample_rate = _decode_with_ffmpeg(descriptor, name, max_seconds, None)
                else:
                    samples, sample_rate = _decode_with_libsndfile(file, name, size, max_seconds)
    if samples.shape[1] == 0:
        raise RowError("load", f"{name}: no samples")
    return samples, sample_rate


def probe_audio(path: str) -> AudioHeader:
    """What the file's header says, without decoding it.

    Raises:
        RowError: as ``decode_audio``, so far as the header shows it.
    """
    name = printable_path(path)
    with open_regular(path, name) as (descriptor, size):
        try:
            file = soundfile.SoundFile(descriptor, closefd=False)
        except soundfile.LibsndfileError as error:
            return _probe_with_ffmpeg(descriptor, name, libsndfile_cause(error))
        with file:
            if is_cut_short_by_libsndfile(file, descriptor, size):
                return _probe_with_ffmpeg(descriptor, name, None)
            check_sample_rate(name, file.samplerate)
            check_plausible(name, file.frames, size)
            return AudioHeader(file.frames, file.samplerate, file.channels)


def printable_path(path: str) -> str:
    """The path, or other location, as a reason may show it: see ``storage.names.spoken``."""
    return spoken(path)


def open_regular(path: str, name: str) -> AbstractContextManager[tuple[int, int]]:
    """A descriptor and the size in bytes of what lies at a location, if that is not empty."""
    return opened(path)


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


def _check_length(name: str, frames: int, sample_rate: int, max_seconds: float | None) -> None:
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


def _decode_with_libsndfile(
    file: soundfile.SoundFile, name: str, size: int, max_seconds: float | None
) -> tuple[Samples, int]:
    promised, sample_rate = file.frames, file.samplerate
    form, subtype = file.format, file.subtype  # each asks libsndfile
    check_sample_rate(name, sample_rate)
    _check_length(name, promised, sample_rate, max_seconds)
    check_plausible(name, promised, size)
    try:
        if form in ("WAV", "WAVEX") and subtype == "PCM_16":
            # libsndfile copies these as they stand, and numpy scales them several times faster than it; by a power of
            # two, so to the same values.
            integers = file.read(promised, dtype="int16", always_2d=True)
            interleaved = np.multiply(integers, np.float32(2.0**-15), dtype=np.float32)
        else:
            interleaved = file.read(promised, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise RowError("load", f"{name}: damaged or cut short ({libsndfile_cause(error)})") from error
    except MemoryError as error:
        raise RowError(
            "load", f"{name}: not enough memory for {promised} samples x {file.channels} channels"
        ) from error
    tolerance = MP3_TOLERANCE if form == "MP3" else 0
    if len(interleaved) < promised - tolerance:
        raise RowError("load", f"{name}: damaged or cut short, {len(interleaved)} of {promised} samples decode")
    # A reshape, where it will do, gives a single channel the strides of a row; a transpose would not.
    samples = interleaved.reshape(1, -1) if file.channels == 1 else np.ascontiguousarray(interleaved.T)
    if subtype in FLOATING_SUBTYPES:
        check_finite(name, samples)
    return samples, sample_rate


def is_cut_short_by_libsndfile(file: soundfile.SoundFile, descriptor: int, size: int) -> bool:
    """Whether libsndfile would stop before the end of this file."""
    if file.frames >= _UNKNOWN_FRAMES:
        return True
    form = file.format  # asks libsndfile
    if form == "MP3":
        return not _mp3_knows_its_length(descriptor, size)
    return form == "OGG" and _ogg_is_chained(descriptor, size)


def _mp3_knows_its_length(descriptor: int, size: int) -> bool:
    """Whether the first frame is a Xing or Info tag that counts frames and bytes, and the file goes on no further.

    A file that is shorter than its tag says passes: it will be seen to be cut when it is decoded.
    """
    start = 0
    head = os.pread(descriptor, 10, 0)
    if head[:3] == b"ID3" and len(head) == 10:
        # Four bytes of seven bits each.
        start = 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])
    frame = os.pread(descriptor, 256, start)
    tag = max(frame.find(b"Xing"), frame.find(b"Info"))
    if tag < 0 or len(frame) < tag + 16:
        return False
    flags, _, audio_bytes = struct.unpack(">III", frame[tag + 4 : tag + 16])
    # Tags of text and pictures may follow the audio; a second recording is longer than the slack.
    return flags & 3 == 3 and size - start <= 1.01 * audio_bytes + 4096


def _ogg_is_chained(descriptor: int, size: int) -> bool:
    """Whether the last page belongs to another stream than the first."""
    tail = os.pread(descriptor, 1 << 16, max(0, size - (1 << 16)))
    last = tail.rfind(b"OggS")
    serial = slice(14, 18)
    return last >= 0 and len(tail) >= last + 18 and tail[last:][serial] != os.pread(descriptor, 18, 0)[serial]


@contextmanager
def open_with_ffmpeg(descriptor: int, name: str, libsndfile_said: str | None) -> Iterator[tuple[Any, av.AudioStream]]:
    """The container and its first audio stream. Errors of FFmpeg's in the body become a ``RowError`` too."""
    import av

    os.lseek(descriptor, 0, os.SEEK_SET)
    file: BinaryIO
    with open(descriptor, "rb", closefd=False) as file:
        try:
            container = av.open(file, mode="r", metadata_errors="replace", options={"protocol_whitelist": "none"})
        except (av.FFmpegError, ValueError) as error:
            raise RowError(
                "load",
                f"{name}: not audio, or its header is damaged or cut short ({_causes(libsndfile_said, error)})",
            ) from error
        with container:
            if not container.streams.audio:
                raise RowError("load", f"{name}: no audio in it ({container.format.name}), or its header is damaged")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise RowError("load", f"{name}: no decoder for its audio ({container.format.name})")
            try:
                yield container, stream
            except av.FFmpegError as error:
                raise RowError("load", f"{name}: damaged or cut short ({_causes(libsndfile_said, error)})") from error


def libsndfile_cause(error: soundfile.LibsndfileError) -> str:
    """What libsndfile has to say, in a few words."""
    return error.error_string.removeprefix("Error : ").rstrip(".")


def _causes(libsndfile_said: str | None, error: Exception) -> str:
    """What each library had to say, in one line."""
    ffmpeg_said = getattr(error, "strerror", None) or str(error)
    return f"libsndfile: {libsndfile_said}; FFmpeg: {ffmpeg_said}" if libsndfile_said else ffmpeg_said


def _probe_with_ffmpeg(descriptor: int, name: str, libsndfile_said: str | None) -> AudioHeader:
    with open_with_ffmpeg(descriptor, name, libsndfile_said) as (_, stream):
        return ffmpeg_header(stream, name, libsndfile_said)


def ffmpeg_header(stream: av.AudioStream, name: str, libsndfile_said: str | None) -> AudioHeader:
    """What FFmpeg found in the file's header."""
    sample_rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
    check_sample_rate(name, sample_rate)
    if channels == 0:
        raise RowError("load", f"{name}: its header is damaged ({libsndfile_said or 'no channels'})")
    frames = None
    # Durations of raw streams are guesses from the bit rate. Indexed containers, which count their packets, know.
    if stream.frames and stream.duration is not None and stream.time_base is not None:
        frames = round(stream.duration * stream.time_base * sample_rate)
    return AudioHeader(frames, sample_rate, channels)


def _decode_with_ffmpeg(
    descriptor: int, name: str, max_seconds: float | None, libsndfile_said: str | None
) -> tuple[Samples, int]:
    blocks: list[Samples] = []
    sample_rate = decoded = 0
    with open_with_ffmpeg(descriptor, name, libsndfile_said) as (container, stream):
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            block = float_samples(frame, name)
            if not blocks:
                sample_rate = frame.sample_rate
                check_sample_rate(name, sample_rate)
            elif frame.sample_rate != sample_rate or len(block) != len(blocks[0]):
                raise RowError("load", f"{name}: its sample rate or number of channels changes part-way")
            decoded += block.shape[1]
            _check_length(name, decoded, sample_rate, max_seconds)
            blocks.append(block)
    if not blocks:
        raise RowError("load", f"{name}: no samples")
    samples = np.concatenate(blocks, axis=1)
    check_finite(name, samples)
    return samples, sample_rate


def float_samples(frame: av.AudioFrame, name: str) -> Samples:
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
