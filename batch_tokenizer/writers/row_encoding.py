"""``RowEncoder``: makes what a sink stores of a row's results: codes, ``info``, and an audio file's bytes.

Nothing in it tells when, where, or beside which rows the codes were computed, so the same row has the same bytes on any
number of processes and after any number of restarts.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from batch_tokenizer.records import OUTPUT_FIELDS, LedgerEntry, RowError, Task, TokenizedRow
from batch_tokenizer.storage.json_lines import without_nan
from batch_tokenizer.storage.row_info import join_info


def token_json(result: TokenizedRow, run_info: Mapping[str, Any]) -> bytes:
    """The token file of one row; see ``tokens_as_json`` and ``row_info``."""
    return tokens_as_json(result.codes, row_info(result, run_info))


def tokens_as_json(codes: npt.NDArray[np.uint16], info: Mapping[str, Any]) -> bytes:
    """``{"quantized_tokens": [[K ints] x T], "info": {...}}``, UTF-8.

    Raises:
        RowError: ``info`` is nested too deeply to be written.
    """
    return json_bytes({"quantized_tokens": np.ascontiguousarray(codes), "info": info})


def tokens_as_npy(codes: npt.NDArray[np.uint16], info: Mapping[str, Any]) -> bytes:
    """What ``numpy.load`` reads as uint16 (T, K), then ``info`` as JSON, UTF-8, up to the end of the file.

    Readers of ``.npy`` know the array's size from its header and do not look beyond it, so that one file holds both
    and is published in one step.

    Raises:
        RowError: ``info`` is nested too deeply to be written.
    """
    return npy_bytes(codes) + json_bytes({"info": info})


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    """An ``.npy`` file of codes uint16 (T, K) or hidden states float16 (T, d), as ``numpy.save`` writes it, in a tenth
    of the time."""
    dtype = array.dtype.newbyteorder("<")
    header = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({array.shape[0]}, {array.shape[1]}), }}"
    padded = header.ljust(-(-(len(header) + 11) // 64) * 64 - 11) + "\n"
    length = len(padded).to_bytes(2, "little")
    return b"\x93NUMPY\x01\x00" + length + padded.encode() + np.ascontiguousarray(array, dtype=dtype).tobytes()


_HEADER_BYTES = 44

#: A RIFF chunk states its size in 32 bits, and counts the header less its own first eight bytes.
_MOST_DATA_BYTES = 2**32 - 1 - (_HEADER_BYTES - 8)

_PIECE_SAMPLES = 1 << 20


def wav_bytes(samples: npt.NDArray[np.float32], sample_rate: int) -> bytes:
    """A wav file of ``samples`` (S,) or (channels, S), S >= 0, at ``sample_rate`` Hz.

    A sample x becomes x * 32768, rounded to the nearest integer (of two, the even one) and clipped to [-32768, 32767],
    as ffmpeg does it. Reading divides by 32768, so PCM-16 audio survives a round trip bit for bit.

    Raises:
        RowError: in stage ``decode`` if a sample is not a number or infinite, which only a faulty model
            makes; in stage ``write`` if the samples do not fit into a wav file (4 GiB).
    """
    return b"".join(wav_pieces(samples, sample_rate))


def wav_pieces(samples: npt.NDArray[np.float32], sample_rate: int) -> Iterator[bytes]:
    """The bytes of ``wav_bytes`` one piece after the other, for samples that need not be in memory.

    Raises:
        RowError: as ``wav_bytes``, from the piece on where it shows.
    """
    if samples.nbytes // 2 > _MOST_DATA_BYTES:
        hours = samples.shape[-1] / sample_rate / 3600
        raise RowError("write", f"{hours:.1f} hours of audio at {sample_rate} Hz do not fit into a wav file (4 GiB)")
    channels, length = (1, len(samples)) if samples.ndim == 1 else samples.shape
    data_bytes = 2 * samples.size
    riff = struct.pack("<4sI4s", b"RIFF", _HEADER_BYTES - 8 + data_bytes, b"WAVE")
    frame_bytes = 2 * channels
    layout = struct.pack(
        "<4sIHHIIHH", b"fmt ", 16, 1, channels, sample_rate, sample_rate * frame_bytes, frame_bytes, 16
    )
    yield b"".join((riff, layout, struct.pack("<4sI", b"data", data_bytes)))
    for start in range(0, length, _PIECE_SAMPLES):
        piece = samples[..., start : start + _PIECE_SAMPLES]
        if not np.isfinite(piece).all():
            count = sum(
                int((~np.isfinite(samples[..., place : place + _PIECE_SAMPLES])).sum())
                for place in range(start, length, _PIECE_SAMPLES)
            )
            raise RowError("decode", f"the codec made {count} of {samples.size} samples NaN or infinite")
        scaled = np.clip(piece, -1, 1)
        scaled *= 32768
        yield np.rint(scaled).clip(max=32767).astype("<i2").T.tobytes()  # channels take turns


#: Float samples (S,) or (channels, S) and their rate in Hz to the bytes of an audio file; raises ``RowError``.
AudioEncoder = Callable[[npt.NDArray[np.float32], int], bytes | memoryview]


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row as a sink takes it.

    Attributes:
        fields: of the manifest's row, ``key`` among them.
        about: what the run says of it: codec, fingerprint and so on, and its lengths; see ``row_about``.
        codes: uint16 (T, K); None where tokens are no output.
        audio: an audio file's bytes; None where audio is no output.
        audio_format: of those bytes, and the suffix of their file's name.
        hidden_states: float16 (T, d); None where they are no output.
        other_codes: uint16 (T, K) of the row's other audio, by name.
    """

    key: str
    fields: Mapping[str, Any]
    about: Mapping[str, Any]
    codes: npt.NDArray[np.uint16] | None
    audio: bytes | memoryview | None = None
    audio_format: str = "wav"
    hidden_states: npt.NDArray[np.float16] | None = None
    other_codes: Mapping[str, npt.NDArray[np.uint16]] = field(default_factory=dict)

    @property
    def info(self) -> dict[str, Any]:
        """Fields and what the run says in one object, for sinks that have one place for them."""
        return join_info(self.fields, self.about)

    @property
    def info_with_codes(self) -> dict[str, Any]:
        """The same with other codes in it, for sinks that have no other place for them."""
        return {**self.info, **{name: np.ascontiguousarray(codes) for name, codes in self.other_codes.items()}}


