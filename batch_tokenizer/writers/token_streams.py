"""Flat streams for language models: the codes of many utterances as one sequence of token numbers.

Every codebook has numbers of its own: code c of codebook k is token ``offsets[k] + c``, with ``offsets[k]`` the base
offset and the sum of the sizes before it. Behind all codebooks come two more: the end of an utterance, which stands
after each, and padding, which only the delayed pattern needs. Marks may stand around the codes of an utterance, and the
tokens of its text, which are below the base offset, before or behind them.

    interleaved    frame by frame, each with its K codes                      T·K tokens
    delayed        codebook k is k steps late; where it has no code, padding  (T + K - 1)·K tokens

``MegatronFile`` writes ``.bin`` and ``.idx`` as Megatron-LM reads them, one utterance a sequence and a document;
``FlatFile`` writes ``tokens.npy`` and ``offsets.npy``: utterance n is ``tokens[offsets[n] : offsets[n + 1]]``.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from batch_tokenizer.storage.npy import NpyWriter

Pattern = Literal["interleaved", "delayed"]

#: Folders of the parts of a stream that is split.
SPLIT_NAMES = ("train", "valid", "test")

#: Megatron takes two bytes a token below this size of the vocabulary, and four from it on.
_MOST_OF_TWO_BYTES = 65500

#: Numbers that the index file has for types.
_TYPE_CODES = {"uint16": 8, "int32": 4}


@dataclass(frozen=True, slots=True)
class Layout:
    """How codes become token numbers and back.

    Attributes:
        codebook_sizes: of the K codebooks.
        base_offset: the token of the first codebook's code 0.
        audio_start, audio_end: tokens around the codes of an utterance; None where there are none.
        last: the token after each utterance; None for the first one behind the codebooks.
        text_vocabulary: tokens below this number are text.
    """

    pattern: Pattern
    codebook_sizes: tuple[int, ...]
    base_offset: int = 0
    audio_start: int | None = None
    audio_end: int | None = None
    last: int | None = None
    text_vocabulary: int = 0

    @property
    def offsets(self) -> tuple[int, ...]:
        """The token of each codebook's code 0."""
        return tuple(self.base_offset + int(end) for end in np.cumsum((0, *self.codebook_sizes[:-1])))

    @property
    def end_of_codes(self) -> int:
        """The first token behind all codebooks."""
        return self.base_offset + sum(self.codebook_sizes)

    @property
    def end_of_utterance(self) -> int:
        """The token after each utterance."""
        return self.end_of_codes if self.last is None else self.last

    @property
    def padding(self) -> int:
        """The token where a delayed codebook has no code."""
        return self.end_of_codes + 1

    @property
    def vocabulary_size(self) -> int:
        """Tokens there are."""
        marks = (mark for mark in (self.audio_start, self.audio_end, self.last) if mark is not None)
        return max(self.padding, self.text_vocabulary - 1, *marks) + 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of token numbers in files."""
        return np.dtype("<u2" if self.vocabulary_size < _MOST_OF_TWO_BYTES else "<i4")

    def encode(self, codes: npt.NDArray[np.uint16]) -> npt.NDArray[Any]:
        """Codes (T, K) to token numbers, the end of the utterance included."""
        return self.join([codes])

    def join(self, parts: Sequence[npt.NDArray[np.uint16] | Sequence[int]]) -> npt.NDArray[Any]:
        """Codes (T, K) and the tokens of texts, in this order, to an utterance with its end."""
        pieces = [
            self._codes(part) if isinstance(part, np.ndarray) else np.array(part, np.int64)
            for part in (*parts, [self.end_of_utterance])
        ]
        return np.concatenate(pieces).astype(self.dtype)

    def _codes(self, codes: npt.NDArray[np.uint16]) -> npt.NDArray[np.int64]:
        """Tokens of codes with the marks around them."""
        num_frames, width = codes.shape
        shifted = codes.astype(np.int64) + np.array(self.offsets)
        if self.pattern == "delayed":
            late = np.full((num_frames + width - 1, width), self.padding, np.int64)
            for codebook in range(width):
                late[codebook : codebook + num_frames, codebook] = shifted[:, codebook]
            shifted = late
        begin = [] if self.audio_start is None else [self.audio_start]
        end = [] if self.audio_end is None else [self.audio_end]
        return np.concatenate((np.array(begin, np.int64), shifted.reshape(-1), np.array(end, np.int64)))

    def decode(self, tokens: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
        """Token numbers of one utterance, with or without its end, to codes (T, K).

        Raises:
            ValueError: they are no such utterance.
        """
        return self.split(tokens)[0]

    def split(self, tokens: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
        """Token numbers of one utterance, with or without its end, to codes (T, K) and the tokens of its text.

        Raises:
            ValueError: they are no such utterance.
        """
        # 1. The codes lie together, and all else is text and marks.
        values = np.asarray(tokens, np.int64)
        if len(values) and values[-1] == self.end_of_utterance:
            values = values[:-1]
        inside = (values >= self.base_offset) & (values < self.end_of_codes)
        if self.pattern == "delayed":
            inside |= values == self.padding
        places = np.flatnonzero(inside)
        begin, end = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        before, values, after = values[:begin], values[begin:end], values[end:]
        if self.audio_start is not None and before[-1:].tolist() == [self.audio_start]:
            before = before[:-1]
        if self.audio_end is not None and after[:1].tolist() == [self.audio_end]:
            after = after[1:]
        text = np.concatenate((before, after))
        if (text < 0).any() or (text >= self.text_vocabulary).any():
            raise ValueError("tokens that are neither text nor codes")
        # 2. Frames of codes.
        width = len(self.codebook_sizes)
        if not len(values) or len(values) % width:
            raise ValueError(f"{len(values)} tokens are not frames of {width}")
        grid = values.reshape(-1, width)
        if self.pattern == "delayed":
            num_frames = len(grid) - width + 1
            if num_frames < 1:
                raise ValueError(f"{len(grid)} steps are too few for {width} delayed codebooks")
            grid = np.stack([grid[codebook : codebook + num_frames, codebook] for codebook in range(width)], axis=1)
        codes = grid - np.array(self.offsets)
        if (codes < 0).any() or (codes >= np.array(self.codebook_sizes)).any():
            raise ValueError("tokens that are not of the codebook in whose place they stand")
        return codes.astype(np.uint16), text

    def as_json(self) -> dict[str, Any]:
        """The layout as ``tokens.json`` has it."""
        return {
            "pattern": self.pattern,
            "num_quantizers": len(self.codebook_sizes),
            "codebook_sizes": self.codebook_sizes,
            "codebook_offsets": self.offsets,
            "base_offset": self.base_offset,
            "audio_start": self.audio_start,
            "audio_end": self.audio_end,
            "end_of_utterance": self.end_of_utterance,
            "padding": self.padding,
            "text_vocabulary": self.text_vocabulary,
            "vocabulary_size": self.vocabulary_size,
            "token_dtype": self.dtype.name,
        }

    @classmethod
    def of_json(cls, about: Mapping[str, Any]) -> Layout:
        """The layout that ``as_json`` wrote.

        Raises:
            KeyError, TypeError: it is none.
        """
        others = {name: about.get(name) for name in ("audio_start", "audio_end")}
        base, text = about.get("base_offset", 0), about.get("text_vocabulary", 0)
        last = about.get("end_of_utterance")
        return cls(about["pattern"], tuple(about["codebook_sizes"]), base, **others, last=last, text_vocabulary=text)


class TokenStream(Protocol):
    """Files of a stream that is being written."""

    def append(self, tokens: npt.NDArray[Any]) -> None:
        """One utterance."""

    def close(self) -> None:
        """Write what comes last."""


class MegatronFile:
    """``FOLDER/tokens.bin`` and ``.idx``. Memory grows by four bytes an utterance."""

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        self._stream = (folder / "tokens.bin").open("wb")
        self._index = folder / "tokens.idx"
        self._dtype = dtype
        self._lengths = array("i")

    def append(self, tokens: npt.NDArray[Any]) -> None:
        """One utterance."""
        self._stream.write(tokens.astype(self._dtype).data)
        self._lengths.append(len(tokens))

    def close(self) -> None:
        """Write the index: header, then each sequence's length, its first byte, and where documents begin."""
        self._stream.close()
        lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.zeros(0, np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
        count = len(lengths)
        with self._index.open("wb") as stream:
            stream.write(b"MMIDIDX\x00\x00")
            stream.write(struct.pack("<QBQQ", 1, _TYPE_CODES[self._dtype.name], count, count + 1))
            stream.write(lengths.astype("<i4").data)
            stream.write((np.concatenate(([0], ends[:-1])) if count else ends).astype("<i8").data)
            stream.write(np.arange(count + 1, dtype="<i8").data)


class FlatFile:
    """``FOLDER/tokens.npy`` and ``offsets.npy``. Memory grows by eight bytes an utterance."""

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        self._folder = folder
        self._tokens = NpyWriter(folder / "tokens.npy", dtype)
        self._offsets = array("q", [0])

    def append(self, tokens: npt.NDArray[Any]) -> None:
        """One utterance."""
        self._tokens.append(tokens)
        self._offsets.append(self._offsets[-1] + len(tokens))

    def close(self) -> None:
        """Write the tokens' header, which has their number, and the offsets."""
        self._tokens.close()
        np.save(self._folder / "offsets.npy", np.frombuffer(self._offsets, np.int64))
