"""Audio read by libsndfile, by far the fastest decoder, where it reads a file whole and right.

It does not, and FFmpeg is asked instead, for

- mp3 without an exact length in its first frame, and mp3 in other containers, where libsndfile goes by an estimate and
  stops there;
- chained ogg, of which libsndfile reads the first link;
- flac that was written to a pipe and so does not know its length;
- Opus, which libsndfile decodes at the rate that the header mentions for information, and of which it keeps the
  decoder's delay where time stamps do not begin at 0;
- GSM, of which it decodes the byte behind an odd number of blocks.

Parts of uncompressed and lossless files are read after a seek. libsndfile's seek in Ogg Vorbis is exact but in the
last page, where it is wrong by what the encoder cut off at the end. All else is decoded from the beginning.
"""

from __future__ import annotations

import io
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, BinaryIO, cast

import numpy as np
import soundfile

from batch_tokenizer.audio.reader import (
    AudioHeader,
    AudioReader,
    Block,
    Samples,
    check_finite,
    check_length,
    check_plausible,
    check_sample_rate,
)
from batch_tokenizer.audio.sizes import SampleBytes
from batch_tokenizer.records import RowError
from batch_tokenizer.storage.files import read_at

#: libsndfile's number of frames for a stream that does not say.
_UNKNOWN_FRAMES = 2**62

#: Encoders differ by a few MPEG frames of 1,152 samples in what they count as an mp3's length.
MP3_TOLERANCE = 4 * 1152

#: What files begin with that libmpg123 is not asked about.
_NOT_MPEG = (b"RIFF", b"RF64", b"RIFX", b"riff", b"fLaC", b"OggS", b"FORM", b"caff", b".snd")

#: What a wav's format chunk says of mp3 and mp2.
_MPEG_TAGS = (b"\x55\0", b"\x50\0")

#: What begins a MIDI sample dump, of which libsndfile prints every checksum that is wrong.
_SDS = b"\xf0\x7e"

#: Samples that are decoded at a time.
_BLOCK = 1 << 18

#: Samples before the last page of Ogg Vorbis that are decoded with it: more than two of its longest packets.
_VORBIS_MARGIN = 1 << 14

_FLOATING = ("FLOAT", "DOUBLE")
_UNCOMPRESSED = ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", *_FLOATING, "ULAW", "ALAW")
_LOSSLESS = (*_UNCOMPRESSED, "ALAC_16", "ALAC_20", "ALAC_24", "ALAC_32")


class Unfit(Exception):
    """libsndfile cannot open a file, or would not read it whole. ``str`` is libsndfile's message, or empty."""


@contextmanager
def open_with_libsndfile(
    file: BinaryIO, size: int, name: str, head: bytes, stale: SampleBytes | None = None
) -> Iterator[LibsndfileReader]:
    """The reader of a file.

    Args:
        head: its first bytes, at least 22 where it has so many.
        stale: where its samples lie if its header's size of them is wrong.

    Raises:
        Unfit: FFmpeg has to read it.
        RowError: its header is damaged.
    """
    if head[:2] == _SDS:
        raise Unfit
    with _quiet() if _may_be_mpeg(head) else _AS_IS:
        try:
            sound = soundfile.SoundFile(_source(file), closefd=False)
        except soundfile.LibsndfileError as error:
            raise Unfit(_cause(error)) from error
    with sound:
        form, subtype = sound.format, sound.subtype
        if stale is None:
            if _is_unfit(file, size, form, subtype, sound.frames):
                raise Unfit
            yield LibsndfileReader(name, sound, form, subtype, file, size)
            return
        is_wav = form in ("WAV", "WAVEX", "RF64", "W64")
        if not (is_wav and subtype in _UNCOMPRESSED and sound.endian != "BIG"):
            raise Unfit
        # The samples are read on to the file's end, as FFmpeg does where the size is 0.
        rest = soundfile.SoundFile(
            _FromOffset(file, stale), samplerate=sound.samplerate, channels=sound.channels, format="RAW",
            subtype=subtype, endian="LITTLE",
        )  # fmt: skip
    with rest:
        yield LibsndfileReader(name, rest, "RAW", subtype, file, size)