@dataclass(frozen=True, slots=True)
class RowEncoder:
    """Makes an ``EncodedRow`` of each result of a run.

    Attributes:
        run_info: codec, fingerprint and so on, the same for all rows of the run.
        sample_rate: of the samples, in Hz.
        encode_audio: to the bytes of a file of ``audio_format``.
    """

    task: Task
    run_info: Mapping[str, Any]
    sample_rate: int
    encode_audio: AudioEncoder = wav_bytes
    audio_format: str = "wav"

    def __call__(self, result: TokenizedRow) -> EncodedRow:
        """
        Raises:
            RowError: the audio cannot be encoded, or hidden states are not numbers that float16 holds.
        """
        if result.hidden_states is not None and not np.isfinite(result.hidden_states).all():
            raise RowError("encode", "hidden states are NaN or beyond the range of float16 (65,504)")
        outputs = OUTPUT_FIELDS[self.task]
        audio = None
        if "reconstructed_wav" in outputs:
            if result.samples is None:
                raise ValueError("a row without samples has no audio file")
            audio = self.encode_audio(result.samples, self.sample_rate)
        codes = result.codes if "quantized_tokens" in outputs else None
        about = row_about(result, self.run_info)
        return EncodedRow(
            result.row.key, result.row.fields, about, codes, audio, self.audio_format, result.hidden_states,
            {name: other.codes for name, other in result.others.items()},
        )  # fmt: skip


def row_info(result: TokenizedRow, run_info: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's row, then ``run_info`` and the row's lengths; see ``join_info`` and ``row_about``."""
    return join_info(result.row.fields, row_about(result, run_info))


def row_about(result: TokenizedRow, run_info: Mapping[str, Any]) -> dict[str, Any]:
    """``run_info``, then ``num_samples`` (input samples at the codec's rate), ``num_frames`` (T) and
    ``num_quantizers`` (K), and ``segments`` where the row was encoded in such: the first frame and the first sample of
    each. ``other_codes`` has the same of the row's other audio."""
    if result.codes is None:
        raise ValueError("a row without codes has no tokens")
    about = {**run_info, **_lengths(result), "num_quantizers": result.codes.shape[1]}
    if result.others:
        about["other_codes"] = {name: _lengths(other) for name, other in result.others.items()}
    return about


def _lengths(result: TokenizedRow) -> dict[str, Any]:
    lengths: dict[str, Any] = {"num_samples": result.num_samples, "num_frames": result.codes.shape[0]}
    if result.segments is not None:
        lengths["segments"] = [list(segment) for segment in result.segments]
    return lengths


#: What precedes the name of other codes in the name of their checksum.
OTHER_CHECKSUM = "codes."


def done_entry(result: TokenizedRow, stored: Mapping[str, bytes | memoryview]) -> LedgerEntry:
    """What the ledger says of a row whose outputs are published.

    Args:
        stored: the bytes that were stored for the row, by name, of which the ledger keeps checksums.
    """
    row = result.row
    checksums = {"codes": codes_checksum(result.codes)}
    checksums |= {f"{OTHER_CHECKSUM}{name}": codes_checksum(other.codes) for name, other in result.others.items()}
    checksums |= {name: zlib.crc32(content) for name, content in stored.items()}
    return LedgerEntry(
        row.line, row.digest, row.key, "done", num_samples=result.num_samples, frames=len(result.codes),
        checksums=checksums,
    )  # fmt: skip


def codes_checksum(codes: npt.NDArray[np.uint16]) -> int:
    """CRC-32 of codes (T, K) as little-endian 16-bit integers, frame by frame."""
    return zlib.crc32(np.ascontiguousarray(codes, dtype="<u2").data)


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """UTF-8 JSON in one line; arrays of numpy may be among the values.

    Raises:
        RowError: a value is nested too deeply to be written.
    """
    try:
        return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:
        # Rows may hold what orjson does not write: integers beyond 64 bits, halves of surrogate pairs, deep nesting.
        pass
    try:
        try:
            return _plain_json(document)
        except ValueError:  # NaN or infinity, which orjson would have written as null
            return _plain_json(without_nan(document))
    except RecursionError as error:
        raise RowError("write", "the row's fields are nested too deeply to be written beside its tokens") from error


def _plain_json(document: Any) -> bytes:
    text = json.dumps(document, separators=(",", ":"), default=lambda array: array.tolist(), allow_nan=False)
    return text.encode("ascii")
