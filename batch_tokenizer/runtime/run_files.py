"""Names of the files in a run folder and of the shards of a run: one place for all who write or read them.

    run.json                            settings that every command on the folder must share, and the run's id
    source.json                         what the manifest was listed from
    attempts/ATTEMPT.json               one start of the job; its number orders the ledger's files
    ledger/ATTEMPT-RANK.jsonl           rows that one process of one attempt ended
    ledger/ATTEMPT-RANK.SHARD.jsonl     rows of one published shard
    shards/ATTEMPT/RANK.SHARD.jsonl     rows of a shard that is being published
    status/ATTEMPT-RANK.json            progress of one process, rewritten every few seconds
    resume/PART.ATTEMPT_ID.npy          which rows were pending when the attempt began, from rank 0 to its other ranks
    index/                              the manifest's index, and the manifest where it was listed from other sources
    columns.json                        columns of parquet shards for the fields of rows
    environments.json                   devices and versions that rows were computed with
    failures.jsonl, summary.json, verify.jsonl
    lock, lock.PART                     PART is shard-I-of-N, the part of the manifest that a job works on

A shard of the output folder is named TASK-ATTEMPT-RANK-SHARD.SUFFIX after its ledger file.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from batch_tokenizer.records import RunError

logger = logging.getLogger(__name__)

_ATTEMPT, _RANK, _SHARD = r"(\d{6,8})", r"(\d{5,8})", r"(\d{6,8})"
_ATTEMPT_FILE = re.compile(rf"{_ATTEMPT}\.json")
_LEDGER_FILE = re.compile(rf"{_ATTEMPT}-{_RANK}(?:\.{_SHARD})?\.jsonl")
_UNPUBLISHED_FILE = re.compile(rf"{_RANK}\.{_SHARD}\.jsonl")
_STATUS_FILE = re.compile(rf"{_ATTEMPT}-{_RANK}\.json")

#: Files that several modules read or write.
RUN, SOURCE, SUMMARY = "run.json", "source.json", "summary.json"
ENVIRONMENTS, COLUMNS = "environments.json", "columns.json"

#: Folders that a run folder always has.
FOLDERS = ("ledger", "attempts", "resume", "status", "index")

#: Ledger lines, published and unpublished.
LEDGER_PATTERNS = ("shards/*/*.jsonl", "ledger/*.jsonl")

#: What ``--overwrite`` removes, ``run.json`` last. Attempts stay, as their numbers go on rising; the index stays, as it
#: belongs to the manifest.
RUN_PATTERNS = (
    *LEDGER_PATTERNS,
    "status/*.json",
    "resume/*.npy",
    "failures.jsonl",
    "verify.jsonl",
    SUMMARY,
    ENVIRONMENTS,
    COLUMNS,
    RUN,
)


def is_run_folder(folder: str | Path) -> bool:
    """Whether a folder is that of a run."""
    return os.path.isfile(os.path.join(folder, RUN))


def read_record(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run folder; empty where there is none, or the file is damaged.

    Raises:
        RunError: the file cannot be read (exit code 1).
    """
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}", exit_code=1) from error
    return content if isinstance(content, dict) else {}


class LedgerFile(NamedTuple):
    """One file of the ledger; ``shard`` is the number of the shard whose rows it has, None for rows in files."""

    path: Path
    attempt: int
    rank: int
    shard: int | None


def attempt_file(run_dir: Path, attempt: int) -> Path:
    """Who started the attempt, where and when."""
    return run_dir / "attempts" / f"{attempt:06d}.json"


def attempt_numbers(run_dir: Path) -> list[int]:
    """Attempts that have begun, in no order."""
    names = (path.name for path in (run_dir / "attempts").iterdir())
    return [int(match[1]) for name in names if (match := _ATTEMPT_FILE.fullmatch(name))]


def ledger_file(run_dir: Path, attempt: int, rank: int) -> Path:
    """The ledger file of one process of one attempt."""
    return run_dir / "ledger" / f"{attempt:06d}-{rank:05d}.jsonl"


def shard_ledger_file(run_dir: Path, attempt: int, rank: int, number: int) -> Path:
    """The ledger file of one published shard."""
    return run_dir / "ledger" / f"{attempt:06d}-{rank:05d}.{number:06d}.jsonl"


def parse_ledger_file(path: Path) -> LedgerFile | None:
    """The parts of a ledger file's name, or None if it is none."""
    match = _LEDGER_FILE.fullmatch(path.name)
    if match is None:
        return None
    return LedgerFile(path, int(match[1]), int(match[2]), None if match[3] is None else int(match[3]))


def ledger_files(run_dir: Path) -> list[LedgerFile]:
    """The ledger's files, earliest attempt first; empty where there is no ledger.

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        paths = sorted((run_dir / "ledger").iterdir())
    except FileNotFoundError:
        return []
    files = []
    for path in paths:
        if (file := parse_ledger_file(path)) is not None:
            files.append(file)
        else:
            logger.warning("%s is no ledger file: ignored", path)
    return files


def unpublished_folder(run_dir: Path, attempt: int) -> Path:
    """Where ledger lines of an attempt's shards are written before they count."""
    return run_dir / "shards" / f"{attempt:06d}"


def unpublished_file(folder: Path, rank: int, number: int) -> Path:
    """The ledger lines of one shard in that folder."""
    return folder / f"{rank:05d}.{number:06d}.jsonl"


def parse_unpublished_file(path: Path) -> tuple[int, int] | None:
    """(rank, shard number) of such a file, or None if it is none."""
    match = _UNPUBLISHED_FILE.fullmatch(path.name)
    return None if match is None else (int(match[1]), int(match[2]))


def shard_name(task: str, attempt: int, rank: int, number: int) -> str:
    """A shard's file name, less its suffix."""
    return f"{task}-{attempt:06d}-{rank:05d}-{number:06d}"


def parse_shard_name(task: str, name: str) -> tuple[int, int, int] | None:
    """(attempt, rank, number) of a shard's file name, or None if it is none of this task."""
    match = re.fullmatch(rf"{re.escape(task)}-{_ATTEMPT}-{_RANK}-{_SHARD}\.[a-z]+", name)
    return None if match is None else (int(match[1]), int(match[2]), int(match[3]))


def status_file(run_dir: Path, attempt: int, rank: int) -> Path:
    """The progress of one process."""
    return run_dir / "status" / f"{attempt:06d}-{rank:05d}.json"


def status_files(run_dir: Path, attempt: int | None) -> list[Path]:
    """The status files of one attempt, or of all, earliest attempt first."""
    pattern = "*.json" if attempt is None else f"{attempt:06d}-*.json"
    return [path for path in sorted((run_dir / "status").glob(pattern)) if _STATUS_FILE.fullmatch(path.name)]


def part_name(num_shards: int, shard: int) -> str:
    """The part of the manifest that a job works on, as it stands in names of locks and resume states."""
    return f"shard-{shard}-of-{num_shards}"
