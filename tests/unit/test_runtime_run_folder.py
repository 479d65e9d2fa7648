"""The run folder: settings, attempts, and a lock that a dead process cannot hold. Processes here are real."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batch_tokenizer.records import LedgerEntry, RunError
from batch_tokenizer.runtime import run_folder as run_folder_module
from batch_tokenizer.runtime.ledger_writer import LedgerWriter
from batch_tokenizer.runtime.processes import ProcessGroup
from batch_tokenizer.runtime.run_folder import RunFolder
from batch_tokenizer.runtime.run_settings import read_settings
from batch_tokenizer.storage import file_lock

ALONE = ProcessGroup(0, 1, 0, "single", "here", os.getpid(), "job")


def open_alone(path: Path, settings: dict[str, Any] | None = None, **options: Any) -> RunFolder:
    return RunFolder.open(path, settings or {"task": "wav2token"}, processes=ALONE, **options)


def do_row(folder: RunFolder) -> None:
    """Record that row 0 is done."""
    with LedgerWriter(folder.ledger_path) as ledger:
        ledger.append(LedgerEntry(0, "0" * 16, "a", "done"))


def srun(rank: int, job: str = "7.0.0") -> ProcessGroup:
    return ProcessGroup(rank, 2, rank, "srun", "here", os.getpid(), job)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder_module, "_LOCK_SECONDS", 0.3)
    monkeypatch.setattr(run_folder_module, "_VISIBLE_SECONDS", 0.3)


@contextmanager
def holder(path: Path, *, body: str = "time.sleep(300)", **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the folder open and then does ``body``."""
    program = textwrap.dedent(
        f"""
        import os, sys, time
        from batch_tokenizer.runtime.processes import ProcessGroup
        from batch_tokenizer.runtime.run_folder import RunFolder
        processes = ProcessGroup.from_environment()
        folder = RunFolder.open(sys.argv[1], {{"task": "wav2token"}}, processes=processes, **{options!r})
        print(folder.attempt, flush=True)
        {body}
        """
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()


# ------------------------------------------------------------------------------------------------------------- the lock


def test_a_second_job_is_told_who_is_at_work(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(RunError) as raised:
            open_alone(tmp_path)
        assert raised.value.exit_code == 1
        assert f"attempt 1 (host {os.uname().nodename}, process {process.pid})" in str(raised.value)
        assert "\n" not in str(raised.value)


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with open_alone(tmp_path) as folder:
            assert folder.attempt == 2


def test_a_restart_waits_a_moment_for_the_old_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder_module, "_LOCK_SECONDS", 300.0)
    with holder(tmp_path, body="time.sleep(1)"), open_alone(tmp_path) as folder:
        assert folder.attempt == 2


def test_loader_workers_of_a_killed_process_do_not_hold_its_lock(tmp_path: Path) -> None:
    body = "child = os.fork(); (print(child, flush=True) if child else None, time.sleep(300))"
    with holder(tmp_path, body=body) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            process.send_signal(signal.SIGKILL)
            process.wait()
            os.kill(child, 0)
            open_alone(tmp_path).close()
        finally:
            os.kill(child, signal.SIGKILL)


def test_shards_work_side_by_side_but_not_with_other_divisions(tmp_path: Path) -> None:
    with holder(tmp_path, num_shards=2, shard=0):
        open_alone(tmp_path, num_shards=2, shard=1).close()
        for options in ({"num_shards": 2, "shard": 0}, {"num_shards": 3, "shard": 1}, {}):
            with pytest.raises(RunError, match="in use by attempt 1"):
                open_alone(tmp_path, **options)
    open_alone(tmp_path).close()


def test_file_systems_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(file_lock.FileLock, "_warned", False)
    with open_alone(tmp_path) as first, open_alone(tmp_path) as second:
        assert (first.attempt, second.attempt) == (1, 2)
    assert caplog.text.count("has no locks") == 1


# ------------------------------------------------------------------------------------------------------------- settings


def test_other_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    with open_alone(tmp_path, {"task": "wav2token", "n_q": 8, "old": [1, 2]}) as folder:
        do_row(folder)
    open_alone(tmp_path, {"old": (1, 2), "task": "wav2token", "n_q": 8}).close()
    with pytest.raises(RunError) as raised:
        open_alone(tmp_path, {"task": "wav2token", "n_q": 4, "new": True})
    message = str(raised.value)
    assert raised.value.exit_code == 2
    assert "n_q: run folder has 8, this run has 4" in message
    assert "old: run folder has [1, 2], this run has nothing" in message
    assert "new: run folder has nothing, this run has True" in message
    assert "task" not in message
    assert "--overwrite" in message
    assert "--run_dir" in message


def test_a_start_without_a_row_that_is_done_binds_nobody(tmp_path: Path) -> None:
    with open_alone(tmp_path, {"n_q": 8}) as folder:
        run_id = folder.run_id
        (tmp_path / "environments.json").write_text('[{"device": "another"}]')
        with LedgerWriter(folder.ledger_path) as ledger:
            ledger.append(LedgerEntry(0, "0" * 16, "a", "failed", stage="load", reason="no such file"))
    with open_alone(tmp_path, {"n_q": 4}) as folder:
        assert folder.run_id == run_id
        assert read_settings(tmp_path) == {"n_q": 4}
        assert not (tmp_path / "environments.json").exists()
        assert not list((tmp_path / "ledger").iterdir())
    (tmp_path / "shards" / "000002").mkdir(parents=True)
    (tmp_path / "shards" / "000002" / "00000.000000.jsonl").touch()  # a shard that may be published already
    with pytest.raises(RunError, match="of a run with other settings"):
        open_alone(tmp_path, {"n_q": 8})


def test_the_job_of_another_shard_holds_its_folder_to_its_settings(tmp_path: Path) -> None:
    with holder(tmp_path, num_shards=2, shard=0), pytest.raises(RunError, match="of a run with other settings"):
        open_alone(tmp_path, {"n_q": 4}, num_shards=2, shard=1)


def test_overwrite_discards_what_runs_wrote_and_nothing_else(tmp_path: Path) -> None:
    with open_alone(tmp_path, {"n_q": 8}) as folder:
        folder.ledger_path.write_text("{}\n")
        folder.write_summary({"rows": 1})
        (tmp_path / "failures.jsonl").touch()
        (tmp_path / "status" / "000001-00000.json").touch()
        (tmp_path / "index" / "kept").touch()
        (tmp_path / "ledger" / "mine.txt").touch()
        (tmp_path / "mine.json").touch()
    with open_alone(tmp_path, {"n_q": 8}, overwrite=True):
        assert (tmp_path / "ledger" / "000001-00000.jsonl").exists()
    with open_alone(tmp_path, {"n_q": 4}, overwrite=True) as folder:
        assert folder.attempt == 3
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for name in left if not name.startswith(("attempts/", "lock"))} == {
        "run.json", "index/kept", "ledger/mine.txt", "mine.json"
    }  # fmt: skip
    assert read_settings(tmp_path) == {"n_q": 4}


