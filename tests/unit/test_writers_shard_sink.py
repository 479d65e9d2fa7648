"""A shard that cannot be written ends in one line, whichever thread meets it, and clean-up does not hide it."""

from __future__ import annotations

import errno
import io
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from batch_tokenizer.records import RunError
from batch_tokenizer.runtime.shard_ledger import ShardJournal
from batch_tokenizer.writers.pool import WriterPool
from batch_tokenizer.writers.row_encoding import RowEncoder
from batch_tokenizer.writers.shard_folder import ShardFolder
from batch_tokenizer.writers.shard_sink import ShardSink, shard_form
from tests.support.shards import RUN_INFO, tokenized

SINKS = ["tar", "parquet", "jsonl"]


class FullDisk(io.RawIOBase):
    """A file that takes so many bytes, and then none."""

    def __init__(self, room: int) -> None:
        self.room = room

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return 0

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)


class FullFolder(ShardFolder):
    """A folder on a disk that is full from some byte on."""

    room = 0

    def create(self, name: str) -> BinaryIO:
        super().create(name).close()
        return FullDisk(self.room)  # type: ignore[return-value]


def open_sink(tmp_path: Path, sink: str, folder: ShardFolder, most_rows: int = 1000) -> ShardSink:
    (tmp_path / "run" / "shards" / "000001").mkdir(parents=True)
    (tmp_path / "run" / "ledger").mkdir()
    journal = ShardJournal(tmp_path / "run", "wav2token", 1, 0)
    encode = RowEncoder("wav2token", RUN_INFO, 24000)
    return ShardSink(encode, shard_form(sink, RUN_INFO, 3, False), folder, journal, most_bytes=1 << 20,
                     most_rows=most_rows)  # fmt: skip


def ignore(*words: object) -> None:
    """Nothing is to be done for a row that was written."""


def rows() -> Any:
    rng = np.random.default_rng(0)
    return [tokenized(line, rng.integers(0, 128, (4000, 3)).astype(np.uint16)) for line in range(300)]


def write_all(shards: ShardSink, *, before: Callable[[], None] = ignore) -> None:
    """As the loop of a run does it: in several threads, to the end."""
    with (
        shards,
        WriterPool(4, write=shards.write, on_done=ignore, on_failed=ignore, bytes_pending=1 << 20) as writers,
    ):
        before()
        for row in rows():
            writers.submit(row)
        writers.drain()
        shards.close()


@pytest.mark.parametrize("room", [0, 200_000])
@pytest.mark.parametrize("sink", SINKS)
def test_a_full_disk_ends_in_one_line(tmp_path: Path, sink: str, room: int) -> None:
    folder = FullFolder(str(tmp_path / "out"))
    folder.room = room
    (tmp_path / "out").mkdir()
    words = r"shard .* cannot be written: No space left on device; put that right"
    with pytest.raises(RunError, match=words) as raised:
        write_all(open_sink(tmp_path, sink, folder))
    assert raised.value.exit_code == 1
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("sink", SINKS)
def test_another_job_that_takes_over_ends_in_one_line(tmp_path: Path, sink: str) -> None:
    (tmp_path / "out").mkdir()
    shards = open_sink(tmp_path, sink, ShardFolder(str(tmp_path / "out")), most_rows=5)
    with pytest.raises(RunError, match="another job has taken over this run"):
        write_all(shards, before=lambda: shutil.rmtree(tmp_path / "run" / "shards"))


@pytest.mark.parametrize("sink", SINKS)
def test_after_a_failure_every_thread_meets_the_same_error(tmp_path: Path, sink: str) -> None:
    (tmp_path / "out").mkdir()
    shards = open_sink(tmp_path, sink, FullFolder(str(tmp_path / "out")), most_rows=1)
    errors: list[BaseException] = []

    def write() -> None:
        for row in rows()[:5]:
            try:
                shards.write(row)
            except RunError as error:
                errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 20
    assert len({id(error) for error in errors}) == 1
    with pytest.raises(RunError), shards:
        shards.close()


@pytest.mark.parametrize("sink", SINKS)
def test_clean_up_does_not_hide_the_error_that_ended_the_run(tmp_path: Path, sink: str) -> None:
    folder = FullFolder(str(tmp_path / "out"))
    folder.room = 200
    (tmp_path / "out").mkdir()

    def fail() -> None:
        raise ZeroDivisionError

    shards = open_sink(tmp_path, sink, folder)
    with pytest.raises(ZeroDivisionError):
        write_all(shards, before=fail)
