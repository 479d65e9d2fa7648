"""``PaddedBatch``: utterances of different lengths as one tensor, padded on the right.

Positions beyond an utterance's end are arbitrary. Every layer that mixes positions (a convolution, attention, a norm
over time) first replaces them with what a lone utterance would have there, so that a result never depends on its
neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batch_tokenizer.kernels.segments import to_device


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """B utterances on axes of T positions.

    Attributes:
        values: (B, C, T); positions beyond an utterance's end are arbitrary.
        lengths: int64 (B,) on the device of ``values``, each 0 … T; None where every utterance fills the axis, so that
            no layer has anything to replace. A lone utterance is such a batch.
        beyond: bool (B, 1, T), true beyond each utterance's end; None with ``lengths``.
    """

    values: Tensor
    lengths: Tensor | None = None
    beyond: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor, lengths: Tensor | None) -> PaddedBatch:
        """``values`` (B, C, T) whose first ``lengths`` (B,) positions are utterances, or all of them."""
        if lengths is None:
            return cls(values)
        positions = torch.arange(values.shape[-1], device=values.device)
        return cls(values, lengths, (positions >= lengths[:, None])[:, None])

    @classmethod
    def join(
        cls,
        utterances: Sequence[Tensor],
        *,
        device: torch.device,
        size: int | None = None,
        rows: int | None = None,
    ) -> PaddedBatch:
        """Utterances (C, L_i) of one dtype as one batch on ``device``, zeros beyond their ends.

        Args:
            size: T; the greatest length where not given. A batch of a given size always has ``lengths``: layers compute
                with them in another way, so that the last bits of an utterance that fills the axis would otherwise
                depend on whether its neighbours do too.
            rows: B, of which those without an utterance have length 0; as many as utterances where not given.
        """
        lengths = [utterance.shape[-1] for utterance in utterances]
        if size is None and rows is None and len(set(lengths)) == 1:
            return cls(to_device(torch.stack(list(utterances)), device))
        size = max(lengths) if size is None else size
        rows = len(lengths) if rows is None else rows
        joined = utterances[0].new_zeros((rows, utterances[0].shape[0], size))
        for row, utterance in zip(joined, utterances, strict=False):
            row[:, : utterance.shape[-1]] = utterance
        counted = torch.tensor(lengths + [0] * (rows - len(lengths)), dtype=torch.int64)
        return cls.of(to_device(joined, device), to_device(counted, device))

    @property
    def size(self) -> int:
        """T."""
        return self.values.shape[-1]

    def with_values(self, values: Tensor) -> PaddedBatch:
        """The same utterances with other values (B, C', T), as an operation on single positions makes them."""
        return PaddedBatch(values, self.lengths, self.beyond)

    def map(self, function: Callable[[Tensor], Tensor]) -> PaddedBatch:
        """``with_values(function(values))``."""
        return self.with_values(function(self.values))

    def filled(self, value: float = 0.0) -> Tensor:
        """``values`` with ``value`` beyond each end."""
        return self.values if self.beyond is None else self.values.masked_fill(self.beyond, value)

    def split(self, lengths: Sequence[int]) -> list[Tensor]:
        """The utterances (C, L_i) for lengths that the host knows; rows after the last of them are dropped."""
        return [row[:, :length] for row, length in zip(self.values, lengths, strict=False)]
