"""``SharedBuffers``: memory in which a rank and its loader processes hand rows to each other.

Buffers are used again and again. Memory that was just written is in the cache, and the kernel need not find and clear
fresh pages for each row, which would cost more than loading a short one.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from typing import Any

_log = logging.getLogger(__name__)

#: Most bytes in a buffer, 24 hours of float32 at 48 kHz. They are addresses; memory is taken as it is written.
BUFFER_BYTES = 1 << 34

#: Bytes of a buffer that stay in memory from one use to the next: two messages of the size that the loader aims at.
_KEPT_BYTES = 32 << 20

#: Bytes of a buffer that are reserved where it is a file on a disk.
_RESERVED_BYTES = 1 << 20

#: ``memfd_create``'s flag for a descriptor that ``exec`` closes.
_MFD_CLOEXEC = 1


class SharedBuffers:
    """``count`` buffers in a file without a name. A process to which they are pickled has the same memory.

    Raises:
        OSError: there is no room for them.
    """

    def __init__(self, count: int) -> None:
        try:
            descriptor = _memory_file()
        except OSError as error:
            folder = tempfile.gettempdir()
            _log.warning("no shared memory (%s): loaded rows pass through a file in %s, which is slower", error, folder)
            descriptor = _disk_file(folder, count)
        os.ftruncate(descriptor, count * BUFFER_BYTES)
        self._map(descriptor, count)

    def _map(self, descriptor: int, count: int) -> None:
        self._descriptor = descriptor
        self._memory = mmap.mmap(descriptor, count * BUFFER_BYTES)
        self._memory.madvise(mmap.MADV_DONTDUMP)  # a core dump would look at each page of these addresses
        self._view = memoryview(self._memory)

    def __len__(self) -> int:
        return len(self._memory) // BUFFER_BYTES

    def __getitem__(self, buffer: int) -> memoryview:
        return self._view[buffer * BUFFER_BYTES : (buffer + 1) * BUFFER_BYTES]

    def __reduce__(self) -> tuple[Callable[..., SharedBuffers], tuple[Any, int]]:
        return _attach, (DupFd(self._descriptor), len(self))

    def release(self, buffer: int, end: int) -> None:
        """A buffer that was written up to ``end`` can be used again: gives back what is more than it should keep."""
        if end > _KEPT_BYTES:
            self._memory.madvise(mmap.MADV_REMOVE, buffer * BUFFER_BYTES + _KEPT_BYTES, end - _KEPT_BYTES)

    def close(self) -> None:
        """Close the file. The memory is given back when nothing looks at it any more, here and in other processes."""
        os.close(self._descriptor)


def _attach(descriptor: Any, count: int) -> SharedBuffers:
    buffers = SharedBuffers.__new__(SharedBuffers)
    buffers._map(descriptor.detach(), count)
    return buffers


def _memory_file() -> int:
    """A file in memory. It counts against no file system: a container's 64 MB of ``/dev/shm`` are no limit."""
    # Not ``os.memfd_create``: conda's Python lacks it, as that is built for C libraries older than the function.
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, f"{sys.platform} has no memory files")
    descriptor = int(ctypes.CDLL(None, use_errno=True).memfd_create(b"batch_tokenizer", _MFD_CLOEXEC))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return descriptor


def _disk_file(folder: str, count: int) -> int:
    """A file in which the beginning of each buffer is reserved, so that a full disk is an error here and no SIGBUS.

    Where that is not enough for a row, the loader process gets a SIGBUS, which costs only that row.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            for buffer in range(count):
                os.posix_fallocate(file.fileno(), buffer * BUFFER_BYTES, _RESERVED_BYTES)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: {count * _RESERVED_BYTES >> 20} MB in {folder}") from error
        return os.dup(file.fileno())
