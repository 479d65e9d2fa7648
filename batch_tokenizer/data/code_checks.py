"""Codes as they come out of a file, from anywhere, and the check that a codec can have them.

The check of frames is one numpy conversion; only those that fail it are searched for the place to name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_tokenizer.records import RowError


@dataclass(frozen=True, slots=True)
class Codebooks:
    """What codes may be.

    Attributes:
        name: of the codec, for messages.
        sizes: codes of each codebook; there may be fewer codebooks, at least one.
    """

    name: str
    sizes: tuple[int, ...]


#: For tokens of an unknown codec.
ANY_CODEBOOKS = Codebooks("any codec", (1 << 16,) * 256)


@dataclass(frozen=True, slots=True)
class UncheckedArray:
    """Codes as an array of any integers."""

    values: npt.NDArray[Any]

    def check(self, name: str, codebooks: Codebooks) -> npt.NDArray[np.uint16]:
        """uint16 (T, K) within the codebooks, or ``RowError`` with the first fault."""
        values, sizes = self.values, codebooks.sizes
        if values.ndim != 2 or values.dtype.kind not in "iu":
            raise RowError("load", f"{name}: an array {values.shape} of {values.dtype}, not integers (T, K)")
        num_frames, width = values.shape
        if num_frames == 0 or width == 0:
            raise RowError("load", f"{name}: has no {'frames' if num_frames == 0 else 'codes'}")
        if width > len(sizes):
            raise RowError(
                "load", f"{name}: frames have {width} codes where {codebooks.name} has {len(sizes)} codebooks"
            )
        ends = np.array(sizes[:width])
        if (values.min(axis=0) < 0).any() or (values.max(axis=0) >= ends).any():
            frame, codebook = map(int, np.argwhere((values < 0) | (values >= ends))[0])
            raise RowError(
                "load",
                f"{name}: frame {frame}, codebook {codebook}: code {values[frame, codebook]} is outside "
                f"0 to {sizes[codebook] - 1}",
            )
        return np.ascontiguousarray(values, dtype=np.uint16)


@dataclass(frozen=True, slots=True)
class UncheckedFrames:
    """Codes as whatever JSON had in their place: lists of frames, each with whether it may hold true or false."""

    pieces: Callable[[], Iterable[tuple[list[Any], bool]]]

    def check(self, name: str, codebooks: Codebooks) -> npt.NDArray[np.uint16]:
        """As ``UncheckedArray.check``."""
        checked: list[npt.NDArray[np.uint16]] = []
        num_frames, width = 0, None
        for tokens, may_hold_bools in self.pieces():
            sound = not may_hold_bools or _all_integers(tokens)
            codes = _as_array(tokens, codebooks.sizes, width) if sound and tokens else None
            if codes is None:
                fault = _first_fault(tokens, codebooks, num_frames, width) if tokens else "has no frames"
                raise RowError("load", f"{name}: {fault}")
            checked.append(codes)
            num_frames, width = num_frames + len(codes), codes.shape[1]
        return checked[0] if len(checked) == 1 else np.concatenate(checked)


def _as_array(tokens: list[Any], sizes: tuple[int, ...], width: int | None) -> npt.NDArray[np.uint16] | None:
    """Codes (T, K), or None if anything about them is wrong. ``width`` is K where frames before these have shown it."""
    try:
        values = np.array(tokens)
    except ValueError:  # ragged
        return None
    if values.ndim != 2 or values.dtype.kind not in "iu" or not 1 <= values.shape[1] <= len(sizes):
        return None
    if width is not None and values.shape[1] != width:
        return None
    ends = np.array(sizes[: values.shape[1]])
    if (values.min(axis=0) < 0).any() or (values.max(axis=0) >= ends).any():
        return None
    return values.astype(np.uint16)


def _all_integers(tokens: list[Any]) -> bool:
    return all(isinstance(frame, list) and all(type(code) is int for code in frame) for frame in tokens)


def _first_fault(tokens: list[Any], codebooks: Codebooks, first_frame: int, width: int | None) -> str:
    """What is wrong with tokens that ``_as_array`` refused; they begin with frame ``first_frame``."""
    most = len(codebooks.sizes)
    if width is None:
        width = len(tokens[0]) if isinstance(tokens[0], list) else 0
    for time_step, frame in enumerate(tokens, first_frame):
        if not isinstance(frame, list):
            return f"frame {time_step} is {kind_of(frame)}, not a list of codes"
        if not frame:
            return f"frame {time_step} has no codes"
        if len(frame) > most:
            return f"frame {time_step} has {len(frame)} codes where {codebooks.name} has {most} codebooks"
        if len(frame) != width:
            return f"frame {time_step} has {len(frame)} codes where frame 0 has {width}"
        for codebook, (code, size) in enumerate(zip(frame, codebooks.sizes, strict=False)):
            place = f"frame {time_step}, codebook {codebook}"
            if type(code) is not int:
                return f"{place}: {kind_of(code)}, not an integer"
            if not 0 <= code < size:
                return f"{place}: code {code} is outside 0 to {size - 1}"
    raise AssertionError("the tokens were refused, but no fault is found")


def kind_of(value: object) -> str:
    """A JSON value's kind, for a message; a number is shown."""
    if isinstance(value, float):
        return f"the number {value}"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number"}
    return names.get(type(value), "null")
