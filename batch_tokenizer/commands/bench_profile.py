"""Where a device spends its time while it encodes and decodes: seconds by kind of operator, by torch's profiler."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

#: Kinds of work, and the names of kernels and operators that do it; the first that fits counts.
_KINDS = (
    ("attention", r"flash|fmha|attention|varlen"),
    ("matrix products", r"gemm|gemv|matmul|addmm|::mm$|::bmm|nvjet|xmma|cutlass|linear"),
    ("spectra", r"fft"),
    ("copies", r"memcpy|memset|copy_|::to$|_to_copy|::cat|index_select|index_copy|gather|scatter"),
    ("fused by the compiler", r"triton"),
    ("norms and sums", r"norm|reduce|sum|mean|softmax|argmax"),
    ("element by element", r"elementwise|vectorized|gelu|add|mul|clamp|exp|cos|sin|log"),
)


def profile_kinds(compute: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Milliseconds of one call of ``compute`` by kind of work, largest first, and how many operators it took.

    On CUDA the device's own kernels are counted, elsewhere the processor's operators without those that they call.
    """
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    with profile(activities=activities, acc_events=True) as profiler:
        compute()
        if on_cuda:
            torch.cuda.synchronize(device)
    spent = []
    for event in profiler.key_averages():
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if is_kernel == on_cuda:
            microseconds = event.self_device_time_total if on_cuda else event.self_cpu_time_total
            spent.append((event.key, microseconds / 1e3, event.count))
    return by_kind(spent)


def by_kind(spent: Iterable[tuple[str, float, int]]) -> dict[str, Any]:
    """(name, milliseconds, count) of operators, summed by kind."""
    milliseconds: dict[str, float] = {}
    operators = 0
    for name, duration, count in spent:
        kind = next((kind for kind, pattern in _KINDS if re.search(pattern, name, re.IGNORECASE)), "other")
        milliseconds[kind] = milliseconds.get(kind, 0.0) + duration
        operators += count
    ordered = sorted(milliseconds.items(), key=lambda item: -item[1])
    return {
        "milliseconds": {kind: round(duration, 3) for kind, duration in ordered},
        "all_milliseconds": round(sum(milliseconds.values()), 3),
        "operators": operators,
    }
