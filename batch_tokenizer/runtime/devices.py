"""The device that this process computes on, its number format, and its share of the machine's cores: on CUDA hosts
those beside its GPU."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from batch_tokenizer.config import Device, Dtype
from batch_tokenizer.records import RunError, first_line
from batch_tokenizer.runtime.processes import num_cores

log = logging.getLogger(__name__)

#: The oldest NVIDIA driver that builds of torch for CUDA 13.0 run with.
LEAST_DRIVER = 580

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

    def batch_size(self, asked: int | None) -> int:
        """Most utterances of a batch: as many as were ``asked`` for, else 64, or on CUDA 1,024, so that utterances of a
        third of a second still fill a pack of 8,192 frames."""
        return asked or (1024 if self.device.type == "cuda" else 64)

    def loaders(self, asked: int | None) -> int:
        """Loader processes: as many as were ``asked`` for, else what a GPU can use of this process's cores, or two."""
        if asked is not None:
            return asked
        return min(12, max(2, self.cores - 2)) if self.device.type == "cuda" else 2


def choose_device(
    device: Device, dtype: Dtype, local_rank: int, cuda_dtype: Literal["float32", "bfloat16"] = "bfloat16"
) -> ComputeDevice:
    """The device of a rank: ranks of one machine take its GPUs in turn; ``auto`` is CUDA where there is any.

    ``auto`` dtype is ``cuda_dtype`` on CUDA, as the codec wants it, and float32 on a CPU. Matrix products and
    convolutions in float32 are computed in float32, not in TF32, on every GPU.

    Raises:
        RunError: CUDA was asked for and there is none, the driver is too old, or a GPU cannot be used.
    """
    # 1. CUDA or not. A driver without a usable GPU is an error, or a whole cluster would compute on its CPUs.
    gpus = torch.cuda.device_count()
    driver = nvidia_driver()
    if gpus == 0 and driver is not None and device != "cpu":
        raise RunError(
            f"--device {device}: this machine has NVIDIA driver {driver}, which torch {torch.__version__} cannot use: "
            f"{_why_no_cuda()}; install driver {LEAST_DRIVER} or newer, or pass --device cpu",
            exit_code=1,
        )
    if device == "cuda" and gpus == 0:
        raise RunError("--device cuda: torch sees no CUDA device here; use --device cpu, or check the driver")
    on_cuda = device == "cuda" or (device == "auto" and gpus > 0)
    chosen = torch.device("cuda", local_rank % gpus) if on_cuda else torch.device("cpu")
    # 2. The GPU must compute, now and not after an hour of listing.
    if on_cuda:
        try:
            torch.cuda.set_device(chosen)
            torch.zeros(1, device=chosen).add_(1)  # a card that this torch has no kernels for fails here, in one line
            torch.cuda.synchronize(chosen)
            name = torch.cuda.get_device_name(chosen)
        except RuntimeError as error:
            raise RunError(
                f"{chosen} cannot be used: {first_line(error)}; free it, choose another by CUDA_VISIBLE_DEVICES, or "
                "use --device cpu",
                exit_code=1,
            ) from error
        what = f"{chosen} ({name})"
        _compute_in_float32()
    else:
        what = "cpu (no CUDA device)" if device == "auto" else "cpu (asked for)"
    # 3. The number format, and this rank's share of the cores.
    if dtype == "auto":
        number_format = _DTYPES[cuda_dtype] if on_cuda else torch.float32
    else:
        number_format = _DTYPES[dtype]
    num_ranks = _ranks_of_machine()
    cores = max(1, num_cores() // num_ranks)
    if on_cuda:
        bind_to_numa_node(chosen, num_ranks)
    name = str(number_format).removeprefix("torch.")
    return ComputeDevice(chosen, number_format, cores, f"device {what}, {name}, {cores} cores a rank")


def nvidia_driver() -> str | None:
    """The version of the NVIDIA driver that the kernel has loaded, such as ``580.65.06``; None where there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else "of unknown version"


def environment_of(compute: ComputeDevice) -> dict[str, str]:
    """What a run's bits may depend on beside its settings: processor or GPU type, torch, CUDA and driver versions."""
    if compute.device.type != "cuda":
        return {"device": "cpu", "torch": torch.__version__}
    return {
        "device": torch.cuda.get_device_name(compute.device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "unknown",
        "driver": nvidia_driver() or "unknown",
    }


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "it is a build for CPUs"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return "no GPU is visible to it"


def _compute_in_float32() -> None:
    """Keeps float32 operations in float32: with TF32, which Ampere and newer GPUs have, codes would change."""
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "1":
        log.warning("NVIDIA_TF32_OVERRIDE=1 computes float32 in TF32, which changes codes: unset it")


def _ranks_of_machine() -> int:
    """Ranks that the launcher put on this machine."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(ranks)) if ranks.isdecimal() else 1


def bind_to_numa_node(device: torch.device, num_ranks: int) -> None:
    """Binds this process to the cores of its GPU's NUMA node, by accelerate's ``set_numa_affinity``.

    Cores that the process may not use stay out of reach, and nothing changes where the node would give this rank fewer
    cores than its share of the machine, as with the GPUs of all ranks on one of two nodes.

    Args:
        device: the rank's CUDA device.
        num_ranks: ranks on this machine, which go to its GPUs in turn. A rank alone keeps all cores.
    """
    node = _numa_node(device.index)
    if num_ranks < 2 or node is None:
        return
    # Imported here, as this takes a second and is for CUDA alone.
    import pynvml
    from accelerate.utils import set_numa_affinity

    num_gpus = torch.cuda.device_count()
    beside = sum(_numa_node(rank % num_gpus) == node for rank in range(num_ranks))
    allowed = os.sched_getaffinity(0)
    try:
        # 1. NVML counts all GPUs of the machine, CUDA only those in CUDA_VISIBLE_DEVICES.
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        set_numa_affinity(pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByUUID(uuid)))
    except (OSError, pynvml.NVMLError) as error:
        os.sched_setaffinity(0, allowed)
        log.info("not bound to the cores beside %s: %s", device, first_line(error))
        return
    # 2. It sets all cores of the node, also those that this process was not allowed before.
    cores = os.sched_getaffinity(0) & allowed
    if len(cores) // beside < len(allowed) // num_ranks:
        os.sched_setaffinity(0, allowed)
        log.info("not bound to NUMA node %d: %d cores for %d ranks are too few", node, len(cores), beside)
        return
    os.sched_setaffinity(0, cores)
    log.info("bound to %d cores of NUMA node %d, beside %s", len(cores), node, device)


def _numa_node(gpu: int) -> int | None:
    """The NUMA node of a CUDA device; None where the machine has a single node, or the system does not say."""
    properties: Any = torch.cuda.get_device_properties(gpu)  # its declared type lacks what it has
    address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    try:
        node = int(Path(f"/sys/bus/pci/devices/{address}/numa_node").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
