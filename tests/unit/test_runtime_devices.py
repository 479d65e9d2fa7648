"""Choosing a device, with torch's and the driver's answers replaced: each way to fail is one line with a remedy."""

from __future__ import annotations

import pytest
import torch

from batch_tokenizer.records import RunError
from batch_tokenizer.runtime import devices
from batch_tokenizer.runtime.devices import choose_device, environment_of, nvidia_driver


@pytest.fixture
def machine(monkeypatch):
    """Sets how many GPUs torch sees, the driver's version, and what using a GPU raises."""

    def make(gpus, driver=None, fault=None):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(devices, "nvidia_driver", lambda: driver)

        def use(device):
            if fault is not None:
                raise fault

        monkeypatch.setattr(torch.cuda, "set_device", use)

    return make


def test_without_a_gpu_auto_is_the_cpu(machine):
    machine(0)
    compute = choose_device("auto", "auto", 0)
    assert (compute.device.type, compute.dtype) == ("cpu", torch.float32)
    assert environment_of(compute) == {"device": "cpu", "torch": torch.__version__}


def test_cuda_without_a_gpu(machine):
    machine(0)
    with pytest.raises(RunError, match="torch sees no CUDA device"):
        choose_device("cuda", "auto", 0)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_an_old_driver_is_named_with_the_one_that_is_needed(machine, device, monkeypatch):
    """Not silently the CPU, which would take weeks for what a GPU does in hours."""
    machine(0, "535.104.05")

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update")

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(RunError) as caught:
        choose_device(device, "auto", 0)
    message = str(caught.value)
    assert "535.104.05" in message
    assert "580 or newer" in message
    assert "--device cpu" in message
    assert "\n" not in message
    assert choose_device("cpu", "auto", 0).device.type == "cpu"


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors …"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB\nmore"),
    ],
    ids=["kernel image", "memory"],
)
def test_a_gpu_that_cannot_be_used_is_one_line(machine, fault):
    machine(2, "580.65.06", fault)
    with pytest.raises(RunError) as caught:
        choose_device("auto", "auto", 3)
    message = str(caught.value)
    assert message.startswith("cuda:1 cannot be used: CUDA")
    assert "\n" not in message


def test_float32_stays_float32_on_cuda(monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    try:
        torch.set_float32_matmul_precision("high")
        devices._compute_in_float32()
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
    assert "NVIDIA_TF32_OVERRIDE" in caplog.text


def test_the_drivers_version_is_read_from_the_kernel(monkeypatch, tmp_path):
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 12.2.0\n"

    class Version:
        def __init__(self, path):
            assert path == "/proc/driver/nvidia/version"

        def read_text(self, **kwargs):
            return text

    monkeypatch.setattr(devices, "Path", Version)
    assert nvidia_driver() == "580.65.06"
