"""``opened``: any location enters, a descriptor that can be read at any place leaves, or one ``RowError``.

A plain file is opened as it stands, after a look at what it is (a pipe would hang). Everything else is brought here
first: into memory that looks like a file, or, above ``_IN_MEMORY`` bytes, into a file without a name. The latest large
one is kept, as the parts of a long recording are asked for one after the other. Small ones share one piece of memory,
one after the other, as making it and letting it go costs more than filling it.
"""

from __future__ import annotations

import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

from batch_tokenizer.records import RowError
from batch_tokenizer.storage.names import PIPE, StreamedMember, TarMember, is_url, parse_member, scheme_of, spoken
from batch_tokenizer.storage.remote import BLOCK, StorageError, fetch, read_range
from batch_tokenizer.storage.streams import read_member
from batch_tokenizer.storage.tar import HEADER, is_member_header

_IN_MEMORY = 64 * 2**20

#: Smaller contents are not kept, but their memory is: they are hardly ever asked for twice, and there are very many.
_WORTH_KEEPING = 2**20

#: Tars that a thread keeps open.
_OPEN_ARCHIVES = 8

#: Most bytes of a member or object: forty hours of CD audio.
MOST_BYTES = 1 << 34


@contextmanager
def opened(location: str, what: str = "an audio file") -> Iterator[tuple[int, int]]:
    """A descriptor and the size in bytes of something that is not empty.

    Args:
        what: it should be, for the message if it is a folder.

    Raises:
        RowError: it cannot be read; the reason names it and the cause.
    """
    name = spoken(location)
    member = parse_member(location)
    if member is None and scheme_of(location) in ("file", "local"):
        location = location.split("://", 1)[1]
    memory: _Memory | None = None
    if member is None and not is_url(location):
        descriptor = _open_file(location, name, what)
    else:
        try:
            descriptor = _kept.reopen(location)
            if descriptor < 0:
                pieces = _fetch(location) if member is None else _fetch_member(member)
                first, second = next(pieces, b""), next(pieces, None)
                if second is None and len(first) < _WORTH_KEEPING and _HAS_MEMORY:
                    memory = _Memory.of(first)
                    descriptor = memory.descriptor
                else:
                    descriptor = _gather(chain((first,), () if second is None else (second,), pieces), name)
                    _kept.offer(location, descriptor)
        except StorageError as error:
            raise RowError("load", error.reason) from error
        except OSError as error:
            raise RowError("load", f"{name}: cannot be brought here: {error.strerror or error}") from error
    try:
        size = os.fstat(descriptor).st_size
        if size == 0:
            raise RowError("load", f"{name}: is empty (0 bytes)")
        yield descriptor, size
    finally:
        if memory is None:
            os.close(descriptor)
        else:
            memory.give_back()


