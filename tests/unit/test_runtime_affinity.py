"""Which cores a rank keeps, on machines that are only described: two nodes of eight cores, GPUs on either."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from batch_tokenizer.runtime import devices

NODES = {0: set(range(8)), 1: set(range(8, 16))}


class Machine:
    """A machine whose GPUs are on the given nodes; NVML counts one more in front, which CUDA does not see."""

    def __init__(self, monkeypatch, gpu_nodes, allowed):
        self.gpu_nodes, self.allowed, self.error = gpu_nodes, set(allowed), None
        monkeypatch.setattr(devices, "_numa_node", gpu_nodes.__getitem__)
        monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: set(self.allowed))
        monkeypatch.setattr(devices.os, "sched_setaffinity", lambda _, cores: setattr(self, "allowed", set(cores)))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpu_nodes))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=device.index))
        monkeypatch.setattr("pynvml.nvmlInit", lambda: None)
        monkeypatch.setattr("pynvml.nvmlDeviceGetHandleByUUID", lambda uuid: int(uuid.removeprefix("GPU-")))
        monkeypatch.setattr("pynvml.nvmlDeviceGetIndex", lambda handle: handle + 1)
        monkeypatch.setattr("accelerate.utils.set_numa_affinity", self.bind)

    def bind(self, index):
        if self.error:
            raise self.error
        self.allowed = set(NODES[self.gpu_nodes[index - 1]])

    def cores(self, gpu, num_ranks):
        devices.bind_to_numa_node(torch.device("cuda", gpu), num_ranks)
        return self.allowed


@pytest.mark.parametrize(
    ("gpu_nodes", "gpu", "num_ranks", "allowed", "kept"),
    [
        ([0, 0, 1, 1], 2, 4, range(16), NODES[1]),
        ([0, 0, 1, 1], 1, 4, range(16), NODES[0]),
        ([0, 1], 1, 1, range(16), set(range(16))),  # alone, so nobody else uses the other cores
        ([0, 0], 1, 2, range(16), set(range(16))),  # both beside node 0, which has half of the cores
        ([0, 1], 1, 2, range(4, 12), set(range(8, 12))),  # no core beyond those that the process was given
        ([0, 1], 1, 2, range(8), set(range(8))),  # given cores of the other node only
        ([None, None], 1, 2, range(16), set(range(16))),
    ],
)
def test_cores_beside_the_gpu(monkeypatch, gpu_nodes, gpu, num_ranks, allowed, kept):
    assert Machine(monkeypatch, gpu_nodes, allowed).cores(gpu, num_ranks) == kept


def test_where_the_node_cannot_be_asked_for_nothing_changes(monkeypatch, caplog):
    caplog.set_level("INFO")
    machine = Machine(monkeypatch, [0, 1], range(16))
    machine.error = OSError("no such device")
    assert machine.cores(1, 2) == set(range(16))
    assert "not bound to the cores beside cuda:1: no such device" in caplog.text


def test_the_node_of_a_device_is_that_of_its_place_on_the_bus(monkeypatch, tmp_path):
    place = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: place)
    read = []
    for text, node in (("1\n", 1), ("-1\n", None), ("", None)):
        monkeypatch.setattr(devices.Path, "read_text", lambda path, encoding: read.append(str(path)) or text)  # noqa: B023
        assert devices._numa_node(0) == node
    assert set(read) == {"/sys/bus/pci/devices/0000:1b:02.0/numa_node"}
