"""What a run's outputs must look like, and the checks of a file or a row of a shard against it.

Most checks are cheap: of audio only the header and the size are read, and codes are checked to be possible. Whether the
content is the very one that was written is checked by the ledger's checksums, which takes reading all of it.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from batch_tokenizer.codecs.base import CodecInfo
from batch_tokenizer.config import OUTPUT_SETTINGS
from batch_tokenizer.data.code_checks import ANY_CODEBOOKS
from batch_tokenizer.data.other_codes import take_other_codes
from batch_tokenizer.data.token_files import parse_hidden_states, parse_token_file
from batch_tokenizer.records import RowError
from batch_tokenizer.runs.stored_rows import StoredRow
from batch_tokenizer.storage.files import open_file
from batch_tokenizer.storage.names import is_url
from batch_tokenizer.writers.row_encoding import OTHER_CHECKSUM, codes_checksum

#: Bytes of an audio file's beginning that the checks want.
AUDIO_HEADER_BYTES = 4096

#: Settings of a run that its outputs do not name.
_NOT_IN_INFO = ("task", "num_quantizers", "segment_samples", "codes_field", *OUTPUT_SETTINGS)

_STREAM_INFO_BYTES = 34

_BLOCK_BYTES = 1 << 20


class CheckFailed(Exception):
    """An output is not what it should be.

    Attributes:
        kind: one of ``commands/verify.py``'s ``KINDS``.
        reason: what is wrong with it, without its name.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason


@dataclass(frozen=True, slots=True)
class OutputForm:
    """What all outputs of a run have in common. Picklable, without a codec.

    Attributes:
        sample_rate, output_sample_rate: Hz, of the audio that was encoded, and of what was decoded.
        channels: of the audio.
        audio_format: ``wav`` or ``flac``.
        codebook_sizes: of the codebooks that the run used.
        info: what the ``info`` of every row says of the run.
    """

    sample_rate: int
    output_sample_rate: int
    channels: int
    audio_format: str
    codebook_sizes: tuple[int, ...]
    info: Mapping[str, Any]

    @classmethod
    def of(cls, codec: CodecInfo, settings: Mapping[str, Any]) -> OutputForm:
        """The form that a run's settings ask for."""
        return cls(
            codec.sample_rate,
            codec.output_sample_rate,
            codec.channels,
            settings.get("audio_format", "wav"),
            codec.codebook_sizes[: settings["num_quantizers"]],
            {name: value for name, value in settings.items() if name not in _NOT_IN_INFO},
        )


# --------------------------------------------------------------------------------------------------------------- files