class _Kept:
    """The latest large content that was brought here, for whoever asks for it next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._location = ""
        self._descriptor = -1
        os.register_at_fork(after_in_child=self._forget_lock)

    def _forget_lock(self) -> None:
        self._lock = threading.Lock()  # which another thread of the parent may hold for ever

    def offer(self, location: str, descriptor: int) -> None:
        """Keep it, instead of the one before."""
        if os.fstat(descriptor).st_size < _WORTH_KEEPING:
            return
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._location, self._descriptor = location, os.dup(descriptor)

    def reopen(self, location: str) -> int:
        """A descriptor with a place of its own in the content; -1 if it is not here."""
        with self._lock:
            if self._descriptor < 0 or self._location != location:
                return -1
            try:
                return os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:  # another system than Linux
                return -1


_kept = _Kept()

_HAS_MEMORY = hasattr(os, "memfd_create")


class _Memory:
    """A small content in memory that looks like a file. Whoever has it is the only one, until it gives it back."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._size = 0
        self.descriptor = -1
        self.descriptor = os.memfd_create("batch_tokenizer", os.MFD_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    @classmethod
    def of(cls, content: bytes) -> _Memory:
        """The thread's memory, or new one if that is taken, with this content and at its beginning."""
        memory: _Memory | None = _idle.__dict__.pop("memory", None)
        if memory is None or memory._process != os.getpid():  # a child would share its parent's
            memory = cls()
        memory._fill(content)
        return memory

    def _fill(self, content: bytes) -> None:
        if len(content) < self._size:
            os.ftruncate(self.descriptor, len(content))
        rest = memoryview(content)
        while rest:
            rest = rest[os.pwrite(self.descriptor, rest, len(content) - len(rest)) :]
        os.lseek(self.descriptor, 0, os.SEEK_SET)
        self._size = len(content)

    def give_back(self) -> None:
        """For the thread's next content."""
        _idle.memory = self


#: Each thread's memory that nobody reads.
_idle = threading.local()


def _open_file(path: str, name: str, what: str) -> int:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise RowError("load", f"{name}: is a folder, not {what}")
        if not stat.S_ISREG(mode):
            raise RowError("load", f"{name}: is a pipe, device or socket, not a regular file")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise RowError("load", f"{name}: no such file") from error
    except PermissionError as error:
        raise RowError("load", f"{name}: no permission to read it") from error
    except OSError as error:
        raise RowError("load", f"{name}: cannot be opened: {error.strerror}") from error
    except ValueError as error:
        # A NUL character, or a lone surrogate out of a JSON escape.
        raise RowError("load", f"{name}: not a possible path: {error}") from error


def _fetch(location: str) -> Iterator[bytes]:
    """The bytes of a URL, or of the audio in a row of a parquet file."""
    from batch_tokenizer.storage.parquet_rows import parse_row_location, read_audio  # which opens files with ``opened``

    row = parse_row_location(location)
    return fetch(location) if row is None else iter((read_audio(*row),))


def _fetch_member(member: TarMember | StreamedMember) -> Iterator[bytes]:
    """A member's bytes, in pieces.

    Raises:
        StorageError: the archive does not have it, or not any more.
    """
    if isinstance(member, StreamedMember):
        yield read_member(member.archive, member.number, MOST_BYTES)
        return
    if member.size > MOST_BYTES:
        raise StorageError(f"{spoken(member.name)}: {member.size:,} bytes, too large for a member")
    begin, stop = member.offset - HEADER, member.offset + member.size
    while begin < stop:
        data = _read_archive(member.archive, begin, min(begin + BLOCK, stop))
        if begin < member.offset:
            if not is_member_header(data[:HEADER], member.size):
                raise StorageError(
                    f"{spoken(member.name)}: {spoken(member.archive)} has something else there: it has changed"
                )
            data, begin = data[HEADER:], member.offset
        if not data and begin < stop:
            raise StorageError(f"{spoken(member.name)}: {spoken(member.archive)} is cut short")
        yield data
        begin += len(data)


class _Archive:
    """A local tar that stays open."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        try:
            if not os.path.isfile(path):
                raise StorageError(f"{spoken(path)}: {'is not a file' if os.path.exists(path) else 'no such file'}")
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise StorageError(f"{spoken(path)}: cannot be opened: {error}") from error

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


#: Each thread's archives by path, the latest last. An opening may cost more than a member's bytes do.
_archives = threading.local()


def _read_archive(path: str, begin: int, stop: int) -> bytes:
    """Bytes of a tar, by their places in it.

    Raises:
        StorageError: they cannot be had.
    """
    if path.startswith(PIPE):
        raise StorageError(f"{spoken(path)}: a command's output has no places")
    if is_url(path):
        return read_range(path, begin, stop)
    latest: dict[str, _Archive] = _archives.__dict__.setdefault("latest", {})
    archive = latest.pop(path, None) or _Archive(path)
    latest[path] = archive
    if len(latest) > _OPEN_ARCHIVES:
        latest.pop(next(iter(latest)))
    return os.pread(archive.descriptor, stop - begin, begin)


def _gather(pieces: Iterator[bytes], name: str) -> int:
    """A descriptor of the pieces, put together.

    Raises:
        StorageError: they are too many.
    """
    first = next(pieces, b"")
    if len(first) < _IN_MEMORY and _HAS_MEMORY:
        descriptor = os.memfd_create("batch_tokenizer", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile(prefix="batch_tokenizer-") as file:
            descriptor = os.dup(file.fileno())
    try:
        total = 0
        piece: bytes | None = first
        while piece is not None:
            total += len(piece)
            if total > MOST_BYTES:
                raise StorageError(f"{name}: more than {MOST_BYTES:,} bytes")
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            piece = next(pieces, None)
        os.lseek(descriptor, 0, os.SEEK_SET)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
