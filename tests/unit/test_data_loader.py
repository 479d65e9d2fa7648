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
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from batch_tokenizer.data.loader import Loader
from batch_tokenizer.records import LoadedRow, ManifestRow, RowFailure, RunError
from tests.support.loading import make_row, misbehave

ROOT = Path(__file__).resolve().parents[2]

#: Seconds that a test waits for what takes one on an idle machine, or some to import torch.
PATIENCE = 300


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


def family(process: psutil.Process | None = None) -> list[psutil.Process]:
    """What runs under a process, this one by default: fork server, loader processes, ``multiprocessing``'s tracker."""
    return (process or psutil.Process()).children(recursive=True)


def workers() -> list[psutil.Process]:
    """The loader processes of this process."""
    return [process for process in family() if process.ppid() == server().pid]


def server() -> psutil.Process:
    """The fork server of this process. Raises psutil.NoSuchProcess in the moment between one's death and the next."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "multiprocessing.forkserver" in " ".join(child.cmdline()):
                return child
    raise psutil.NoSuchProcess(os.getpid(), "fork server")


def are_gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def take_all(loader: Loader) -> dict[int, LoadedRow | RowFailure]:
    """Everything pending, by line; a line that comes twice is an error."""
    records: dict[int, LoadedRow | RowFailure] = {}
    while (record := loader.next(timeout=PATIENCE)) is not None:
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
        assert time.monotonic() - began >= 0.2
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
    doing = {100: "die", 110: "crash"}
    rows = [make_row(line, do=doing.get(line), load_seconds=load_seconds) for line in range(150)]
    with make_loader() as loader:
        reasons = failures(run_rows(loader, rows))
    assert sorted(reasons) == [100, 110]
    assert reasons[100] == "loader process died twice on this row (signal 9: probably out of memory)"
    assert "signal 11" in reasons[110]


@pytest.mark.parametrize("doing", [{"do": "exit"}, {"do": "exit", "status": 255}, {"do": "exit", "status": 0}])
def test_a_row_that_ends_its_process_costs_only_itself(doing: dict[str, object]) -> None:
    with make_loader(num_workers=1) as loader:
        reasons = failures(run_rows(loader, [make_row(0), make_row(1, **doing), make_row(2)]))
    assert reasons == {1: f"loader process died twice on this row (exit status {doing.get('status', 3)})"}


def test_a_row_that_takes_its_time_holds_up_no_other() -> None:
    with make_loader() as loader:
        loader.submit([make_row(line, do="sleep" if line == 5 else None) for line in range(40)])
        lines = {record.row.line for _ in range(39) if isinstance(record := loader.next(timeout=PATIENCE), LoadedRow)}
    assert lines == set(range(40)) - {5}


def test_a_worker_killed_once_costs_nothing(tmp_path: Path) -> None:
    rows = [make_row(line, do="die once", marker=str(tmp_path / f"{line}")) for line in range(0, 12, 3)]
    rows += [make_row(line) for line in range(1, 60, 3)]
    with make_loader() as loader:
        assert failures(run_rows(loader, rows)) == {}
    assert len(list(tmp_path.iterdir())) == 4


def test_a_death_in_the_middle_of_handing_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [make_row(line, samples=10_000) for line in range(20)]
    rows[3] = make_row(3, samples=10_000, do="die while handing over", marker=str(tmp_path / "died"))
    with make_loader() as loader:
        records = run_rows(loader, rows)
    assert failures(records) == {}
    assert "loader process died (signal 9: probably out of memory) on row 'utterance 3'; trying it" in caplog.text
    for line, record in records.items():
        assert isinstance(record, LoadedRow)
        assert record.features is not None
        assert (record.features == line).all()


def test_a_row_too_large_to_be_handed_over_fails() -> None:
    with make_loader(num_workers=1) as loader:
        records = run_rows(loader, [make_row(0), make_row(1, do="be too large")])
    assert failures(records) == {1: "32 bytes at once are too many; --long_audio segment takes it"}


def test_random_kills_from_outside_lose_nothing() -> None:
    """Workers and, once, the server. A row may be hit twice by chance, so the killer waits for progress in between."""
    rows = [make_row(line, do="sleep", seconds=0.005) for line in range(200)]
    taken = 0
    with make_loader(num_workers=3) as loader:
        loader.submit(rows)
        lines: set[int] = set()
        while (record := loader.next(timeout=PATIENCE)) is not None:
            assert isinstance(record, LoadedRow)
            lines.add(record.row.line)
            taken += 1
            if taken % 40 == 0:
                with contextlib.suppress(psutil.NoSuchProcess):  # it was hit a moment ago
                    for victim in [server()] if taken == 80 else workers()[:1]:
                        victim.kill()
    assert lines == set(range(200))
    assert taken == 200


@pytest.mark.parametrize("do", ["sleep", "hang in native code"])
def test_a_row_that_takes_too_long_is_cut_off(do: str) -> None:
    with make_loader(row_timeout=2) as loader:
        reasons = failures(run_rows(loader, [make_row(line, do=do if line == 0 else None) for line in range(30)]))
        assert reasons == {0: "took longer than --row_timeout 2 s to load; raise it if the file is good"}


def test_a_process_that_was_cut_off_is_gone(tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    with make_loader(row_timeout=2) as loader:
        run_rows(loader, [make_row(0, do="sleep", marker=str(marker))])
        wait_until(lambda: not psutil.pid_exists(int(marker.read_text())))


def test_slow_rows_within_their_time_are_left_alone() -> None:
    """Rows that wait behind a slow one in the same worker are not timed meanwhile."""
    with make_loader(num_workers=1, row_timeout=2) as loader:
        assert failures(run_rows(loader, [make_row(line, do="sleep", seconds=0.8) for line in range(4)])) == {}


def marked_row(folder: Path, line: int, samples: int = 8) -> ManifestRow:
    """A row that leaves a file when it is loaded."""
    return make_row(line, do="leave a mark", marker=str(folder / f"{line}"), samples=samples)


def num_loaded(folder: Path) -> int:
    return len(list(folder.iterdir()))


def test_a_slow_consumer_is_not_a_slow_row(tmp_path: Path) -> None:
    """An answer that is held back for want of room has no deadline."""
    with make_loader(num_workers=2, bytes_ahead=1_000_000, row_timeout=1) as loader:
        loader.submit([marked_row(tmp_path, line, samples=500_000) for line in range(4)])
        wait_until(lambda: num_loaded(tmp_path) > 1)
        time.sleep(2)
        assert failures(take_all(loader)) == {}


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_back_pressure_bounds_rows(tmp_path: Path, num_workers: int) -> None:
    """Exactly ``rows_ahead`` rows are loaded and not taken."""
    with make_loader(num_workers=num_workers, rows_ahead=5) as loader:
        loader.submit([marked_row(tmp_path, line) for line in range(50)])
        for taken in range(5):
            wait_until(lambda: num_loaded(tmp_path) >= 5 + taken)  # noqa: B023 - called at once
            time.sleep(0.2)
            assert num_loaded(tmp_path) == 5 + taken
            assert loader.next() is not None
        assert len(take_all(loader)) == 45


@pytest.mark.parametrize("small_first", [False, True])
def test_back_pressure_bounds_bytes(tmp_path: Path, small_first: bool) -> None:
    """Also when rows of 4 MB follow on rows of 32 bytes, whose size promised nothing."""
    sizes = [8] * 20 * small_first + [1_000_000] * 30
    small, most = 20 * small_first, 0
    with make_loader(num_workers=2, bytes_ahead=10_000_000) as loader:
        loader.submit([marked_row(tmp_path, line, samples=size) for line, size in enumerate(sizes)])
        for taken in range(len(sizes)):
            time.sleep(0.01)
            most = max(most, num_loaded(tmp_path) - max(taken, small))
            assert isinstance(loader.next(timeout=PATIENCE), LoadedRow)
    # Two rows are within the bound, and each worker may have two more and one in its hands.
    assert 1 <= most <= 2 + 2 * 3


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
        done = [loader.next(timeout=PATIENCE) for _ in range(8)]
        returned = loader.stop_loading()
        rest = list(take_all(loader).values())
        lines = [record.row.line for record in done + rest if isinstance(record, LoadedRow)]
        assert [row.line for row in returned] == sorted(set(range(40)) - set(lines))
        assert len(lines) + len(returned) == 40
        with pytest.raises(RuntimeError, match="stopped"):
            loader.submit(rows)


def test_close_ends_all_loader_processes_at_once() -> None:
    loader = make_loader(num_workers=3)
    loader.submit([make_row(line, do="sleep" if line % 10 == 9 else None) for line in range(60)])
    assert loader.next(timeout=PATIENCE) is not None
    wait_until(lambda: len(workers()) == 3)
    before = workers()
    loader.close()
    wait_until(lambda: are_gone(before))
    assert loader.pending == 0
    assert loader.next() is None
    assert not any(thread.name == "loader" for thread in threading.enumerate())
    loader.close()


def test_close_does_not_wait_for_processes_that_are_being_started(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = threading.Event()

    def wait(descriptors: list[int]) -> tuple[int, int]:
        closed.wait(PATIENCE)
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(forkserver, "connect_to_new_process", wait)
    loader = make_loader()
    loader.submit([make_row(0)])
    loader.close()
    assert loader.next() is None
    closed.set()


def test_next_wakes_when_the_loading_is_stopped() -> None:
    with make_loader(num_workers=1) as loader:
        loader.submit([make_row(0, do="sleep")])
        timer = threading.Timer(0.2, loader.stop_loading)
        timer.start()
        assert loader.next() is None
        timer.join()


PROGRAM = """
import os, sys, tempfile, time
sys.path.insert(0, {root!r})
from batch_tokenizer.data.loader import Loader
from tests.support.loading import make_row, misbehave

