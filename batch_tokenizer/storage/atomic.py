"""Local files that several processes share: replaced as a whole by a rename, or written under a lock."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)


@contextmanager
def atomic_write(path: str | Path, *, sync: bool = False) -> Iterator[IO[bytes]]:
    """Opens a new binary file that appears at ``path`` when the block ends, in place of what is there.

    A reader of ``path`` sees the old file or the whole new one. If the block raises, the old file stays and the
    unfinished one is removed.

    Args:
        sync: also write the file and its folder entry to the disk before returning, so that they outlive a power loss.

    Raises:
        OSError: it cannot be written or renamed.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{socket.gethostname()[:32]}-{os.getpid()}.part")
    try:
        with open(unfinished, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        # The error that ended the block is the one to report, not that of removing the file.
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
    if sync:
        sync_folder(path.parent)


@contextmanager
def exclusive_lock(path: Path, purpose: str, idle: Callable[[], None]) -> Iterator[None]:
    """Holds the lock of a file, which is made if it is not there. For work that is harmless if it is done twice: where
    the file system has no locks, the block runs without one, and a warning says so.

    Args:
        purpose: what is done under the lock, for the log.
        idle: called now and then while waiting; an exception that it raises ends the wait.

    Raises:
        OSError: the file cannot be made.
    """
    with path.open("ab") as lock:
        warned = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not warned:
                    logger.info("another process is %s; waiting for it", purpose)
                    warned = True
                idle()
                time.sleep(0.2)
            except OSError as error:
                logger.warning("%s cannot be locked (%s): %s without a lock", path, error.strerror, purpose)
                break
        yield


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
