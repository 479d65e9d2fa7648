"""Audio and codes in chunks as they arrive, for several utterances at once, equal to doing each utterance in one pass.

Enters: one list a step with a chunk for each utterance, of any size, empty too; None from when it has ended.
Samples of a stereo model are interleaved.
Leaves: for each step what that makes of whole frames. Memory is constant: a chunk, less than a frame of samples that
wait for the rest of theirs, and the keys and values of each layer's window.
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
    waiting: Tensor = field(default_factory=lambda: torch.empty(0))
    begun: bool = False
    ended: bool = False

    def take(self, chunk: Tensor | None, samples_per_frame: int) -> Tensor:
        """Samples that are ready to be encoded: whole frames, or when the utterance has ended all that are left."""
        if self.ended or chunk is None:
            self.ended = True
            ready, self.waiting = self.waiting, self.waiting[:0]
            return ready
        self.begun = self.begun or len(chunk) > 0
        joined = torch.cat((self.waiting, chunk))
        whole = len(joined) - len(joined) % samples_per_frame
        self.waiting = joined[whole:].clone()
        return joined[:whole]


def encode_stream(
    model: MossAudioTokenizer, chunks: Iterable[Sequence[Tensor | None]], num_quantizers: int
) -> Iterator[list[Tensor]]:
    """Samples float32 (n_i,) each a step to codes int64 (t_i, ``num_quantizers``) each a step.

    The last frame of an utterance is zero-padded and comes out in the step that says that it has ended, or in one more
    step after the last chunks.

    Raises:
        ValueError: the number of utterances changes, one goes on after its end, or one ends without any samples.
    """
    utterances: list[_Utterance] = []
    for step in chunks:
        utterances = utterances or [_Utterance() for _ in step]
        yield _encode_step(model, utterances, step, num_quantizers)
    if any(not utterance.ended for utterance in utterances):
        waiting = any(len(utterance.waiting) for utterance in utterances)
        last = _encode_step(model, utterances, [None] * len(utterances), num_quantizers)
        if waiting:
            yield last


def _encode_step(
    model: MossAudioTokenizer, utterances: list[_Utterance], step: Sequence[Tensor | None], num_quantizers: int
) -> list[Tensor]:
    _check_step(step, [utterance.ended for utterance in utterances])
    ready = [
        utterance.take(chunk, model.config.rows_per_frame) for utterance, chunk in zip(utterances, step, strict=True)
    ]
    for index, utterance in enumerate(utterances):
        if utterance.ended and not utterance.begun:
            raise ValueError(f"utterance {index} has no samples")
    return model.encode_streams([utterance.stream for utterance in utterances], ready, num_quantizers)


def decode_stream(model: MossAudioTokenizer, chunks: Iterable[Sequence[Tensor | None]]) -> Iterator[list[Tensor]]:
    """Codes (t_i, K_i) each a step, in range, to float32 samples (t_i · samples per frame,) each a step.

    Raises:
        ValueError: the number of utterances changes, or one goes on after its end.
    """
    streams: list[Stream] = []
    ended: list[bool] = []
    nothing = torch.empty(0, 1, dtype=torch.int64)
    for step in chunks:
        streams = streams or [Stream() for _ in step]
        ended = ended or [False] * len(step)
        _check_step(step, ended)
        ended = [chunk is None for chunk in step]
        yield model.decode_streams(streams, [nothing if chunk is None else chunk for chunk in step])


def _check_step(step: Sequence[Tensor | None], ended: Sequence[bool]) -> None:
    if len(step) != len(ended):
        raise ValueError(f"{len(step)} chunks for {len(ended)} utterances")
    for index, (chunk, over) in enumerate(zip(step, ended, strict=True)):
        if over and chunk is not None:
            raise ValueError(f"utterance {index} goes on after its end")
