"""``batch_tokenizer status RUN_DIR``: how far a run is, from another terminal, while it runs and after.

It reads the run folder's status files, which each process rewrites every few seconds, and prints the job's sums and a
line a rank. Nothing is written, and torch is not imported, so the answer comes at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

from batch_tokenizer.records import RunError, printable
from batch_tokenizer.runtime.progress import JobStatus, RankStatus, duration_text, read_status, speed_text
from batch_tokenizer.runtime.run_files import is_run_folder

#: Seconds without an update after which a rank that should be at work counts as silent. Ranks of a large job write
#: every 30 s, and clocks of machines differ a little.
SILENT_AFTER = 90.0

_CLEAR_SCREEN = "\x1b[H\x1b[J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run_dir", type=Path, help="the run folder, by default named MANIFEST.TASK.run")
    parser.add_argument("--json", action="store_true", help="one line of JSON: sums, and what each rank last reported")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="show it again and again, until the run is over")


def main(arguments: argparse.Namespace) -> int:
    """Prints the status, once or until the run is over. Returns 0.

    Raises:
        RunError: there is no such run folder, or ``--watch`` is not positive.
    """
    run_dir: Path = arguments.run_dir
    if arguments.watch is not None and not arguments.watch > 0:
        raise RunError(f"--watch {arguments.watch:g}: must be more than 0 seconds")
    on_terminal = sys.stdout.isatty()
    while True:
        if not run_dir.is_dir():
            raise RunError(f"run folder {run_dir} does not exist")
        if not is_run_folder(run_dir) and not (run_dir / "status").is_dir():
            raise RunError(f"{run_dir} is not a run folder: it has neither run.json nor status")
        job = read_status(run_dir)
        now = time.time()
        lines = [json.dumps(json_report(job, now))] if arguments.json else report(run_dir, job, now)
        if arguments.watch is None:
            print("\n".join(map(printable, lines)))
            return 0
        if on_terminal and not arguments.json:
            height = get_terminal_size().lines - 1
            if len(lines) > height:
                lines = [*lines[: height - 1], f"… and {len(lines) - height + 1} more ranks"]
            print(_CLEAR_SCREEN, end="")
        print("\n".join(map(printable, lines)), flush=True)
        if is_over(job):
            return 0
        try:
            time.sleep(arguments.watch)
        except KeyboardInterrupt:
            return 0


def json_report(job: JobStatus, now: float) -> dict[str, Any]:
    """The status as one JSON object; ``now`` as in ``report``."""
    return {
        "over": is_over(job),
        "rows": job.rows_total,
        "done": job.rows_done,
        "failed": job.rows_failed,
        "left": max(0, job.rows_total - job.rows_done - job.rows_failed),
        "audio_seconds": job.audio_seconds,
        "elapsed_seconds": job.elapsed,
        "seconds_left": job.seconds_left,
        "ranks": [asdict(rank) | {"state": state_of(rank, now)} for rank in job.ranks],
        "not_heard_of": [{"shard": shard, "rank": rank} for shard, rank in missing_ranks(job)],
    }


def report(run_dir: Path, job: JobStatus, now: float) -> list[str]:
    """The status as lines of text.

    Args:
        now: seconds since 1970, against which a rank's last update is held.
    """
    if not job.ranks:
        return [f"{run_dir}: no process has started yet"]
    # 1. What is missing: ranks that have written nothing, and shards whose job has not started.
    left = max(0, job.rows_total - job.rows_done - job.rows_failed)
    states = [state_of(rank, now) for rank in job.ranks]
    unheard = missing_ranks(job)
    shards = sorted({rank.shard for rank in job.ranks})
    num_shards = job.ranks[0].num_shards
    waiting = sorted(set(range(num_shards)) - set(shards))

    # 2. The sums.
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    if unheard:
        counts["not heard of"] = len(unheard)
    num_ranks = len(states) + len(unheard)
    lines = [
        f"{run_dir}: " + ", ".join(f"{count} of {num_ranks} ranks {state}" for state, count in counts.items()),
        f"rows     {job.rows_done:,} done, {job.rows_failed:,} failed, {left:,} left of {job.rows_total:,}"
        + (f" ({100 * (job.rows_total - left) / job.rows_total:.1f} %)" if job.rows_total else ""),
        f"audio    {duration_text(job.audio_seconds)} in {format_duration(job.elapsed)}, "
        f"{speed_text(job.audio_seconds, job.elapsed)}",
    ]
    if left and "running" in states and job.seconds_left is not None:
        lines[-1] += f", about {format_duration(job.seconds_left)} left"
    if job.stage_seconds:
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in job.stage_seconds.items())
        lines.append(f"seconds  {stages} (over all processes)")
    if num_shards > 1:
        lines.append(f"shards   {len(shards)} of {num_shards} have started")
        if waiting:
            lines[-1] += f"; not yet: {_ranges(waiting)}"
    lines += ["", *_table(job, states, unheard, now, with_shards=num_shards > 1)]
    return lines


def state_of(rank: RankStatus, now: float) -> str:
    """The rank's own state, or ``silent`` if it should be at work but wrote nothing for ``SILENT_AFTER`` seconds."""
    if rank.state in ("starting", "running") and now - rank.updated > SILENT_AFTER:
        return "silent"
    return rank.state


