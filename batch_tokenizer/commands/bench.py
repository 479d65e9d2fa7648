"""``batch_tokenizer bench``: how fast a codec and everything around it run here, and where the time goes.

What enters is a codec (a checkpoint, or a configuration with random weights, or one that costs nothing), utterances (a
manifest's, or made ones of some distribution of lengths) and a run's settings. What leaves is one table on standard
output, with the exact conditions, and a last line of JSON with the same.

    peak           the largest rate of matrix products that the device reaches, in the model's number format
    model          encode and decode of loaded batches, host arrays to host arrays
    end to end     a whole run: manifest, loader processes, codec, writers, ledger; start-up is told apart
    loader         decoding and resampling as a run does it, against bare soundfile and torchaudio, per core
    writer         token files and wavs, per core
    baseline       the published way, on the same files (MiMo only; see ``bench_baseline``)

Everything is done once to warm up, then ``--repeats`` times, model, end to end and baseline in turns; the table has the
median and the least and the most.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from batch_tokenizer import __version__
from batch_tokenizer.audio.loading import load_samples
from batch_tokenizer.codecs.base import Codec, Computation, Computed
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.mimo.codec import MiMoCodec, MiMoSpec
from batch_tokenizer.codecs.mimo.operations import decoder_operations, encoder_operations
from batch_tokenizer.codecs.mimo.sized import size_names, sized_config
from batch_tokenizer.codecs.registry import Family
from batch_tokenizer.commands.bench_workload import (
    LENGTHS,
    FreeFamily,
    RandomMiMo,
    draw_lengths,
    manifest_wavs,
    write_manifest,
    write_utterances,
)
from batch_tokenizer.commands.published_loop import PublishedLoop, load_bare
from batch_tokenizer.config import RunConfig, add_options
from batch_tokenizer.data.batching import Packer
from batch_tokenizer.data.loader import Loader
from batch_tokenizer.data.loading import RowLoader
from batch_tokenizer.pipeline.run import run_job
from batch_tokenizer.pipeline.setup import RunContext, with_front_end
from batch_tokenizer.records import Batch, LoadedRow, ManifestRow, RowError, RunError, Task, TokenizedRow
from batch_tokenizer.runtime.devices import choose_device
from batch_tokenizer.runtime.processes import ProcessGroup
from batch_tokenizer.runtime.signals import StopRequest
from batch_tokenizer.writers.file_sink import FileSink

PARTS = ("peak", "model", "end_to_end", "loader", "writer")

#: Flags that mean what they mean for a run.
_RUN_OPTIONS = (
    "model_path", "task", "num_quantizers", "device", "dtype", "resampler", "attention", "batch_size", "frame_budget",
    "num_workers", "prefetch", "front_end",
)  # fmt: skip

#: Rows that the loader's and the writer's rates are measured on, and the least seconds that a repeat of them takes.
_SAMPLED_ROWS = 128
_LEAST_SECONDS = 0.2

#: What the folder of a pass is called, before its number.
_PASS = "pass"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add(
        "--config",
        help=f"in place of a checkpoint: {', '.join(size_names())}, a MiMo config.json, or free (costs nothing)",
    )
    add("--random_weights", action="store_true", help="what --config needs, as a configuration has no weights")
    add("--data_list", type=Path, metavar="MANIFEST", help="its utterances; generated ones when absent")
    add("--lengths", default="seed-tts", help=f"of generated ones: {', '.join(LENGTHS)}, uniform:A-B, constant:S")
    add("--num_utterances", type=int, metavar="N", help="how many (128, or all rows of the manifest)")
    add("--format", choices=("wav", "flac", "mp3"), default="wav", help="of generated ones")
    add("--sample_rate", type=int, default=24000, metavar="HZ", help="of generated ones")
    add("--seed", type=int, default=1986, metavar="N", help="of the draw of utterances (%(default)s)")
    add_options(parser, *_RUN_OPTIONS, task="wav2token2wav")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    add("--baseline", nargs="+", type=int, default=[], metavar="BATCH_SIZE", help="run the published way as well")
    add("--repeats", type=int, default=3)
    add("--work_dir", type=Path, help="where files are read and written; a temporary folder when absent")


def main(arguments: argparse.Namespace) -> int:
    """Measures, prints the table and the line of JSON. Returns 0.

    Raises:
        RunError: what was asked for cannot be run.
    """
    if arguments.repeats < 1:
        raise RunError(f"--repeats {arguments.repeats}: must be at least 1")
    if arguments.num_utterances is not None and arguments.num_utterances < 1:
        raise RunError(f"--num_utterances {arguments.num_utterances}: must be at least 1")
    with _work_dir(arguments.work_dir) as folder:
        bench = Bench.prepare(arguments, folder)
        report = bench.measure(arguments.parts, arguments.baseline)
    print("\n".join(_table(report)))
    print(json.dumps(report), flush=True)
    return 0


@contextmanager
def _work_dir(chosen: Path | None) -> Iterator[Path]:
    if chosen is None:
        with tempfile.TemporaryDirectory(prefix="batch_tokenizer_bench_") as folder:
            yield Path(folder)
    else:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen.resolve()


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

    def encode(self, features: Sequence[npt.NDArray[np.float32]], num_quantizers: int) -> list[npt.NDArray[np.uint16]]:
        with self._timed():
            return self._codec.encode(features, num_quantizers)

    def decode(self, codes: Sequence[npt.NDArray[np.uint16]]) -> list[npt.NDArray[np.float32]]:
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

    loader: Loader | None = None
    codec: Codec | None = None

    @classmethod
    def of(cls, context: RunContext, loader: Loader, codec: Codec) -> WarmContext:
        """``context`` with what is there."""
        known = {name.name: getattr(context, name.name) for name in fields(RunContext)}
        return cls(**known, loader=loader, codec=codec)

    def open_loader(self) -> AbstractContextManager[Loader]:
        assert self.loader is not None
        return nullcontext(self.loader)

    def load_codec(self) -> Codec:
        assert self.codec is not None
        return self.codec


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
        self.codes = [done.codes for done in _in_succession(self.codec, "wav2token", inputs, self.num_quantizers)]

    def decode(self) -> None:
        """All batches' samples, where the task has any."""
        if self.task == "wav2token":
            self.samples = [[None] * len(part) for part in self.codes]
        else:
            done = _in_succession(self.codec, "token2wav", self.codes, self.num_quantizers)
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


