"""``RowEncoder``: a row's results enter, what a sink stores of them leaves: codes, ``info``, and an audio file's bytes.

Nothing in it tells when, where, or beside which rows the codes were computed, so the same row has the same bytes on any
number of processes and after any number of restarts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from batch_tokenizer.records import OUTPUT_FIELDS, LedgerEntry, RowError, Task, TokenizedRow
from batch_tokenizer.writers.wav_file import wav_bytes

#: Float samples (S,) and their rate in Hz to the bytes of an audio file; raises ``RowError``.
AudioEncoder = Callable[[npt.NDArray[np.float32], int], bytes | memoryview]


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row as a sink takes it.

    Attributes:
        info: what is known of the row, ``key`` among it; see ``row_info``.
        codes: uint16 (T, K); None where tokens are no output.
        audio: an audio file's bytes; None where audio is no output.
        audio_format: of those bytes, and the suffix of their file's name.
    """

    key: str
    info: Mapping[str, Any]
    codes: npt.NDArray[np.uint16] | None
    audio: bytes | memoryview | None = None
    audio_format: str = "wav"


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
            RowError: the audio cannot be encoded.
        """
        outputs = OUTPUT_FIELDS[self.task]
        audio = None
        if "reconstructed_wav" in outputs:
            if result.samples is None:
                raise ValueError("a row without samples has no audio file")
            audio = self.encode_audio(result.samples, self.sample_rate)
        codes = result.codes if "quantized_tokens" in outputs else None
        return EncodedRow(result.row.key, row_info(result, self.run_info), codes, audio, self.audio_format)


def row_info(result: TokenizedRow, run_info: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's row, then ``run_info``, then ``num_samples`` (input samples at the codec's rate), ``num_frames``
    (T) and ``num_quantizers`` (K), and ``segments`` where the row was encoded in such: the first frame and the first
    sample of each. Fields of the row that differ from another one of their name there are kept under ``manifest_row``.
    """
    if result.codes is None:
        raise ValueError("a row without codes has no tokens")
    ours = {
        **run_info,
        "num_samples": result.num_samples,
        "num_frames": result.codes.shape[0],
        "num_quantizers": result.codes.shape[1],
    }
    if result.segments is not None:
        ours["segments"] = [list(segment) for segment in result.segments]
    fields = result.row.fields
    reserved = {*ours, "manifest_row", "segments"}
    hidden = {
        name: value for name, value in fields.items() if name in reserved and (name not in ours or ours[name] != value)
    }
    info = {**{name: value for name, value in fields.items() if name not in reserved}, **ours}
    if hidden:
        info["manifest_row"] = hidden
    return info


def done_entry(result: TokenizedRow) -> LedgerEntry:
    """What the ledger says of a row whose outputs are published."""
    row = result.row
    return LedgerEntry(row.line, row.digest, row.key, "done", num_samples=result.num_samples, frames=len(result.codes))


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
        return json.dumps(document, separators=(",", ":"), default=lambda array: array.tolist()).encode("ascii")
    except RecursionError as error:
        raise RowError("write", "the row's fields are nested too deeply to be written beside its tokens") from error
