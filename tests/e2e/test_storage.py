"""Disks that are full or read-only, run folders that vanish or are damaged, two jobs on one of them: each ends with a
line that says so, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from batch_tokenizer.runtime import run_folder
from tests.e2e.conftest import Open
from tests.support.command import run_here
from tests.support.runs import after_batches


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
        # Lazily, as a run in this process may still have a manifest's index mapped.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while stream.write(bytes(1024)):
            pass


def last_error(output: str) -> str:
    """The line of the log that says why a run ended; there must be no traceback."""
    assert "Traceback" not in output
    return next(line for line in reversed(output.splitlines()) if " ERROR " in line)


def test_outputs_on_a_full_disk(open_workspace: Open, undisturbed: Mapping[str, bytes]) -> None:
    workspace = open_workspace(100)
    out = workspace.folder / "out"
    with disk(out, "size=512k"):
        run = run_here(*workspace.arguments(), cwd=workspace.folder)
        assert run.returncode == 1
        assert "the disk is full; " in last_error(run.stderr)
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


def test_run_folder_on_a_full_disk(
    open_workspace: Open, undisturbed: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = open_workspace(120)
    run_disk = workspace.folder / "disk"
    words = ("--run_dir", "disk/run")
    after_batches(monkeypatch, 1, lambda: fill(run_disk / "filler"))
    with disk(run_disk, "size=256k"):
        run = run_here(*workspace.arguments(*words), cwd=workspace.folder)
        assert run.returncode == 1
        assert "No space left on device" in last_error(run.stderr)
        (run_disk / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", str(run_disk)], check=True)
        workspace.finish_here(*words)
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


def test_run_folder_removed_while_the_run_is_at_work(
    open_workspace: Open, undisturbed: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = open_workspace(64)
    after_batches(monkeypatch, 3, lambda: shutil.rmtree(workspace.run_dir))
    run = run_here(*workspace.arguments(), cwd=workspace.folder)
    assert run.returncode == 1
    assert "removed while the run wrote to it" in last_error(run.stderr)
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


def test_a_second_job_on_the_same_run_folder(
    open_workspace: Open, undisturbed: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in this process, the second in the middle of the first."""
    monkeypatch.setattr(run_folder, "_LOCK_SECONDS", 0.0)
    workspace = open_workspace(64)
    seconds = []
    after_batches(monkeypatch, 3, lambda: seconds.append(run_here(*workspace.arguments(), cwd=workspace.folder)))
    workspace.finish_here()
    (second,) = seconds
    assert second.returncode == 1
    said = last_error(second.stderr)
    assert "is in use by attempt 1" in said
    assert f"process {os.getpid()}" in said
    assert "wait for that job or stop it" in said
    assert len(list((workspace.run_dir / "ledger").iterdir())) == 1
    workspace.check_complete(undisturbed)
