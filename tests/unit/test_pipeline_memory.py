"""Out of memory is recognised whoever reports it, and a batch that failed is let go before its halves are tried."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from batch_tokenizer.codecs import offline
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.memory import in_memory, is_out_of_memory
from batch_tokenizer.codecs.opening import CodecSetup
from batch_tokenizer.records import RowError, RunError
from batch_tokenizer.runtime.devices import choose_device


class Activations:
    """Stands for what a batch holds on the device."""


class Codec:
    """Fails with an error, while its frames, or the object that is asked, hold activations."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.own = Activations()
        self.held = [weakref.ref(self.own)]

    def compute(self) -> None:
        activations = Activations()
        self.held.append(weakref.ref(activations))
        self.layer(activations)

    def layer(self, hidden: Activations) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), MemoryError()]
)
def test_a_failed_batch_is_let_go(error: Exception) -> None:
    codec = Codec(error)
    held = codec.held
    del error
    gc.disable()
    try:
        with pytest.raises(RowError, match="encode: does not fit in memory, even alone"):
            in_memory("encode", codec.compute)
        del codec
        assert [reference() for reference in held] == [None, None]
    finally:
        gc.enable()


def test_a_failed_batch_is_let_go_before_each_member_is_tried_alone() -> None:
    held: list[Any] = []
    released: list[bool] = []

    def encode(members: list[np.ndarray], count: int) -> list[np.ndarray]:
        activations = Activations()
        held.append(weakref.ref(activations))
        if len(members) > 1 or len(members[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return members

    spec = SimpleNamespace(features=lambda samples: samples, num_frames=int)
    release = lambda: released.append(all(reference() is None for reference in held))  # noqa: E731
    codec: Any = SimpleNamespace(spec=spec, frame_budget=100, encode=encode, release=release)
    gc.disable()
    try:
        first, second = offline.encode(codec, [np.zeros(2), np.zeros(3)], 1)
    finally:
        gc.enable()
    assert released == [True, True]
    assert len(first) == 2
    assert isinstance(second, RowError)


@pytest.mark.parametrize("message", [
    "CUDA out of memory. Tried to allocate 20.00 GiB.",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuFFT error: CUFFT_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
])  # fmt: skip
def test_what_counts_as_out_of_memory(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))
    with pytest.raises(RowError, match="does not fit in memory"):
        in_memory("decode", _raise(RuntimeError(message)))


def test_a_device_that_fails_ends_the_run_and_a_bug_is_not_hidden() -> None:
    with pytest.raises(RunError, match=r"encode: the device failed \(CUDA error: an illegal memory access") as raised:
        in_memory("encode", _raise(torch.AcceleratorError("CUDA error: an illegal memory access\nmore")))
    assert raised.value.exit_code == 1
    with pytest.raises(RuntimeError, match="shapes"):
        in_memory("encode", _raise(RuntimeError("shapes do not match")))


def _raise(error: Exception):  # type: ignore[no-untyped-def]
    def compute() -> None:
        raise error

    return compute


def test_weights_that_do_not_fit_are_one_line(tmp_path):
    class Family:
        def load_codec(self, request):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.40 GiB\nmore")

    checkpoint = Checkpoint(folder=tmp_path, name="large", config={})
    cpu = choose_device("cpu", "auto", 0)
    setup = CodecSetup(checkpoint, Family(), None, cpu, "auto", 1)
    with pytest.raises(RunError, match="the weights do not fit in the memory of cpu") as caught:
        setup.load()
    assert "\n" not in str(caught.value)
