"""Locks on files that a dead process cannot hold."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from batch_tokenizer.records import RunError

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FileLock:
    """An exclusive lock on a file, held until ``release`` or the end of this process, not of its children."""

    #: Where the file system has no locks, one warning is enough.
    _warned: ClassVar[bool] = False
    _held: ClassVar[weakref.WeakSet[FileLock]] = weakref.WeakSet()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1

    def acquire(self) -> bool:
        """Take the lock, or return False because another process has it. True where the file system has no locks."""
        # Not inherited by programs that this process starts, which would hold the lock after it has ended.
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self.release()
                raise
            if not FileLock._warned:
                logger.warning(
                    "%s: this file system has no locks, so nothing keeps a second job out of the folder. "
                    "It would do rows twice, with the same result.",
                    self.path,
                )
                FileLock._warned = True
        FileLock._held.add(self)
        return True

    def write(self, text: str) -> None:
        """Replace the locked file's content, which says who holds the lock."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)

    def release(self) -> None:
        """Release the lock if it is held."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @classmethod
    def release_in_child(cls) -> None:
        """A forked loader process that outlives a killed rank must not keep its locks."""
        for lock in list(cls._held):
            lock.release()


os.register_at_fork(after_in_child=FileLock.release_in_child)


@contextmanager
def exclusive_lock(
    path: Path, idle: Callable[[], None], *, purpose: str = "", timeout: float | None = None
) -> Iterator[None]:
    """Holds the lock on ``path`` during the block.

    Args:
        idle: called while waiting; an exception of its ends the wait.
        purpose: of locks that are held for long, what the other process is doing, for the log.
        timeout: seconds to wait; None for no limit.

    Raises:
        OSError: the file cannot be made or locked.
        RunError: another process has held it for ``timeout`` seconds (exit code 1).
    """
    lock = FileLock(path)
    began, logged = time.monotonic(), False
    while not lock.acquire():
        if timeout is not None and time.monotonic() > began + timeout:
            raise RunError(f"{path} has been locked for {timeout:g} s: is a job hanging?", exit_code=1)
        if purpose and not logged:
            logger.info("another process is %s; waiting for it", purpose)
            logged = True
        idle()
        time.sleep(0.05)
    try:
        yield
    finally:
        lock.release()