@contextmanager
def regular_file(path: str) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file, opened, and its size in bytes; it may be behind a URL.

    Raises:
        CheckFailed: it is missing, is no regular file, or cannot be read.
    """
    if is_url(path):
        try:
            with open_file(path, "an output") as place:
                yield place
        except RowError as error:
            raise CheckFailed("missing" if "no such file" in error.reason else "unreadable", error.reason) from error
        return
    try:
        # Without waiting for a writer, should it be a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise CheckFailed("unreadable", "is not a regular file")
        with open(descriptor, "rb", buffering=0) as file:
            yield cast(BinaryIO, file), os.fstat(descriptor).st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckFailed("missing", "no such file") from error
    except OSError as error:
        raise CheckFailed("unreadable", f"cannot be read: {error.strerror}") from error


def check_audio_file(path: str, form: OutputForm, num_samples: int) -> None:
    """Whether ``path`` is an audio file of the run with ``num_samples`` samples, by its header and its size.

    Raises:
        CheckFailed: it is not.
    """
    with regular_file(path) as (file, size):
        head = file.read(AUDIO_HEADER_BYTES)
    check_audio(
        form.audio_format, head, size,
        sample_rate=form.output_sample_rate, num_samples=num_samples, channels=form.channels,
    )  # fmt: skip


def check_token_file(
    path: str, form: OutputForm, *, key: str, num_samples: int, num_frames: int, other_names: Collection[str] = ()
) -> None:
    """Whether ``path`` is a token file of the run with ``num_frames`` frames, whose ``info`` names key and length.

    Args:
        other_names: of the codes of the row's other audio.

    Raises:
        CheckFailed: it is not.
    """
    with regular_file(path) as (file, size):
        content = file.read()
    try:
        unchecked_codes, info = parse_token_file(content, "")
    except RowError as error:
        raise CheckFailed("unreadable", f"{error.reason[2:]} ({size} bytes)") from error
    if not isinstance(info, Mapping):
        raise CheckFailed("unreadable", "tokens without info")
    try:
        codes = unchecked_codes.check("", ANY_CODEBOOKS)
    except RowError as error:
        raise CheckFailed("content", error.reason[2:]) from error
    check_codes(codes, form.codebook_sizes, num_samples=num_samples, num_frames=num_frames)
    own = {"key": key, "num_samples": num_samples, "num_frames": num_frames}
    check_info(info, {**form.info, **own, "num_quantizers": len(form.codebook_sizes)})
    try:
        _, other_codes = take_other_codes(info, "")
    except RowError as error:
        raise CheckFailed("content", error.reason[2:]) from error
    check_other_codes(other_codes, info, form.codebook_sizes, other_names)


def check_other_codes(
    other_codes: Mapping[str, npt.NDArray[Any]],
    info: Mapping[str, Any],
    codebook_sizes: tuple[int, ...],
    names: Collection[str],
) -> None:
    """Whether a row has codes of its other audio under these names, each as long as its ``info`` says.

    Raises:
        CheckFailed: it has not.
    """
    if set(names) != set(other_codes):
        found = ", ".join(sorted(other_codes)) or "none"
        raise CheckFailed("missing", f"codes of other audio: {found}, and not {', '.join(sorted(names)) or 'none'}")
    for name, codes in other_codes.items():
        try:
            lengths = info["other_codes"][name]
            num_samples, num_frames = lengths["num_samples"], lengths["num_frames"]
        except (KeyError, TypeError) as error:
            raise CheckFailed("content", f"its info does not say how long {name} is") from error
        try:
            check_codes(codes, codebook_sizes, num_samples=num_samples, num_frames=num_frames)
        except CheckFailed as error:
            raise CheckFailed(error.kind, f"{name}: {error.reason}") from error


def check_hidden_states_file(path: str, num_frames: int) -> None:
    """Whether ``path`` is an .npy file of hidden states float16 (``num_frames``, d), d >= 1, as a run writes them.

    Raises:
        CheckFailed: it is not.
    """
    with regular_file(path) as (file, _):
        content = file.read()
    try:
        check_hidden_states(parse_hidden_states(content, ""), num_frames)
    except RowError as error:
        raise CheckFailed("unreadable", error.reason[2:]) from error


def check_hidden_states(hidden_states: npt.NDArray[np.float16], num_frames: int) -> None:
    """Whether hidden states (T, d) are finite and of ``num_frames`` frames.

    Raises:
        CheckFailed: they are not.
    """
    if len(hidden_states) != num_frames:
        raise CheckFailed("length", f"hidden states of {len(hidden_states)} frames where {num_frames} are expected")
    if not hidden_states.shape[1] or not np.isfinite(hidden_states).all():
        raise CheckFailed("content", "hidden states that are empty, NaN or infinite")


def check_file_checksum(path: str, checksum: int) -> None:
    """Whether all bytes of ``path`` have this CRC-32.

    Raises:
        CheckFailed: they have not, or cannot be read.
    """
    found = 0
    with regular_file(path) as (file, _):
        while block := file.read(_BLOCK_BYTES):
            found = zlib.crc32(block, found)
    if found != checksum:
        raise CheckFailed("changed", "its bytes are not those that were written")


# ------------------------------------------------------------------------------------------------------------- content


def check_checksums(row: StoredRow, checksums: Mapping[str, int]) -> None:
    """Whether a row of a shard has the codes and the bytes that were written, by their CRC-32.

    Raises:
        CheckFailed: it has not.
    """
    for name, checksum in checksums.items():
        if name == "codes":
            # In token2wav shards there are none.
            if row.codes is not None and codes_checksum(row.codes) != checksum:
                raise CheckFailed("changed", "its codes are not those that were written")
        elif name.startswith(OTHER_CHECKSUM):
            other = row.other_codes.get(name.removeprefix(OTHER_CHECKSUM))
            if other is None or codes_checksum(other) != checksum:
                raise CheckFailed("changed", f"its {name.removeprefix(OTHER_CHECKSUM)} are not those that were written")
        elif name not in row.stored or zlib.crc32(row.stored[name]) != checksum:
            raise CheckFailed("changed", f"its bytes ({name}) are not those that were written")


def check_audio(
    audio_format: str, head: bytes, size: int, *, sample_rate: int, num_samples: int, channels: int = 1
) -> None:
    """Whether ``wav`` or ``flac`` content has ``channels`` of 16 bits and ``num_samples`` samples, by its header.

    Args:
        head: its first ``AUDIO_HEADER_BYTES``.
        size: of all of it, in bytes.

    Raises:
        CheckFailed: it is not.
    """
    check = _check_wav if audio_format == "wav" else _check_flac
    check(head, size, sample_rate, num_samples, channels)


def _check_wav(head: bytes, size: int, sample_rate: int, num_samples: int, due: int) -> None:
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        raise CheckFailed("unreadable", f"not a wav file ({size} bytes)")
    # 1. The chunks up to the samples.
    chunks: dict[bytes, tuple[int, int]] = {}
    at = 12
    while b"data" not in chunks and at + 8 <= len(head):
        name, length = struct.unpack_from("<4sI", head, at)
        chunks[name] = at + 8, length
        at += 8 + length + length % 2
    if b"data" not in chunks or b"fmt " not in chunks or chunks[b"fmt "][0] + 16 > len(head):
        raise CheckFailed("unreadable", f"not a wav file that can be read: its header is damaged ({size} bytes)")
    # 2. The format, then the length by the header against the file's size.
    tag, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", head, chunks[b"fmt "][0])
    if (tag, channels, bits) != (1, due, 16):
        raise CheckFailed(
            "content", f"format {tag}, {channels} channels, {bits} bits, and not PCM, {_channels(due)}, 16 bits"
        )
    if rate != sample_rate:
        raise CheckFailed("content", f"{rate} Hz, not {sample_rate} Hz")
    begin, length = chunks[b"data"]
    if begin + length > size:
        raise CheckFailed("length", f"cut short: {size - begin} of {length} bytes of audio are there")
    if length != 2 * num_samples * channels:
        raise CheckFailed("length", f"{length / 2 / channels:.16g} samples where {num_samples} are expected")
    (promised,) = struct.unpack_from("<I", head, 4)
    if begin + length != size or promised + 8 != size:
        raise CheckFailed("content", f"{size} bytes, and not the {begin + length} that its header implies")


def _channels(count: int) -> str:
    return f"{count} channel" + "s" * (count != 1)


def _check_flac(head: bytes, size: int, sample_rate: int, num_samples: int, due: int) -> None:
    """By the first metadata block, which states the stream's length. The frames after it are not looked at."""
    if head[:4] != b"fLaC":
        raise CheckFailed("unreadable", f"not a flac file ({size} bytes)")
    info = head[8 : 8 + _STREAM_INFO_BYTES]
    if head[4] & 0x7F != 0 or len(info) < _STREAM_INFO_BYTES:
        raise CheckFailed("unreadable", f"not a flac file that can be read: its header is damaged ({size} bytes)")
    fields = int.from_bytes(info[10:18], "big")
    rate, channels, bits = fields >> 44, (fields >> 41 & 7) + 1, (fields >> 36 & 31) + 1
    if (channels, bits) != (due, 16):
        raise CheckFailed("content", f"{channels} channels, {bits} bits, and not {_channels(due)}, 16 bits")
    if rate != sample_rate:
        raise CheckFailed("content", f"{rate} Hz, not {sample_rate} Hz")
    length = fields & (1 << 36) - 1
    if length != num_samples:
        raise CheckFailed("length", f"{length} samples where {num_samples} are expected")


