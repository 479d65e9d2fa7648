"""Files to samples: float32 samples (channels, S) at the file's own rate, or one ``RowError``.

``libsndfile.py`` and ``ffmpeg.py`` say which decoder reads what. A file that holds less than its header promises:

- wav and other uncompressed formats yield what is there, as programs that write to a pipe usually promise too much;
- so do webm and other containers cut at the end, which promise nothing;
- flac, mp3 and ogg with missing pages, and any stream in which decoding fails part-way, are failures: audio is missing.

A file that holds more than its header promises is read on to its end, or fails; it is never cut short.

A path may be any location that ``storage`` opens. A file is untrusted input: its header's sizes are believed only so
far as its bytes could hold them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from batch_tokenizer.audio.ffmpeg import open_with_ffmpeg
from batch_tokenizer.audio.libsndfile import Unfit, ogg_is_chained, open_with_libsndfile
from batch_tokenizer.audio.reader import AudioHeader, AudioReader, Samples
from batch_tokenizer.audio.sizes import HEAD_BYTES, find_stale_size
from batch_tokenizer.records import RowError
from batch_tokenizer.storage.names import display_name
from batch_tokenizer.storage.opening import open_location


@contextmanager
def open_audio(path: str, stream: int | None = None) -> Iterator[AudioReader]:
    """The reader of a file, at its beginning.

    Args:
        path: a location; paths are relative to the working directory.
        stream: the audio stream to read, counted from 0; None for the one that FFmpeg plays by default.

    Raises:
        RowError: there is no such audio, whatever the cause; the reason names the file and the cause.
    """
    with open_location(path) as (file, size), _open_reader(file, size, display_name(path), stream) as reader:
        yield reader


@contextmanager
def _open_reader(file: BinaryIO, size: int, name: str, stream: int | None) -> Iterator[AudioReader]:
    libsndfile_error = None
    head = file.read(HEAD_BYTES)
    file.seek(0)
    stale = find_stale_size(file, size, name, head)
    try:
        with open_with_libsndfile(file, size, name, head, stale) as reader:
            if stream:
                raise RowError("load", f"{name}: has 1 audio stream, so none with number {stream} from 0")
            yield reader
            return
    except Unfit as unfit:
        libsndfile_error = str(unfit) or None
    if stale is not None and (stale.stated > 0 or not stale.is_wav):
        raise RowError(
            "load",
            f"{name}: its header promises {stale.stated:,} bytes of audio, and {stale.there - stale.stated:,} more "
            "follow: write it again (ffmpeg -i, or sox)",
        )
    one_link = not ogg_is_chained(file, size)
    with open_with_ffmpeg(
        file, name, stream=stream, libsndfile_error=libsndfile_error, one_link=one_link
    ) as other:  # fmt: skip
        yield other


def decode_audio(path: str, *, max_seconds: float | None = None, stream: int | None = None) -> tuple[Samples, int]:
    """All of a file's audio.

    Args:
        path, stream: as in ``open_audio``.
        max_seconds: longest audio to accept; checked before decoding where the header knows, and while decoding.

    Returns:
        Samples (channels, S), S >= 1, float32 and finite; integers are scaled so that full scale is 1. And Hz.

    Raises:
        RowError: as ``open_audio``, or the audio is damaged or too long.
    """
    with open_audio(path, stream) as audio:
        return audio.decode_all(max_seconds), audio.header.sample_rate


def decode_bytes(content: bytes, name: str) -> tuple[Samples, int]:
    """As ``decode_audio``, of a file in memory.

    Args:
        name: for messages.

    Raises:
        RowError: it is no audio, or damaged.
    """
    with _open_reader(io.BytesIO(content), len(content), name, None) as audio:
        return audio.decode_all(None), audio.header.sample_rate


def probe_audio(path: str) -> AudioHeader:
    """What the file's header says, without decoding it.

    Raises:
        RowError: as ``decode_audio``, so far as the header shows it.
    """
    with open_audio(path) as audio:
        return audio.header
