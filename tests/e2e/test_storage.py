"""Disks that are full or read-only, run folders that vanish or are damaged, two jobs on one of them: each ends with a
line that says so, and nothing is lost."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import Open
from tests.support.command import run_here


@contextmanager
def disk(folder: Path, options: str) -> Iterator[None]:
    """A small file system in memory at ``folder``."""
    folder.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    mounted = subprocess.run(words, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small file system takes root: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write until the disk is full, which raises OSError."""
    with path.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(1024))


def last_error(output: str) -> str:
    """The line of the log that says why a run ended; there must be no traceback."""
    assert "Traceback" not in output
    return next(line for line in reversed(output.splitlines()) if " ERROR " in line)


def test_outputs_on_a_full_disk(open_workspace: Open, undisturbed: Mapping[str, bytes]) -> None:
    workspace = open_workspace(100)
    out = workspace.folder / "out"
    with disk(out, "size=512k"):
        with workspace.start(1) as run:
            assert run.wait() == 1
        assert "the disk is full; " in last_error(run.output())
        done = workspace.rows_done()
        assert 0 < done < 100
        assert all(entry["status"] == "done" for entry in workspace.ledger())
        subprocess.run(["mount", "-o", "remount,size=64m", str(out)], check=True)
        workspace.finish_here()
        workspace.check_complete(undisturbed)


def test_outputs_on_a_read_only_disk(open_workspace: Open) -> None:
    workspace = open_workspace(20)
    with disk(workspace.folder / "out", "ro"):
        done = run_here(*workspace.arguments(), cwd=workspace.folder)
        assert done.returncode == 1
        assert "the file system is read-only; " in last_error(done.stderr)
        assert workspace.ledger() == []


def test_run_folder_on_a_full_disk(open_workspace: Open, undisturbed: Mapping[str, bytes]) -> None:
    workspace = open_workspace(200)
    run_disk = workspace.folder / "disk"
    words = ("--run_dir", "disk/run")
    with disk(run_disk, "size=256k"):
        with workspace.start(1, *words) as run:
            run.wait_until(lambda: (run_disk / "run" / "ledger" / "000001-00000.jsonl").exists(), "the ledger")
            with pytest.raises(OSError, match="No space"):
                fill(run_disk / "filler")
            assert run.wait() == 1
        assert "No space left on device" in last_error(run.output())
        (run_disk / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", str(run_disk)], check=True)
        workspace.finish(1, *words)
        shutil.copytree(run_disk / "run", workspace.run_dir)
    run_disk.rmdir()
    workspace.check_complete(undisturbed, redone=True)


def test_run_folder_that_cannot_be_written(open_workspace: Open) -> None:
    workspace = open_workspace(20)
    with disk(workspace.folder / "disk", "ro"):
        done = run_here(*workspace.arguments("--run_dir", "disk/run"), cwd=workspace.folder)
    assert done.returncode == 1
    assert "run folder disk/run: Read-only file system" in last_error(done.stderr)
    assert "--run_dir" in last_error(done.stderr)


def test_run_folder_removed_while_the_run_is_at_work(open_workspace: Open, undisturbed: Mapping[str, bytes]) -> None:
    workspace = open_workspace(200)
    with workspace.start(1) as run:
        workspace.await_rows(20, run)
        shutil.rmtree(workspace.run_dir)
        assert run.wait() == 1
    assert "removed while the run wrote to it" in last_error(run.output())
    assert not workspace.run_dir.exists()
    workspace.finish_here()
    workspace.check_complete(undisturbed)


def test_ledger_torn_as_after_a_power_loss(open_workspace: Open, undisturbed: Mapping[str, bytes]) -> None:
    """The last line cut in two, a file without a byte, one that ends in a block of zeros."""
    workspace = open_workspace(100)
    for shard in range(2):
        workspace.finish_here("--num_shards", 2, "--shard", shard)
    first, second = sorted((workspace.run_dir / "ledger").iterdir())
    lines = first.read_bytes().splitlines(keepends=True)
    assert len(lines) > 10
    assert second.stat().st_size > 0
    first.write_bytes(b"".join(lines[:-3]) + lines[-3][:40])
    second.write_bytes(bytes(4096))
    (workspace.run_dir / "ledger" / "000001-00002.jsonl").write_bytes(b"")
    said = workspace.finish_here()
    assert f"resuming: {len(lines) - 3} rows are done" in said
    assert "2 ledger lines cannot be read, as after a crash; their rows are done again" in said
    workspace.check_complete(undisturbed, redone=True)


def test_a_second_job_on_the_same_run_folder(open_workspace: Open, undisturbed: Mapping[str, bytes]) -> None:
    workspace = open_workspace(300)
    with workspace.start(1) as first:
        workspace.await_rows(20, first)
        first.process.send_signal(signal.SIGSTOP)  # so that it is still there when the second has looked
        second = run_here(*workspace.arguments(), cwd=workspace.folder)
        assert second.returncode == 1
        first.process.send_signal(signal.SIGCONT)
        said = last_error(second.stderr)
        assert "is in use by attempt 1" in said
        assert f"process {first.process.pid}" in said
        assert "wait for that job or stop it" in said
        first.kill()
    assert len(list((workspace.run_dir / "ledger").iterdir())) == 1