def check_codes(codes: npt.NDArray[Any], codebook_sizes: tuple[int, ...], *, num_samples: int, num_frames: int) -> None:
    """Whether integers (T, K) are ``num_frames`` frames of one code for each codebook.

    Args:
        num_samples: for the message.

    Raises:
        CheckFailed: they are not.
    """
    if len(codes) != num_frames:
        raise CheckFailed("length", f"{len(codes)} frames where {num_samples} samples make {num_frames}")
    if codes.ndim != 2 or codes.shape[1] != len(codebook_sizes):
        raise CheckFailed("content", f"codes of shape {codes.shape}, not ({num_frames}, {len(codebook_sizes)})")
    if codes.dtype.kind not in "iu":
        raise CheckFailed("content", "codes that are not integers")
    outside = (codes < 0) | (codes >= np.array(codebook_sizes))
    if outside.any():
        frame, codebook = map(int, np.argwhere(outside)[0])
        raise CheckFailed(
            "content",
            f"frame {frame}, codebook {codebook}: code {codes[frame, codebook]} is outside "
            f"0 to {codebook_sizes[codebook] - 1}",
        )


def check_info(info: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Whether what an output says of itself has these values.

    Raises:
        CheckFailed: it has not.
    """
    for name, value in expected.items():
        if name not in info or info[name] != value:
            found = info.get(name, "absent")
            raise CheckFailed("content", f"its info has {name} {found}, not {value}")
