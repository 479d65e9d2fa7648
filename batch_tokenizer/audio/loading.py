"""Utterances from files or parts of files, at a codec's sample rate: samples (S,), or (channels, S) for several."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from batch_tokenizer.audio.decoding import decode_audio, open_audio
from batch_tokenizer.audio.reader import AlreadyPassed, AudioReader, AudioTooLong
from batch_tokenizer.audio.resampling import SHORT_SAMPLES, Piece, Resampler, resample, resampled_length
from batch_tokenizer.records import AudioCut, Downmix, RowError
from batch_tokenizer.storage.names import display_name, is_url, parse_member

Samples = npt.NDArray[np.float32]

#: Seconds by which a cut may end behind its file: manifests round, and encoders count their padding or do not.
END_TOLERANCE = 0.1

#: More samples than any file has.
_ENDLESS = 1 << 48


def load_samples(
    path: str,
    sample_rate: int,
    resampler: Resampler = "reference",
    *,
    cut: AudioCut | None = None,
    max_samples: int | None = None,
    channels: int = 1,
    downmix: Downmix = "mean",
) -> npt.NDArray[np.float32]:
    """One utterance: decoded, resampled to ``sample_rate`` Hz, with as many channels as a codec has.

    ``reference`` resamples each channel and then averages, the order in which published tokens were made. The same file
    gives the same bits, whatever process and however many threads load it.

    A cut is what ``[round(start * sample_rate) : round(end * sample_rate)]`` would take from the whole loaded file, so
    cuts that touch in time fit together to the sample; with ``soxr`` within 2e-5. Only the cut is held in memory, and
    only it is decoded where the format allows exact seeks.

    Args:
        max_samples: the most samples that may be returned.
        channels: 1, or as many as the codec has; the file's first ones, or copies of a single one.
        downmix: what the one channel is of a file with several: their mean, or the first.

    Returns:
        Samples (S,), or (``channels``, S) of more than one, 1 <= S <= ``max_samples``, contiguous, finite, nominally in
        [-1, 1].

    Raises:
        RowError: the file cannot be decoded (the reason says why), is too long, or ends before the cut does.
    """
    mix = _Mix(channels, downmix, resampler)
    if cut is not None and (cut.start > 0 or cut.end is not None or cut.channel is not None):
        samples, computed = _load_cut(path, sample_rate, mix, cut, max_samples), True
    else:
        max_seconds = None if max_samples is None else max_samples / sample_rate
        stream = None if cut is None else cut.stream
        recorded, file_rate = decode_audio(path, max_seconds=max_seconds, stream=stream)
        samples = mix(recorded, lambda part: resample(part, file_rate, sample_rate, resampler))
        computed = file_rate != sample_rate or len(recorded) > 1
    if max_samples is not None and samples.shape[-1] > max_samples:
        raise _too_long(path, samples.shape[-1], sample_rate, max_samples)
    # Finite samples near the end of float32's range overflow in a sum.
    if computed and not np.isfinite(samples).all():
        raise RowError("load", f"{display_name(path)}: its samples are too large to resample or average")
    return samples


def measure_samples(
    path: str, sample_rate: int, resampler: Resampler = "reference", *, cut: AudioCut | None = None
) -> int:
    """The number of samples that ``load_samples`` would return, in memory that does not grow with it.

    Raises:
        RowError: the file cannot be decoded, has no samples, or ends before the cut does.
    """
    with open_audio(path, None if cut is None else cut.stream) as audio:
        length = audio.length()
        if not length:
            raise RowError("load", f"{display_name(path)}: no samples")
        last = resampled_length(length, audio.header.sample_rate, sample_rate, resampler)
        if cut is None:
            return last
        _check_cut(display_name(path), cut, length / audio.header.sample_rate)
        return (last if cut.end is None else min(last, round(cut.end * sample_rate))) - round(cut.start * sample_rate)


@dataclass(frozen=True)
class _Mix:
    """How the channels of a file become those of a codec."""

    channels: int
    downmix: Downmix
    resampler: Resampler

    def __call__(self, recorded: Samples, to_rate: Callable[[Samples], Samples]) -> Samples:
        """Recorded samples (channels, n) to (S,), or to (``channels``, S); ``to_rate`` resamples each channel."""
        if self.channels > 1:
            made = to_rate(np.ascontiguousarray(recorded[: self.channels]))
            return np.repeat(made, self.channels, axis=0) if len(made) == 1 else made
        if self.resampler == "reference":
            made = to_rate(recorded)
            return made[0] if self.downmix == "first" else _mean(made)
        return to_rate(recorded[:1] if self.downmix == "first" else _mean(recorded)[None])[0]


def _load_cut(path: str, sample_rate: int, mix: _Mix, cut: AudioCut, max_samples: int | None) -> Samples:
    name = display_name(path)
    first = round(cut.start * sample_rate)
    last = None if cut.end is None else round(cut.end * sample_rate)
    if last == first:
        raise RowError("load", f"{name}: the segment from {cut.start:g} to {cut.end:g} s is shorter than a sample")
    if last is not None and max_samples is not None and last - first > max_samples:
        raise _too_long(path, last - first, sample_rate, max_samples)
    asked = last if last is not None else first + (_ENDLESS if max_samples is None else max_samples + 1)
    try:
        with _open_cached(path, cut.stream) as audio:
            file_rate = audio.header.sample_rate
            if audio.header.exact and audio.header.frames is not None:
                _check_cut(name, cut, audio.header.frames / file_rate)
            # Short recordings are resampled in one piece, which gives other last bits than blocks do.
            length = None if file_rate == sample_rate else audio.length_up_to(SHORT_SAMPLES)
            piece = Piece.plan(first, asked, length, file_rate, sample_rate, mix.resampler)
            recorded = audio.read(piece.start, piece.stop, cut.channel)
    except AlreadyPassed:  # of a file that was kept open, and now is not
        return _load_cut(path, sample_rate, mix, cut, max_samples)
    if not recorded.shape[1]:
        raise RowError("load", f"{name}: ends before {cut.start:g} s, where the segment starts")
    samples = mix(recorded, piece.resample)
    length = samples.shape[-1]
    if length < asked - first:  # the file ends here
        _check_cut(name, cut, (first + length) / sample_rate)
    if not length:
        raise RowError("load", f"{name}: ends before {cut.start:g} s, where the segment starts")
    return samples


class _ReaderCache(threading.local):
    """The file that a thread has read a part of, where it does not seek: the next part is often asked for next."""

    identity: object = None
    reader: AudioReader | None = None
    closing: ExitStack | None = None


_reader_cache = _ReaderCache()


# While modules still are what their readers need.
@atexit.register
def _close_cached_reader() -> None:
    if _reader_cache.closing is not None:
        _reader_cache.closing.close()


@contextmanager
def _open_cached(path: str, stream: int | None) -> Iterator[AudioReader]:
    """As ``open_audio``; a file that does not seek is kept for the next call."""
    identity = _identity(path, stream)
    reader, closing = _reader_cache.reader, _reader_cache.closing
    if reader is None or closing is None or identity is None or _reader_cache.identity != identity:
        if closing is not None:
            closing.close()
        closing = ExitStack()
        _reader_cache.identity = _reader_cache.reader = _reader_cache.closing = None
        reader = closing.enter_context(open_audio(path, stream))
    _reader_cache.identity = _reader_cache.reader = _reader_cache.closing = None
    try:
        yield reader
    except BaseException:
        # ``open_audio`` makes a ``RowError`` of what its decoder raises.
        if not closing.__exit__(*sys.exc_info()):
            raise
    else:
        if reader.seeks or identity is None:
            closing.close()
        else:
            _reader_cache.identity, _reader_cache.reader, _reader_cache.closing = identity, reader, closing


def _identity(path: str, stream: int | None) -> object:
    """What stays the same as long as the bytes at a location do; None where that is not known."""
    member = parse_member(path)
    place = path if member is None else member.archive
    if is_url(place):
        return path, stream
    try:
        status = os.stat(place)
    except (OSError, ValueError):
        return None
    return path if member is not None else "", stream, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _check_cut(name: str, cut: AudioCut, file_seconds: float) -> None:
    if cut.start > 0 and cut.start >= file_seconds:
        raise RowError("load", f"{name}: the segment starts at {cut.start:g} s, the file ends at {file_seconds:.3f} s")
    if cut.end is not None and cut.end > file_seconds + END_TOLERANCE:
        raise RowError("load", f"{name}: the segment ends at {cut.end:g} s, the file at {file_seconds:.3f} s")


def _too_long(path: str, count: int, sample_rate: int, max_samples: int) -> AudioTooLong:
    length = f"{count} samples at {sample_rate} Hz where {max_samples} is the most"
    return AudioTooLong("load", f"{display_name(path)}: too long, {length}")


def _mean(channels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(channels, S) to (S,). By torch, since numpy adds up more than two channels in another order."""
    return channels[0] if len(channels) == 1 else torch.from_numpy(channels).mean(0).numpy()
