"""Shards that a killed run left half published: at the next start a shard is there and its rows are done, or neither.

A process may outlive its job for some seconds, and go on publishing while the job that replaced it already does its
rows. For files that is harmless, for shards it would be rows twice. So the folder of a dead attempt's unpublished
ledger lines is renamed first: from then on none of its processes can write lines or make them count.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from batch_tokenizer.records import RunError
from batch_tokenizer.runtime.ledger_lines import read_shard_lines
from batch_tokenizer.runtime.run_files import (
    attempt_file,
    ledger_files,
    parse_shard_name,
    parse_unpublished_file,
    shard_ledger_file,
    shard_name,
    unpublished_folder,
)
from batch_tokenizer.writers.shard_folder import ShardFolder

logger = logging.getLogger(__name__)

_CLOSED = ".closed"


def recover(
    run_dir: Path, shards: ShardFolder, task: str, suffix: str, *, attempt: int, num_shards: int, shard: int
) -> None:
    """Rank 0, before it reads the ledger: finish what dead attempts left half done, and open this attempt.

    Dead are earlier attempts of this part of the manifest, as its lock is ours, and those that divided it otherwise,
    as no two divisions work at once. Other parts' attempts may be alive, and are left alone.

    Raises:
        RunError: the folders cannot be read or written (exit code 1).
    """
    is_dead = _dead_attempts(run_dir, attempt, num_shards, shard)
    try:
        (run_dir / "shards").mkdir(parents=True, exist_ok=True)
        _settle_unpublished(run_dir, shards, task, suffix, is_dead)
        _remove_damaged(run_dir, shards, task, suffix, is_dead)
        _remove_orphans(run_dir, shards, task, is_dead)
        unpublished_folder(run_dir, attempt).mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot repair what an earlier run left ({error.filename}: {error.strerror})", exit_code=1
        ) from error


def _dead_attempts(run_dir: Path, attempt: int, num_shards: int, shard: int) -> Callable[[int], bool]:
    """Whether no process of a living job belongs to an attempt, which must not be greater than ``attempt``."""

    @cache
    def is_dead(other: int) -> bool:
        if other >= attempt:
            return False
        try:
            about = json.loads(attempt_file(run_dir, other).read_bytes())
            return bool(about["num_shards"] != num_shards or about["shard"] == shard)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            # Its job was killed before it had written more than the file's name, or the file was removed.
            return True

    return is_dead


def _settle_unpublished(
    run_dir: Path, shards: ShardFolder, task: str, suffix: str, is_dead: Callable[[int], bool]
) -> None:
    """Unpublished lines count where their shard is published, and are removed where it is not."""
    for path in sorted((run_dir / "shards").iterdir()):
        name = path.name.removesuffix(_CLOSED)
        if not name.isdecimal() or not is_dead(attempt := int(name)):
            continue
        # 1. Close the folder to processes of that attempt which are still alive.
        closed = path.with_name(name + _CLOSED)
        if path != closed:
            path.rename(closed)
        for lines in sorted(closed.iterdir()):
            place = parse_unpublished_file(lines)
            if place is None:
                continue
            # 2. Take the shard's unpublished file away first, so that no such process can publish it after it was
            #    found missing.
            shard = f"{shard_name(task, attempt, *place)}.{suffix}"
            shards.discard(shard)
            # 3. The lines share the shard's fate.
            if shards.exists(shard):
                os.replace(lines, shard_ledger_file(run_dir, attempt, *place))
            else:
                lines.unlink()
        with suppress(OSError):  # a network file system may still show files that were removed
            closed.rmdir()


def _remove_damaged(run_dir: Path, shards: ShardFolder, task: str, suffix: str, is_dead: Callable[[int], bool]) -> None:
    """Remove shards whose ledger file is torn or damaged, and that file: which of their rows count cannot be known."""
    for file in ledger_files(run_dir):
        if file.shard is None or not is_dead(file.attempt) or read_shard_lines(file.path) is not None:
            continue
        name = f"{shard_name(task, file.attempt, file.rank, file.shard)}.{suffix}"
        logger.warning("%s is damaged: shard %s is removed, its rows are done again", file.path, name)
        # The file last, so that a kill in between leaves it for the next start to find.
        shards.remove(name)
        file.path.unlink()


def _remove_orphans(run_dir: Path, shards: ShardFolder, task: str, is_dead: Callable[[int], bool]) -> None:
    """Remove shards whose rows do not count, as they will be done again."""
    for name in shards.names_aside():
        place = parse_shard_name(task, name)
        if place is not None and is_dead(place[0]):
            shards.discard(name)
    for name in shards.names():
        place = parse_shard_name(task, name)
        if place is not None and is_dead(place[0]) and not shard_ledger_file(run_dir, *place).exists():
            logger.warning("shard %s is removed: its rows do not count as done, and are done again", name)
            shards.remove(name)
