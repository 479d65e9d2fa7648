"""A CUDA device made of fake tensors: shapes, dtypes and devices are computed, values are not, and no GPU is needed.

``fake_cuda()`` makes torch believe in one GPU. While its ``watch()`` is open

- an operator whose tensors lie on different devices raises, as does one that needs a value on the host (``item``,
  ``nonzero``, ``repeat_interleave`` without ``output_size``): on a GPU that would wait for all work before it;
- a copy between host and device from memory that is not pinned raises, as it would wait too, and so does indexing with
  a tensor of the host, which copies it;
- so does a tensor made of Python's numbers on the device, which is copied there from such memory;
- ``segment_reduce`` with its own check of the lengths raises, as the check is on the host;
- the varlen attention kernel's demands are checked, which its fake implementation does not look at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch._subclasses.fake_tensor as fake_tensor
import torch.nn.attention.varlen as varlen
import torch.utils._device
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from batch_tokenizer.codecs.execution import ToHost
from batch_tokenizer.codecs.layers import quantizers

CUDA = torch.device("cuda", 0)


class HostWait(AssertionError):
    """Something on the path would wait for the device."""


@dataclass
class Trace:
    """What was done while the fake device was there.

    Attributes:
        pinned_bytes: sizes of the host arrays that were pinned for a copy to the device.
        operators: operators on the device, without views.
        varlen_calls: calls of the varlen attention kernel.
    """

    pinned_bytes: list[int] = field(default_factory=list)
    operators: int = 0
    varlen_calls: int = 0

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Checks every operator while it is open. Building a model before may copy as it likes."""
        self.pinned_bytes.clear()
        with mock.patch.object(torch, "tensor", _host_tensor(torch.tensor)), _Checks(self):
            yield


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: _Event) -> float:
        return 1.0


