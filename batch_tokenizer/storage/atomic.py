"""Files that are replaced as a whole by a rename, so that a reader sees the old one or the new one; and what becomes of
an error of the file system."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from batch_tokenizer.records import RunError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Opens a new binary file that appears at ``path`` when the block ends, in place of what is there.

    A reader of ``path`` sees the old file or the whole new one. If the block raises, the old file stays and the
    unfinished one is removed.

    Raises:
        OSError: it cannot be written or renamed.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{socket.gethostname()[:32]}-{os.getpid()}.part")
    try:
        with open(unfinished, "wb") as file:
            yield file
        os.replace(unfinished, path)
    except BaseException:
        # The error that ended the block is the one to report, not that of removing the file.
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def replace_file(path: str | Path, content: bytes) -> None:
    """Makes ``content`` the file at ``path``; errors as in ``atomic_write``."""
    with atomic_write(path) as file:
        file.write(content)


def replace_json(path: str | Path, value: Any) -> None:
    """Makes a JSON value, indented, the file at ``path``; errors as in ``atomic_write``."""
    replace_file(path, (json.dumps(value, indent=2) + "\n").encode())


@contextmanager
def os_error_ends_run(message: str, exit_code: int = 1) -> Iterator[None]:
    """
    Raises:
        RunError: the body raised an ``OSError``: ``message`` and the system's reason.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{message}: {error.strerror or error}", exit_code=exit_code) from error


def sync_folder(folder: str | Path) -> None:
    """Writes a folder's entries to the disk, so that a rename in it outlives a power loss.

    Raises:
        OSError: the folder cannot be opened or synced.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
