"""Buffers that stay float32 when the model around them is cast to a 16-bit type."""

from __future__ import annotations

from collections.abc import Callable

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
