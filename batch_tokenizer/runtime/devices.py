"""The device that this process computes on, its number format, and its share of the machine's cores."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from batch_tokenizer.config import Device, Dtype
from batch_tokenizer.records import RunError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class ComputeDevice:
    """Where and how a process computes.

    Attributes:
        device: ``cpu`` or ``cuda:N``.
        dtype: of the model's weights and activations.
        cores: processor cores that are this process's share.
        reason: one line for the log.
    """

    device: torch.device
    dtype: torch.dtype
    cores: int
    reason: str

    @property
    def dtype_name(self) -> str:
        """``float32``, ``bfloat16`` or ``float16``."""
        return str(self.dtype).removeprefix("torch.")

    def loaders(self, asked: int | None) -> int:
        """Loader processes: as many as were ``asked`` for, else what a GPU can use of this process's cores, or two."""
        if asked is not None:
            return asked
        return min(12, max(2, self.cores - 2)) if self.device.type == "cuda" else 2


def choose_device(
    device: Device, dtype: Dtype, local_rank: int, cuda_dtype: Literal["float32", "bfloat16"] = "bfloat16"
) -> ComputeDevice:
    """Ranks of one machine go to its GPUs in turn; ``auto`` is CUDA where there is any.

    ``auto`` dtype is ``cuda_dtype`` on CUDA, as the codec wants it, and float32 on a CPU.

    Raises:
        RunError: CUDA was asked for and there is none, or a GPU cannot be used.
    """
    gpus = torch.cuda.device_count()
    if device == "cuda" and gpus == 0:
        raise RunError("--device cuda: torch sees no CUDA device here; use --device cpu, or check the driver")
    on_cuda = device == "cuda" or (device == "auto" and gpus > 0)
    chosen = torch.device("cuda", local_rank % gpus) if on_cuda else torch.device("cpu")
    if on_cuda:
        try:
            torch.cuda.set_device(chosen)
            what = f"{chosen} ({torch.cuda.get_device_name(chosen)})"
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise RunError(f"{chosen} cannot be used: {reason}; free it, or use --device cpu", exit_code=1) from error
    else:
        what = "cpu (no CUDA device)" if device == "auto" else "cpu (asked for)"
    if dtype == "auto":
        number_format = _DTYPES[cuda_dtype] if on_cuda else torch.float32
    else:
        number_format = _DTYPES[dtype]
    cores = _share_of_cores()
    name = str(number_format).removeprefix("torch.")
    return ComputeDevice(chosen, number_format, cores, f"device {what}, {name}, {cores} cores a rank")


def _share_of_cores() -> int:
    """The cores this process may use, divided among the ranks that the launcher put on this machine."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this operating system
        cores = os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores // (int(ranks) if ranks.isdecimal() else 1))
