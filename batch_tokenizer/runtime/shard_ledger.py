"""The ledger of sinks that make shards: rows are done when their shard is published, all of them in one step.

A shard's ledger lines are a file of their own. Publishing goes: the shard aside; its lines aside; rename the shard;
rename the lines into the ledger. ``recover`` turns whatever a kill between two of these steps left into one of two
states, both of them whole: the shard is there and its rows are done, or neither.

    shards/<attempt>/<rank>.<number>.jsonl     lines aside
    ledger/<attempt>-<rank>.<number>.jsonl     lines that count
    OUTPUT_DIR/<task>-<attempt>-<rank>-<number>.<suffix>

A process may outlive its job for some seconds, and go on publishing while the job that replaced it already does its
rows. For files that is harmless, for shards it would be rows twice. So ``recover`` first renames the folder of a dead
attempt: from then on none of its processes can write lines or make them count.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from batch_tokenizer.records import LedgerEntry, RunError, Task
from batch_tokenizer.runtime.ledger import encode_entry, shard_ledger_file

_LEDGER_NAME = re.compile(r"(\d{6,8})-(\d{5,8})\.(\d{6,8})\.jsonl")


def shard_of_ledger_file(name: str, task: Task, suffix: str) -> str | None:
    """The name of the shard whose rows a ledger file has; None of the ledger files that are no shard's."""
    match = _LEDGER_NAME.fullmatch(name)
    return None if match is None else f"{shard_name(task, *map(int, match.groups()))}.{suffix}"


logger = logging.getLogger(__name__)

_PART_NAME = re.compile(r"(\d{5,8})\.(\d{6,8})\.jsonl")

_FENCED = ".closed"


class Shards(Protocol):
    """What recovering needs of the output folder."""

    def names(self) -> list[str]:
        """Published files."""

    def names_aside(self) -> list[str]:
        """Files written aside, by the names that they would have."""

    def exists(self, name: str) -> bool:
        """Whether a file is published."""

    def discard(self, name: str) -> None:
        """Remove a file written aside, if it is there."""

    def remove(self, name: str) -> None:
        """Remove a published file, if it is there."""


def shard_name(task: str, attempt: int, rank: int, number: int) -> str:
    """A shard's file name, less its suffix."""
    return f"{task}-{attempt:06d}-{rank:05d}-{number:06d}"


def parse_shard_name(task: str, name: str) -> tuple[int, int, int] | None:
    """(attempt, rank, number) of a shard's file name, or None if it is none of this task."""
    match = re.fullmatch(re.escape(task) + r"-(\d{6,8})-(\d{5,8})-(\d{6,8})\.[a-z]+", name)
    return None if match is None else (int(match[1]), int(match[2]), int(match[3]))


class ShardJournal:
    """The ledger lines of the shards of one process."""

    def __init__(self, run_dir: Path, task: str, attempt: int, rank: int) -> None:
        self._run_dir = run_dir
        self._task = task
        self._attempt = attempt
        self._rank = rank
        self._aside = run_dir / "shards" / f"{attempt:06d}"
        self._next = 0

    def draw(self) -> tuple[int, str]:
        """A number that no shard of this process has, also not of one before it in this attempt, and the shard's name
        with it, less its suffix."""
        while self._part(self._next).exists() or self._valid(self._next).exists():
            self._next += 1
        number = self._next
        self._next += 1
        return number, shard_name(self._task, self._attempt, self._rank, number)

    def prepare(self, number: int, entries: Sequence[LedgerEntry]) -> None:
        """Write the lines of a shard, which do not count yet.

        Raises:
            RunError: they cannot be written, or another job has taken over (exit code 1).
        """
        try:
            with self._part(number).open("xb") as stream:
                stream.writelines(map(encode_entry, entries))
        except OSError as error:
            raise self._failure(error) from error

    def commit(self, number: int) -> None:
        """Let the lines of a published shard count.

        Raises:
            RunError: they cannot, or another job has taken over (exit code 1).
        """
        try:
            self._part(number).rename(self._valid(number))
        except OSError as error:
            raise self._failure(error) from error

    def _part(self, number: int) -> Path:
        return self._aside / f"{self._rank:05d}.{number:06d}.jsonl"

    def _valid(self, number: int) -> Path:
        return shard_ledger_file(self._run_dir, self._attempt, self._rank, number)

    def _failure(self, error: OSError) -> RunError:
        if isinstance(error, FileNotFoundError):
            return RunError(
                f"run folder {self._run_dir}: another job has taken over this run; what this one had not published is "
                "done again",
                exit_code=1,
            )
        return RunError(
            f"cannot write {self._aside} ({error.strerror}): put that right and start the same command again; finished "
            "rows are kept",
            exit_code=1,
        )


