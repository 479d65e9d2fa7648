"""The loader processes, with real deaths."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from batch_tokenizer.data import worker as worker_module
from batch_tokenizer.data.loader import Loader
from batch_tokenizer.records import LoadedRow, ManifestRow, RowFailure, RunError
from tests.support.loading import make_row, misbehave

ROOT = Path(__file__).resolve().parents[2]


def make_loader(
    load: Callable[[ManifestRow], LoadedRow] = misbehave,
    *,
    num_workers: int = 2,
    rows_ahead: int = 1000,
    bytes_ahead: int = 1 << 28,
    row_timeout: float = 60.0,
) -> Loader:
    return Loader(
        load, num_workers=num_workers, rows_ahead=rows_ahead, bytes_ahead=bytes_ahead, row_timeout=row_timeout
    )


def server_of(loader: Loader) -> psutil.Process:
    """The fork server of this loader; other tests of the process may have children too."""
    assert loader._server is not None
    return psutil.Process(loader._server.pid)


def take_all(loader: Loader) -> dict[int, LoadedRow | RowFailure]:
    """Everything pending, by line; a line that comes twice is an error."""
    records: dict[int, LoadedRow | RowFailure] = {}
    while (record := loader.next(timeout=20)) is not None:
        line = record.row.line if isinstance(record, LoadedRow) else record.line
        assert line not in records
        records[line] = record
    assert loader.pending == 0
    return records


def run_rows(loader: Loader, rows: list[ManifestRow]) -> dict[int, LoadedRow | RowFailure]:
    loader.submit(rows)
    records = take_all(loader)
    assert sorted(records) == sorted(row.line for row in rows)
    return records


def failures(records: dict[int, LoadedRow | RowFailure]) -> dict[int, str]:
    return {line: record.reason for line, record in records.items() if isinstance(record, RowFailure)}


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_every_row_comes_out_once_with_its_own_content(num_workers: int) -> None:
    rows = [make_row(line, samples=1 + line % 3 * 40_000, text="ü") for line in range(100)]
    with make_loader(num_workers=num_workers) as loader:
        loader.submit(rows[:60])
        loader.submit(rows[60:])
        assert loader.pending == 100
        records = take_all(loader)
    assert sorted(records) == list(range(100))
    for line, record in records.items():
        assert isinstance(record, LoadedRow)
        assert record.row is rows[line]
        assert record.features is not None
        assert record.features.shape == (1, 1 + line % 3 * 40_000)
        assert record.features.dtype == np.float32
        assert record.features.flags.writeable
        assert (record.features == line).all()
        assert (record.codes, record.num_samples, record.frames) == (None, record.features.size, 1)
        assert record.load_seconds == 0.5


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_pending_is_none_at_once(num_workers: int) -> None:
    with make_loader(num_workers=num_workers) as loader:
        assert loader.next() is None


def test_next_gives_up_after_its_timeout(tmp_path: Path) -> None:
    with make_loader(num_workers=1) as loader:
        loader.submit([make_row(0, do="sleep")])
        began = time.monotonic()
        assert loader.next(timeout=0.2) is None
        assert 0.2 <= time.monotonic() - began < 5
        assert loader.pending == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_failures_carry_their_reasons(num_workers: int, caplog: pytest.LogCaptureFixture) -> None:
    troubles = ["refuse", "run out of memory", "lose the file server", "have a bug"]
    with make_loader(num_workers=num_workers) as loader, caplog.at_level(logging.ERROR):
        records = run_rows(loader, [make_row(i, do=(troubles[i // 2] if i % 2 else None)) for i in range(8)])
    reasons = failures(records)
    assert sorted(reasons) == [1, 3, 5, 7]
    assert reasons[1] == "refused"
    assert "not enough memory" in reasons[3]
    assert reasons[5] == "[Errno 5] Input/output error: 'some file'"
    assert reasons[7] == "internal error: KeyError: 'no such thing'"
    assert all(isinstance(record, LoadedRow) or record.stage == "load" for record in records.values())
    assert [record.message.count("in misbehave") for record in caplog.records] == [1]  # the bug's traceback, only


@pytest.mark.parametrize("load_seconds", [0.5, 1e-4])
def test_a_row_that_kills_its_worker_is_tried_twice_and_harms_no_other(load_seconds: float) -> None:
    """Also behind many others, as workers hold more rows where these take little time."""
    doing = {200: "die", 240: "die", 220: "crash"}
    rows = [make_row(line, do=doing.get(line), load_seconds=load_seconds) for line in range(300)]
    with make_loader() as loader:
        reasons = failures(run_rows(loader, rows))
    assert sorted(reasons) == [200, 220, 240]
    assert reasons[200] == "loader process died twice on this row (signal 9: probably out of memory)"
    assert "signal 11" in reasons[220]


@pytest.mark.parametrize(("load_seconds", "most"), [(0.5, 3), (1e-4, 12)])
def test_a_worker_holds_more_rows_where_they_take_little_time(load_seconds: float, most: int) -> None:
    rows = [make_row(line, load_seconds=load_seconds) for line in range(200)]
    waiting = [make_row(line, do="sleep", load_seconds=load_seconds) for line in range(200, 260)]
    with make_loader(num_workers=2, rows_ahead=100) as loader:
        assert failures(run_rows(loader, rows)) == {}
        loader.submit(waiting)
        assert loader.next(timeout=0.5) is None
        assert [len(held.jobs) for held in loader._workers.values()] == [most, most]


def test_a_worker_killed_once_costs_nothing(tmp_path: Path) -> None:
    rows = [make_row(line, do="die once", marker=str(tmp_path / f"{line}")) for line in range(0, 12, 3)]
    rows += [make_row(line) for line in range(1, 60, 3)]
    with make_loader() as loader:
        assert failures(run_rows(loader, rows)) == {}
    assert len(list(tmp_path.iterdir())) == 4


def test_a_death_in_the_middle_of_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    with make_loader() as loader:
        rows = [make_row(line, samples=10_000, do="die at next answer" if line == 3 else None) for line in range(20)]
        assert failures(run_rows(loader, rows)) == {}
        assert "loader process died (signal 9" in caplog.text
        assert loader._held_bytes == 0


def test_random_kills_from_outside_lose_nothing() -> None:
    """Workers and, twice, the server. A row may be hit twice by chance, so the killer waits for progress in between."""
    rows = [make_row(line, do="sleep", seconds=0.005) for line in range(400)]
    taken = 0
    with make_loader(num_workers=3) as loader:
        loader.submit(rows)
        lines = set()
        while (record := loader.next(timeout=20)) is not None:
            assert isinstance(record, LoadedRow)
            lines.add(record.row.line)
            taken += 1
            if taken % 40 == 0:
                with contextlib.suppress(psutil.NoSuchProcess):  # it was hit a moment ago
                    server = server_of(loader)
                    for victim in [server] if taken % 160 == 0 else server.children()[:1]:
                        victim.kill()
    assert lines == set(range(400))
    assert taken == 400


def test_a_row_that_takes_too_long_is_cut_off(tmp_path: Path) -> None:
    rows = [make_row(0, do="sleep", marker=str(tmp_path / "pid")), *(make_row(line) for line in range(1, 30))]
    with make_loader(row_timeout=0.5) as loader:
        began = time.monotonic()
        reasons = failures(run_rows(loader, rows))
        assert 0.5 <= time.monotonic() - began < 10
        assert list(reasons) == [0]
        assert "longer than --row_timeout 0.5 s" in reasons[0]
        wait_until(lambda: not psutil.pid_exists(int((tmp_path / "pid").read_text())))


def test_slow_rows_within_their_time_are_left_alone() -> None:
    """Rows that wait behind a slow one in the same worker are not timed meanwhile."""
    with make_loader(num_workers=1, row_timeout=0.5) as loader:
        assert failures(run_rows(loader, [make_row(line, do="sleep", seconds=0.3) for line in range(4)])) == {}


def test_a_slow_consumer_is_not_a_slow_row() -> None:
    """An answer that is held back for want of room has no deadline."""
    rows = [make_row(line, samples=500_000) for line in range(4)]
    with make_loader(num_workers=2, bytes_ahead=1_000_000, row_timeout=0.3) as loader:
        loader.submit(rows)
        wait_until(lambda: any(worker.held_back for worker in loader._workers.values()))
        time.sleep(0.6)
        assert failures(take_all(loader)) == {}


def test_back_pressure_bounds_rows(tmp_path: Path) -> None:
    with make_loader(rows_ahead=5) as loader:
        loader.submit([make_row(line) for line in range(50)])
        wait_until(lambda: len(loader._ready) == 5)
        time.sleep(0.2)
        assert len(loader._ready) == 5
        assert loader.next() is not None
        wait_until(lambda: len(loader._ready) == 5)
        assert len(take_all(loader)) == 49


@pytest.mark.parametrize("small_first", [False, True])
def test_back_pressure_bounds_bytes(small_first: bool) -> None:
    """Also when rows of 4 MB follow on rows of 32 bytes, whose size promised nothing."""
    sizes = [8] * 20 * small_first + [1_000_000] * 30
    most = 0
    with make_loader(bytes_ahead=10_000_000) as loader:
        loader.submit([make_row(line, samples=size) for line, size in enumerate(sizes)])
        for _ in sizes:
            time.sleep(0.01)
            most = max(most, loader._held_bytes)
            assert isinstance(loader.next(timeout=10), LoadedRow)
        assert loader._held_bytes == 0
    assert 4_000_000 < most <= 10_000_000


def test_a_row_larger_than_the_allowance_comes_out() -> None:
    with make_loader(bytes_ahead=1000) as loader:
        records = run_rows(loader, [make_row(line, samples=100_000) for line in range(6)])
    assert failures(records) == {}


def test_a_large_manifest_row_does_not_block_the_thread() -> None:
    """Parent and worker send each other more than a socket holds."""
    rows = [make_row(line, samples=1_000_000, text="x" * 2_000_000) for line in range(6)]
    with make_loader(num_workers=1) as loader:
        assert failures(run_rows(loader, rows)) == {}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stop_loading_gives_back_what_is_not_done(num_workers: int) -> None:
    rows = [make_row(line, do="sleep" if line >= 10 else None) for line in range(40)]
    with make_loader(num_workers=num_workers) as loader:
        loader.submit(rows)
        done = [loader.next(timeout=20) for _ in range(8)]
        returned = loader.stop_loading()
        rest = list(take_all(loader).values())
        lines = [record.row.line for record in done + rest if isinstance(record, LoadedRow)]
        assert [row.line for row in returned] == sorted(set(range(40)) - set(lines))
        assert len(lines) + len(returned) == 40
        with pytest.raises(RuntimeError, match="stopped"):
            loader.submit(rows)


def test_close_ends_all_processes_within_a_second() -> None:
    loader = make_loader(num_workers=3)
    loader.submit([make_row(line, do="sleep" if line % 10 == 9 else None) for line in range(60)])
    assert loader.next(timeout=20) is not None
    server = server_of(loader)
    wait_until(lambda: len(server.children(recursive=True)) == 3)
    family = [server, *server.children(recursive=True)]
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 2  # a tenth of a second on a machine that has nothing else to do
    wait_until(lambda: not any(process.is_running() and process.status() != "zombie" for process in family))
    assert loader.pending == 0
    assert loader.next() is None
    assert not any(thread.name == "loader" for thread in threading.enumerate())
    loader.close()


def test_close_before_the_server_is_up() -> None:
    began = time.monotonic()
    make_loader().close()
    assert time.monotonic() - began < 2


def test_next_wakes_when_the_loading_is_stopped() -> None:
    with make_loader(num_workers=1) as loader:
        loader.submit([make_row(0, do="sleep")])
        timer = threading.Timer(0.2, loader.stop_loading)
        timer.start()
        assert loader.next() is None
        timer.join()


PARENT = """
import sys, time
sys.path.insert(0, {root!r})
from batch_tokenizer.data.loader import Loader
from tests.support.loading import make_row, misbehave
loader = Loader(misbehave, num_workers=2, rows_ahead=10, bytes_ahead=1 << 20, row_timeout={row_timeout})
loader.submit([make_row(0), make_row(1, do="sleep", seconds={seconds}), make_row(2, do="sleep", seconds={seconds})])
print(loader.next(), flush=True)
print(loader.next(), flush=True)
print(loader.next(), flush=True)
"""


def start_parent(row_timeout: float, seconds: float) -> subprocess.Popen[str]:
    program = PARENT.format(root=str(ROOT), row_timeout=row_timeout, seconds=seconds)
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_no_process_outlives_a_killed_parent() -> None:
    """Neither the server nor workers in the middle of a row."""
    with start_parent(row_timeout=600, seconds=600) as parent:
        assert parent.stdout is not None
        assert "LoadedRow" in parent.stdout.readline()
        family = psutil.Process(parent.pid).children(recursive=True)
        assert len(family) == 3
        parent.kill()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []


def test_no_worker_outlives_its_server() -> None:
    with make_loader() as loader:
        loader.submit([make_row(line, do="sleep") for line in range(2)])
        wait_until(lambda: [worker.alive for worker in loader._workers.values()] == [True, True])
        server = server_of(loader)
        workers = server.children()
        assert len(workers) == 2
        server.kill()
        _, alive = psutil.wait_procs(workers, timeout=5)
        assert alive == []


def test_signals_to_the_whole_job_blame_no_row() -> None:
    """A launcher signals every process of a job; only the computing process may answer. Here it ignores them."""
    with start_parent(row_timeout=600, seconds=1) as parent:
        assert parent.stdout is not None
        assert "LoadedRow" in parent.stdout.readline()
        family = psutil.Process(parent.pid).children(recursive=True)
        assert len(family) == 3
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            for process in family:
                process.send_signal(number)
        assert "LoadedRow" in parent.stdout.readline()
        assert all(process.is_running() and process.status() != "zombie" for process in family)
        assert "LoadedRow" in parent.stdout.readline()


def test_time_in_suspension_does_not_count() -> None:
    with start_parent(row_timeout=2, seconds=1) as parent:
        assert parent.stdout is not None
        assert "LoadedRow" in parent.stdout.readline()
        os.killpg(parent.pid, signal.SIGSTOP)
        time.sleep(3)
        os.killpg(parent.pid, signal.SIGCONT)
        assert [line.partition("(")[0] for line in parent.stdout] == ["LoadedRow"] * 2


def unforkable() -> int:
    raise OSError(errno.EAGAIN, "Resource temporarily unavailable")


class LoadWhoseServerCannotFork:
    """Unpickled in the server, it takes the server's ``fork`` away."""

    def __setstate__(self, state: dict[str, object]) -> None:
        worker_module.os.fork = unforkable

    def __getstate__(self) -> dict[str, object]:
        return {"some": "state"}

    def __call__(self, row: ManifestRow) -> LoadedRow:
        raise AssertionError("no worker should have started")


class LoadThatCannotBeImported:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return __import__, ("a_module_that_is_not_there",)

    def __call__(self, row: ManifestRow) -> LoadedRow:
        raise AssertionError("no worker should have started")


class LoadWhoseServerDies(LoadWhoseServerCannotFork):
    def __setstate__(self, state: dict[str, object]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class LoadWhoseWorkersDie(LoadWhoseServerCannotFork):
    def __setstate__(self, state: dict[str, object]) -> None:
        worker_module.work = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (LoadWhoseServerCannotFork(), "cannot start a loader process: Resource temporarily unavailable"),
        (LoadThatCannotBeImported(), "No module named 'a_module_that_is_not_there'"),
        (LoadWhoseServerDies(), "keeps dying"),
        (LoadWhoseWorkersDie(), "die as soon as they start"),
    ],
)
def test_what_no_row_is_to_blame_for_ends_the_run(load: Callable[[ManifestRow], LoadedRow], message: str) -> None:
    with make_loader(load) as loader:
        loader.submit([make_row(0)])
        for _ in range(2):  # also whoever asks again
            with pytest.raises(RunError, match=message) as raised:
                loader.next(timeout=20)
            assert raised.value.exit_code == 1


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
