"""Files that are replaced as a whole by a rename, so that a reader sees the old one or the new one."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


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
