"""Measures the sinks with very many short rows out of tars. A command, not a test.

    python -m tests.measure.sink_scale --rows 100000
    python -m tests.measure.sink_scale --without_model --rows 100000
    python -m tests.measure.sink_scale --compare --rows 4000

Makes tars of short clips (``DISTINCT`` of them again and again, under new names) in a temporary folder and runs
``batch_tokenizer`` on them through each sink, with a tiny random model, so that the model is the least of it. For each:
rows a second from the command's start to its end, processor time, bytes a code, files made (outputs and run folder),
and the peak of the memory of all its processes, in the second and in the last quarter of the run (shared pages count
for each). Where processor time is far below the time, the machine was busy with other things.
``--without_model`` writes random codes of such rows (8 codebooks, as the published model has them) with the run's own
writer threads, a process a sink. ``--compare`` runs tar to tar against JSON lines of files to json on the same audio,
clips of 0.5 s and of 8 s, in pairs of which now the one and now the other comes first, and tells the median of their
ratios. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import wave
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from batch_tokenizer.config import RunConfig
from batch_tokenizer.records import ManifestRow, RowError, Sink, TokenizedRow
from batch_tokenizer.runtime.ledger_writer import LedgerWriter
from batch_tokenizer.runtime.processes import ProcessGroup
from batch_tokenizer.runtime.run_folder import RunFolder
from batch_tokenizer.sources.finishing import output_path
from batch_tokenizer.writers.open import open_sink, recover_shards
from batch_tokenizer.writers.pool import WriterPool
from tests.support.checkpoints import write_mimo_checkpoint
from tests.support.runs import run_environment

RATE = 24000
DISTINCT = 400
ROWS_PER_TAR = 2000
SINKS = ("json", "npy", "jsonl", "tar", "parquet")


@dataclass(frozen=True)
class Result:
    """What one run took and made; processor time is that of all its processes, megabytes are of resident memory."""

    name: str
    rows: int
    seconds: float
    processor_seconds: float
    rows_per_second: float
    bytes_per_code: float
    output_files: int
    run_files: int
    early_megabytes: float
    late_megabytes: float


def clips(low: float, high: float) -> list[bytes]:
    """Wav files of ``low`` to ``high`` seconds, of a tone in noise."""
    rng = np.random.default_rng(0)
    made = []
    for seconds in rng.uniform(low, high, DISTINCT):
        axis = np.arange(int(seconds * RATE)) / RATE
        samples = 0.3 * np.sin(2 * np.pi * rng.uniform(80, 2000) * axis) + 0.1 * rng.standard_normal(len(axis))
        stream = io.BytesIO()
        with wave.open(stream, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
        made.append(stream.getvalue())
    return made


def write_tars(folder: Path, rows: int, audio: Sequence[bytes]) -> None:
    """``KEY.wav`` and ``KEY.json`` of each row."""
    folder.mkdir()
    for first in range(0, rows, ROWS_PER_TAR):
        with tarfile.open(folder / f"{first // ROWS_PER_TAR:06d}.tar", "w") as tar:
            for row in range(first, min(rows, first + ROWS_PER_TAR)):
                about = json.dumps({"text": f"text of row {row}", "speaker": row % 251}).encode()
                for ending, content in (("json", about), ("wav", audio[row % len(audio)])):
                    member = tarfile.TarInfo(f"row{row:08d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def write_files(folder: Path, rows: int, audio: Sequence[bytes]) -> Path:
    """The same rows as files, a hundred a folder, and a manifest of them."""
    lines = []
    for row in range(rows):
        path = folder / "wavs" / f"{row // 100:06d}" / f"row{row:08d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(audio[row % len(audio)])
        fields = {"key": f"row{row:08d}", "wav": str(path), "text": f"text of row {row}", "speaker": row % 251}
        fields["quantized_tokens"] = str(folder / "tokens" / f"{row // 100:06d}" / f"row{row:08d}.json")
        lines.append(json.dumps(fields) + "\n")
    (folder / "data.jsonl").write_text("".join(lines))
    return folder / "data.jsonl"


class Watch:
    """Looks at a process and all below it, now and then."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._processor: dict[int, float] = {}
        self.megabytes: list[float] = []

    @property
    def processor_seconds(self) -> float:
        """Of all processes that were seen, as last seen."""
        return sum(self._processor.values())

    def look(self) -> None:
        """Once."""
        total = 0
        with contextlib.suppress(psutil.Error):
            for member in [self._process, *self._process.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += member.memory_info().rss
                    times = member.cpu_times()
                    self._processor[member.pid] = times.user + times.system
        self.megabytes.append(total / 1e6)


def files_below(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place) / name for name in names)


