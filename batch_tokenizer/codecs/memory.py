"""Classifying a codec's errors: a batch that does not fit in memory, or a failed device."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

from batch_tokenizer.records import RowError, RunError, Stage, first_line

Result = TypeVar("Result")


class DoesNotFit(RowError):
    """A batch needs more memory than there is."""


#: Allocations that fail outside torch's own allocator, as their libraries report them.
_ALLOCATION_FAILURES = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that the device or the host ran out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    from accelerate.utils.memory import should_reduce_batch_size  # takes a second to import, and is seldom needed

    return should_reduce_batch_size(error) or any(words in str(error) for words in _ALLOCATION_FAILURES)


def in_memory(stage: Stage, compute: Callable[[], Result]) -> Result:
    """Calls ``compute`` and returns its result.

    Raises:
        DoesNotFit: there was not enough memory. Nothing that ``compute`` held is kept alive by the error.
        RunError: the device failed (exit code 1).
    """
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:
        reason = first_line(error)
        if not is_out_of_memory(error):
            if isinstance(error, torch.AcceleratorError):
                raise RunError(
                    f"{stage}: the device failed ({reason}); start the same command again", exit_code=1
                ) from error
            raise
        # The traceback's frames, and this one, hold the batch's activations, and would through all further attempts.
        traceback.clear_frames(error.__traceback__)
        del compute
    raise DoesNotFit(stage, f"does not fit in memory, even alone: use a larger device, or cut it ({reason})")