def test_overwrite_spares_a_folder_at_work(tmp_path: Path) -> None:
    with holder(tmp_path, num_shards=2, shard=0), pytest.raises(RunError, match=r"--overwrite: .* in use by attempt 1"):
        open_alone(tmp_path, {"n_q": 4}, overwrite=True, num_shards=2, shard=1)
    assert read_settings(tmp_path) == {"task": "wav2token"}


def test_a_ledger_without_settings_is_not_taken_over(tmp_path: Path) -> None:
    with open_alone(tmp_path) as folder:
        folder.ledger_path.touch()
    (tmp_path / "run.json").unlink()
    with pytest.raises(RunError, match="other settings"):
        open_alone(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(RunError, match="is damaged"):
        open_alone(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "[]", "3", "{", "{}", '{"settings": []}', '{"settings": null}', "[" * 100_000, '"\\ud800"', "\0"]
)
def test_a_run_file_of_another_shape_is_one_line(tmp_path: Path, content: str) -> None:
    open_alone(tmp_path).close()
    (tmp_path / "run.json").write_text(content)
    for overwrite in (False, True):
        with pytest.raises(RunError, match=r"run.json is damaged: remove it") as raised:
            open_alone(tmp_path, overwrite=overwrite)
        assert "\n" not in str(raised.value)


