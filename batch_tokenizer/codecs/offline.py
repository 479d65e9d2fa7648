"""Encoding and decoding a handful of utterances outside of a run, for ``evaluate``, ``inspect`` and ``report``.

Results are those of a run, as a codec's results do not depend on the other members of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from batch_tokenizer.audio.resampling import resample
from batch_tokenizer.codecs.memory import DoesNotFit, in_memory
from batch_tokenizer.records import Pieces, RowError, RunError, Stage

if TYPE_CHECKING:
    from batch_tokenizer.codecs.base import Codec, CodecInfo

Samples = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint16]


def check_num_quantizers(wanted: Sequence[int], most: int) -> tuple[int, ...]:
    """The numbers of codebooks to look at, rising, each once; ``most`` alone where none is wanted.

    Raises:
        RunError: one of them is out of range.
    """
    for number in wanted:
        if not 1 <= number <= most:
            raise RunError(f"--num_quantizers {number}: must be between 1 and {most}, the codebooks there are")
    return tuple(sorted(set(wanted))) or (most,)


def encode(codec: Codec, samples: Sequence[Samples], num_quantizers: int) -> list[Codes | RowError]:
    """Samples (S_i,) or (channels, S_i) at the codec's rate to codes (T_i, ``num_quantizers``) each, or the error."""
    features = [codec.spec.features(one) for one in samples]
    frames = [codec.spec.num_frames(one.shape[-1]) for one in samples]
    results: list[Codes | RowError] = []
    for first, last in _chunks(frames, codec.frame_budget):
        part = features[first:last]
        results += _compute_or_split(codec, lambda few: codec.encode(few, num_quantizers), part, "encode")
    return results


def decode(
    codec: Codec, codes: Sequence[Codes], segments: Sequence[Pieces | None] | None = None
) -> list[Samples | RowError]:
    """Codes (T_i, K_i) to samples (S_i,) each at the codec's ``output_sample_rate``, or the error.

    Args:
        segments: for each, the segments that it was encoded in, which are decoded one by one; None where it was not.
    """
    segments = segments or [None] * len(codes)
    parts = [part for one, pieces in zip(codes, segments, strict=True) for part in _parts(one, pieces)]
    results: list[Samples | RowError] = []
    for first, last in _chunks([len(part) for part in parts], codec.frame_budget):
        results += _compute_or_split(codec, codec.decode, parts[first:last], "decode")
    made = iter(results)
    return [
        next(made) if pieces is None else _joined(codec.info, list(islice(made, len(pieces))), pieces)
        for pieces in segments
    ]


def _parts(codes: Codes, segments: Pieces | None) -> list[Codes]:
    if segments is None:
        return [codes]
    assert segments.frames is not None
    return [codes[first:last] for first, last in pairwise(segments.frames)]


def _joined(info: CodecInfo, parts: Sequence[Samples | RowError], segments: Pieces) -> Samples | RowError:
    places = [round(sample * info.output_sample_rate / info.sample_rate) for sample in segments.samples]
    samples = []
    for part, (begin, end) in zip(parts, pairwise(places), strict=True):
        if isinstance(part, RowError):
            return part
        samples.append(fitted(part, end - begin))
    return np.concatenate(samples, axis=-1)


def at_input_rate(info: CodecInfo, samples: Samples) -> Samples:
    """Decoded samples as they are compared with the original: (S,), the mean of channels, at the original's rate."""
    mono = samples if samples.ndim == 1 else samples.mean(axis=0)
    return resample(mono[None], info.output_sample_rate, info.sample_rate, "soxr")[0]


def _chunks(frames: Sequence[int], budget: int) -> Iterator[tuple[int, int]]:
    """Ranges of about ``budget`` frames, of one member at least."""
    first = total = 0
    for number, count in enumerate(frames):
        if number > first and total + count > budget:
            yield first, number
            first, total = number, 0
        total += count
    if first < len(frames):
        yield first, len(frames)


def _compute_or_split(
    codec: Codec, compute: Callable[[Sequence[Any]], list[Any]], members: Sequence[Any], stage: Stage
) -> list[Any]:
    """The results of ``compute``; of each member alone where all together do not fit in memory."""
    try:
        return in_memory(stage, lambda: compute(members))
    except DoesNotFit as error:
        if len(members) == 1:
            codec.release()
            return [error]
    codec.release()
    return [result for member in members for result in _compute_or_split(codec, compute, [member], stage)]


def fitted(samples: npt.NDArray[np.float32], length: int) -> npt.NDArray[np.float32]:
    """A segment's decoded samples, cut or filled up with zeros to the ``length`` that it has in its row."""
    missing = max(0, length - samples.shape[-1])
    return np.pad(samples[..., :length], [(0, 0)] * (samples.ndim - 1) + [(0, missing)])