def at_work(row_timeout, seconds, other="sleep"):
    loader = Loader(misbehave, num_workers=2, rows_ahead=10, bytes_ahead=1 << 20, row_timeout=row_timeout)
    folder = tempfile.mkdtemp(dir={folder!r})
    doing = enumerate(("sleep", other))
    loader.submit([make_row(line, do=do, marker=f"{{folder}}/{{line}}", seconds=seconds) for line, do in doing])
    while len(os.listdir(folder)) < 2:
        time.sleep(0.01)
    print("both are at work", flush=True)
    return loader

loader = at_work(row_timeout={row_timeout}, seconds={seconds})
print(loader.next(), flush=True)
print(loader.next(), flush=True)
sys.stdin.readline()
loader.close()
loader = at_work(row_timeout=600, seconds=600, other={other!r})
{then}
"""


def parent_program(folder: Path, row_timeout: float, seconds: float, other: str, then: str) -> str:
    """A program with two loaders, the second after a line of input. Rows of the first sleep for some seconds. When both
    processes of the second have a row that takes ten minutes, one of them with ``other``, the program does ``then``."""
    folder.mkdir()
    return PROGRAM.format(
        root=str(ROOT), folder=str(folder), row_timeout=row_timeout, seconds=seconds, other=other, then=then
    )


def test_no_worker_outlives_its_server() -> None:
    with make_loader() as loader:
        loader.submit([make_row(line, do="sleep") for line in range(2)])
        wait_until(lambda: len(workers()) == 2)
        before = workers()
        server().kill()
        wait_until(lambda: are_gone(before))


def test_a_caller_without_a_main_guard_that_ends_without_closing(tmp_path: Path) -> None:
    """Loader processes do not run the caller's script again, nor import from the working directory what it did not; a
    ``TMPDIR`` longer than a socket's path may be does no harm. The end does not wait for rows."""
    script = tmp_path / "script.py"
    script.write_text(parent_program(tmp_path / "marks", row_timeout=60, seconds=0, other="sleep", then="sys.exit(3)"))
    (tmp_path / "here").mkdir()
    long = tmp_path / ("t" * 100)
    long.mkdir()
    (tmp_path / "here" / "batch_tokenizer.py").write_text("raise RuntimeError('not the one that was imported')")
    ended = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path / "here",
        env={**os.environ, "TMPDIR": str(long)},
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (ended.returncode, ended.stdout.count("LoadedRow"), ended.stderr) == (3, 2, "")


