"""Writer threads: every row told of once, bounded memory, no swallowed bug."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from batch_tokenizer.records import RowError, TokenizedRow
from batch_tokenizer.writers.pool import WriterPool
from tests.support.loading import make_row


def result(line: int, num_bytes: int = 4) -> TokenizedRow:
    return TokenizedRow(make_row(line), None, np.zeros(num_bytes // 4, np.float32), 1)


class Calls:
    def __init__(self) -> None:
        self.done: list[int] = []
        self.failed: list[tuple[int, str]] = []

    def pool(self, write: Callable[[TokenizedRow], None], threads: int = 3, bytes_pending: int = 1 << 20) -> WriterPool:
        return WriterPool(
            threads,
            write=write,
            on_done=lambda row: self.done.append(row.row.line),
            on_failed=lambda row, error: self.failed.append((row.row.line, error.reason)),
            bytes_pending=bytes_pending,
        )


def test_every_row_is_done_or_failed_once() -> None:
    calls = Calls()

    def write(row: TokenizedRow) -> None:
        if row.row.line % 5 == 0:
            raise RowError("write", "the disk is full")

    with calls.pool(write) as pool:
        for line in range(100):
            pool.submit(result(line))
        assert pool.drain()
        assert sorted(calls.done + [line for line, _ in calls.failed]) == list(range(100))
        assert sorted(calls.failed) == [(line, "the disk is full") for line in range(0, 100, 5)]


def test_close_writes_what_was_submitted() -> None:
    calls = Calls()
    pool = calls.pool(lambda row: time.sleep(0.01), threads=1)
    for line in range(10):
        pool.submit(result(line))
    pool.close()
    assert calls.done == list(range(10))
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(result(10))


def test_submit_waits_while_too_much_is_pending() -> None:
    calls, gate = Calls(), threading.Semaphore(0)
    submitted = []
    with calls.pool(lambda row: bool(gate.acquire()) and None, threads=2, bytes_pending=1000) as pool:

        def produce() -> None:
            for line in range(6):
                pool.submit(result(line, 400))
                submitted.append(line)
            pool.submit(result(6, 4000))  # larger than the limit: alone
            submitted.append(6)

        producer = threading.Thread(target=produce)
        producer.start()
        try:
            for released in range(7):
                expected = min(6, released + 2) if released < 6 else 7
                deadline = time.monotonic() + 300
                while len(submitted) < expected and time.monotonic() < deadline:
                    time.sleep(0.005)
                time.sleep(0.03)
                assert len(submitted) == expected
                gate.release()
        finally:
            gate.release(100)
        producer.join()
    assert sorted(calls.done) == list(range(7))


def test_drain_gives_up_after_its_timeout() -> None:
    calls, gate = Calls(), threading.Event()
    with calls.pool(lambda row: bool(gate.wait()) and None) as pool:
        pool.submit(result(0))
        drained = pool.drain(timeout=0.05)
        gate.set()
        assert not drained
        assert pool.drain(timeout=300)


@pytest.mark.parametrize("place", ["write", "on_done"])
def test_a_bug_reaches_the_submitter(place: str) -> None:
    def break_down(row: TokenizedRow) -> None:
        if row.row.line == 3:
            raise ZeroDivisionError("a bug")

    calls = Calls()
    if place == "write":
        pool = calls.pool(break_down, threads=2, bytes_pending=8)
    else:
        pool = WriterPool(
            2, write=lambda row: None, on_done=break_down, on_failed=lambda row, error: None, bytes_pending=8
        )

    def submit_all() -> None:
        for line in range(1000):
            pool.submit(result(line))

    with pytest.raises(ZeroDivisionError):
        submit_all()
    with pytest.raises(ZeroDivisionError):
        pool.drain()
    with pytest.raises(ZeroDivisionError):
        pool.close()
    assert not any(thread.name.startswith("writer-") for thread in threading.enumerate())
