"""The records that flow through a run, one type per arrow of the pipeline, and the two errors that end a row or a run.

    manifest ─ManifestRow─► loader ─LoadedRow─► packer ─Batch─► codec ─TokenizedRow─► writers ─LedgerEntry─► ledger
                               └───────────────── RowFailure ──────────────────────────────────────────────────┘

A row with other audio beside its own (``--audio_fields``) is several rows up to the codec, and one again after it.

Every record is frozen: a stage makes a new one instead of changing what it was given. Arrays are numpy, not torch, so
that a record crosses a process border as plain bytes.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Task = Literal["wav2token", "token2wav", "wav2token2wav"]
Sink = Literal["json", "npy", "jsonl", "tar", "parquet"]
Stage = Literal["manifest", "load", "encode", "decode", "write"]
LongAudio = Literal["native", "segment", "stream"]
AttentionWindow = Literal["full", "published"]
DecoderChunks = Literal["exact", "published"]
WindowMerge = Literal["complete", "published"]
Loudness = Literal["none", "moss_tts"]
Downmix = Literal["mean", "first"]

TASKS: tuple[Task, ...] = ("wav2token", "token2wav", "wav2token2wav")

#: Sinks that gather many rows in one file, so that rows name no files of their own.
SHARD_SINKS: tuple[Sink, ...] = ("jsonl", "tar", "parquet")

#: Sinks whose rows have a field or a column of codes, whose name ``--codes_field`` sets, and that name by default.
CODES_FIELD_SINKS: tuple[Sink, ...] = ("jsonl", "parquet")
CODES_FIELD = "audio_codes"

#: Fields that make a row's audio a part of the file that ``wav`` names.
CUT_FIELDS = frozenset(("start", "end", "offset", "channel", "audio_stream"))

#: Fields that a manifest row must carry for each task, all of them non-empty strings.
REQUIRED_FIELDS: Mapping[Task, tuple[str, ...]] = {
    "wav2token": ("key", "wav", "quantized_tokens"),
    "token2wav": ("key", "quantized_tokens", "reconstructed_wav"),
    "wav2token2wav": ("key", "wav", "quantized_tokens", "reconstructed_wav"),
}

#: Fields that name a file which the task writes; no two rows may name the same one.
OUTPUT_FIELDS: Mapping[Task, tuple[str, ...]] = {
    "wav2token": ("quantized_tokens",),
    "token2wav": ("reconstructed_wav",),
    "wav2token2wav": ("quantized_tokens", "reconstructed_wav"),
}

#: What the ``info`` of every row of a run says alike.
RUN_INFO_FIELDS = (
    "codec", "fingerprint", "sample_rate", "frame_rate", "codebook_sizes", "dtype", "resampler", "segment_samples",
    "loudness", "attention_window", "window_merge", "hidden_states", "other_audio", "version",
)  # fmt: skip

#: What a run says of a single row: samples of input at the codec's rate, T, K, the first frame and the first sample of
#: each segment of a row that was encoded in such, and the same of the row's other audio by the name of its codes.
ROW_INFO_FIELDS = ("num_samples", "num_frames", "num_quantizers", "segments", "other_codes")


@dataclass(frozen=True, slots=True)
class RowForm:
    """What a manifest's rows must look like, which the task and the sink decide.

    Attributes:
        required: fields that must be there as non-empty strings, the key first.
        outputs: those of them that name a file which the task writes; no two rows may name the same one.
    """

    task: Task
    required: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, task: Task, sink: Sink = "json") -> RowForm:
        """The form for a task and a sink; rows whose results go into shards name no outputs."""
        if sink in SHARD_SINKS:
            inputs = tuple(name for name in REQUIRED_FIELDS[task] if name not in OUTPUT_FIELDS[task])
            return cls(task, inputs, ())
        return cls(task, REQUIRED_FIELDS[task], OUTPUT_FIELDS[task])


class RowError(Exception):
    """One row cannot be done, for a reason outside this program. It never reaches the rows beside it.

    Attributes:
        stage: where the row stopped.
        reason: one line for a person, naming what is wrong and, where there is one, the remedy.
    """

    def __init__(self, stage: Stage, reason: str) -> None:
        super().__init__(stage, reason)
        self.stage: Stage = stage
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}"


class RunError(Exception):
    """The whole run cannot start or go on, for a reason outside this program. ``cli.py`` prints it as one line.

    Attributes:
        exit_code: 2 for what the caller asked for (flags, paths, checkpoint), 1 for what the world did (disk, network).
        reported: another rank of the job has the same error and prints it, so that this one need not.
    """

    def __init__(self, message: str, *, exit_code: int = 2, reported: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.reported = reported


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type where it has none, for a one-line reason."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = 16
_SHORT.maxstring = _SHORT.maxother = 100


def short_repr(value: object) -> str:
    """``repr`` of a value out of somebody's file, cut to what a message has room for."""
    return _SHORT.repr(value)


