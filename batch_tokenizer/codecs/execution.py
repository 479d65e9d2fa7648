"""How a codec's model goes through a batch, and how its results reach the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy.typing as npt
import torch
from torch import Tensor

Result = TypeVar("Result")


class BatchRunner:
    """Runs a model over a batch: at once on a device; on a CPU one utterance at a time, ``threads`` side by side.

    Each utterance has one thread: the caller sets torch's own thread count to 1, so that results do not depend on how
    many cores a process was given.
    """

    #: Utterances per thread that a batch should have, so that the threads end at about the same time.
    _PER_THREAD = 8

    def __init__(self, device: torch.device, threads: int) -> None:
        self.batch_limit = self._PER_THREAD * threads if device.type == "cpu" else None
        self._pool = ThreadPoolExecutor(threads, "codec") if device.type == "cpu" and threads > 1 else None

    def __call__(
        self,
        compute: Callable[[list[Tensor]], list[Result]],
        batch: Sequence[Tensor],
        length: Callable[[Tensor], int],
    ) -> list[Result]:
        """``compute``'s result for each member, in order; on a CPU the longest is begun first."""
        if self._pool is None:
            with torch.inference_mode():
                return compute(list(batch))

        def one(index: int) -> Result:
            with torch.inference_mode():
                return compute([batch[index]])[0]

        order = sorted(range(len(batch)), key=lambda index: -length(batch[index]))
        done = dict(zip(order, self._pool.map(one, order), strict=True))
        return [done[index] for index in range(len(batch))]


def to_host(parts: Sequence[Tensor], dtype: torch.dtype) -> list[npt.NDArray[Any]]:
    """Tensors of equal width to numpy arrays, in one transfer to pinned memory where they are on a device."""
    if all(part.device.type == "cpu" for part in parts):
        return [part.to(dtype).numpy() for part in parts]
    packed = torch.cat(list(parts)).to(dtype)
    host = torch.empty(packed.shape, dtype=dtype, pin_memory=packed.device.type == "cuda")
    host.copy_(packed, non_blocking=True)
    if packed.device.type == "cuda":
        torch.cuda.current_stream(packed.device).synchronize()
    return [part.numpy() for part in host.split([len(part) for part in parts])]