def _source(file: BinaryIO) -> Any:
    """What libsndfile reads from: the descriptor where there is one, as it needs no call of Python's for each block."""
    file.seek(0)
    try:
        return file.fileno()
    except io.UnsupportedOperation:
        return file


class _FromOffset(io.RawIOBase):
    """A file from where its samples begin."""

    def __init__(self, file: BinaryIO, samples: SampleBytes) -> None:
        super().__init__()
        self._file = file
        self._offset = samples.offset
        file.seek(self._offset)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return cast(Any, self._file).readinto(buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset + (self._offset if whence == os.SEEK_SET else 0), whence) - self._offset

    def tell(self) -> int:
        return self._file.tell() - self._offset


def _is_unfit(file: BinaryIO, size: int, form: str, subtype: str, frames: int) -> bool:
    """Whether libsndfile would not read all of this file, or more than it holds."""
    if frames >= _UNKNOWN_FRAMES or subtype in ("OPUS", "GSM610"):
        return True
    if subtype.startswith("MPEG_"):
        return form != "MP3" or not _mp3_knows_its_length(file, size)
    return form == "OGG" and ogg_is_chained(file, size)


def _mp3_knows_its_length(file: BinaryIO, size: int) -> bool:
    """Whether the first frame is a Xing or Info tag that counts frames and bytes, and the file goes on no further.

    A file that is shorter than its tag says passes: it will be seen to be cut when it is decoded.
    """
    start = 0
    head = read_at(file, 0, 10)
    if head[:3] == b"ID3" and len(head) == 10:
        # Four bytes of seven bits each.
        start = 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])
    frame = read_at(file, start, 256)
    tag = max(frame.find(b"Xing"), frame.find(b"Info"))
    if tag < 0 or len(frame) < tag + 16:
        return False
    flags, _, audio_bytes = struct.unpack(">III", frame[tag + 4 : tag + 16])
    # Tags of text and pictures may follow the audio; a second recording is longer than the slack.
    return flags & 3 == 3 and size - start <= 1.01 * audio_bytes + 4096


def _may_be_mpeg(head: bytes) -> bool:
    """Whether libsndfile may ask libmpg123: it does with all that begins like no other format, too."""
    return not head.startswith(_NOT_MPEG) or (head[:4] == b"RIFF" and head[20:22] in _MPEG_TAGS)


def ogg_is_chained(file: BinaryIO, size: int) -> bool:
    """Whether the last page belongs to another stream than the first."""
    pages = _last_pages(file, size)
    serial = slice(14, 18)
    return bool(pages) and pages[-1][serial] != read_at(file, 0, 18)[serial]


def _last_pages(file: BinaryIO, size: int) -> list[bytes]:
    """The headers of the last pages of an ogg file, two where the last 128 KiB have so many."""
    tail = read_at(file, max(0, size - (1 << 17)), 1 << 17)
    pages: list[bytes] = []
    place = tail.rfind(b"OggS")
    while place >= 0 and len(pages) < 2:
        if len(tail) >= place + 27:
            pages.insert(0, tail[place : place + 27])
        place = tail.rfind(b"OggS", 0, place)
    return pages


def _seekable_end(file: BinaryIO, size: int, frames: int) -> int:
    """The sample up to which libsndfile's seek in Ogg Vorbis is exact."""
    pages = _last_pages(file, size)
    if len(pages) < 2:
        return 0
    before_last, last = (int.from_bytes(page[6:14], "little", signed=True) for page in pages)
    # Where positions do not begin at 0, or a page has none, nothing is known.
    return max(0, before_last - _VORBIS_MARGIN) if last == frames and 0 < before_last < last else 0