def test_a_folder_of_another_version_is_refused_or_discarded(tmp_path: Path) -> None:
    with open_alone(tmp_path) as folder:
        folder.ledger_path.write_text("{}\n")
        run_id = folder.run_id
    content = json.loads((tmp_path / "run.json").read_text())
    del content["format"]
    (tmp_path / "run.json").write_text(json.dumps(content))
    for call in (open_alone, read_settings):
        with pytest.raises(RunError, match=r"is of batch_tokenizer 0.1, whose ledger this version does not read"):
            call(tmp_path)
    with open_alone(tmp_path, overwrite=True) as folder:
        assert folder.run_id == run_id
        assert not (tmp_path / "ledger" / "000001-00000.jsonl").exists()
    open_alone(tmp_path).close()


# -------------------------------------------------------------------------------------------------------- more than one


def test_ranks_of_srun_share_one_attempt(tmp_path: Path) -> None:
    settings = {"n_q": 8}
    with pytest.raises(RunError, match="no message from rank 0 within 0 seconds"):
        RunFolder.open(tmp_path, settings, processes=srun(1), timeout=0.1)
    with RunFolder.open(tmp_path, settings, processes=srun(0)) as main:
        other = RunFolder.open(tmp_path, settings, processes=srun(1), timeout=300)
        assert (other.attempt, other.attempt_id) == (main.attempt, main.attempt_id)
        assert other.ledger_path != main.ledger_path
        with pytest.raises(RunError, match="no message from rank 0"):
            other.await_status(timeout=0.1)
        main.share_status(np.array([0, 1, 2], np.uint8))
        assert list(other.await_status(timeout=300)) == [0, 1, 2]
        with pytest.raises(RunError, match="rank 1 on here differs: n_q: run folder has 8, this run has 4"):
            RunFolder.open(tmp_path, {"n_q": 4}, processes=srun(1), timeout=300)
    # A requeued job has another name; its ranks must not take the old word.
    with pytest.raises(RunError, match="no message from rank 0"):
        RunFolder.open(tmp_path, settings, processes=srun(1, "7.0.1"), timeout=0.1)
    with RunFolder.open(tmp_path, settings, processes=srun(0, "7.0.1")) as main:
        assert main.attempt == 2
        main.share_status(np.zeros(1, np.uint8))
        assert len(list((tmp_path / "resume").iterdir())) == 1


def test_ranks_hear_why_rank_0_stopped(tmp_path: Path) -> None:
    with open_alone(tmp_path, {"n_q": 8}) as folder:
        do_row(folder)
    with pytest.raises(RunError):
        RunFolder.open(tmp_path, {"n_q": 4}, processes=srun(0))
    with pytest.raises(RunError, match=r"rank 0 stopped: .*n_q: run folder has 8"):
        RunFolder.open(tmp_path, {"n_q": 4}, processes=srun(1), timeout=300)
    main = RunFolder.open(tmp_path, {"n_q": 8}, processes=srun(0, "8.0.0"))
    other = RunFolder.open(tmp_path, {"n_q": 8}, processes=srun(1, "8.0.0"), timeout=300)
    main.__exit__(RunError, RunError("no manifest"), None)
    with pytest.raises(RunError, match="rank 0 stopped: no manifest"):
        other.await_status(timeout=300)


def test_waiting_can_be_given_up(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        RunFolder.open(tmp_path, {}, processes=srun(1), timeout=300, idle=lambda: print(1 / 0))


# -------------------------------------------------------------------------------------------------------------- trouble


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError) as raised:
        open_alone(tmp_path / "file" / "run")
    assert raised.value.exit_code == 1
    assert "--run_dir" in str(raised.value)
    with open_alone(tmp_path / "run") as folder:
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(RunError, match="was it removed"):
            folder.write_summary({})


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_alone(tmp_path) as folder:
        monkeypatch.setattr(os, "replace", _raise(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(RunError, match="free some space"):
            folder.write_summary({})


def _raise(error: Exception) -> Callable[..., None]:
    def function(*arguments: object) -> None:
        raise error

    return function


def test_attempts_say_who_they_were(tmp_path: Path) -> None:
    before = time.time()
    open_alone(tmp_path, num_shards=4, shard=3).close()
    record = json.loads((tmp_path / "attempts" / "000001.json").read_text())
    assert {name: record[name] for name in ("attempt", "host", "pid", "num_shards", "shard", "world_size")} == {
        "attempt": 1, "host": "here", "pid": os.getpid(), "num_shards": 4, "shard": 3, "world_size": 1,
    }  # fmt: skip
    assert before <= record["started"] <= time.time()
