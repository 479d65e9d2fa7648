"""Residual vector quantizer: hidden frames to codes and back, in float32 whatever the model's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from batch_tokenizer.codecs.layers.quantizers import residual_codes, summed_rows
from batch_tokenizer.kernels.codebook import Float32Buffers, first_equal_rows, minus_half_norms, nearest_rows


class Codebook(Float32Buffers):
    """One codebook: rows ``embed`` (size, d). Stays float32 when the model around it is cast."""

    embed: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("embed", torch.zeros(size, dim))

    def nearest(self, rows: Tensor) -> Tensor:
        """int64 (N,): for each row (N, d), the codebook row at the least squared distance; of equals, the first."""
        return nearest_rows(rows, self.embed, *self._known())

    def forward(self, codes: Tensor) -> Tensor:
        """Rows (N, d) of codes (N,)."""
        return self.embed.index_select(0, codes)

    def _known(self) -> tuple[Tensor | None, Tensor]:
        """``first`` and ``offsets`` of ``nearest_rows``, found again when training or a move has changed the rows."""
        state = (self.embed.data_ptr(), self.embed._version)
        known = self.__dict__.get("_found")
        if known is None or known[0] != state:
            first = first_equal_rows(self.embed)
            distinct = bool((first == torch.arange(len(first), device=first.device)).all())
            known = self.__dict__["_found"] = (state, None if distinct else first, minus_half_norms(self.embed))
        return known[1:]


class CodebookLayer(nn.Module):
    """Holds the published parameter name ``layers.N._codebook.embed``."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self._codebook = Codebook(size, dim)


class ResidualVectorQuantizer(nn.Module):
    """K codebooks, each quantizing the residual of those before it."""

    def __init__(self, sizes: Sequence[int], dim: int) -> None:
        super().__init__()
        self.vq = nn.Module()
        self.vq.layers = nn.ModuleList(CodebookLayer(size, dim) for size in sizes)

    @property
    def codebooks(self) -> list[Codebook]:
        """The K codebooks in order."""
        layers: Any = self.vq.layers
        return [layer._codebook for layer in layers]

    def encode(self, hidden: Tensor, num_quantizers: int) -> Tensor:
        """Hidden frames (N, d) to codes int64 (N, ``num_quantizers``)."""
        return torch.stack(residual_codes(self.codebooks[:num_quantizers], hidden.float()), dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 (N, K'), K' <= K, to the sum of their rows, float32 (N, d)."""
        return summed_rows(self.codebooks, codes)
