"""Rows that are too long for one pass through the model: computed in pieces, joined to one result.

    loader ─LoadedRow with pieces─► LongRows ─rows of pieces─► loader ─► packer ─► codec ─► LongRows ─► writers

A row's pieces are loaded a few at a time and go through the codec like any rows (segments, windows), or in their order
through a stream of their row's own. Codes and hidden states are kept in memory, audio in an unnamed file, each piece at
its place, so memory does not grow with the row's audio. The row ends once: when its last piece is done, or when the
first one fails; results of the others are then dropped.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from batch_tokenizer.codecs.base import Codec, CodecStream
from batch_tokenizer.codecs.offline import fitted
from batch_tokenizer.data.loader import Loader
from batch_tokenizer.data.pieces import CONTEXT_SECONDS, piece_of
from batch_tokenizer.records import LoadedRow, ManifestRow, RowFailure, RunError, TokenizedRow
from batch_tokenizer.runtime.signals import StopRequest

Samples = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint16]
RowId = tuple[int, str | None, str | None]

_SAMPLE_BYTES = 4

#: Rows whose pieces are loaded side by side. Each of them has a file, and a stream its state.
ROWS_AT_ONCE = 2

#: Token frames over which one window's audio fades into the next one's.
FADE_FRAMES = 1


class LongRows:
    """The long rows that one process is working on.

    Args:
        codec: of which streams are opened.
        loader: loads the pieces, until the process is asked to ``stop``.
        pieces_ahead: pieces of a row that are in the loader at a time.
        folder: where unnamed files of samples are made; they end with the process.
    """

    def __init__(self, codec: Codec, loader: Loader, stop: StopRequest, pieces_ahead: int, folder: Path) -> None:
        self._codec = codec
        self._loader = loader
        self._stop = stop
        self._pieces_ahead = pieces_ahead
        self._folder = folder
        self._rows: dict[RowId, _LongRow] = {}
        self._waiting: deque[LoadedRow] = deque()
        self._failed: set[RowId] = set()

    def unfold(self, loaded: LoadedRow) -> Iterator[tuple[LoadedRow, CodecStream | None]]:
        """What the codec can be given now that ``loaded`` has come from the loader: the row itself, or pieces of long
        rows; and the stream that a piece of a streamed row goes through, alone and in its turn."""
        # 1. A long row, not computed yet. Its audio is loaded piece by piece, when its turn comes.
        if loaded.pieces is not None:
            if loaded.codes is None:
                self._waiting.append(loaded)
                self._start_rows()
                return
            # Codes are in memory whole, so their pieces need no loading.
            long = self._open(loaded)
            for piece in long.pieces_of_codes():
                if self._stop.requested or _id(piece.row) not in self._rows:
                    return
                yield piece, long.stream
        # 2. A row that fits in one pass.
        elif loaded.row.piece is None:
            yield loaded, None
        # 3. A piece of a long row, whose next piece takes its place in the loader. Pieces of failed rows are dropped.
        elif _id(loaded.row) in self._rows:
            long = self._rows[_id(loaded.row)]
            self._load(long, 1)
            self._start_rows()
            for piece in long.in_turn(loaded):
                yield piece, long.stream

    def fold(self, outcome: TokenizedRow | RowFailure) -> TokenizedRow | RowFailure | None:
        """How a row has ended, given the outcome of a row or of a piece; None if that ends no row.

        Raises:
            RunError: samples cannot be kept.
        """
        if isinstance(outcome, RowFailure):
            return self._fail(outcome)
        if outcome.row.piece is None:
            return outcome
        long = self._rows.get(_id(outcome.row))
        if long is None:  # another piece has failed
            return None
        try:
            if not long.add(outcome):
                return None
        except OSError as error:
            raise RunError(
                f"{self._folder}: audio of a long row cannot be kept: {error.strerror}", exit_code=1
            ) from error
        del self._rows[_id(outcome.row)]
        return long.result()

    def _fail(self, failure: RowFailure) -> RowFailure | None:
        """The failure, unless another piece of its row failed before."""
        row = _id(failure)
        if row in self._failed:
            return None
        if self._rows.pop(row, None) is not None:
            self._failed.add(row)
            self._start_rows()
        return failure

    def _open(self, loaded: LoadedRow) -> _LongRow:
        long = self._rows[_id(loaded.row)] = _LongRow(loaded, self._codec, self._folder)
        return long

    def _start_rows(self) -> None:
        """Begin with rows that wait, as far as they may be loaded beside each other."""
        while True:
            loading = sum(not long.is_requested for long in self._rows.values())
            if not self._waiting or loading >= ROWS_AT_ONCE:
                return
            self._load(self._open(self._waiting.popleft()), self._pieces_ahead)

    def _load(self, long: _LongRow, count: int) -> None:
        pieces = long.next_to_load(count)
        if pieces and not self._stop.requested:  # the loader may be stopped already
            self._loader.submit(pieces)


def _id(row: ManifestRow | RowFailure) -> RowId:
    return row.line, row.key, row.other_codes


class _LongRow:
    """One long row between its first piece and its last."""

    def __init__(self, loaded: LoadedRow, codec: Codec, folder: Path) -> None:
        assert loaded.pieces is not None
        self.stream = codec.open_stream() if loaded.pieces.kind == "stream" else None
        self._whole = loaded
        self._pieces = loaded.pieces
        self._info = codec.info
        self._samples = _SampleFile(folder, codec.info.channels)
        self._codes: dict[int, Codes] = {}
        self._hidden_states: dict[int, npt.NDArray[np.float16]] = {}
        self._requested = 0
        self._waiting: dict[int, LoadedRow] = {}

    @property
    def is_requested(self) -> bool:
        """Whether no piece is left to be loaded."""
        return self._whole.codes is not None or self._requested == len(self._pieces)

    def next_to_load(self, count: int) -> list[ManifestRow]:
        """The rows of the next pieces."""
        numbers = range(self._requested, min(len(self._pieces), self._requested + count))
        self._requested = numbers.stop
        return [piece_of(self._whole.row, self._pieces, number, self._info.sample_rate) for number in numbers]

    def in_turn(self, piece: LoadedRow) -> Iterator[LoadedRow]:
        """The piece itself; of a stream, those that have come and whose turn it is."""
        if self.stream is None:
            yield piece
            return
        assert piece.row.piece is not None
        self._waiting[piece.row.piece] = piece
        while (turn := self._waiting.pop(len(self._codes), None)) is not None:
            yield turn

    def pieces_of_codes(self) -> Iterator[LoadedRow]:
        """The pieces of a row whose codes were loaded."""
        assert self._whole.codes is not None
        for number in range(len(self._pieces)):
            first, last = self._window(number)
            row = replace(self._whole.row, piece=number)
            yield LoadedRow(row, None, np.ascontiguousarray(self._whole.codes[first:last]), 0, last - first)

    def add(self, result: TokenizedRow) -> bool:
        """Keep a piece's result; returns whether it was the last one missing."""
        number = result.row.piece
        assert number is not None
        self._codes[number] = result.codes
        if result.hidden_states is not None:
            self._hidden_states[number] = result.hidden_states.copy()  # it may be a view of a whole batch's
        if result.samples is not None:
            self._keep(number, result.samples)
        return len(self._codes) == len(self._pieces)

    def result(self) -> TokenizedRow:
        """The row's result, when all pieces are there."""
        whole, segments = self._whole, None
        codes = whole.codes
        if codes is None:
            parts = [self._codes[number] for number in range(len(self._pieces))]
            codes = np.concatenate(parts)
            if self._pieces.kind == "segments":
                starts = np.cumsum([0, *map(len, parts[:-1])]).tolist()
                segments = tuple(zip(starts, self._pieces.samples[:-1], strict=True))
        hidden_states = None
        if self._hidden_states:
            hidden_states = np.concatenate([self._hidden_states[number] for number in range(len(self._pieces))])
        return TokenizedRow(whole.row, codes, self._samples.map(), whole.num_samples, segments, hidden_states)

    def _window(self, number: int) -> tuple[int, int]:
        """The frames that the codec is given for a piece."""
        assert self._pieces.frames is not None
        context = round(CONTEXT_SECONDS * self._info.frame_rate) if self._pieces.kind == "windows" else 0
        return window(self._pieces.frames, number, context)

    def _keep(self, number: int, samples: Samples) -> None:
        # Segments are exactly as long as their input; windows fade into their neighbours; a stream's parts just follow.
        begin, end = (self._output(place) for place in self._pieces.samples[number : number + 2])
        if self._pieces.kind == "stream":
            self._samples.add(begin, samples)
        elif self._pieces.kind == "segments":
            self._samples.add(begin, fitted(samples, end - begin))
        else:
            origin = self._output(self._window(number)[0] * self._info.samples_per_frame)
            is_last = number + 1 == len(self._pieces)
            place, used = fade(
                samples,
                begin - origin,
                None if is_last else end - origin,
                self._output(FADE_FRAMES * self._info.samples_per_frame),
            )
            self._samples.add(origin + place, used)

    def _output(self, sample: int) -> int:
        """A place in the row's audio at the rate of what is decoded."""
        return round(sample * self._info.output_sample_rate / self._info.sample_rate)


