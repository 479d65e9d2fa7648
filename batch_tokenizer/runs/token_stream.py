"""``StoredStream``: the utterances of a folder that ``convert --to flat`` or ``megatron`` wrote, by their number."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_tokenizer.records import RowError, first_line
from batch_tokenizer.storage.files import read_bytes
from batch_tokenizer.storage.json_lines import parse_json
from batch_tokenizer.writers.text_tokenizer import open_tokenizer
from batch_tokenizer.writers.token_streams import Layout

#: What ``convert`` writes beside the tokens.
ABOUT, KEYS = "tokens.json", "keys.jsonl"

_MEGATRON_HEADER = struct.Struct("<9sQBQQ")

#: Types of tokens by their number in Megatron's index.
_TYPES = {8: "<u2", 4: "<i4"}


@dataclass(frozen=True, slots=True)
class StoredStream:
    """A stream. Picklable: it holds no open file.

    Attributes:
        layout: how its tokens become codes.
        made_by: what is the same for all utterances.
        path: the file with the tokens, of ``dtype``.
        starts: int64 (N + 1,), the byte at which each utterance begins, and where the last one ends.
        key_starts: int64 (N + 1,), likewise for the lines of ``keys.jsonl``.
    """

    folder: Path
    layout: Layout
    made_by: Mapping[str, Any]
    path: Path
    dtype: str
    starts: npt.NDArray[np.int64]
    key_starts: npt.NDArray[np.int64]

    @classmethod
    def open(cls, folder: Path) -> StoredStream:
        """
        Raises:
            RowError: a file of it is missing, damaged, or does not fit the others.
        """
        try:
            about = json.loads((folder / ABOUT).read_bytes())
            layout = Layout.of_json(about)
            if (folder / "tokens.bin").exists():
                path, (dtype, starts) = folder / "tokens.bin", _megatron_places(folder / "tokens.idx")
            else:
                path, (dtype, starts) = folder / "tokens.npy", _flat_places(folder)
            key_starts = _line_starts(folder / KEYS)
            if len(key_starts) != len(starts) or starts[-1] != path.stat().st_size:
                raise ValueError(f"{len(starts) - 1:,} utterances, {len(key_starts) - 1:,} keys, or a file cut short")
        except OSError as error:
            raise RowError("load", f"{error.filename or folder}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise RowError("load", f"{folder}: no whole token stream: {first_line(error)}") from error
        made_by = about.get("made_by")
        return cls(folder, layout, made_by if isinstance(made_by, dict) else {}, path, dtype, starts, key_starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def key(self, number: int) -> str:
        """The key of utterance ``number``."""
        return str(self._about(number).get("key"))

    def read(self, number: int) -> tuple[str, npt.NDArray[np.uint16], dict[str, Any]]:
        """Key, codes uint16 (T, K), and what is known of utterance ``number``, counted from 0.

        Raises:
            RowError: it is damaged.
        """
        about = self._about(number)
        codes, _ = self._split(number)
        return str(about["key"]), codes, {**self.made_by, "codebook_sizes": list(self.layout.codebook_sizes), **about}

    def text(self, number: int) -> str | None:
        """The text that stands beside the codes of utterance ``number``; None of a stream without text.

        Raises:
            RowError: it is damaged.
            RunError: the stream's tokenizer cannot be read.
        """
        if not self.layout.text_vocabulary:
            return None
        tokenizer = open_tokenizer(str(self.folder / "tokenizer.json"))
        return str(tokenizer.decode(self._split(number)[1].tolist(), skip_special_tokens=False))

    def _split(self, number: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
        begin, stop = self.starts[number : number + 2].tolist()
        tokens = np.frombuffer(read_bytes(str(self.path), begin, stop), self.dtype)
        try:
            return self.layout.split(tokens)
        except ValueError as error:
            raise RowError("load", f"{self.path}: utterance {number + 1}: {error}") from error

    def _about(self, number: int) -> dict[str, Any]:
        """The line of ``keys.jsonl``: a key, or an object that has one."""
        begin, stop = self.key_starts[number : number + 2].tolist()
        try:
            line = parse_json(read_bytes(str(self.folder / KEYS), begin, stop))
        except ValueError as error:
            raise RowError("load", f"{self.folder / KEYS}: line {number + 1} is not JSON") from error
        about = line if isinstance(line, dict) else {"key": line}
        if not isinstance(about.get("key"), str):
            raise RowError("load", f"{self.folder / KEYS}: line {number + 1} has no key")
        return about


def is_stream(folder: Path) -> bool:
    """Whether ``convert`` wrote a stream into a folder."""
    return (folder / ABOUT).is_file() and any((folder / name).is_file() for name in ("tokens.npy", "tokens.bin"))


def _flat_places(folder: Path) -> tuple[str, npt.NDArray[np.int64]]:
    """The tokens' type, and the byte at which each utterance begins, and the last one ends."""
    offsets = np.load(folder / "offsets.npy").astype(np.int64)
    if offsets.tolist() == [0]:  # an empty file cannot be mapped
        return np.load(folder / "tokens.npy").dtype.str, np.array([(folder / "tokens.npy").stat().st_size])
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) == 0:
        raise ValueError("its arrays are no tokens")
    if offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] != len(tokens):
        raise ValueError("offsets.npy does not fit tokens.npy")
    return tokens.dtype.str, tokens.offset + offsets * tokens.dtype.itemsize


def _megatron_places(index: Path) -> tuple[str, npt.NDArray[np.int64]]:
    """As ``_flat_places``, of Megatron's index."""
    content = index.read_bytes()
    magic, version, type_code, count, _ = _MEGATRON_HEADER.unpack_from(content)
    if magic != b"MMIDIDX\0\0" or version != 1 or type_code not in _TYPES:
        raise ValueError("tokens.idx is no index of 16 or 32 bit tokens")
    dtype = _TYPES[type_code]
    lengths = np.frombuffer(content, "<i4", count, _MEGATRON_HEADER.size)
    return dtype, np.concatenate(([0], np.cumsum(lengths, dtype=np.int64) * np.dtype(dtype).itemsize))


def _line_starts(path: Path) -> npt.NDArray[np.int64]:
    ends = np.flatnonzero(np.fromfile(path, np.uint8) == ord("\n")) + 1
    return np.concatenate(([0], ends)).astype(np.int64)
