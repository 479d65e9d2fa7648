"""Audio files to codes and codes to audio files, for the Python interface: ``Codec.encode_files``,
``Codec.decode_to_files``.

Results are those of a run, as a codec's results do not depend on the other members of a batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from batch_tokenizer.audio.encoding import encoded_bytes
from batch_tokenizer.audio.loading import load_samples
from batch_tokenizer.codecs.offline import decode, encode
from batch_tokenizer.records import RowError
from batch_tokenizer.storage.atomic import atomic_write

if TYPE_CHECKING:
    from batch_tokenizer.codecs.base import Codec

#: Files that are loaded before they are encoded.
_LOADED_FILES = 32


def encode_files(
    codec: Codec, paths: Sequence[str | os.PathLike[str]], num_quantizers: int | None
) -> list[npt.NDArray[np.uint16]]:
    """As ``Codec.encode_files``."""
    if isinstance(paths, (str, bytes, os.PathLike)):
        raise TypeError(f"paths must be a list of paths, is {paths!r}")
    info, spec = codec.info, codec.spec
    names = [os.fspath(path) for path in paths]
    codes: list[npt.NDArray[np.uint16]] = []
    for start in range(0, len(names), _LOADED_FILES):
        part = names[start : start + _LOADED_FILES]
        samples = [
            load_samples(
                name, info.sample_rate, max_samples=info.max_samples, channels=info.channels, downmix=spec.downmix
            )
            for name in part
        ]
        for name, result in zip(part, encode(codec, samples, num_quantizers or info.num_codebooks), strict=True):
            if isinstance(result, RowError):
                raise RowError(result.stage, f"{name}: {result.reason}") from result
            codes.append(result)
    return codes


def decode_to_files(
    codec: Codec, codes: Sequence[npt.NDArray[np.uint16]], paths: Sequence[str | os.PathLike[str]]
) -> None:
    """As ``Codec.decode_to_files``."""
    names = [os.fspath(path) for path in paths]
    forms = [os.path.splitext(name)[1].lower().removeprefix(".") for name in names]
    if len(codes) != len(names):
        raise ValueError(f"{len(codes)} utterances for {len(names)} paths")
    for name, form in zip(names, forms, strict=True):
        if form not in ("wav", "flac"):
            raise ValueError(f"{name}: audio is written as .wav or .flac")
    for name, form, samples in zip(names, forms, decode(codec, codes), strict=True):
        if isinstance(samples, RowError):
            raise RowError(samples.stage, f"{name}: {samples.reason}") from samples
        if not np.isfinite(samples).all():
            raise RowError("decode", f"{name}: the codec made samples that are NaN or infinite")
        # To the nearest of 16-bit values, as a run writes them; the encoder would round down.
        steps = np.rint(samples * 32768).clip(-32768, 32767)
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with atomic_write(name) as file:
            file.write(encoded_bytes((steps / 32768).astype(np.float32), codec.info.output_sample_rate, form))