def test_signals_to_the_whole_job_and_time_in_suspension_blame_no_row_and_a_killed_parent_leaves_no_process(
    tmp_path: Path,
) -> None:
    """A launcher signals every process of a job; only the computing process may answer. Here it ignores them. After its
    death neither the server is left nor workers in the middle of a row, not even in code that never lets Python run."""
    other = "hang in native code"
    program = parent_program(tmp_path / "marks", row_timeout=4, seconds=1, other=other, then="time.sleep(600)")
    arguments = [sys.executable, "-c", program]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        try:
            assert parent.stdin is not None
            assert parent.stdout is not None
            assert "both" in parent.stdout.readline()
            children = family(psutil.Process(parent.pid))
            assert len(children) >= 3
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                for process in children:
                    process.send_signal(number)
            os.killpg(parent.pid, signal.SIGSTOP)
            time.sleep(5)
            os.killpg(parent.pid, signal.SIGCONT)
            assert "LoadedRow" in parent.stdout.readline()
            assert "LoadedRow" in parent.stdout.readline()
            assert not any(are_gone([process]) for process in children)
            parent.stdin.write("go on\n")
            parent.stdin.flush()
            assert "both" in parent.stdout.readline()
            children = family(psutil.Process(parent.pid))
            assert len(children) >= 3
        finally:
            parent.kill()
        wait_until(lambda: are_gone(children))


