"""The parts of the benchmark: model, whole runs, loader, writer and the published loop, over the same utterances."""

from __future__ import annotations

import io
import json
import logging
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from batch_tokenizer.audio.loading import load_samples
from batch_tokenizer.codecs.base import Codec
from batch_tokenizer.codecs.mimo.codec import MiMoCodec, MiMoSpec
from batch_tokenizer.codecs.mimo.operations import decoder_operations, encoder_operations
from batch_tokenizer.commands.bench_timing import (
    InMemory,
    Spread,
    TimedCodec,
    WarmContext,
    in_turns,
    peak_rate,
    profile_kinds,
)
from batch_tokenizer.commands.bench_workload import manifest_rows, write_manifest
from batch_tokenizer.commands.published_loop import PublishedLoop, load_bare
from batch_tokenizer.data.batching import Packer
from batch_tokenizer.data.loading import RowLoader
from batch_tokenizer.pipeline.run import run_job
from batch_tokenizer.pipeline.setup import RunContext
from batch_tokenizer.records import Batch, LoadedRow, ManifestRow, RowError, RunError, TokenizedRow
from batch_tokenizer.runtime.signals import StopRequest
from batch_tokenizer.writers.file_sink import FileSink

#: Rows that the loader's and the writer's rates are measured on, and the least seconds that a repeat of them takes.
_SAMPLED_ROWS = 128
_LEAST_SECONDS = 0.2

#: Batches that are profiled: the profiler keeps every operator of them.
_PROFILED_BATCHES = 4

#: What the folder of a pass is called, before its number.
PASS = "pass"


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

    def measure(self, parts: Sequence[str], baseline: Sequence[int]) -> dict[str, Any]:
        """All of ``parts``, in their order; the published way at each batch size of ``baseline``."""
        # 1. The bound, and the codec with its start-up time.
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
            # 2. All rows in memory; tokens that ``token2wav`` reads are made of them first.
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
            # 3. Loader and writer by themselves, then what takes turns: model, whole runs, published loop.
            if "loader" in parts and task != "token2wav":
                self._loader()
            if "writer" in parts:
                self._writer(results)
            contenders = [self._model(in_memory, seconds)] if "model" in parts else []
            contenders += [self._end_to_end(codec, seconds)] if "end_to_end" in parts else []
            contenders += [self._baseline(inner, batch_size, seconds) for batch_size in baseline]
            in_turns(contenders)
        # 4. The profile last, as profiling slows what it watches.
        if "profile" in parts:
            one = codec
            if self.context.compute.device.type == "cpu":  # utterances run in threads, which the profiler does not see
                one = TimedCodec(replace(self.context.codec, threads=1).load(task), self.context.compute.device)
            some = replace(in_memory, codec=one, batches=in_memory.batches[:_PROFILED_BATCHES])
            kinds = profile_kinds(some.results, self.context.compute.device)
            self.report["profile"] = {"batches": len(some.batches)} | kinds
        self.report["peak_memory_gb"] = self._memory()
        self.report["start_seconds"] = self.start_seconds
        return self.report

    def _new_pass(self) -> Path:
        """A folder with a manifest of the same rows, whose outputs go below it; tokens that are inputs stay in place.

        Nothing is deleted between passes: for minutes after many files were, ext4 takes ten times as long to create
        one, as it looks for an inode that was not freed of late.
        """
        folder = self.folder / f"{PASS}{self.passes}"
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
            rows = manifest_rows(self._new_pass() / "bench.jsonl")
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
            # 1. One row starts the loader processes, outside of what is timed.
            loader.submit(self.rows[:1])
            loader.next()
            self.start_seconds["loader"] = round(time.perf_counter() - began, 3)
            # 2. Each pass is a whole run into a new folder; the first one warms up and does not count.
            for repeat in range(self.repeats + 1):
                folder = self._new_pass()
                run_dir = folder / "run"
                codec.take_busy_seconds()
                config = replace(self.context.config, data_list=folder / "bench.jsonl", run_dir=run_dir)
                began = time.perf_counter()
                with StopRequest() as stop, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
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
        # 3. Medians over the passes.
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
            rows = manifest_rows(self._new_pass() / "bench.jsonl")
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
