"""Measures the memory of runs over hours of audio in one row, beside that of runs over some minutes.

    python -m tests.measure.long_audio_memory [--hours 3] [--policy segment|stream] [--model_path FOLDER]

The command is run as a user runs it, ``wav2token2wav`` with a loader process, on a flac file made for it; without a
checkpoint on a small MiMo with random weights, or for ``stream`` a small MOSS with the published window. Memory is what
no file backs, of each process: results of a long row are in the pages of a file. The last line is JSON; the exit status
is 1 if the hours took 100 MB more than the minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tests.measure.moss_hour import SMALL
from tests.support.checkpoints import write_mimo_checkpoint
from tests.support.long_audio import anonymous_bytes, write_recording
from tests.support.moss import write_moss_checkpoint
from tests.support.runs import Run

MEGABYTE = 1 << 20

MINUTES = 10


def measure(folder: Path, seconds: float, policy: str, model_path: str) -> dict[str, float]:
    """One row of so many seconds; megabytes of the process that has most at its highest, and what the run took."""
    name = f"{seconds:g}"
    write_recording(folder / f"{name}.flac", seconds, 16000)
    row = {"key": name, "wav": f"{name}.flac", "quantized_tokens": f"{name}.json", "reconstructed_wav": f"{name}.wav"}
    (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    command = [
        sys.executable, "-m", "batch_tokenizer", "--data_list", f"{name}.jsonl", "--task", "wav2token2wav",
        "--model_path", model_path, "--num_workers", "1", "--long_audio", policy,
    ]  # fmt: skip
    peak, told, started = 0, 0.0, time.monotonic()
    with Run.start(command, folder) as run:
        while run.process.poll() is None:
            now = max((anonymous_bytes(process.pid) for process in run.tree()), default=0)
            peak = max(peak, now)
            if time.monotonic() - told > 15:
                told = time.monotonic()
                print(f"{seconds:g} s of audio, {told - started:5.0f} s: {now / MEGABYTE:.0f} MB", flush=True)
            time.sleep(0.1)
        if run.wait(1):
            raise SystemExit(run.output())
    return {"peak_mb": round(peak / MEGABYTE, 1), "wall_seconds": round(time.monotonic() - started, 1)}


def main() -> int:
    """Runs the measurement; the exit status says whether the bound held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=3.0)
    parser.add_argument("--policy", choices=("segment", "stream"), default="segment")
    parser.add_argument("--model_path")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "log").mkdir()
        model_path = arguments.model_path
        if model_path is None:
            small = folder / "model"
            model_path = str(
                write_mimo_checkpoint(small) if arguments.policy == "segment" else write_moss_checkpoint(small, SMALL)
            )
        minutes = measure(folder, 60.0 * MINUTES, arguments.policy, model_path)
        hours = measure(folder, 3600.0 * arguments.hours, arguments.policy, model_path)
    grown = round(hours["peak_mb"] - minutes["peak_mb"], 1)
    print(json.dumps({"policy": arguments.policy, "minutes": minutes, "hours": hours, "grown_mb": grown}))
    return 0 if grown < 100 else 1


if __name__ == "__main__":
    raise SystemExit(main())