def _cause(error: soundfile.LibsndfileError) -> str:
    """libsndfile's error message, shortened."""
    words = cast(str, error.error_string).removeprefix("Error : ").rstrip(".")
    return words.replace("Unspecified internal error", "its header contradicts itself")


_quiet_lock = threading.Lock()

_AS_IS = nullcontext()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps libmpg123, which libsndfile decodes mp3 with, from writing to the process's standard error itself."""
    with _quiet_lock:
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.dup2(nowhere, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)


class LibsndfileReader(AudioReader):
    """A file that libsndfile has opened."""

    def __init__(
        self, name: str, sound: soundfile.SoundFile, form: str, subtype: str, file: BinaryIO, size: int
    ) -> None:
        """
        Args:
            form, subtype: of ``sound``, which would ask libsndfile for them each time.
        """
        self._form, self._subtype, frames = form, subtype, sound.frames
        check_sample_rate(name, sound.samplerate)
        check_plausible(name, frames, size)
        self._sound = sound
        self._is_mp3 = self._form == "MP3"
        self._file, self._size = file, size
        exact = self._subtype in _LOSSLESS or self._subtype == "VORBIS"
        header = AudioHeader(frames, sound.samplerate, sound.channels, exact)
        super().__init__(name, header, exact and sound.seekable())

    def decode_all(self, max_seconds: float | None = None) -> Samples:
        """All samples in one read; see ``AudioReader``."""
        sound, promised = self._sound, self._sound.frames
        check_length(self.name, promised, self.header.sample_rate, max_seconds)
        try:
            with _quiet() if self._is_mp3 else _AS_IS:
                if self._form in ("WAV", "WAVEX") and self._subtype == "PCM_16":
                    # libsndfile copies these as they are, and numpy scales them several times faster; by a power of
                    # two, so to the same values.
                    integers = sound.read(promised, dtype="int16", always_2d=True)
                    interleaved = np.multiply(integers, np.float32(2.0**-15), dtype=np.float32)
                else:
                    interleaved = sound.read(promised, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise RowError("load", f"{self.name}: damaged or cut short ({_cause(error)})") from error
        except MemoryError as error:
            count = f"{promised} samples x {self.header.channels} channels"
            raise RowError("load", f"{self.name}: not enough memory for {count}") from error
        self._check_decoded(len(interleaved), promised)
        if not len(interleaved):
            raise RowError("load", f"{self.name}: no samples")
        # A reshape, where it will do, gives a single channel the strides of a row; a transpose would not.
        is_mono = self.header.channels == 1
        samples = interleaved.reshape(1, -1) if is_mono else np.ascontiguousarray(interleaved.T)
        if self._subtype in _FLOATING:
            check_finite(self.name, samples)
        return samples

    def _decode(self, start: int, stop: int | None) -> Iterator[Block]:
        sound, promised = self._sound, self._sound.frames
        end = promised if stop is None else min(stop, promised)
        position = 0
        try:
            # Ogg Vorbis is read from before its last page, into which libsndfile's seek is not exact.
            if self.seeks:
                position = min(start, promised)
                if self._subtype == "VORBIS":
                    position = min(position, _seekable_end(self._file, self._size, promised))
                sound.seek(position)
            while position < end:
                with _quiet() if self._is_mp3 else _AS_IS:
                    block = sound.read(min(_BLOCK, end - position), dtype="float32", always_2d=True)
                if not len(block):
                    break
                yield position, block.T
                position += len(block)
        except soundfile.LibsndfileError as error:
            raise RowError("load", f"{self.name}: damaged or cut short ({_cause(error)})") from error
        self._check_decoded(position, end)

    def _check_decoded(self, decoded: int, promised: int) -> None:
        if decoded < promised - (MP3_TOLERANCE if self._is_mp3 else 0):
            raise RowError("load", f"{self.name}: damaged or cut short, {decoded} of {promised} samples decode")