def recover(
    run_dir: Path, shards: Shards, task: str, suffix: str, *, attempt: int, num_shards: int, shard: int
) -> None:
    """Rank 0, before it reads the ledger: end what dead attempts left half done, and open this attempt.

    Dead are earlier attempts of this part of the manifest, as its lock is ours, and those that divided it otherwise,
    as no two divisions work at once. Other parts' attempts may be alive, and are left alone.

    Raises:
        RunError: the folders cannot be read or written (exit code 1).
    """
    aside = run_dir / "shards"
    try:
        aside.mkdir(parents=True, exist_ok=True)
        dead = _Dead(run_dir, attempt, num_shards, shard)
        _settle(run_dir, shards, task, suffix, dead)
        _remove_orphans(run_dir, shards, task, dead)
        (aside / f"{attempt:06d}").mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot put right what an earlier run left ({error.filename}: {error.strerror})", exit_code=1
        ) from error


class _Dead:
    """Which attempts no process of a living job belongs to."""

    def __init__(self, run_dir: Path, attempt: int, num_shards: int, shard: int) -> None:
        self._run_dir = run_dir
        self._attempt = attempt
        self._num_shards = num_shards
        self._shard = shard
        self._known: dict[int, bool] = {}

    def __contains__(self, attempt: int) -> bool:
        if attempt not in self._known:
            self._known[attempt] = self._find_out(attempt)
        return self._known[attempt]

    def _find_out(self, attempt: int) -> bool:
        if attempt >= self._attempt:
            return False
        try:
            about = json.loads((self._run_dir / "attempts" / f"{attempt:06d}.json").read_bytes())
            return bool(about["num_shards"] != self._num_shards or about["shard"] == self._shard)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            # Its job was killed before it had written more than the file's name, or the file was removed.
            return True


def _settle(run_dir: Path, shards: Shards, task: str, suffix: str, dead: _Dead) -> None:
    """Lines aside become valid where their shard is published, and go where it is not."""
    aside = run_dir / "shards"
    for path in sorted(aside.iterdir()):
        number_text = path.name.removesuffix(_FENCED)
        if not number_text.isdecimal() or int(number_text) not in dead:
            continue
        fenced = aside / f"{number_text}{_FENCED}"
        if path != fenced:
            path.rename(fenced)
        attempt = int(number_text)
        for part in sorted(fenced.iterdir()):
            match = _PART_NAME.fullmatch(part.name)
            if match is None:
                continue
            rank, number = int(match[1]), int(match[2])
            name = f"{shard_name(task, attempt, rank, number)}.{suffix}"
            # First of all, so that a process that is still alive cannot publish it after it was found missing.
            shards.discard(name)
            if shards.exists(name):
                os.replace(part, shard_ledger_file(run_dir, attempt, rank, number))
            else:
                part.unlink()
        with suppress(OSError):  # a network file system may still show files that were removed
            fenced.rmdir()


def _remove_orphans(run_dir: Path, shards: Shards, task: str, dead: _Dead) -> None:
    for name in shards.names_aside():
        place = parse_shard_name(task, name)
        if place is not None and place[0] in dead:
            shards.discard(name)
    for name in shards.names():
        place = parse_shard_name(task, name)
        if place is not None and place[0] in dead and not shard_ledger_file(run_dir, *place).exists():
            logger.warning("shard %s is removed: its rows do not count as done, and are done again", name)
            shards.remove(name)