@dataclass(slots=True)
class Bench:
    """What is measured, and the table as it grows."""

    context: RunContext
    folder: Path
    wavs: list[str]
    rows: list[ManifestRow]
    repeats: int
    report: dict[str, Any] = field(default_factory=dict)
    passes: int = 0
    peak: float | None = None
    start_seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def prepare(cls, arguments: argparse.Namespace, folder: Path) -> Bench:
        """Opens the codec's spec, and puts the utterances on disk.

        Raises:
            RunError: the codec, the device or the utterances are not what was asked for.
        """
        wavs: Sequence[str | Path]
        if arguments.data_list is not None:
            wavs = manifest_wavs(arguments.data_list, arguments.num_utterances, arguments.seed)
            source = str(arguments.data_list)
        else:
            lengths = draw_lengths(arguments.lengths, arguments.num_utterances or 128, arguments.seed)
            wavs = write_utterances(folder / "wavs", lengths, arguments.sample_rate, arguments.format, arguments.seed)
            source = f"made, lengths {arguments.lengths}, {arguments.format}, {arguments.sample_rate} Hz"
        manifest = write_manifest(folder / "bench.jsonl", wavs, folder / "out", folder / "out")
        shared = {name: getattr(arguments, name) for name in _RUN_OPTIONS}
        config = RunConfig(data_list=manifest, run_dir=folder / "run", overwrite=True, **shared)
        context = _open_context(config, arguments.config, arguments.random_weights)
        for passed in folder.glob(f"{_PASS}*"):
            shutil.rmtree(passed, ignore_errors=True)
        bench = cls(context, folder, [str(wav) for wav in wavs], _manifest_rows(manifest), arguments.repeats)
        bench.report["conditions"] = bench._conditions(arguments.config or arguments.model_path or "default", source)
        return bench

    def _conditions(self, codec: str, source: str) -> dict[str, Any]:
        context, compute = self.context, self.context.compute
        return {
            "date": time.strftime("%Y-%m-%d"),
            "version": __version__,
            "codec": codec,
            "task": context.config.task,
            "num_quantizers": context.num_quantizers,
            "device": _device_name(compute.device),
            "dtype": compute.dtype_name,
            "cores": compute.cores,
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "load_average_at_start": round(os.getloadavg()[0], 2),
            "utterances": len(self.rows),
            "source": source,
            "batch_size": context.batch_size,
            "num_workers": context.num_workers,
            "front_end": context.spec.front_end,
            "attention": context.config.attention,
            "resampler": context.config.resampler,
            "repeats": self.repeats,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }

    def measure(self, parts: Sequence[str], baseline: Sequence[int]) -> dict[str, Any]:
        """All of ``parts``, in their order; the published way at each batch size of ``baseline``."""
        task = self.context.config.task
        if "peak" in parts:
            self.peak = peak_rate(self.context.compute.device, self.context.compute.dtype, self.context.compute.cores)
            self.report["peak_tflops"] = float(f"{self.peak / 1e12:.4g}")
        began = time.perf_counter()
        inner = self.context.load_codec()
        codec = TimedCodec(inner, self.context.compute.device)
        self.start_seconds["codec"] = round(time.perf_counter() - began, 3)
        self.report["conditions"]["frame_budget"] = codec.frame_budget
        with _logging_at(logging.ERROR):
            loaded = self._load()
            seconds = sum(row.num_samples for row in loaded) / self.context.spec.info.sample_rate
            self.report["conditions"]["audio_seconds"] = round(seconds, 1)
            in_memory = InMemory(codec, self._batches(codec, loaded), task, self.context.num_quantizers)
            if task == "token2wav" or "writer" in parts:
                results = in_memory.results()
            if task == "token2wav":
                sink = FileSink("wav2token", self.context.spec.info.sample_rate, self.context.info)
                for result in results:
                    sink.write(result)
            if "loader" in parts and task != "token2wav":
                self._loader()
            if "writer" in parts:
                self._writer(results)
            contenders = [self._model(in_memory, seconds)] if "model" in parts else []
            contenders += [self._end_to_end(codec, seconds)] if "end_to_end" in parts else []
            contenders += [self._baseline(inner, batch_size, seconds) for batch_size in baseline]
            _in_turns(contenders)
        self.report["peak_memory_gb"] = self._memory()
        self.report["start_seconds"] = self.start_seconds
        return self.report

    def _new_pass(self) -> Path:
        """A folder with a manifest of the same rows, whose outputs go below it; tokens that are inputs stay in place.

        Nothing is deleted between passes: for minutes after many files were, ext4 takes ten times as long to create
        one, as it looks for an inode that was not freed of late.
        """
        folder = self.folder / f"{_PASS}{self.passes}"
        self.passes += 1
        folder.mkdir()
        tokens = self.folder if self.context.config.task == "token2wav" else folder
        write_manifest(folder / "bench.jsonl", self.wavs, tokens / "out", folder / "out")
        return folder

    # ------------------------------------------------------------------------------------------------------- the parts

    def _load(self) -> list[LoadedRow]:
        """All rows in memory, as the codec takes them."""
        task = "wav2token" if self.context.config.task == "token2wav" else self.context.config.task
        load = RowLoader(task, self.context.spec, self.context.config.resampler, self.context.num_quantizers)
        try:
            return [load(row) for row in self.rows]
        except RowError as error:
            raise RunError(f"an utterance cannot be loaded: {error}") from error

    def _batches(self, codec: Codec, loaded: Sequence[LoadedRow]) -> list[Batch]:
        """As the run makes them, with the longest rows first."""
        batch_size = min(self.context.batch_size, codec.batch_limit or self.context.batch_size)
        packer = Packer(batch_size, max(1, codec.frame_budget * 15 // 16))
        longest_first = sorted(loaded, key=lambda row: -row.frames)
        return [batch for row in longest_first for batch in packer.add(row)] + packer.flush()

    def _model(self, rows: InMemory, seconds: float) -> Iterator[None]:
        """Encode and decode of what is in memory, one pass a step."""
        spent: dict[str, list[float]] = {"encode": [], "decode": []}
        for repeat in range(self.repeats + 1):
            for stage, compute in (("encode", rows.encode), ("decode", rows.decode)):
                elapsed = self._elapsed(compute)
                if repeat:
                    spent[stage].append(elapsed)
            yield
        self._report_model(rows.codec, rows.batches, spent, seconds)

    def _report_model(
        self, codec: TimedCodec, batches: Sequence[Batch], spent: Mapping[str, Sequence[float]], seconds: float
    ) -> None:
        task = self.context.config.task
        stages = {"wav2token": ("encode",), "token2wav": ("decode",)}.get(task, ("encode", "decode"))
        total = Spread(tuple(sum(times) for times in zip(*(spent[stage] for stage in stages), strict=True)))
        model: dict[str, Any] = {"rtf": total.per(seconds).json(), "times_real_time": round(seconds / total.median, 2)}
        for stage in stages:
            model[f"{stage}_rtf"] = Spread(tuple(spent[stage])).per(seconds).json()
        model["batches"] = len(batches)
        if self.context.compute.device.type == "cuda":
            used = sum(batch.frames for batch in batches)
            model["packing_waste"] = round(1 - used / (len(batches) * codec.frame_budget), 4)
        else:
            model["packing_waste"] = 0.0  # nothing is packed or padded on a CPU
        operations = self._operations([row for batch in batches for row in batch.rows], stages)
        if operations is not None:
            model["gflop_per_audio_second"] = round(operations / seconds / 1e9, 2)
            model["tflops"] = float(f"{operations / total.median / 1e12:.4g}")
            if self.peak is not None:
                model["share_of_peak"] = round(operations / total.median / self.peak, 4)
        self.report["model"] = model

    def _operations(self, rows: Sequence[LoadedRow], stages: Sequence[str]) -> int | None:
        """Floating-point operations by the equations, of the families for which they are written down."""
        spec = self.context.spec
        if not isinstance(spec, MiMoSpec):
            return None
        total = 0
        for row in rows:
            if "encode" in stages:
                mel_frames = spec.config.num_mel_frames(row.num_samples)
                total += encoder_operations(spec.config, mel_frames, self.context.num_quantizers)
            if "decode" in stages:
                total += decoder_operations(spec.config, row.frames)
        return total

    def _loader(self) -> None:
        """Decoding and resampling by ours and by bare libraries, in turns, in this thread; and ours with the front end.

        Processor time, so that what else runs on the machine counts little.
        """
        rows = self.rows[:_SAMPLED_ROWS]
        rate, resampler = self.context.spec.info.sample_rate, self.context.config.resampler
        load = RowLoader("wav2token", self.context.spec, resampler, self.context.num_quantizers)
        loaders: dict[str, Callable[[ManifestRow], Any]] = {
            "bare": lambda row: load_bare(str(row.wav), rate),
            "ours": lambda row: load_samples(str(row.wav), rate, resampler),
            "with_front_end": load,
        }
        seconds = sum(len(load_samples(str(row.wav), rate, resampler)) for row in rows) / rate
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        times: dict[str, list[float]] = {name: [] for name in loaders}
        for repeat in range(self.repeats + 1):
            for name, one in loaders.items():
                began, passes = time.thread_time(), 0
                while not passes or time.thread_time() - began < _LEAST_SECONDS:
                    for row in rows:
                        one(row)
                    passes += 1
                if repeat:
                    times[name].append((time.thread_time() - began) / passes)
        torch.set_num_threads(threads)
        bare = statistics.median(times["bare"])
        self.report["loader_per_core"] = {
            f"{name}_audio_seconds_a_second": round(seconds / statistics.median(spent), 1)
            for name, spent in times.items()
        } | {"share_of_bare": round(bare / statistics.median(times["ours"]), 3)}

    def _writer(self, results: Sequence[TokenizedRow]) -> None:
        """What one thread writes: token files and wavs, as the task has them."""
        some = results[:_SAMPLED_ROWS]
        task = self.context.config.task
        sink = FileSink(task, self.context.spec.info.output_sample_rate, self.context.info)
        times = []
        for repeat in range(self.repeats + 1):
            rows = _manifest_rows(self._new_pass() / "bench.jsonl")
            placed = [replace(result, row=rows[result.row.line]) for result in some]
            began, cpu = time.perf_counter(), time.thread_time()
            for result in placed:
                sink.write(result)
            if repeat:
                times.append((time.perf_counter() - began, time.thread_time() - cpu))
        seconds = sum(result.num_samples for result in some) / self.context.spec.info.sample_rate
        wall, processor = (statistics.median(column) for column in zip(*times, strict=True))
        self.report["writer_per_core"] = {
            "rows_a_second": round(len(some) / wall, 1),
            "audio_seconds_a_second": round(seconds / wall, 1),
            "processor_milliseconds_a_row": round(1e3 * processor / len(some), 3),
        }

    def _end_to_end(self, codec: TimedCodec, seconds: float) -> Iterator[None]:
        """Whole runs, one a step, each into a new folder, with loader processes that are already there."""
        walls, shares, idle = [], [], []
        began = time.perf_counter()
        with self.context.open_loader() as loader:
            loader.submit(self.rows[:1])
            loader.next()
            self.start_seconds["loader"] = round(time.perf_counter() - began, 3)
            for repeat in range(self.repeats + 1):
                folder = self._new_pass()
                run_dir = folder / "run"
                codec.take_busy_seconds()
                config = replace(self.context.config, data_list=folder / "bench.jsonl", run_dir=run_dir)
                began = time.perf_counter()
                with StopRequest() as stop, contextlib.redirect_stdout(io.StringIO()), _quiet_stderr():
                    context = replace(self.context, config=config, stop=stop, started=time.monotonic())
                    status = run_job(WarmContext.of(context, loader, codec))
                wall = time.perf_counter() - began
                summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
                if status or summary["done"] != len(self.rows):
                    raise RunError(f"a run of the benchmark ended with {summary['failed']} rows failed: see {run_dir}")
                busy = codec.take_busy_seconds()
                if repeat:
                    walls.append(wall)
                    shares.append({name: rate * seconds / wall for name, rate in summary["rtf_per_stage"].items()})
                    if busy is not None:
                        idle.append(1 - busy / wall)
                yield
        spread = Spread(tuple(walls))
        measured = {
            "rtf": spread.per(seconds).json(),
            "times_real_time": round(seconds / spread.median, 2),
            "rows_a_second": round(len(self.rows) / spread.median, 1),
            "seconds_of_stages_a_second": {
                name: round(statistics.median(share[name] for share in shares), 3) for name in shares[0]
            },
            "device_idle_share": round(statistics.median(idle), 4) if idle else "not applicable",
        }
        if "model" in self.report:
            model = self.report["model"]["rtf"]["median"]
            measured["share_of_model_rate"] = round(model * seconds / spread.median, 4)
        self.report["end_to_end"] = measured

    def _baseline(self, codec: Codec, batch_size: int, seconds: float) -> Iterator[None]:
        """The published loop on the same rows, one pass a step, on all cores."""
        if not isinstance(codec, MiMoCodec) or codec.model.decoder is None:
            raise RunError("--baseline: the published loop is of MiMo, and needs --task wav2token2wav")
        context = self.context
        sink = FileSink("wav2token2wav", context.spec.info.output_sample_rate, context.info)
        assert isinstance(context.spec, MiMoSpec)
        loop = PublishedLoop(
            codec.model, self.rows, replace(context.spec, front_end="host"), batch_size, context.num_workers
        )
        walls = []
        for repeat in range(self.repeats + 1):
            rows = _manifest_rows(self._new_pass() / "bench.jsonl")
            threads = torch.get_num_threads()
            torch.set_num_threads(context.compute.cores)
            began = time.perf_counter()
            # The first batch is enough for its workers to start, and libraries too.
            for result in loop.run(context.num_quantizers, num_batches=None if repeat else 1):
                sink.write(replace(result, row=rows[result.row.line]))
            if repeat:
                walls.append(time.perf_counter() - began)
            torch.set_num_threads(threads)
            yield
        spread = Spread(tuple(walls))
        measured = {"rtf": spread.per(seconds).json(), "times_real_time": round(seconds / spread.median, 2)}
        if "end_to_end" in self.report:
            measured["ours_over_it"] = round(spread.median / seconds / self.report["end_to_end"]["rtf"]["median"], 3)
        self.report[f"published_loop_batch_{batch_size}"] = measured

    def _elapsed(self, compute: Callable[[], None]) -> float:
        """Seconds: by the device's events on CUDA, else by the clock."""
        if self.context.compute.device.type != "cuda":
            began = time.perf_counter()
            compute()
            return time.perf_counter() - began
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        first.record()
        compute()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def _memory(self) -> dict[str, float]:
        kilobytes = 1 if platform.system() == "Darwin" else 1024
        peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes / 1e9}
        if self.context.compute.device.type == "cuda":
            peak["device"] = torch.cuda.max_memory_allocated(self.context.compute.device) / 1e9
        return {name: round(size, 3) for name, size in peak.items()}


def _manifest_rows(manifest: Path) -> list[ManifestRow]:
    """The rows of a manifest that ``write_manifest`` wrote."""
    return [
        ManifestRow(line, f"{line:016x}", row["key"], row["wav"], row["quantized_tokens"],
                    row["reconstructed_wav"], row)
        for line, row in enumerate(map(json.loads, manifest.read_text(encoding="utf-8").splitlines()))
    ]  # fmt: skip


def _in_succession(
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


def _in_turns(contenders: Sequence[Iterator[None]]) -> None:
    """One step of each after the other until all have ended, so that what else runs on the machine meets all alike."""
    left = list(contenders)
    while left:
        left = [contender for contender in left if next(contender, "ended") is None]


def _open_context(config: RunConfig, size: str | None, random_weights: bool) -> RunContext:
    """A run on a checkpoint, or on a configuration without one."""
    processes = ProcessGroup.from_environment({})
    if size is None:
        if random_weights:
            raise RunError("--random_weights: say of which configuration, with --config")
        return RunContext.prepare(config, processes, StopRequest(), time.monotonic())
    if config.model_path is not None:
        raise RunError("--config and --model_path: give one of them")
    family: Family
    if size == "free":
        family = FreeFamily()
    elif random_weights:
        family = RandomMiMo(size, sized_config(size))
    else:
        raise RunError(f"--config {size}: has no weights; add --random_weights, or give a checkpoint with --model_path")
    checkpoint = Checkpoint(folder=Path(size), name=size, config={})
    spec = family.open_spec(checkpoint)
    compute = choose_device(config.device, config.dtype, 0, spec.cuda_dtype)
    spec = with_front_end(spec, config.front_end, compute)
    if compute.device.type == "cpu":
        torch.set_num_threads(1)  # as in a run
    most = spec.info.num_codebooks
    if config.num_quantizers is not None and config.num_quantizers > most:
        raise RunError(f"--num_quantizers {config.num_quantizers}: this configuration has {most} codebooks")
    return RunContext(
        config, processes, compute, checkpoint, family, spec, config.num_quantizers or most, StopRequest(),
        time.monotonic(),
    )  # fmt: skip


def peak_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """The largest rate of square matrix products that the device reaches here, operations a second.

    The best of several tries: it is a bound to compare with.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    best = 0.0
    for size in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        first, second = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(10):
            if device.type == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                for _ in range(10):
                    first @ second
                end.record()
                end.synchronize()
                elapsed = start.elapsed_time(end) / 1e4
            else:
                began = time.perf_counter()
                first @ second
                elapsed = time.perf_counter() - began
            best = max(best, 2 * size**3 / elapsed)
    torch.set_num_threads(before)
    return best


@contextmanager
def _logging_at(level: int) -> Iterator[None]:
    """The root logger at ``level``."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(level)
    try:
        yield
    finally:
        root.setLevel(before)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Without the progress line of each pass."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _table(report: Mapping[str, Any]) -> list[str]:
    """The report as aligned lines, a name and its value each."""
    rows = list(_flat(report))
    width = max(len(name) for name, _ in rows) + 2
    return [f"{name:<{width}}{value}" for name, value in rows]


def _flat(report: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in report.items():
        spoken = prefix + name.replace("_", " ")
        if isinstance(value, Mapping) and set(value) == {"median", "least", "most"}:
            yield spoken, f"{value['median']:.6g}  ({value['least']:.6g} to {value['most']:.6g})"
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{spoken}: ")
        else:
            yield spoken, str(value)
