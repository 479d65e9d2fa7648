"""``batch_tokenizer bench``: how fast a codec and everything around it run here, and where the time goes.

It takes a codec (a checkpoint, a configuration with random weights, or one that costs nothing), utterances (those of a
manifest, or generated ones of some distribution of lengths) and a run's settings. It prints one table, with the exact
conditions, and a last line of JSON with the same.

    peak           the largest rate of matrix products that the device reaches, in the model's number format
    model          encode and decode of loaded batches, host arrays to host arrays
    end to end     a whole run: manifest, loader processes, codec, writers, ledger; start-up is reported apart
    loader         decoding and resampling as a run does it, against bare soundfile and torchaudio, per core
    writer         token files and wavs, per core
    profile        the device's time by kind of operator (only when it is named: profiling slows what it watches)
    baseline       the published way, on the same files (MiMo only: ``published_loop``)

Everything is done once to warm up, then ``--repeats`` times, model, end to end and baseline in turns; the table has the
median and the least and the most.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from batch_tokenizer import __version__
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.mimo.sized import size_names, sized_config
from batch_tokenizer.codecs.opening import CodecSetup
from batch_tokenizer.codecs.published_sizes import published_sizes, write_random_checkpoint
from batch_tokenizer.codecs.registry import Family
from batch_tokenizer.commands.bench_parts import PASS, Bench
from batch_tokenizer.commands.bench_workload import (
    LENGTHS,
    FreeFamily,
    RandomMiMo,
    draw_lengths,
    manifest_rows,
    manifest_wavs,
    write_manifest,
    write_utterances,
)
from batch_tokenizer.config import RunConfig, add_options, check_least
from batch_tokenizer.pipeline.setup import RunContext
from batch_tokenizer.records import RunError
from batch_tokenizer.runtime.processes import ProcessGroup
from batch_tokenizer.runtime.signals import StopRequest

PARTS = ("peak", "model", "end_to_end", "loader", "writer")

#: Measured only when it is asked for by name.
PROFILE = "profile"

#: Flags that mean what they mean for a run.
_RUN_OPTIONS = (
    "model_path", "task", "num_quantizers", "device", "dtype", "resampler", "attention", "batch_size", "frame_budget",
    "num_workers", "prefetch", "front_end",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add(
        "--config",
        help=f"in place of a checkpoint: {', '.join((*size_names(), *published_sizes()))}, a MiMo config.json, or free "
        "(costs nothing)",
    )
    add("--random_weights", action="store_true", help="what --config needs, as a configuration has no weights")
    add("--data_list", type=Path, metavar="MANIFEST", help="its utterances; generated ones when absent")
    add("--lengths", default="seed-tts", help=f"of generated ones: {', '.join(LENGTHS)}, uniform:A-B, constant:S")
    add("--num_utterances", type=int, metavar="N", help="how many (128, or all rows of the manifest)")
    add("--format", choices=("wav", "flac", "mp3"), default="wav", help="of generated ones")
    add("--sample_rate", type=int, default=24000, metavar="HZ", help="of generated ones")
    add("--seed", type=int, default=1986, metavar="N", help="of the draw of utterances (%(default)s)")
    add_options(parser, *_RUN_OPTIONS, task="wav2token2wav")
    add("--parts", nargs="+", choices=(*PARTS, PROFILE), default=list(PARTS), help="what to measure")
    add("--baseline", nargs="+", type=int, default=[], metavar="BATCH_SIZE", help="run the published way as well")
    add("--repeats", type=int, default=3)
    add("--work_dir", type=Path, help="where files are read and written; a temporary folder when absent")


def main(arguments: argparse.Namespace) -> int:
    """Measures, prints the table and the line of JSON. Returns 0.

    Raises:
        RunError: what was asked for cannot be run.
    """
    check_least(arguments, repeats=1, num_utterances=1)
    with _work_dir(arguments.work_dir) as folder:
        bench = prepare(arguments, folder)
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


def prepare(arguments: argparse.Namespace, folder: Path) -> Bench:
    """Opens the codec's spec, and writes the utterances and their manifest into ``folder``.

    Raises:
        RunError: the codec, the device or the utterances are not what was asked for.
    """
    # 1. Utterances in files, and a manifest of them.
    wavs: Sequence[str | Path]
    if arguments.data_list is not None:
        wavs = manifest_wavs(arguments.data_list, arguments.num_utterances, arguments.seed)
        source = str(arguments.data_list)
    else:
        lengths = draw_lengths(arguments.lengths, arguments.num_utterances or 128, arguments.seed)
        wavs = write_utterances(folder / "wavs", lengths, arguments.sample_rate, arguments.format, arguments.seed)
        source = f"generated, lengths {arguments.lengths}, {arguments.format}, {arguments.sample_rate} Hz"
    manifest = write_manifest(folder / "bench.jsonl", wavs, folder / "out", folder / "out")
    # 2. The codec, as a run opens it.
    shared = {name: getattr(arguments, name) for name in _RUN_OPTIONS}
    size = arguments.config
    if size in published_sizes() and arguments.random_weights and arguments.model_path is None:
        shared["model_path"], size = str(write_random_checkpoint(size, folder / size)), None
    config = RunConfig(data_list=manifest, run_dir=folder / "run", overwrite=True, **shared)
    context = open_context(config, size, arguments.random_weights and size == arguments.config)
    # 3. Outputs of an earlier benchmark in the same folder would make creating files slower.
    for earlier in folder.glob(f"{PASS}*"):
        shutil.rmtree(earlier, ignore_errors=True)
    bench = Bench(context, folder, [str(wav) for wav in wavs], manifest_rows(manifest), arguments.repeats)
    bench.report["conditions"] = {
        "date": time.strftime("%Y-%m-%d"),
        "version": __version__,
        "codec": arguments.config or arguments.model_path or "default",
        "task": config.task,
        "num_quantizers": context.num_quantizers,
        "device": _device_name(context.compute.device),
        "dtype": context.compute.dtype_name,
        "cores": context.compute.cores,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "utterances": len(bench.rows),
        "source": source,
        "batch_size": context.batch_size,
        "num_workers": context.num_workers,
        "front_end": context.spec.front_end,
        "attention": config.attention,
        "resampler": config.resampler,
        "repeats": arguments.repeats,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return bench


def open_context(config: RunConfig, size: str | None, random_weights: bool) -> RunContext:
    """What a run has on a checkpoint, or on a configuration without one.

    Raises:
        RunError: the flags do not say which codec, or it cannot be opened.
    """
    opened = None
    if size is not None:
        if config.model_path is not None:
            raise RunError("--config and --model_path: give one of them")
        if size != "free" and not random_weights:
            raise RunError(
                f"--config {size}: has no weights; add --random_weights, or give a checkpoint by --model_path"
            )
        family: Family = FreeFamily() if size == "free" else RandomMiMo(size, sized_config(size))
        opened = CodecSetup.open(
            Checkpoint(folder=Path(size), name=size, config={}), family, device=config.device, dtype=config.dtype,
            front_end=config.front_end, attention=config.attention,
        )  # fmt: skip
    elif random_weights:
        raise RunError("--random_weights: say of which configuration, with --config")
    return RunContext.prepare(config, ProcessGroup.from_environment({}), StopRequest(), time.monotonic(), opened)


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
        label = prefix + name.replace("_", " ")
        if isinstance(value, Mapping) and set(value) == {"median", "least", "most"}:
            yield label, f"{value['median']:.6g}  ({value['least']:.6g} to {value['most']:.6g})"
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{label}: ")
        else:
            yield label, str(value)