def window(frames: Sequence[int], number: int, context: int) -> tuple[int, int]:
    """First frame, and frame after the last, of a piece with its context; ``frames`` are where pieces begin and end."""
    return max(0, frames[number] - context), min(frames[-1], frames[number + 1] + context)


def fade(samples: Samples, begin: int, end: int | None, width: int) -> tuple[int, Samples]:
    """The part of a window's samples that is used: from ``begin`` to ``end``, faded in and out over ``width`` samples.

    Neighbours' fades add up to one. ``begin`` 0 and ``end`` None are the ends of the audio and are not faded.

    Returns:
        where the used samples begin in the window, and the samples, float32 (S,) or (channels, S).
    """
    first = begin - width // 2 if begin else 0
    last = samples.shape[-1] if end is None else end + width // 2
    used = samples[..., first:last].copy()
    middles = np.arange(first, first + used.shape[-1], dtype=np.float32) + 0.5
    if begin:
        used *= np.clip((middles - begin) / width + 0.5, 0, 1)
    if end is not None:
        used *= np.clip((end - middles) / width + 0.5, 0, 1)
    return first, used


class _SampleFile:
    """Float32 samples in a file without a name, each added to what is at its place; channels take turns."""

    def __init__(self, folder: Path, channels: int) -> None:
        self._folder = folder
        self._channels = channels
        self._file: IO[bytes] | None = None

    def add(self, place: int, samples: Samples) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - lives as long as the row
        samples = np.ascontiguousarray(samples.T).reshape(-1)
        self._file.seek(_SAMPLE_BYTES * self._channels * place)
        # Where windows overlap, the fade-out of the one before is there already, and sums with this fade-in to one.
        there = np.frombuffer(self._file.read(samples.nbytes), np.float32)
        if len(there):
            samples = samples.copy()
            samples[: len(there)] += there
        self._file.seek(_SAMPLE_BYTES * self._channels * place)
        self._file.write(samples.tobytes())
        self._file.flush()

    def map(self) -> Samples | None:
        """All of them, (S,) or (channels, S), in the file's pages and not in memory of this process; None if there are
        none."""
        if self._file is None:
            return None
        samples = np.memmap(self._file, np.float32, mode="r")
        return samples if self._channels == 1 else samples.reshape(-1, self._channels).T
