"""``RowLoader``: a manifest row enters, what the codec takes leaves. It runs in loader processes.

In ``wav2token`` and ``wav2token2wav`` that is the front end's features of an audio file, in ``token2wav`` the codes of
a token file. Token files may come from anywhere, so each is checked to be what the codec can decode: the check is one
numpy conversion, and only a file that fails it is searched for the place to name.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from batch_tokenizer.audio.loading import load_samples
from batch_tokenizer.audio.resampling import Resampler
from batch_tokenizer.codecs.base import CodecInfo, CodecSpec
from batch_tokenizer.records import LoadedRow, ManifestRow, RowError, Task
from batch_tokenizer.storage.opening import opened

#: Largest token file that is read; a day of audio at 20 codebooks takes about 200 MB.
_MOST_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class RowLoader:
    """Loads the rows of one run. Picklable.

    Attributes:
        resampler: how audio reaches the codec's rate.
        num_quantizers: in ``token2wav``, the most codebooks to use of those that a file has; None for all.
    """

    task: Task
    spec: CodecSpec
    resampler: Resampler = "reference"
    num_quantizers: int | None = None

    def __call__(self, row: ManifestRow) -> LoadedRow:
        """Load one row.

        Raises:
            RowError: its file cannot be read, or is not what the codec takes.
        """
        began = time.thread_time()
        if self.task == "token2wav":
            codes, num_samples, frames = self._load_codes(row)
            return LoadedRow(row, None, codes, num_samples, frames, time.thread_time() - began)
        features, num_samples, frames = self._load_audio(row)
        return LoadedRow(row, features, None, num_samples, frames, time.thread_time() - began)

    def _load_audio(self, row: ManifestRow) -> tuple[npt.NDArray[np.float32], int, int]:
        if row.wav is None:
            raise RowError("load", "the row has no wav")
        info = self.spec.info
        samples = load_samples(row.wav, info.sample_rate, self.resampler, max_samples=info.max_samples)
        return self.spec.features(samples), len(samples), self.spec.num_frames(len(samples))

    def _load_codes(self, row: ManifestRow) -> tuple[npt.NDArray[np.uint16], int, int]:
        if row.quantized_tokens is None:
            raise RowError("load", "the row has no quantized_tokens")
        codes = read_codes(row.quantized_tokens, self.spec.info)
        frames = len(codes)
        longest = self.spec.info.max_samples
        if longest is not None and frames > (most := self.spec.num_frames(longest)):
            raise RowError("load", f"{row.quantized_tokens}: too long, {frames} frames where the model takes {most}")
        if self.num_quantizers is not None:
            codes = np.ascontiguousarray(codes[:, : self.num_quantizers])
        return codes, self.spec.num_output_samples(frames), frames


def read_codes(path: str, info: CodecInfo) -> npt.NDArray[np.uint16]:
    """The codes of a token file, ``{"quantized_tokens": [[K ints] x T], "info": {...}}`` or the bare list of lists.

    Returns:
        uint16 (T, K), T >= 1 and 1 <= K <= ``info.num_codebooks``, each within its codebook.

    Raises:
        RowError: the file cannot be read, is not of that form, was made by another codec (by ``info.fingerprint``), or
            has codes that this one does not have.
    """
    content = _read_regular_file(path)
    try:
        document = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise RowError("load", f"{path}: not JSON: {error}") from error
    if isinstance(document, Mapping):
        if "quantized_tokens" not in document:
            raise RowError("load", f"{path}: has no field quantized_tokens")
        tokens = document["quantized_tokens"]
        _check_origin(path, document.get("info"), info)
    else:
        tokens = document
    if not isinstance(tokens, list):
        raise RowError("load", f"{path}: quantized_tokens is {_name(tokens)}, not a list of frames")
    if not tokens:
        raise RowError("load", f"{path}: has no frames")
    # numpy takes true for 1 when it stands among integers.
    may_hold_bools = b"true" in content or b"false" in content
    codes = None if may_hold_bools and not _all_integers(tokens) else _as_array(tokens, info)
    if codes is None:
        raise RowError("load", f"{path}: {_first_fault(tokens, info)}")
    return codes


def _read_regular_file(path: str) -> bytes:
    """A file's bytes. Not a pipe's or a device's, which might never end."""
    with opened(path, "a token file") as (descriptor, size):
        if size > _MOST_BYTES:
            raise RowError("load", f"{path}: {size:,} bytes, too large for a token file")
        try:
            with open(descriptor, "rb", closefd=False) as file:
                return file.read()
        except OSError as error:
            raise RowError("load", f"{path}: cannot be read: {error.strerror}") from error


def _check_origin(path: str, origin: object, info: CodecInfo) -> None:
    """Codes say nothing about where they come from; the fingerprint beside them does, if there is one."""
    if not isinstance(origin, Mapping) or origin.get("fingerprint") in (None, info.fingerprint):
        return
    raise RowError(
        "load",
        f"{path}: made by codec {origin.get('codec')} (fingerprint {origin['fingerprint']}), "
        f"this is {info.name} (fingerprint {info.fingerprint})",
    )


def _as_array(tokens: list[Any], info: CodecInfo) -> npt.NDArray[np.uint16] | None:
    """Codes (T, K), or None if anything about them is wrong."""
    try:
        values = np.array(tokens)
    except ValueError:  # ragged
        return None
    if values.ndim != 2 or values.dtype.kind not in "iu" or not 1 <= values.shape[1] <= info.num_codebooks:
        return None
    sizes = np.array(info.codebook_sizes[: values.shape[1]])
    if (values.min(axis=0) < 0).any() or (values.max(axis=0) >= sizes).any():
        return None
    return values.astype(np.uint16)


def _all_integers(tokens: list[Any]) -> bool:
    return all(isinstance(frame, list) and all(type(code) is int for code in frame) for frame in tokens)


def _first_fault(tokens: list[Any], info: CodecInfo) -> str:
    """What is wrong with tokens that ``_as_array`` refused."""
    width = len(tokens[0]) if isinstance(tokens[0], list) else 0
    for time_step, frame in enumerate(tokens):
        if not isinstance(frame, list):
            return f"frame {time_step} is {_name(frame)}, not a list of codes"
        if not frame:
            return f"frame {time_step} has no codes"
        if len(frame) > info.num_codebooks:
            return f"frame {time_step} has {len(frame)} codes where {info.name} has {info.num_codebooks} codebooks"
        if len(frame) != width:
            return f"frame {time_step} has {len(frame)} codes where frame 0 has {width}"
        for codebook, (code, size) in enumerate(zip(frame, info.codebook_sizes, strict=False)):
            place = f"frame {time_step}, codebook {codebook}"
            if type(code) is not int:
                return f"{place}: {_name(code)}, not an integer"
            if not 0 <= code < size:
                return f"{place}: code {code} is outside 0 to {size - 1}"
    raise AssertionError("the tokens were refused, but no fault is found")


def _name(value: object) -> str:
    """A JSON value's kind, for a message; a number is shown."""
    if isinstance(value, float):
        return f"the number {value}"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number"}
    return names.get(type(value), "null")
