"""The nearest row of a codebook; of rows at equal distance the first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """A module whose own buffers move with the model but are never cast with it.

    ``model.bfloat16()`` reaches every buffer; rounding codebook rows or a synthesis window would change results.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Buffers:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        if recurse:
            for child in self.children():
                child._apply(fn)
        return self


def first_equal_rows(rows: Tensor) -> Tensor:
    """int64 (size,): for each of ``rows`` (size, d) the index of the first row with the same values."""
    _, group = torch.unique(rows, dim=0, return_inverse=True)
    order = torch.arange(len(group), device=group.device)
    first = torch.full_like(order, len(group)).scatter_reduce(0, group, order, "amin")
    return first[group]


def minus_half_norms(rows: Tensor) -> Tensor:
    """-|e|²/2 of each of ``rows`` (size, d), (size,)."""
    return rows.square().sum(dim=1).mul(-0.5)


def nearest_rows(queries: Tensor, rows: Tensor, first: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
    """int64 (N,): for each query (N, d) the row at the least squared distance; of equals, the first.

    |x - e|² = |x|² - 2 (x·e - |e|²/2), so the least distance is the greatest x·e - |e|²/2. A matrix product may round
    two equal columns differently, so ``argmax`` alone would not keep the first of them.

    Args:
        rows: (size, d).
        first: ``first_equal_rows(rows)``; None if no two rows are equal.
        offsets: ``minus_half_norms(rows)``, if computed before.
    """
    scores = torch.addmm(minus_half_norms(rows) if offsets is None else offsets, queries, rows.t())
    nearest = scores.argmax(dim=1)
    return nearest if first is None else first[nearest]
