"""What the benchmark times with: a codec that notes how long its device worked, batches in memory, a run whose loader
processes and codec are there already, the largest rate of products that the device reaches, and torch's profiler.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from batch_tokenizer.codecs.base import Codec, Computation, Computed
from batch_tokenizer.data.loader import Loader
from batch_tokenizer.pipeline.setup import RunContext
from batch_tokenizer.records import Batch, Task, TokenizedRow

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


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one thing."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    def per(self, amount: float) -> Spread:
        """The same, divided by ``amount``."""
        return Spread(tuple(value / amount for value in self.values))

    def json(self) -> dict[str, float]:
        """``median``, ``least`` and ``most``, to six digits."""
        numbers = {"median": self.median, "least": min(self.values), "most": max(self.values)}
        return {name: float(f"{number:.6g}") for name, number in numbers.items()}


class TimedCodec(Codec):
    """A codec that notes how long its device worked on each call: by the device's own events, where it has some."""

    def __init__(self, codec: Codec, device: torch.device) -> None:
        self._codec = codec
        self._cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.spec = codec.spec
        self.batch_limit = codec.batch_limit
        self.runs_ahead = codec.runs_ahead

    @property
    def frame_budget(self) -> int:
        """The codec's."""
        return self._codec.frame_budget

    @frame_budget.setter
    def frame_budget(self, frames: int) -> None:
        self._codec.frame_budget = frames

    def encode_batch(
        self, features: Sequence[npt.NDArray[np.float32]], num_quantizers: int
    ) -> list[npt.NDArray[np.uint16]]:
        with self._timed():
            return self._codec.encode(features, num_quantizers)

    def decode_batch(self, codes: Sequence[npt.NDArray[np.uint16]]) -> list[npt.NDArray[np.float32]]:
        with self._timed():
            return self._codec.decode(codes)

    def begin(self, task: Task, inputs: Sequence[npt.NDArray[Any]], num_quantizers: int) -> Computation:
        with self._timed():
            return self._codec.begin(task, inputs, num_quantizers)

    def release(self) -> None:
        self._codec.release()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        if not self._cuda:
            yield
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._events.append((first, last))

    def take_busy_seconds(self) -> float | None:
        """Seconds between the first and the last work of each call since this was asked, or None without events."""
        if not self._cuda:
            return None
        torch.cuda.synchronize()
        seconds = sum(first.elapsed_time(last) for first, last in self._events) / 1e3
        self._events.clear()
        return seconds


@dataclass(frozen=True, slots=True)
class WarmContext(RunContext):
    """A run whose loader processes and codec are there already, so that a pass over the rows times nothing else."""

    warm_loader: Loader
    warm_codec: Codec

    @classmethod
    def of(cls, context: RunContext, loader: Loader, codec: Codec) -> WarmContext:
        """``context`` with what is there."""
        known = {one.name: getattr(context, one.name) for one in fields(RunContext)}
        return cls(**known, warm_loader=loader, warm_codec=codec)

    def open_loader(self) -> AbstractContextManager[Loader]:
        return nullcontext(self.warm_loader)

    def load_codec(self) -> Codec:
        return self.warm_codec


@dataclass(slots=True)
class InMemory:
    """Loaded rows in batches, and what the codec makes of them."""

    codec: TimedCodec
    batches: Sequence[Batch]
    task: Task
    num_quantizers: int
    codes: list[list[npt.NDArray[np.uint16]]] = field(default_factory=list)
    samples: list[Any] = field(default_factory=list)

    def encode(self) -> None:
        """All batches' codes."""
        inputs = [[row.features for row in batch.rows if row.features is not None] for batch in self.batches]
        self.codes = [done.codes for done in in_succession(self.codec, "wav2token", inputs, self.num_quantizers)]

    def decode(self) -> None:
        """All batches' samples, where the task has any."""
        if self.task == "wav2token":
            self.samples = [[None] * len(part) for part in self.codes]
        else:
            done = in_succession(self.codec, "token2wav", self.codes, self.num_quantizers)
            self.samples = [one.samples for one in done]

    def results(self) -> list[TokenizedRow]:
        """Both, as records."""
        self.encode()
        self.decode()
        return [
            TokenizedRow(row.row, code, wav, row.num_samples)
            for batch, codes, wavs in zip(self.batches, self.codes, self.samples, strict=True)
            for row, code, wav in zip(batch.rows, codes, wavs, strict=True)
        ]


def in_succession(
    codec: Codec, task: Literal["wav2token", "token2wav"], batches: Sequence[Sequence[Any]], num_quantizers: int
) -> Iterator[Computed]:
    """Each batch's results; where the codec runs ahead, as a run does it, the next is begun before they are there."""
    before: Computation | None = None
    for inputs in batches:
        if codec.runs_ahead:
            begun = codec.begin(task, inputs, num_quantizers)
            if before is not None:
                yield before.finish()
            before = begun
        elif task == "wav2token":
            yield Computed(codec.encode(inputs, num_quantizers), None, {})
        else:
            yield Computed([], codec.decode(inputs), {})
    if before is not None:
        yield before.finish()


def in_turns(contenders: Sequence[Iterator[None]]) -> None:
    """One step of each after the other until all have ended, so that what else runs on the machine meets all alike."""
    left = list(contenders)
    while left:
        left = [contender for contender in left if next(contender, "ended") is None]


def peak_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """The largest rate of square matrix products that the device reaches here, operations a second.

    The best of several tries: it is a bound to compare with.
    """
    best = 0.0
    for size in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        first, second = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        product = Timer("first @ second", globals={"first": first, "second": second}, num_threads=threads)
        best = max(best, 2 * size**3 / min(product.blocked_autorange().times))
    return best


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
