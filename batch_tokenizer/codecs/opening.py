"""Opening a codec: the checkpoint, its family and spec, the device and number format, and then the weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from batch_tokenizer import __version__
from batch_tokenizer.codecs import registry
from batch_tokenizer.codecs.base import Codec, CodecSpec
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.memory import is_out_of_memory
from batch_tokenizer.codecs.registry import Family, find_family
from batch_tokenizer.config import AttentionBackend, Device, Dtype, FrontEnd
from batch_tokenizer.records import RunError, Task, first_line
from batch_tokenizer.runtime.devices import ComputeDevice, choose_device

log = logging.getLogger(__name__)


def open_spec(model_path: str | None) -> CodecSpec:
    """The spec of a checkpoint (folder, hub id, or None for the bundled one), without its weights.

    Raises:
        RunError: it cannot be found or is of no known family.
    """
    return registry.open_spec(Checkpoint.open(model_path))


def open_codec(
    model_path: str | None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Codec:
    """A checkpoint with all of its weights on a device, as ``CodecSetup.open`` chooses it.

    Args:
        settings: of a run, from which those of the codec's family are taken.

    Raises:
        RunError: the checkpoint or the device cannot be used.
    """
    setup = CodecSetup.open(Checkpoint.open(model_path), device=device, dtype=dtype)
    return replace(setup, spec=setup.spec.with_recorded(settings)).load()


@dataclass(frozen=True, slots=True)
class CodecSetup:
    """A codec on its device, before its weights are loaded.

    Attributes:
        spec: what loader processes and the codec share.
        threads: utterances that are computed side by side on a CPU.
    """

    checkpoint: Checkpoint
    family: Family
    spec: CodecSpec
    compute: ComputeDevice
    attention: AttentionBackend
    threads: int

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        family: Family | None = None,
        *,
        device: Device = "auto",
        dtype: Dtype = "auto",
        front_end: FrontEnd = "host",
        attention: AttentionBackend = "auto",
        options: Mapping[str, Any] = MappingProxyType({}),
        local_rank: int = 0,
        threads: int | None = None,
    ) -> CodecSetup:
        """Finds the family, reads the spec and chooses the device.

        Args:
            family: where it is known.
            options: settings of the codec's family, as ``CodecSpec.with_options`` takes them.
            local_rank: of the processes on this machine, which go to its GPUs in turn.
            threads: None takes one for each core of this process, and lets torch compute an operation on one thread:
                faster for short utterances, and results do not depend on how many cores there are. With a number,
                torch keeps its own number of threads.

        Raises:
            RunError: the checkpoint or the device cannot be used; the message names what is wrong.
        """
        family = family or find_family(checkpoint)
        spec = registry.open_spec(checkpoint, family).with_options(options)
        compute = choose_device(device, dtype, local_rank, spec.cuda_dtype)
        if threads is None:
            # On CUDA the processor only joins arrays, for which eight ranks must not take all cores.
            torch.set_num_threads(1 if compute.device.type == "cpu" else min(4, compute.cores))
        spec = with_front_end(spec, front_end, compute)
        return cls(checkpoint, family, spec, compute, attention, threads or compute.cores)

    def load(self, task: Task = "wav2token2wav", frame_budget: int | None = None) -> Codec:
        """Loads the weights that ``task`` needs.

        Args:
            frame_budget: most token frames computed at once, where it is not the codec's own.

        Raises:
            RunError: the weights are not what the configuration implies, cannot be read, or do not fit in memory; or
                the attention backend cannot run here.
        """
        try:
            request = LoadRequest(
                self.checkpoint, self.spec, task, self.compute.device, self.compute.dtype, self.attention, self.threads
            )
            with registry.errors_as_run_errors(self.checkpoint):
                codec = self.family.load_codec(request)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                f"{self.checkpoint.folder}: the weights do not fit in the memory of {self.compute.device} "
                f"({first_line(error)}); free it, or use a larger device",
                exit_code=1,
            ) from error
        if frame_budget is not None:
            codec.frame_budget = frame_budget
        return codec

    def token_info(self, num_quantizers: int, resampler: str) -> dict[str, Any]:
        """What every token file says about how its codes were computed, not when, where or beside which rows."""
        info = self.spec.info
        return {
            "codec": info.family,
            "fingerprint": info.fingerprint,
            "sample_rate": info.sample_rate,
            "frame_rate": info.frame_rate,
            "codebook_sizes": list(info.codebook_sizes[:num_quantizers]),
            "dtype": self.compute.dtype_name,
            "resampler": resampler,
            **({"columns": list(info.columns[:num_quantizers])} if info.columns else {}),
            **({"channels": info.channels} if info.channels > 1 else {}),
            **self.spec.settings,
            "version": __version__,
        }


def with_front_end(spec: CodecSpec, wanted: FrontEnd, compute: ComputeDevice) -> CodecSpec:
    """The spec whose features are made where ``wanted``; ``auto`` is on the device on CUDA, where the codec can.

    Raises:
        RunError: this codec cannot make them on a device.
    """
    if wanted == "host" or (wanted == "auto" and compute.device.type == "cpu"):
        return spec
    on_device = spec.with_device_front_end()
    if on_device is None and wanted == "device":
        raise RunError(f"--front_end device: {spec.info.family} makes its features in loader processes; leave it out")
    log.info("features are made %s", "in loader processes" if on_device is None else f"on {compute.device}")
    return on_device or spec
