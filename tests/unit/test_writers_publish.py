"""Publishing whole files, and naming what prevents it."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from batch_tokenizer.records import RowError
from batch_tokenizer.writers.publish import publish


def refusal(path: str | Path, content: bytes = b"new") -> str:
    with pytest.raises(RowError) as raised:
        publish(str(path), content)
    assert raised.value.stage == "write"
    assert "\n" not in raised.value.reason
    return raised.value.reason


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize("name", ["a.json", "ключ 键 🎵.json", "new\nline", "x" * 255, "deep/er/than/that.json"])
def test_a_file_appears_with_its_folders(tmp_path: Path, name: str) -> None:
    path = tmp_path / "new" / name
    publish(str(path), b"content")
    publish(str(path), b"other")
    assert path.read_bytes() == b"other"
    assert files_in(tmp_path) == {path.name}


def test_a_relative_name_goes_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    publish("a.json", b"content")
    assert (tmp_path / "a.json").read_bytes() == b"content"


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        publish(str(tmp_path / "a"), b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    contents = [bytes([number]) * 300_000 for number in (1, 2)]
    publish(str(path), contents[0])
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            for content in contents:
                publish(str(path), content)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        assert all(path.read_bytes() in contents for _ in range(300))
    finally:
        stop.set()
        writer.join()


def test_what_a_killed_run_leaves_is_gone_when_the_row_is_redone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        patch.setattr(os, "unlink", die)  # SIGKILL cleans nothing up
        with pytest.raises(Killed):
            publish(str(path), b"a longer first attempt")
    (left,) = files_in(tmp_path)
    assert left.startswith(".")
    assert left.endswith(".part")
    assert len(left) == 1 + 16 + 5
    publish(str(tmp_path / "b"), b"other row")
    assert files_in(tmp_path) == {left, "b"}
    publish(str(path), b"second")
    assert files_in(tmp_path) == {"a", "b"}
    assert path.read_bytes() == b"second"


def test_folders_made_by_many_at_once(tmp_path: Path) -> None:
    errors: list[RowError] = []

    def write(number: int) -> None:
        try:
            publish(str(tmp_path / "a" / "b" / "c" / str(number)), b"")
        except RowError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(files_in(tmp_path)) == 16


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    for name in ("folder", "folder/", "folder/.", "folder/..", "link"):
        assert "is a folder" in refusal(f"{tmp_path}/{name}")
    assert files_in(tmp_path) == set()


def test_a_link_to_a_file_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old")
    for link, target in (("link", "target"), ("dangling", "none")):
        (tmp_path / link).symlink_to(target)
        publish(str(tmp_path / link), b"new")
        assert not (tmp_path / link).is_symlink()
        assert (tmp_path / link).read_bytes() == b"new"
    assert (tmp_path / "target").read_bytes() == b"old"


def test_devices_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "null").symlink_to("/dev/null")
    for path in (tmp_path / "fifo", tmp_path / "null", "/dev/null"):
        assert "pipe, socket or device" in refusal(path)
    assert Path("/dev/null").is_char_device()


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    assert "its name is too long" in refusal(tmp_path / ("x" * 300))
    assert "its name is too long" in refusal(tmp_path / ("ж" * 200))
    assert "no file can have this name" in refusal(f"{tmp_path}/zero\0byte")
    assert "no file can have this name" in refusal(f"{tmp_path}/half \ud800 pair")
    assert files_in(tmp_path) == set()


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "not a folder" in refusal(tmp_path / "file" / "a.json")
    assert "not a folder" in refusal(tmp_path / "file" / "b" / "a.json")


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert "points back to itself" in refusal(tmp_path / "a")
    assert "points back to itself" in refusal(tmp_path / "a" / "file")


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        assert "larger than" in refusal(tmp_path / "a", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert files_in(tmp_path) == set()


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small file system takes root: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_disk_full_then_room_again(tmp_path: Path) -> None:
    with small_disk(tmp_path, "size=256k"):
        publish(str(tmp_path / "a"), b"old")
        assert refusal(tmp_path / "a", bytes(1_000_000)) == f"{tmp_path}/a: cannot be written: the disk is full"
        assert (tmp_path / "a").read_bytes() == b"old"
        assert files_in(tmp_path) == {"a"}
        publish(str(tmp_path / "a"), bytes(200_000))


def test_out_of_inodes_is_disk_full(tmp_path: Path) -> None:
    with small_disk(tmp_path, "nr_inodes=4"):
        reasons = [refusal(tmp_path / "x" / "y" / str(number) / "a") for number in range(2)]
        assert all("the disk is full" in reason for reason in reasons)


def test_read_only_file_system(tmp_path: Path) -> None:
    with small_disk(tmp_path, "ro"):
        assert "the file system is read-only" in refusal(tmp_path / "a")
        assert "the file system is read-only" in refusal(tmp_path / "folder" / "a")


def test_no_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    assert "no permission" in refusal(tmp_path / "a")


def test_two_writers_of_one_path_leave_a_whole_file(tmp_path: Path) -> None:
    content = b"x" * 300_000
    errors: list[RowError] = []

    def write() -> None:
        try:
            for _ in range(100):
                publish(str(tmp_path / "a"), content)
        except RowError as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert (tmp_path / "a").read_bytes() == content
    assert files_in(tmp_path) == {"a"}
