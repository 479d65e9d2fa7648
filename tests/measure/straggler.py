"""Measures how long a job of three ranks waits for one that is slowed down ten-fold.

    python -m tests.measure.straggler [--rows 3000] [--slowdown 10] [--folder DIR]

The slow rank is suspended nine tenths of the time, from outside. Each rank's rate is taken from its own ledger file, so
other load on the machine does no harm as long as it is even; a machine whose load changes gives noise, which is why
this is a command and not a test. Prints when each rank was done; the last line is JSON, with the wall time of the work
and its bound: 1.15 times that of a perfect balance at these rates, and a unit of the slow rank. Exit status 1 if the
bound is broken.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.support.runs import Workspace, make_corpus

PERIOD = 0.1
RANKS = 3
SLOW = 2


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--slowdown", type=float, default=10.0)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder when absent")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        return measure(arguments.folder, arguments.rows, arguments.slowdown)
    with tempfile.TemporaryDirectory(prefix="straggler-") as folder:
        return measure(Path(folder), arguments.rows, arguments.slowdown)


def slow_down(process: psutil.Process, factor: float) -> None:
    """Lets a process run a part of every tenth of a second, until it has ended."""
    with suppress(psutil.NoSuchProcess):
        while process.is_running():
            process.send_signal(signal.SIGSTOP)
            time.sleep(PERIOD * (1 - 1 / factor))
            process.send_signal(signal.SIGCONT)
            time.sleep(PERIOD / factor)


def rows_by_rank(workspace: Workspace) -> dict[int, int]:
    """Rows that each rank has ended, of those that have ended any."""
    counts = {}
    for path in (workspace.run_dir / "ledger").glob("000001-*.jsonl"):
        if count := path.read_bytes().count(b"\n"):
            counts[int(path.stem.partition("-")[2])] = count
    return counts


def measure(folder: Path, num_rows: int, slowdown: float) -> int:
    """Runs, slows, reports."""
    workspace = Workspace.make(make_corpus(folder / "corpus", num_rows), folder / "run")
    with workspace.start(RANKS, "--batch_size", 64, "--prefetch", 4) as run:
        run.wait_until(lambda: len(rows_by_rank(workspace)) == RANKS, "all ranks at work")
        slow = next(rank for rank in run.ranks() if rank.environ()["RANK"] == str(SLOW))
        threading.Thread(target=slow_down, args=(slow, slowdown), daemon=True).start()
        began = time.monotonic()
        first = last = rows_by_rank(workspace)
        ended = dict.fromkeys(first, 0.0)
        while run.process.poll() is None:
            now = rows_by_rank(workspace)
            ended |= {rank: time.monotonic() - began for rank in now if now[rank] > last[rank]}
            last = now
            time.sleep(0.02)
        assert run.wait() == 0, run.output()
        units = int(re.findall(r"(\d+) units", run.output())[0])
    workspace.check_complete()
    done = {rank: last[rank] - first[rank] for rank in first}
    if not done[SLOW]:
        sys.exit("the slow rank did nothing more: take more rows")
    rates = {rank: done[rank] / ended[rank] for rank in done}
    wall = max(ended.values())
    ideal = sum(done.values()) / sum(rates.values())
    unit = num_rows / units / rates[SLOW]
    for rank in sorted(done):
        print(f"rank {rank}: {done[rank]} rows, {rates[rank]:.1f} a second, done after {ended[rank]:.1f} s")
    bound = 1.15 * ideal + unit
    figures = {"rows": num_rows, "slowdown": slowdown, "wall": wall, "ideal": ideal, "slow_unit": unit, "bound": bound}
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}))
    return 0 if wall <= bound else 1


if __name__ == "__main__":
    sys.exit(main())
