"""Progress: sums over ranks and shards, one line for the job, and clocks that jump."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

import pytest

from batch_tokenizer.runtime import progress as progress_module
from batch_tokenizer.runtime import row_counter
from batch_tokenizer.runtime.processes import ProcessGroup
from batch_tokenizer.runtime.progress import ProgressReporter, read_status
from batch_tokenizer.runtime.run_folder import RunFolder


def folder_of(path: Path, rank: int = 0, world_size: int = 1, attempt: int = 1, **shards: int) -> RunFolder:
    """A folder as one rank sees it, without the other ranks that opening it would wait for."""
    (path / "status").mkdir(exist_ok=True)
    processes = ProcessGroup(rank, world_size, rank, "srun", f"node{rank}", os.getpid(), "job")
    folder = RunFolder(path, processes, shards.get("num_shards", 1), shards.get("shard", 0), None)  # type: ignore[arg-type]
    folder.attempt = attempt
    return folder


def report(folder: RunFolder, done: int, failed: int = 0, seconds: float = 10.0, **options: Any) -> str:
    stream = io.StringIO()
    with ProgressReporter(folder, **{"rows_total": 100, "stream": stream} | options) as progress:
        progress.set_state("running")
        for _ in range(done):
            progress.row_done(seconds)
        for _ in range(failed):
            progress.row_failed()
        progress.add_seconds("load", 0.5)
        progress.add_seconds("load", 0.25)
    return stream.getvalue()


def test_ranks_add_up_and_only_rank_0_speaks(tmp_path: Path) -> None:
    assert report(folder_of(tmp_path, 1, 2), done=3, failed=1, rows_done_before=20, rows_failed_before=2) == ""
    line = report(folder_of(tmp_path, 0, 2), done=5, rows_done_before=20, rows_failed_before=2)
    assert line.startswith("31/100 rows, 80 s of audio, ")
    assert ", 3 failed, " in line
    assert line.count("\n") == 1
    status = read_status(tmp_path)
    assert [rank.state for rank in status.ranks] == ["finished", "finished"]
    assert (status.rows_done, status.rows_failed, status.rows_total) == (28, 3, 100)
    assert status.audio_seconds == 80.0
    assert status.stage_seconds == {"load": 1.5}
    assert sorted(path.name for path in (tmp_path / "status").iterdir()) == ["000001-00000.json", "000001-00001.json"]


def test_only_the_last_attempt_of_every_shard_counts(tmp_path: Path) -> None:
    report(folder_of(tmp_path, attempt=1, num_shards=3), done=50)
    for attempt, shard in ((2, 0), (3, 1), (5, 0)):
        for rank in range(2 if attempt == 2 else 1):
            report(folder_of(tmp_path, rank, 2, attempt, num_shards=2, shard=shard), done=attempt)
    status = read_status(tmp_path)
    assert [(rank.attempt, rank.shard) for rank in status.ranks] == [(5, 0), (3, 1)]
    assert (status.rows_done, status.rows_total) == (8, 200)


def test_an_exception_is_an_interruption(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ProgressReporter(folder_of(tmp_path), rows_total=1, stream=io.StringIO()):
        raise ZeroDivisionError
    assert read_status(tmp_path).ranks[0].state == "interrupted"


def test_a_clock_that_jumps_changes_no_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    with ProgressReporter(folder_of(tmp_path), rows_total=10, stream=io.StringIO()) as progress:
        progress.row_done(3600.0)
        monkeypatch.setattr(progress_module.time, "time", lambda: now - 86400)
        progress._began -= 1800
    status = read_status(tmp_path)
    assert status.elapsed == pytest.approx(1800, abs=300)  # and no day more or less
    assert status.audio_seconds == 3600
    assert status.seconds_left == pytest.approx(9 * status.elapsed)


def test_the_reporter_speaks_while_the_loop_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "_PLAIN_LINE_SECONDS", 0.1)
    stream = io.StringIO()
    progress = ProgressReporter(folder_of(tmp_path), rows_total=10, stream=stream)
    progress._interval = 0.05
    began = time.monotonic()
    with progress:
        progress.row_done(1.0)
        while stream.getvalue().count("1/10 rows") < 3:
            assert time.monotonic() < began + 300
            time.sleep(0.01)
        assert read_status(tmp_path).rows_done == 1
        count = stream.getvalue().count("1/10 rows")
        assert count <= (time.monotonic() - began) / 0.1 + 1


def test_a_terminal_gets_one_moving_line(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    report(folder_of(tmp_path), done=5, stream=stream)
    assert "5/100 rows, 50 s of audio" in stream.getvalue()
    assert stream.getvalue().count("\n") == 1


def test_status_files_are_never_worth_stopping_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_of(tmp_path)
    (tmp_path / "status").rmdir()
    report(folder, done=1)
    assert caplog.text.count("the progress shown will be wrong") == 1
    assert read_status(tmp_path).ranks == ()
    (tmp_path / "status").mkdir()
    (tmp_path / "status" / "000001-00000.json").write_bytes(bytes(20))
    assert read_status(tmp_path).ranks == ()
    assert "is damaged" in caplog.text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 s"), (22.46, "22.5 s"), (119.0, "119 s"), (319.2, "5.32 min"), (7200.0, "2 h"), (4.2e7, "11,667 h")],
)
def test_durations_have_few_digits(seconds: float, text: str) -> None:
    assert progress_module.duration_text(seconds) == text


def test_a_quiet_reporter_shows_nothing_and_counts(tmp_path: Path) -> None:
    assert report(folder_of(tmp_path), done=5, quiet=True) == ""
    assert read_status(tmp_path).rows_done == 5


def test_rows_are_counted_in_plain_lines_where_nobody_watches(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(row_counter, "_LINE_SECONDS", 0.0)
    with caplog.at_level("INFO"), row_counter.RowCounter("verified", 2000) as counter:
        counter.update(1500)
    assert caplog.messages == ["verified: 1,500 of 2,000 rows"]
