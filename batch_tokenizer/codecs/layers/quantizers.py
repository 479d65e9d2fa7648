"""Vectors to codes and back: codebooks by nearest row, residual stacks of them, and finite scalar quantization.

All of it works on single frames (N, d), so that it is the same for a batch and for an utterance alone. Everything is
float32 whatever the dtype of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from batch_tokenizer.kernels.codebook import Float32Buffers, first_equal_rows, minus_half_norms, nearest_rows


class Codebook(Float32Buffers):
    """Rows (size, d), looked up by the least squared distance; of equals the first.

    ``fold`` must be called once after ``weight`` has its values.

    Attributes:
        weight: (size, d), as the checkpoint has them; decoding gives these.
        by_direction: whether vectors and rows are compared at length 1.
    """

    weight: Tensor
    compared: Tensor
    offsets: Tensor
    first: Tensor

    def __init__(self, size: int, dim: int, *, by_direction: bool = False) -> None:
        super().__init__()
        self.by_direction = by_direction
        self.register_buffer("weight", torch.zeros(size, dim))

    def fold(self) -> None:
        """Makes what lookups need from ``weight``."""
        compared = normalize(self.weight) if self.by_direction else self.weight
        self.register_buffer("compared", compared, persistent=False)
        self.register_buffer("offsets", minus_half_norms(compared), persistent=False)
        self.register_buffer("first", first_equal_rows(compared), persistent=False)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Codes int64 (N,) of float32 vectors (N, d)."""
        queries = normalize(vectors) if self.by_direction else vectors
        return nearest_rows(queries, self.compared, self.first, self.offsets)

    def forward(self, codes: Tensor) -> Tensor:
        """Rows (…, d) of codes (…)."""
        return self.weight[codes]


def residual_codes(codebooks: Iterable[Any], vectors: Tensor) -> list[Tensor]:
    """Codes int64 (…) of each codebook in order, each of the residual r of the last: c = nearest(r), r = r - e(c).

    Args:
        codebooks: modules with ``nearest(vectors)`` and, when called with codes, the vectors e that they add.
        vectors: float32, such as (N, d).
    """
    residual = vectors
    codes = []
    for codebook in codebooks:
        codes.append(codebook.nearest(residual))
        residual = residual - codebook(codes[-1])
    return codes


def summed_rows(codebooks: Sequence[Any], codes: Tensor) -> Tensor:
    """Codes (N, K), K at most the number of codebooks, to the sum of their vectors, added in order."""
    total: Tensor = codebooks[0](codes[:, 0])
    for index in range(1, codes.shape[1]):
        total = total + codebooks[index](codes[:, index])
    return total


class Projection(Float32Buffers):
    """A linear map that stays in float32 beside a codebook; ``weight`` is (out, in)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, dim_in: int, dim_out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(dim_out, dim_in))
        self.register_buffer("bias", torch.zeros(dim_out) if bias else None)

    def forward(self, vectors: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        return linear(vectors, self.weight, self.bias)


class FiniteScalarQuantizer(Float32Buffers):
    """Finite scalar quantization (arXiv:2309.15505): each dimension is rounded to one of a few levels.

    For a dimension with n levels, s = (n - 1)/2 · 0.999 and o = 1/2 if n is even, else 0:
    c = round(s · tanh(x + tan(o / s)) - o), a digit is c + n // 2, and the first dimension's digit counts least.
    The decoded value is c / (n // 2). (The published code has the tangent where one would expect the inverse of tanh.)

    Attributes:
        size: number of codes, the product of ``levels``.
    """

    levels: Tensor
    places: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.size = math.prod(levels)
        self._levels = tuple(levels)
        #: The place value of each dimension's digit.
        self._places = tuple(math.prod(levels[:index]) for index in range(len(levels)))
        self.register_buffer("levels", torch.tensor(self._levels, device="cpu"), persistent=False)
        self.register_buffer("places", torch.tensor(self._places, device="cpu"), persistent=False)

    def fold(self, device: torch.device) -> None:
        """Puts the levels on the device of a model that was built without memory.

        Tensors made of numbers in each call would be copied to the device, and waited for.
        """
        self.levels = torch.tensor(self._levels, device="cpu").to(device)
        self.places = torch.tensor(self._places, device="cpu").to(device)

    def encode(self, vectors: Tensor) -> Tensor:
        """Vectors (…, D) to codes int64 (…)."""
        levels = self.levels
        half = levels // 2
        scale = (levels - 1).float() / 2 * (1 - 0.001)
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        centred = torch.round(scale * torch.tanh(vectors.float() + torch.tan(offset / scale)) - offset)
        return ((centred.long() + half) * self.places).sum(dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (…) to float32 values (…, D) in [-1, 1]."""
        levels = self.levels
        half = levels // 2
        digits = codes[..., None] // self.places % levels
        return (digits - half).float() / half
