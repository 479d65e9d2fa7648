"""``ShardFolder``: the folder or URL that shards are published in, and which run it belongs to.

A shard is written under ``.NAME.part`` and renamed to ``NAME`` when it is whole. Shards that no ledger names are
removed when a run starts, so a folder belongs to one run alone: ``.batch_tokenizer.TASK.json`` says which.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from batch_tokenizer.records import RunError
from batch_tokenizer.storage import remote
from batch_tokenizer.storage.atomic import atomic_write, sync_folder
from batch_tokenizer.storage.names import is_url
from batch_tokenizer.storage.remote import StorageError


def shard_folder(place: str) -> ShardFolder:
    """The folder at a path or a URL."""
    return RemoteShardFolder(place) if is_url(place) else ShardFolder(place)


class ShardFolder:
    """A folder of shards.

    Args:
        place: its path.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self._path = Path(place)

    def claim(self, task: str, run_id: str, run_dir: Path) -> None:
        """Make the folder, and take it for a run.

        Raises:
            RunError: it holds shards of the task that another run made (exit code 2), or cannot be written (1).
        """
        # A marker names the run that owns the folder. Shards without one may be of any run.
        marker = f".batch_tokenizer.{task}.json"
        try:
            content = self._read_marker(marker)
            try:
                owner = json.loads(content)
                if owner.get("id") == run_id:
                    return
                whose = f" (run folder {owner.get('run_folder')})"
            except (ValueError, AttributeError):
                whose = ""
            if any(name.startswith(f"{task}-") for name in self.names()):
                raise RunError(
                    f"--output_dir {self.place} holds shards of another {task} run{whose}: choose another folder, or "
                    "remove them"
                )
            about = json.dumps({"id": run_id, "run_folder": str(run_dir.resolve())}) + "\n"
            self._write_marker(marker, about.encode())
        except OSError as error:
            raise RunError(f"--output_dir {self.place}: {error.strerror or error}", exit_code=1) from error

    def _read_marker(self, name: str) -> bytes:
        """Empty where there is none; the folder is there afterwards."""
        self._path.mkdir(parents=True, exist_ok=True)
        try:
            return (self._path / name).read_bytes()
        except FileNotFoundError:
            return b""

    def _write_marker(self, name: str, content: bytes) -> None:
        with atomic_write(self._path / name) as file:
            file.write(content)

    def names(self) -> list[str]:
        """Published files, sorted.

        Raises:
            OSError: the folder cannot be read.
        """
        return sorted(entry.name for entry in self._entries() if not entry.name.startswith("."))

    def names_aside(self) -> list[str]:
        """Files that are not published, by the names that they would have, sorted.

        Raises:
            OSError: the folder cannot be read.
        """
        return sorted(
            entry.name[1 : -len(".part")]
            for entry in self._entries()
            if entry.name.startswith(".") and entry.name.endswith(".part")
        )

    def _entries(self) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self._path) as entries:
                return [entry for entry in entries if entry.is_file()]
        except FileNotFoundError:
            return []

    def location(self, name: str) -> str:
        """Where a published file lies."""
        return str(self._path / name)

    def create(self, name: str) -> BinaryIO:
        """Begin a file aside, in the place of one that a killed process left.

        Raises:
            OSError: it cannot be.
        """
        self.discard(name)
        return (self._aside(name)).open("xb")

    def publish(self, name: str) -> None:
        """Let a file that was written aside appear, and outlive a power loss.

        Raises:
            OSError: it cannot be, or was taken away.
        """
        with self._aside(name).open("rb") as file:
            os.fsync(file.fileno())
        os.rename(self._aside(name), self._path / name)
        sync_folder(self._path)

    def exists(self, name: str) -> bool:
        """Whether a file is published."""
        return (self._path / name).is_file()

    def discard(self, name: str) -> None:
        """Remove a file that was written aside, if it is there. After that it cannot be published any more."""
        self._aside(name).unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove a published file, if it is there."""
        (self._path / name).unlink(missing_ok=True)

    def _aside(self, name: str) -> Path:
        return self._path / f".{name}.part"


class RemoteShardFolder(ShardFolder):
    """The same behind a URL. What is written aside is a local file without a name, put as a whole object in the end.

    A process that outlives its job for some seconds cannot be kept from putting an object, as a file aside can be taken
    away from it. Its rows do not count then; ``verify`` names such a shard, and the next start removes it.
    """

    def __init__(self, place: str) -> None:
        super().__init__(place.rstrip("/"))
        self._aside_files: dict[str, BinaryIO] = {}

    def _read_marker(self, name: str) -> bytes:
        with _as_os_error():
            url = self.location(name)
            return b"".join(remote.fetch(url)) if remote.exists(url) else b""

    def _write_marker(self, name: str, content: bytes) -> None:
        with _as_os_error():
            remote.put(self.location(name), content)

    def names(self) -> list[str]:
        with _as_os_error():
            found = remote.find(f"{self.place}/*")
        return sorted(name for name in (url.rpartition("/")[2] for url in found) if name and not name.startswith("."))

    def names_aside(self) -> list[str]:
        """None: they end with their process."""
        return []

    def location(self, name: str) -> str:
        return f"{self.place}/{name}"

    def create(self, name: str) -> BinaryIO:
        self.discard(name)
        file = tempfile.TemporaryFile(prefix="batch_tokenizer-")  # noqa: SIM115 - open until it is published
        self._aside_files[name] = file
        return os.fdopen(os.dup(file.fileno()), "wb")

    def publish(self, name: str) -> None:
        """Puts the whole object, which takes memory of its size."""
        with self._aside_files.pop(name) as file, _as_os_error():
            file.seek(0)
            remote.put(self.location(name), file.read())

    def exists(self, name: str) -> bool:
        with _as_os_error():
            return remote.exists(self.location(name))

    def discard(self, name: str) -> None:
        if name in self._aside_files:
            self._aside_files.pop(name).close()

    def remove(self, name: str) -> None:
        with _as_os_error():
            remote.remove(self.location(name))


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Raises a store's error as the ``OSError`` that a file system would raise."""
    try:
        yield
    except StorageError as error:
        raise OSError(errno.EIO, error.reason) from error
