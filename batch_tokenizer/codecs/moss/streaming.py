"""Audio and codes in chunks as they arrive, for several utterances at once, equal to doing each utterance in one pass.

Input: one list a step with a chunk of any size, also empty, for each utterance; None after its end. Samples of a stereo
model are interleaved.
Output: the whole frames that are complete after each step. Memory is constant: a chunk, less than a frame of buffered
samples, and the keys and values of each layer's window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from batch_tokenizer.codecs.moss.layers import Stream
from batch_tokenizer.codecs.moss.model import MossAudioTokenizer


@dataclass
class _Utterance:
    stream: Stream = field(default_factory=Stream)
    buffered: Tensor = field(default_factory=lambda: torch.empty(0))
    has_samples: bool = False
    ended: bool = False

    def take(self, chunk: Tensor | None, samples_per_frame: int) -> Tensor:
        """Samples to encode now: whole frames, or at the utterance's end all that are buffered."""
        if self.ended or chunk is None:
            self.ended = True
            ready, self.buffered = self.buffered, self.buffered[:0]
            return ready
        self.has_samples = self.has_samples or len(chunk) > 0
        joined = torch.cat((self.buffered, chunk))
        whole = len(joined) - len(joined) % samples_per_frame
        self.buffered = joined[whole:].clone()
        return joined[:whole]


def encode_stream(
    model: MossAudioTokenizer, chunks: Iterable[Sequence[Tensor | None]], num_quantizers: int
) -> Iterator[list[Tensor]]:
    """Samples float32 (n_i,) each a step to codes int64 (t_i, ``num_quantizers``) each a step.

    The last frame of an utterance is zero-padded and is returned in the step in which it ends, or in one more step
    after the last chunks.

    Raises:
        ValueError: the number of utterances changes, one goes on after its end, or one ends without any samples.
    """
    utterances: list[_Utterance] = []
    for step in chunks:
        utterances = utterances or [_Utterance() for _ in step]
        yield _encode_step(model, utterances, step, num_quantizers)
    if any(not utterance.ended for utterance in utterances):
        buffered = any(len(utterance.buffered) for utterance in utterances)
        last = _encode_step(model, utterances, [None] * len(utterances), num_quantizers)
        if buffered:
            yield last


def _encode_step(
    model: MossAudioTokenizer, utterances: list[_Utterance], step: Sequence[Tensor | None], num_quantizers: int
) -> list[Tensor]:
    _check_step(step, [utterance.ended for utterance in utterances])
    ready = [
        utterance.take(chunk, model.config.rows_per_frame) for utterance, chunk in zip(utterances, step, strict=True)
    ]
    for index, utterance in enumerate(utterances):
        if utterance.ended and not utterance.has_samples:
            raise ValueError(f"utterance {index} has no samples")
    return model.encode_streams([utterance.stream for utterance in utterances], ready, num_quantizers)


def decode_stream(model: MossAudioTokenizer, chunks: Iterable[Sequence[Tensor | None]]) -> Iterator[list[Tensor]]:
    """Codes (t_i, K_i) each a step, in range, to float32 samples (t_i · samples per frame,) each a step.

    Raises:
        ValueError: the number of utterances changes, or one goes on after its end.
    """
    streams: list[Stream] = []
    ended: list[bool] = []
    empty = torch.empty(0, 1, dtype=torch.int64)
    for step in chunks:
        streams = streams or [Stream() for _ in step]
        ended = ended or [False] * len(step)
        _check_step(step, ended)
        ended = [chunk is None for chunk in step]
        yield model.decode_streams(streams, [empty if chunk is None else chunk for chunk in step])


def _check_step(step: Sequence[Tensor | None], ended: Sequence[bool]) -> None:
    if len(step) != len(ended):
        raise ValueError(f"{len(step)} chunks for {len(ended)} utterances")
    for index, (chunk, over) in enumerate(zip(step, ended, strict=True)):
        if over and chunk is not None:
            raise ValueError(f"utterance {index} goes on after its end")
