"""Binding a rank, with the loader processes that it starts, to the processor cores beside its GPU."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

from batch_tokenizer.records import first_line

log = logging.getLogger(__name__)


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
