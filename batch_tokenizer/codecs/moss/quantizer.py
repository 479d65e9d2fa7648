"""MOSS's residual quantizer: hidden frames to codes and back, in float32 whatever the model's dtype.

Everything here is a buffer of a ``Float32Buffers``, so it stays float32 when the model is cast. A checkpoint has
weight-normed projections; ``fold`` multiplies them out once and makes one table of each codebook's lookup and
projection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from batch_tokenizer.codecs.layers import quantizers
from batch_tokenizer.codecs.layers.quantizers import residual_codes, summed_rows
from batch_tokenizer.codecs.moss.config import QuantizerConfig
from batch_tokenizer.kernels.codebook import Float32Buffers


class WeightNorm(Float32Buffers):
    """A weight (out, in, 1) as gain ``original0`` (out, 1, 1) and direction ``original1``, the published names."""

    original0: Tensor
    original1: Tensor

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.register_buffer("original0", torch.ones(channels_out, 1, 1))
        self.register_buffer("original1", torch.zeros(channels_out, channels_in, 1))

    def folded(self) -> Tensor:
        """(out, in)."""
        direction = self.original1[:, :, 0]
        return direction * (self.original0[:, :, 0] / direction.norm(dim=1, keepdim=True))


class Projection(Float32Buffers):
    """A weight-normed 1×1 convolution with bias: a linear layer on rows."""

    weight: Tensor
    bias: Tensor

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(channels_out))
        self.parametrizations = nn.Module()
        self.parametrizations.weight = WeightNorm(channels_in, channels_out)

    def fold(self) -> None:
        """Multiplies gain and direction out."""
        weight_norm = self.parametrizations.weight
        assert isinstance(weight_norm, WeightNorm)
        self.register_buffer("weight", weight_norm.folded())
        del self.parametrizations

    def forward(self, rows: Tensor) -> Tensor:
        """(N, in) to (N, out)."""
        return linear(rows, self.weight, self.bias)


class Codebook(Float32Buffers):
    """One codebook in a space of few dimensions, compared by direction.

    After ``fold``:

    Attributes:
        table: (size + 1, rvq_dim), what each code adds to the sum; the last row is zero, for a codebook not used.
    """

    table: Tensor

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.codebook = quantizers.Codebook(config.codebook_size, config.codebook_dim, by_direction=True)
        self.in_proj = _projection(config.rvq_dim, config.codebook_dim)
        self.out_proj = _projection(config.codebook_dim, config.rvq_dim)

    def fold(self) -> None:
        """Makes the tables from the published parameters."""
        self.codebook.fold()
        added = self.out_proj(self.codebook.weight)
        self.register_buffer("table", torch.cat((added, added.new_zeros(1, added.shape[1]))))
        del self.codebook.weight, self.out_proj

    def nearest(self, residual: Tensor) -> Tensor:
        """int64 (N,): for each residual (N, rvq_dim) the code."""
        return self.codebook.nearest(self.in_proj(residual))

    def forward(self, codes: Tensor) -> Tensor:
        """Codes (N,) to the vectors that they add to the sum, (N, rvq_dim)."""
        return self.table[codes]


class ResidualQuantizer(nn.Module):
    """K codebooks, each quantizing the residual of those before it."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.input_proj = _projection(config.input_dim, config.rvq_dim)
        self.output_proj = _projection(config.rvq_dim, config.output_dim)
        self.quantizers = nn.ModuleList(Codebook(config) for _ in range(config.num_quantizers))

    @property
    def codebooks(self) -> list[Codebook]:
        """The K codebooks in order."""
        return [module for module in self.quantizers if isinstance(module, Codebook)]

    @property
    def unused(self) -> int:
        """The code of a codebook that an utterance does not use: it adds nothing."""
        return self.config.codebook_size

    @torch.no_grad()
    def fold(self) -> None:
        """Prepares projections and codebooks; called once, with the published parameters."""
        for projection in [module for module in self.modules() if isinstance(module, Projection)]:
            projection.fold()
        for codebook in self.codebooks:
            codebook.fold()

    def encode(self, hidden: Tensor, num_quantizers: int) -> Tensor:
        """Hidden frames (N, input_dim) to codes int64 (N, ``num_quantizers``)."""
        projected = self.input_proj(hidden.float())
        return torch.stack(residual_codes(self.codebooks[:num_quantizers], projected), dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 (N, K'), K' <= K, each in range or ``unused``, to float32 (N, output_dim)."""
        return self.output_proj(summed_rows(self.codebooks, codes))


def _projection(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Identity() if channels_in == channels_out else Projection(channels_in, channels_out)
