"""Flat streams for language models: the codes of many utterances as one sequence of token numbers.

Every codebook has numbers of its own: code c of codebook k is token ``offsets[k] + c``, with ``offsets[k]`` the sum of
the sizes before it. Behind all codebooks come two more: the end of an utterance, which stands after each, and padding,
which only the delayed pattern needs. So the vocabulary has the sum of the sizes plus 2.

    interleaved    frame by frame, each with its K codes                      T·K + 1 tokens
    delayed        codebook k is k steps late; where it has no code, padding  (T + K - 1)·K + 1 tokens

``MegatronFile`` writes ``.bin`` and ``.idx`` as Megatron-LM reads them, one utterance a sequence and a document;
``FlatFile`` writes ``tokens.npy`` and ``offsets.npy``: utterance n is ``tokens[offsets[n] : offsets[n + 1]]``.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import numpy.typing as npt

Pattern = Literal["interleaved", "delayed"]

#: Megatron takes two bytes a token below this size of the vocabulary, and four from it on.
_MOST_OF_TWO_BYTES = 65500

#: Numbers that the index file has for types.
_TYPE_CODES = {"uint16": 8, "int32": 4}

_NPY_HEADER_BYTES = 128


@dataclass(frozen=True, slots=True)
class Layout:
    """How codes become token numbers and back.

    Attributes:
        codebook_sizes: of the K codebooks.
    """

    pattern: Pattern
    codebook_sizes: tuple[int, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """The token of each codebook's code 0."""
        return tuple(int(end) for end in np.cumsum((0, *self.codebook_sizes[:-1])))

    @property
    def end_of_utterance(self) -> int:
        """The token after each utterance."""
        return sum(self.codebook_sizes)

    @property
    def padding(self) -> int:
        """The token where a delayed codebook has no code."""
        return self.end_of_utterance + 1

    @property
    def vocabulary_size(self) -> int:
        """Tokens there are."""
        return self.end_of_utterance + 2

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of token numbers in files."""
        return np.dtype("<u2" if self.vocabulary_size < _MOST_OF_TWO_BYTES else "<i4")

    def encode(self, codes: npt.NDArray[np.uint16]) -> npt.NDArray[Any]:
        """Codes (T, K) to token numbers, the end of the utterance included."""
        num_frames, width = codes.shape
        shifted = codes.astype(np.int64) + np.array(self.offsets)
        if self.pattern == "delayed":
            late = np.full((num_frames + width - 1, width), self.padding, np.int64)
            for codebook in range(width):
                late[codebook : codebook + num_frames, codebook] = shifted[:, codebook]
            shifted = late
        return np.append(shifted.reshape(-1), self.end_of_utterance).astype(self.dtype)

    def decode(self, tokens: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
        """Token numbers of one utterance, with or without its end, to codes (T, K).

        Raises:
            ValueError: they are no such utterance.
        """
        values = np.asarray(tokens, np.int64)
        if len(values) and values[-1] == self.end_of_utterance:
            values = values[:-1]
        width = len(self.codebook_sizes)
        if len(values) % width:
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
        return codes.astype(np.uint16)


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
        self._stream: BinaryIO = (folder / "tokens.npy").open("wb")
        self._stream.write(bytes(_NPY_HEADER_BYTES))
        self._dtype = dtype
        self._offsets = array("q", [0])

    def append(self, tokens: npt.NDArray[Any]) -> None:
        """One utterance."""
        self._stream.write(tokens.astype(self._dtype).data)
        self._offsets.append(self._offsets[-1] + len(tokens))

    def close(self) -> None:
        """Write the tokens' header, which has their number, and the offsets."""
        self._stream.seek(0)
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._offsets[-1],)}
        np.lib.format.write_array_header_1_0(self._stream, header)
        assert self._stream.tell() == _NPY_HEADER_BYTES
        self._stream.close()
        np.save(self._folder / "offsets.npy", np.frombuffer(self._offsets, np.int64))