class _Checks(TorchDispatchMode):
    """Watches every operator; sits above the fake tensors."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten.segment_reduce.default and not kwargs.get("unsafe", False):
            raise HostWait("segment_reduce checks its lengths on the host; pass unsafe=True")
        out = function(*args, **kwargs)
        packet = function.overloadpacket
        if packet in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            self._check_indices(args[0], args[1])
        if packet in (torch.ops.aten._to_copy, torch.ops.aten.to):  # the latter in inference mode
            self._check_copy(args[0], out, args[0])
        elif packet is torch.ops.aten.copy_:
            self._check_copy(args[1], args[0], args[0] if args[0].device.type == "cpu" else args[1])
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        if isinstance(first, torch.Tensor) and first.device.type == "cuda" and not function.is_view:
            self.trace.operators += 1
        return out

    @staticmethod
    def _check_indices(indexed: torch.Tensor, indices: Any) -> None:
        if indexed.device.type == "cuda" and any(index is not None and index.device.type == "cpu" for index in indices):
            raise HostWait(
                f"{tuple(indexed.shape)} on the device is indexed by a tensor on the host, copied there first"
            )

    @staticmethod
    def _check_copy(source: torch.Tensor, target: torch.Tensor, host: torch.Tensor) -> None:
        if source.device.type != target.device.type and not getattr(host, "is_marked_pinned", False):
            raise HostWait(
                f"a copy from {source.device.type} to {target.device.type} of {tuple(source.shape)} {source.dtype} in "
                f"pageable memory"
            )


def _host_tensor(real: Any) -> Any:
    """``torch.tensor`` for the host only."""

    def make(*args: Any, device: Any = None, **rest: Any) -> torch.Tensor:
        if device is not None and torch.device(device).type == "cuda":
            raise HostWait("a tensor is made of Python's numbers and copied to the device")
        made: torch.Tensor = real(*args, device=device, **rest)
        return made

    return make


def _checked_varlen(real: Any, trace: Trace) -> Any:
    """``varlen_attn`` with what its kernel demands: 16 bits, contiguous last axes, int32 offsets, plain integers."""

    def call(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, **rest: Any) -> Any:
        trace.varlen_calls += 1
        for x in (q, k, v):
            assert x.device == CUDA
            assert x.dtype in (torch.float16, torch.bfloat16)
            assert x.ndim == 3
            assert x.stride(-1) == 1
            assert x.shape[-1] % 8 == 0
            assert x.shape[-1] <= 256
        for offsets in (cu_q, cu_k):
            assert offsets.device == CUDA
            assert offsets.dtype == torch.int32
            assert offsets.is_contiguous()
            assert len(offsets) - 1 >= 64
            assert (len(offsets) - 1).bit_count() == 1  # few sizes
        for bound in (max_q, max_k):
            assert type(bound) is int
            assert bound >= 1024
            assert bound.bit_count() == 1
        window = rest.get("window_size")
        assert isinstance(window, tuple)
        assert max(window) < max_k or window == (max_k, max_k)  # else the longest utterance chooses the kernel
        return real(q, k, v, cu_q, cu_k, max_q, max_k, **rest)

    return call


@contextlib.contextmanager
def fake_cuda(capability: tuple[int, int] = (9, 0), *patches: Any) -> Iterator[Trace]:
    """One fake GPU of ``capability`` for the block; ``patches`` are entered with it."""
    torch.utils._device._device_constructors()  # caches torch.empty: fill the cache before it is replaced
    torch._C._ensureCUDADeviceGuardSet()
    trace = Trace()
    real_empty = torch.empty

    def pin(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
        trace.pinned_bytes.append(tensor.nbytes)
        copy = tensor.clone()
        copy.is_marked_pinned = True  # type: ignore[attr-defined]
        return copy

    def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made = real_empty(*args, **kwargs)
        if pin_memory:
            trace.pinned_bytes.append(made.nbytes)
            made.is_marked_pinned = True  # type: ignore[attr-defined]
        return made

    replaced = [
        (fake_tensor, "init_gpu_context", lambda *args: None),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "get_device_capability", lambda *args: capability),
        (torch.cuda, "current_stream", lambda *args: None),
        (torch.cuda, "Event", _Event),
        (torch.Tensor, "pin_memory", pin),
        (torch, "empty", empty),
        (varlen, "varlen_attn", _checked_varlen(varlen.varlen_attn, trace)),
    ]
    with contextlib.ExitStack() as stack:
        for where, name, value in replaced:
            stack.enter_context(mock.patch.object(where, name, value))
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield trace


def fake_weights(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model with its parameters in ``dtype``, in place: ``Module.to`` cannot swap fake parameters."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
    return model.eval()


def move_to_fake_device(model: torch.nn.Module) -> torch.nn.Module:
    """A real model as ``Module.to`` would move it, in place."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().to(CUDA), requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.detach().to(CUDA)
    return model.eval()


def _zeros(copied: ToHost) -> list[np.ndarray]:
    """``ToHost.arrays`` of fake tensors, which have no values."""
    return [np.zeros(part.shape, str(part.dtype).removeprefix("torch.")) for part in copied._parts]


def fake_cuda_for_batches(*patches: Any) -> contextlib.AbstractContextManager[Trace]:
    """``fake_cuda`` for codecs that run padded batches (``PaddedCodec``)."""
    # Equal codebook rows are found on the host, once after loading.
    equal = mock.patch.object(quantizers, "first_equal_rows", lambda rows: torch.arange(len(rows), device=rows.device))
    values = mock.patch.object(torch.Tensor, "numpy", lambda tensor: np.zeros(tensor.shape, np.int64))
    arrays = mock.patch.object(ToHost, "arrays", _zeros)
    packing = mock.patch.object(torch.nn.LSTM, "flatten_parameters", return_value=None)  # of weights, by cuDNN
    single = mock.patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", 0)  # single numbers are computed for real
    return fake_cuda((9, 0), equal, values, arrays, packing, single, *patches)


def fake_mel_transform(form: Any, device: torch.device) -> Any:
    """The window and the filters of a mel transform, by their shapes."""
    return SimpleNamespace(
        spectrogram=SimpleNamespace(window=torch.empty(form.window_size, device=device)),
        mel_scale=SimpleNamespace(fb=torch.empty(form.n_fft // 2 + 1, form.n_mels, device=device)),
    )
