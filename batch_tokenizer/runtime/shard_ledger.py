"""The ledger lines of shards: rows are done when their shard is published, all of them in one step.

A shard's ledger lines are a file of their own. A shard is published in four steps: write the shard aside; write its
lines aside; rename the shard into the output folder; rename the lines into the ledger. ``recover`` in
``writers/shard_recovery.py`` turns whatever a kill between two of these steps left into one of two states, both of them
whole: the shard is there and its rows are done, or neither.

Both files and their folders are synced to the disk, so that after a power loss no torn shard has ledger lines.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from batch_tokenizer.records import LedgerEntry, RunError
from batch_tokenizer.runtime.ledger_lines import encode_shard
from batch_tokenizer.runtime.run_files import shard_ledger_file, shard_name, unpublished_file, unpublished_folder
from batch_tokenizer.storage.atomic import sync_folder


class ShardJournal:
    """The ledger lines of the shards of one process."""

    def __init__(self, run_dir: Path, task: str, attempt: int, rank: int) -> None:
        self._run_dir = run_dir
        self._task = task
        self._attempt = attempt
        self._rank = rank
        self._unpublished = unpublished_folder(run_dir, attempt)
        self._next = 0

    def draw(self) -> tuple[int, str]:
        """A number that no shard of this process has, also not of one before it in this attempt, and the shard's name
        with it, less its suffix."""
        while self._unpublished_file(self._next).exists() or self._published_file(self._next).exists():
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
            with self._unpublished_file(number).open("xb") as stream:
                stream.write(encode_shard(entries))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise self._failure(error) from error

    def commit(self, number: int) -> None:
        """Let the lines of a published shard count.

        Raises:
            RunError: they cannot, or another job has taken over (exit code 1).
        """
        try:
            published = self._published_file(number)
            self._unpublished_file(number).rename(published)
            sync_folder(published.parent)
        except OSError as error:
            raise self._failure(error) from error

    def _unpublished_file(self, number: int) -> Path:
        return unpublished_file(self._unpublished, self._rank, number)

    def _published_file(self, number: int) -> Path:
        return shard_ledger_file(self._run_dir, self._attempt, self._rank, number)

    def _failure(self, error: OSError) -> RunError:
        if isinstance(error, FileNotFoundError):
            return RunError(
                f"run folder {self._run_dir}: another job has taken over this run; what this one had not published is "
                "done again",
                exit_code=1,
            )
        return RunError(
            f"cannot write {self._unpublished} ({error.strerror}): put that right and start the same command again; "
            "finished rows are kept",
            exit_code=1,
        )
