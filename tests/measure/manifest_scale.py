"""Measures start-up at manifest scale: index, cached opening, planning, resume, failures. A command, not a test.

    python -m tests.measure.manifest_scale --rows 10000000

Makes a manifest of ``--rows`` rows and a ledger in which 90 % of them are done and 0.1 % failed, in a temporary folder
(about 350 bytes a row), and runs each step in a fresh process, so that its memory is its own. Prints a table and, as
the last line, JSON. Where processor time (with a second for imports) is far below the time, the machine was busy.
Memory is the growth of the resident set at its peak, mapped pages of the index included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.manifest.units import plan_units
from batch_tokenizer.records import LedgerEntry
from batch_tokenizer.runtime.ledger import RowStatus, iter_failures, read_ledger
from batch_tokenizer.runtime.ledger_lines import encode_entry
from batch_tokenizer.runtime.run_files import ledger_file

RANKS = 16
UNIT = 64


def resident(field: str) -> float:
    """A field of this process's memory status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def write_manifest(folder: Path, rows: int) -> None:
    """Rows as corpora have them: a speaker, a text, a duration."""
    rng = np.random.default_rng(0)
    with (folder / "data.jsonl").open("w") as stream:
        for start in range(0, rows, 100_000):
            seconds = np.round(rng.gamma(2.0, 6.0, 100_000), 3).tolist()
            stream.writelines(
                f'{{"key": "speaker{n % 9973:05d}-utterance{n:09d}", '
                f'"wav": "corpus/train/speaker{n % 9973:05d}/{n:09d}.flac", '
                f'"quantized_tokens": "tokens/{n % 9973:05d}/{n:09d}.json", '
                f'"duration": {seconds[n - start]}, "speaker": "{n % 9973:05d}"}}\n'
                for n in range(start, min(rows, start + 100_000))
            )


def write_ledger(folder: Path, rows: int) -> None:
    """The last tenth of the units is missing; one row in a thousand failed."""
    manifest = open_manifest(folder)
    (folder / "ledger").mkdir()
    streams = [ledger_file(folder, 1, rank).open("wb") for rank in range(RANKS)]
    for start in range(0, rows * 9 // 10, UNIT):
        digests = manifest.digests[start : start + UNIT].tolist()
        for n, digest in enumerate(digests, start):
            row = n, f"{digest:016x}", f"speaker{n % 9973:05d}-utterance{n:09d}"
            if n % 1000 == 7:
                entry = LedgerEntry(*row, "failed", stage="load", reason="no such file")
            else:
                checksums = {"codes": n, "quantized_tokens": n}
                entry = LedgerEntry(*row, "done", 24000 + n % 960, 26 + n % 500, checksums)
            streams[start // UNIT % RANKS].write(encode_entry(entry))
    for stream in streams:
        stream.close()


def open_manifest(folder: Path) -> Manifest:
    return Manifest.open(folder / "data.jsonl", "wav2token", folder / "index")


def build(folder: Path, rows: int) -> None:
    assert len(open_manifest(folder)) == rows


def plan(folder: Path, rows: int) -> None:
    units = plan_units(open_manifest(folder), world_size=RANKS)
    assert np.sum(units.stops - units.starts) == rows


def resume(folder: Path, rows: int) -> None:
    manifest = open_manifest(folder)
    state = read_ledger(folder, manifest)
    assert state.num_done + state.num_failed == -(-(rows * 9 // 10) // UNIT) * UNIT
    assert state.num_pending == rows - state.num_done - state.num_failed
    assert len(plan_units(manifest, world_size=RANKS, pending=state.status == RowStatus.PENDING))


def failures(folder: Path, rows: int) -> None:
    manifest = open_manifest(folder)
    state = read_ledger(folder, manifest)
    assert sum(1 for _ in iter_failures(folder, manifest, state)) == state.num_failed > 0


def shifted(folder: Path, rows: int) -> None:
    """The manifest with a row put in front: no line stands where the ledger says."""
    if not (folder / "shifted").exists():
        (folder / "shifted").mkdir()
        with (folder / "shifted" / "data.jsonl").open("wb") as out, (folder / "data.jsonl").open("rb") as stream:
            out.write(b'{"key": "new", "wav": "new.wav", "quantized_tokens": "new.json"}\n')
            while block := stream.read(2**24):
                out.write(block)
        open_manifest(folder / "shifted")
        return
    state = read_ledger(folder, open_manifest(folder / "shifted"))
    assert state.num_done + state.num_failed == -(-(rows * 9 // 10) // UNIT) * UNIT


#: What is done, in this order, and whether it is part of the table.
STEPS: dict[str, tuple[Callable[[Path, int], None], bool]] = {
    "write the manifest": (write_manifest, False),
    "build the index": (build, True),
    "open with the index": (build, True),
    "plan units": (plan, True),
    "write the ledger": (write_ledger, False),
    "resume, 90 % done": (resume, True),
    "resume and list failures": (failures, True),
    "put a row in front": (shifted, False),
    "resume, every row moved": (shifted, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        before = resident("VmRSS")
        started = time.monotonic()
        STEPS[options.step][0](options.folder, options.rows)
        seconds, processor = time.monotonic() - started, time.process_time()
        memory = round(resident("VmHWM") - before)
        print(json.dumps({"seconds": round(seconds, 2), "cpu_seconds": round(processor, 2), "mib": memory}))
        return
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for step, (_, reported) in STEPS.items():
            command = [
                sys.executable,
                "-m",
                "tests.measure.manifest_scale",
                "--rows",
                str(options.rows),
                "--folder",
                name,
            ]
            done = subprocess.run([*command, "--step", step], stdout=subprocess.PIPE, text=True, check=True)
            if reported:
                results[step] = json.loads(done.stdout)
        size = (Path(name) / "data.jsonl").stat().st_size
        ledger = sum(path.stat().st_size for path in (Path(name) / "ledger").iterdir())
        index = sum(path.stat().st_size for path in (Path(name) / "index").rglob("*.npy"))
    print(
        f"{options.rows:,} rows; manifest {size / 1e9:.2f} GB, index {index / 1e9:.2f} GB, ledger {ledger / 1e9:.2f} GB"
    )
    for step, result in results.items():
        seconds, processor = result["seconds"], result["cpu_seconds"]
        print(f"{step:26} {seconds:8.2f} s, processor {processor:8.2f} s, {result['mib']:6.0f} MiB")
    print(json.dumps({"rows": options.rows, "manifest_bytes": size, "ledger_bytes": ledger, "steps": results}))


if __name__ == "__main__":
    main()
