"""A graph loaded by onnxruntime, on the best provider that works here, with its arrays bound to the device.

``PROVIDERS_VARIABLE`` in the environment names providers in order (``tensorrt,cuda,cpu``): then one that does not load
ends the run. Without it a CUDA device means CUDA and then the CPU, and falling back to the CPU is a warning.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from batch_tokenizer.codecs.onnx.graph_file import INSTALL
from batch_tokenizer.records import RunError, first_line

log = logging.getLogger(__name__)

PROVIDERS_VARIABLE = "BATCH_TOKENIZER_ONNX_PROVIDERS"

_PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}

#: Words in onnxruntime's messages that mean that memory ran out.
_NO_MEMORY = ("failed to allocate memory", "out of memory", "bad allocation", "bad_alloc")


class Session:
    """A loaded graph. Calls from several threads at once are fine.

    Attributes:
        path: the graph's file.
        provider: the one that it runs on.
    """

    def __init__(self, path: Path, device: torch.device, threads: int) -> None:
        """Loads a graph.

        Args:
            threads: of each call, where it runs on the CPU.

        Raises:
            RunError: onnxruntime is not installed, cannot load the graph, or lacks a provider that was asked for.
        """
        try:
            import onnxruntime  # type: ignore[import-untyped]
        except ImportError as error:
            raise RunError(INSTALL) from error
        self._onnxruntime = onnxruntime
        self.path = path
        wanted, asked = _wanted(device)
        available = onnxruntime.get_available_providers()
        missing = [name for name in wanted if name not in available]
        if missing:
            reason = f"{', '.join(missing)} is not in this onnxruntime, which has {', '.join(available)}"
            if asked:
                raise RunError(f"{PROVIDERS_VARIABLE}: {reason}; install onnxruntime-gpu, or choose another")
            log.warning("%s: %s; install onnxruntime-gpu to use the GPU", path.name, reason)
        chosen = [name for name in wanted if name in available]
        if chosen[0] != _PROVIDERS["cpu"] and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # finds the CUDA libraries that torch brought
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = threads
        options.enable_mem_pattern = False  # one would be kept for every length that ever occurs
        options.log_severity_level = 3
        index = device.index or 0
        settings: list[dict[str, Any]] = [{} if name == _PROVIDERS["cpu"] else {"device_id": index} for name in chosen]
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=chosen, provider_options=settings
            )
        except Exception as error:  # onnxruntime's errors have no common type of their own
            raise RunError(f"{path}: onnxruntime cannot load it: {first_line(error)}") from error
        loaded = self._session.get_providers()
        if chosen[0] not in loaded:
            reason = f"{chosen[0]} did not load, as its libraries are absent or of another version"
            if asked:
                raise RunError(f"{PROVIDERS_VARIABLE}: {path.name}: {reason}")
            log.warning("%s: %s; running on %s", path.name, reason, loaded[0])
        self.provider: str = loaded[0]
        self._device, self._index = ("cpu", 0) if self.provider == _PROVIDERS["cpu"] else ("cuda", index)
        log.info("%s: onnxruntime %s on %s", path.name, onnxruntime.__version__, self.provider)

    def to_device(self, array: npt.NDArray[Any]) -> Any:
        """An array where the session computes."""
        values = np.ascontiguousarray(array)
        return self._onnxruntime.OrtValue.ortvalue_from_numpy(values, self._device, self._index)

    def __call__(
        self, feeds: Mapping[str, Any], outputs: Sequence[str], stay: Sequence[str] = ()
    ) -> tuple[list[npt.NDArray[Any]], list[Any]]:
        """Runs the graph.

        Args:
            feeds: arrays, or values that a call left on the device, by input.
            outputs: outputs to bring to the host.
            stay: outputs to leave on the device.

        Raises:
            MemoryError: it does not fit.
            RunError: it fails otherwise.
        """
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, self.to_device(value) if isinstance(value, np.ndarray) else value)
        for name in outputs:
            binding.bind_output(name, "cpu")
        for name in stay:
            binding.bind_output(name, self._device, self._index)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            message = first_line(error)
            if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY):
                raise MemoryError(message) from error
            raise RunError(f"{self.path}: fails: {message}", exit_code=1) from error
        values = binding.get_outputs()
        return [value.numpy() for value in values[: len(outputs)]], values[len(outputs) :]


def _wanted(device: torch.device) -> tuple[list[str], bool]:
    """Providers in order, and whether the user named them."""
    text = os.environ.get(PROVIDERS_VARIABLE, "")
    if not text.strip():
        names = ["cpu"] if device.type == "cpu" else ["cuda", "cpu"]
        return [_PROVIDERS[name] for name in names], False
    names = [word.strip().lower() for word in text.split(",")]
    for name in names:
        if name not in _PROVIDERS:
            raise RunError(f"{PROVIDERS_VARIABLE}: {name}: choose from {', '.join(_PROVIDERS)}")
    return [_PROVIDERS[name] for name in names], True