def printable(text: str) -> str:
    """Text from files or manifests as a terminal may show it: control characters, line separators and other
    unprintable characters are written as escapes, such as ``\\x1b``, so that they cannot move the cursor, change
    colours or break a line in two."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def printable_lines(text: str) -> str:
    """As ``printable`` for each line of a text of several lines."""
    return "\n".join(map(printable, text.split("\n")))


@dataclass(frozen=True, slots=True)
class AudioCut:
    """Which part of an audio file is the utterance.

    Attributes:
        start: seconds from the file's beginning.
        end: likewise, greater than ``start``; None for the file's end.
        channel: counted from 0; None for the mean of all.
        stream: which audio stream of a file with several, counted from 0; None for the one that FFmpeg plays.
    """

    start: float = 0.0
    end: float | None = None
    channel: int | None = None
    stream: int | None = None


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One good line of a manifest.

    Attributes:
        line: its line number in the manifest, counted from 0; with ``digest`` it identifies the row in the ledger.
        digest: 16 hexadecimal digits, a 64-bit hash of the line's bytes without surrounding white space.
        key: the utterance's name.
        wav, quantized_tokens, reconstructed_wav: paths, relative to the working directory; None where the row has none.
        fields: the whole row as it stood, for pass-through to the output's ``info``.
        cut: the part of ``wav`` that is meant; None for all of it.
        piece: which piece of a long row this is, from 0, ``cut`` being that piece's; None for a whole row.
        other_codes: where ``wav`` is other audio of the row, the name of its codes; None where it is the row's own.
    """

    line: int
    digest: str
    key: str
    wav: str | None
    quantized_tokens: str | None
    reconstructed_wav: str | None
    fields: Mapping[str, Any]
    cut: AudioCut | None = None
    piece: int | None = None
    other_codes: str | None = None


@dataclass(frozen=True, slots=True)
class Pieces:
    """How a row that is too long for one pass through the model is taken apart.

    Attributes:
        kind: ``segments`` are utterances of their own; ``stream`` is one utterance that goes on from piece to piece;
            ``windows`` of codes overlap, as codes do not show where audio could be cut.
        samples: where each piece begins in the row's audio, at the codec's rate, and where the last one ends.
        frames: where each begins in the row's codes, and where the last one ends; None until there are codes.
    """

    kind: Literal["segments", "stream", "windows"]
    samples: tuple[int, ...]
    frames: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.samples) - 1


@dataclass(frozen=True, slots=True)
class RowFailure:
    """A row that ends as failed. ``key`` is None where the line could not be read far enough to know it, and
    ``other_codes`` names those whose audio has failed, unless that is the row's own."""

    line: int
    digest: str
    key: str | None
    stage: Stage
    reason: str
    other_codes: str | None = None

    @classmethod
    def of(cls, row: ManifestRow, stage: Stage, reason: str) -> RowFailure:
        """The failure of a row. Where it is that of a piece or of other audio, the reason says which."""
        if row.piece is not None and row.cut is not None and row.cut.end is not None:
            reason = f"{reason} (in its piece from {row.cut.start:g} to {row.cut.end:g} s)"
        if row.other_codes is not None:
            reason = f"for {row.other_codes}: {reason}"
        return cls(row.line, row.digest, row.key, stage, reason, row.other_codes)


@dataclass(frozen=True, slots=True)
class LoadedRow:
    """A row whose input is in memory, as the codec's front end left it.

    Attributes:
        features: float32 (channels, length), what the codec's ``front_end`` made of the audio; None in ``token2wav``.
        codes: uint16 (T, K), codes read from the row's token file; None unless ``token2wav``.
        num_samples: the utterance's length in samples at the codec's sample rate, before the front end pads it; in
            ``token2wav`` what its codes are decoded to, at the rate of the codec's output.
        frames: token frames, which is what a batch's budget counts.
        load_seconds: processor time of this row's loading.
        pieces: of a row that is too long for one pass. Its audio is not loaded then; its codes are.
    """

    row: ManifestRow
    features: npt.NDArray[np.float32] | None
    codes: npt.NDArray[np.uint16] | None
    num_samples: int
    frames: int
    load_seconds: float = 0.0
    pieces: Pieces | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of array data this record holds."""
        return sum(array.nbytes for array in (self.features, self.codes) if array is not None)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that go through the codec together. Which rows share a batch changes no row's result."""

    rows: tuple[LoadedRow, ...]

    @property
    def frames(self) -> int:
        """Token frames of all rows together."""
        return sum(loaded.frames for loaded in self.rows)


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """A row's results, on their way to the writers.

    Attributes:
        codes: uint16 (T, K); in ``token2wav`` the ones that were read.
        samples: float32 (S,), or (channels, S) of a codec with several, at the codec's sample rate, nominally in
            [-1, 1]; None in ``wav2token``. Those of a long row are a ``numpy.memmap``, so that they need no memory.
        num_samples: as in ``LoadedRow``.
        segments: of a row that was encoded in segments, the first frame and the first sample of each.
        hidden_states: float16 (T, d), the encoder's output before quantization; None where it is not kept.
        others: results of the row's other audio, by the name of their codes.
    """

    row: ManifestRow
    codes: npt.NDArray[np.uint16]
    samples: npt.NDArray[np.float32] | None
    num_samples: int
    segments: tuple[tuple[int, int], ...] | None = None
    hidden_states: npt.NDArray[np.float16] | None = None
    others: Mapping[str, TokenizedRow] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of array data this record holds."""
        own = sum(array.nbytes for array in (self.codes, self.samples, self.hidden_states) if array is not None)
        return own + sum(other.nbytes for other in self.others.values())


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One line of a ledger: how a row ended. Written only after the row's outputs are published.

    Attributes:
        status: ``done``, ``failed``, or ``redo`` (cancels an earlier ``done`` whose outputs are missing or wrong).
        num_samples: input length in samples at the codec's rate (``done`` only).
        frames: token frames (``done`` only).
        checksums: CRC-32 of the row's codes (``codes``) and of the bytes that were stored for it, by name
            (``done`` only).
        stage, reason: why it failed (``failed`` only).
    """

    line: int
    digest: str
    key: str | None
    status: Literal["done", "failed", "redo"]
    num_samples: int = 0
    frames: int = 0
    checksums: Mapping[str, int] = field(default_factory=dict)
    stage: Stage | None = None
    reason: str | None = None