class LoadThatCannotBeImported:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return __import__, ("a_module_that_is_not_there",)

    def __call__(self, row: ManifestRow) -> LoadedRow:
        raise AssertionError("no worker should have started")


class LoadWhoseWorkersDie(LoadThatCannotBeImported):
    def __reduce__(self) -> Any:
        return os._exit, (7,)


def kill_server() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(3600)  # until the kernel has this process follow


class LoadWhoseServerDies(LoadThatCannotBeImported):
    def __reduce__(self) -> Any:
        return kill_server, ()


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (LoadThatCannotBeImported(), "cannot import what they need: ModuleNotFoundError: No module named 'a_module_th"),
        (LoadWhoseServerDies(), "the fork server of the loader processes died; is the machine out of memory"),
        (LoadWhoseWorkersDie(), "loader processes die as soon as they start .exit status 7"),
    ],
)
def test_what_no_row_is_to_blame_for_ends_the_run(load: Callable[[ManifestRow], LoadedRow], message: str) -> None:
    assert_cannot_start(load, message)


@pytest.mark.parametrize("started", [0, 1])
def test_a_process_that_cannot_be_forked_ends_the_run(
    started: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first or, of two, the second; the first is not left behind."""
    connect = forkserver.connect_to_new_process
    calls = iter(range(1000))

    def refuse(descriptors: list[int]) -> tuple[int, int]:
        if next(calls) % 2 < started:
            return connect(descriptors)  # type: ignore[no-any-return]
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(forkserver, "connect_to_new_process", refuse)
    assert_cannot_start(
        misbehave, "cannot start a loader process: .*Resource temporarily unavailable; lower --num_workers"
    )
    assert workers() == []
    assert capfd.readouterr().err == ""


def assert_cannot_start(load: Callable[[ManifestRow], LoadedRow], message: str) -> None:
    with make_loader(load) as loader:
        loader.submit([make_row(0)])
        for _ in range(2):  # also whoever asks again
            with pytest.raises(RunError, match=message) as raised:
                loader.next(timeout=PATIENCE)
            assert raised.value.exit_code == 1


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