def missing_ranks(job: JobStatus) -> list[tuple[int, int]]:
    """(shard, rank) of processes that belong to a job of which others have written, and have written nothing."""
    world_sizes = {rank.shard: rank.world_size for rank in job.ranks}
    heard = {(rank.shard, rank.rank) for rank in job.ranks}
    everyone = ((shard, rank) for shard, world_size in sorted(world_sizes.items()) for rank in range(world_size))
    return [place for place in everyone if place not in heard]


def is_over(job: JobStatus) -> bool:
    """Whether every process of every shard has finished."""
    return (
        bool(job.ranks)
        and all(rank.state == "finished" for rank in job.ranks)
        and not missing_ranks(job)
        and len({rank.shard for rank in job.ranks}) == job.ranks[0].num_shards
    )


def _table(
    job: JobStatus, states: Sequence[str], unheard: Sequence[tuple[int, int]], now: float, *, with_shards: bool
) -> list[str]:
    head = [
        "shard", "rank", "attempt", "host", "device", "state", "rows", "failed", "audio", "× real time", "last heard",
    ]  # fmt: skip
    rows = [
        [
            str(rank.shard), str(rank.rank), str(rank.attempt), rank.host, rank.device, state,
            f"{rank.rows_done:,}", f"{rank.rows_failed:,}", duration_text(rank.audio_seconds),
            speed_text(rank.audio_seconds, rank.elapsed).split()[0] if rank.elapsed > 0 else "-",
            f"{format_duration(max(0.0, now - rank.updated))} ago",
        ]
        for rank, state in zip(job.ranks, states, strict=True)
    ]  # fmt: skip
    rows += [[str(shard), str(rank), *["-"] * 3, "not heard of", *["-"] * 5] for shard, rank in unheard]
    first = 0 if with_shards else 1
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row[first:], widths[first:], strict=True)).rstrip()
        for row in [head, *rows]
    ]


def format_duration(seconds: float) -> str:
    """A duration in its two largest units: 42 s, 3 min 5 s, 2 h 7 min, 3 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def format_size(number: float) -> str:
    """Bytes in decimal units: 512 B, 3.1 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def seems_at_work(run_dir: Path) -> bool:
    """Whether a process reported within the last ``SILENT_AFTER`` seconds that it works on the run."""
    now = time.time()
    return any(
        rank.state in ("starting", "running") and state_of(rank, now) != "silent" for rank in read_status(run_dir).ranks
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as a person lists them: 0, 3-7, 9."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