def run(
    name: str, source: str, rows: int, folder: Path, checkpoint: Path, ranks: int, workers: int, *flags: object
) -> Result:
    """One run from start to end; its outputs are removed."""
    outputs, run_dir = folder / "tokens", folder / "run"
    launcher = ("-m", "torch.distributed.run", f"--nproc_per_node={ranks}") if ranks > 1 else ()
    command = [
        sys.executable, *launcher, "-m", "batch_tokenizer", "--data_list", source, "--task", "wav2token",
        "--model_path", checkpoint, "--run_dir", run_dir, "--num_workers", workers, "--batch_size", 64, *flags,
    ]  # fmt: skip
    started = time.monotonic()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), env=run_environment(), stdout=log, stderr=subprocess.STDOUT)
        watch = Watch(psutil.Process(process.pid))
        while process.poll() is None:
            watch.look()
            time.sleep(0.25)
    seconds = time.monotonic() - started
    summary = json.loads((run_dir / "summary.json").read_text()) if (run_dir / "summary.json").exists() else {}
    if process.returncode or summary.get("done") != rows:
        raise SystemExit(f"{name} failed:\n{(folder / 'log.txt').read_text()[-2000:]}")
    frames = 0
    for path in (run_dir / "ledger").glob("*.jsonl"):
        frames += sum(json.loads(line).get("frames", 0) for line in path.read_bytes().splitlines())
    made = list(files_below(outputs))
    memory = watch.megabytes
    quarter = max(1, len(memory) // 4)
    result = Result(
        name, rows, round(seconds, 1), round(watch.processor_seconds, 1), round(rows / seconds, 1),
        round(sum(path.stat().st_size for path in made) / (frames * 5), 2), len(made),
        sum(1 for _ in files_below(run_dir)), round(max(memory[quarter : 2 * quarter] or [0.0])),
        round(max(memory[-quarter:])),
    )  # fmt: skip
    show(result)
    shutil.rmtree(outputs)
    shutil.rmtree(run_dir)
    return result


def show(result: Result) -> None:
    """Print it."""
    print(
        f"{result.name:<18} {result.rows:>8,} rows {result.seconds:>7.1f} s "
        f"({result.processor_seconds:.1f} s of processors) {result.rows_per_second:>8,.1f} rows/s "
        f"{result.bytes_per_code:>7.2f} bytes/code {result.output_files:>7,} + {result.run_files} files "
        f"{result.early_megabytes:>6.0f} MB, then {result.late_megabytes:.0f} MB",
        flush=True,
    )


def write_only(sink: Sink, rows: int, folder: Path) -> Result:
    """Random codes through the writer threads and the sink of a run; in a process of its own."""
    sizes = (1024, 1024, 128, 128, 128, 128, 128, 128)
    info = {
        "codec": "mimo", "fingerprint": "0" * 32, "sample_rate": RATE, "frame_rate": 25.0, "codebook_sizes": sizes,
        "dtype": "float32", "resampler": "reference", "version": "0.1.0",
    }  # fmt: skip
    outputs, run_dir = folder / "tokens", folder / "run"
    config = RunConfig(data_list=folder / "none.jsonl", sink=sink, output_dir=str(outputs), run_dir=run_dir)
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 26, rows)
    alone = ProcessGroup.from_environment({})
    watch = Watch(psutil.Process())
    started = time.monotonic()
    with RunFolder.open(run_dir, {}, processes=alone) as run_folder, LedgerWriter(run_folder.ledger_path) as ledger:
        recover_shards(config, run_folder)
        with (
            open_sink(config, run_folder, info, len(sizes), RATE, ledger.append) as results,
            WriterPool(
                2, write=results.write, on_done=lambda row: None, on_failed=fail, bytes_pending=1 << 24
            ) as writers,
        ):  # fmt: skip
            for number in range(rows):
                key = f"row{number:08d}"
                path = output_path(str(outputs), key, f".{sink}")
                fields = {"key": key, "wav": f"tar://1+2/{key}.wav::x.tar", "text": f"text of row {number}"}
                row = ManifestRow(number, f"{number:016x}", key, fields["wav"], path, None, fields)
                codes = rng.integers(0, sizes, (lengths[number], len(sizes))).astype(np.uint16)
                writers.submit(TokenizedRow(row, codes, None, 960 * len(codes)))
                if number % 1000 == 0:
                    watch.look()
            writers.drain()
            watch.look()
    seconds = time.monotonic() - started
    made = list(files_below(outputs))
    num_codes = int(lengths.sum()) * len(sizes)
    memory = watch.megabytes
    quarter = max(1, len(memory) // 4)
    return Result(
        f"writers-{sink}", rows, round(seconds, 1), round(watch.processor_seconds, 1), round(rows / seconds, 1),
        round(sum(path.stat().st_size for path in made) / num_codes, 2), len(made),
        sum(1 for _ in files_below(run_dir)), round(max(memory[quarter : 2 * quarter] or [0.0])),
        round(max(memory[-quarter:])),
    )  # fmt: skip


def fail(result: TokenizedRow, error: RowError) -> None:
    raise SystemExit(f"row {result.row.key}: {error}")


def compare(
    rows: int, folder: Path, checkpoint: Path, ranks: int, workers: int, rounds: int, lengths: Sequence[float]
) -> list[Result]:
    """Tar to tar against files to json."""
    results = []
    for seconds in lengths:
        count = round(rows / max(1.0, seconds))
        audio = clips(seconds, seconds)
        place = folder / f"{seconds:g}s"
        place.mkdir()
        write_tars(place / "tars", count, audio)
        manifest = write_files(place, count, audio)
        tars = (f"{seconds:g} s, tar-tar", f"{place}/tars/*.tar")
        shards = ("--sink", "tar", "--output_dir", place / "tokens")
        files = (f"{seconds:g} s, files-json", str(manifest))
        clock, processor = [], []
        for number in range(rounds):
            both = [(tars, shards), (files, ())]
            made = {
                source: run(*source, count, place, checkpoint, ranks, workers, *flags)
                for source, flags in (both if number % 2 else reversed(both))
            }
            results += made.values()
            clock.append(made[tars].rows_per_second / made[files].rows_per_second)
            processor.append(made[files].processor_seconds / made[tars].processor_seconds)
        print(
            f"{seconds:g} s, tar to tar: {median(clock):.2f} ({min(clock):.2f} to {max(clock):.2f}) of the throughput, "
            f"{median(processor):.2f} ({min(processor):.2f} to {max(processor):.2f}) by processor time",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--sinks", default=",".join(SINKS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--without_model", action="store_true")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--rounds", type=int, default=3, help="of --compare")
    parser.add_argument("--lengths", default="0.5,8", help="of --compare, in seconds")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        checkpoint = write_mimo_checkpoint(folder / "checkpoint", encoder_layers=2, encoder_skip_layer_id=1)
        if arguments.without_model:
            results = []
            for sink in arguments.sinks.split(","):
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    results.append(pool.submit(write_only, sink, arguments.rows, folder / sink).result())
                show(results[-1])
        elif arguments.compare:
            results = compare(
                arguments.rows, folder, checkpoint, arguments.ranks, arguments.workers, arguments.rounds,
                [float(length) for length in arguments.lengths.split(",")],
            )  # fmt: skip
        else:
            write_tars(folder / "tars", arguments.rows, clips(0.2, 1.0))
            results = [
                run(
                    f"tar-{sink}", f"{folder}/tars/*.tar", arguments.rows, folder, checkpoint, arguments.ranks,
                    arguments.workers,
                    "--sink", sink, "--output_dir", folder / "tokens",
                )
                for sink in arguments.sinks.split(",")
            ]  # fmt: skip
    print(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    main()
