"""Files, objects behind URLs and members of tars, each opened as a binary file object that can seek.

A plain file is opened directly, if it is a regular one (a pipe would hang). Everything else is read first: into memory,
or, above ``_IN_MEMORY`` bytes, into a temporary file. The latest large content is cached, as the parts of a
long recording are asked for one after the other.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import BinaryIO, cast

from batch_tokenizer.records import RowError
from batch_tokenizer.storage.names import PIPE, StreamedMember, TarMember, display_name, is_url, parse_member, scheme_of
from batch_tokenizer.storage.remote import BLOCK, StorageError, fetch, read_range
from batch_tokenizer.storage.streams import StreamReader, read_member
from batch_tokenizer.storage.tar import HEADER, is_member_header

_IN_MEMORY = 64 * 2**20

#: Smaller contents are not cached: they are hardly ever asked for twice, and there are very many.
MIN_CACHED_BYTES = 2**20

#: Tars that a thread keeps open.
_OPEN_ARCHIVES = 8

#: Most bytes of a member or object: forty hours of CD audio.
MOST_BYTES = 1 << 34


@contextmanager
def open_file(location: str, what: str = "an audio file") -> Iterator[tuple[BinaryIO, int]]:
    """A file object at its beginning, and its size in bytes, which is not 0.

    Args:
        what: it should be, for the message if it is a folder.

    Raises:
        RowError: it cannot be read; the reason names it and the cause.
    """
    name = display_name(location)
    try:
        file = _open(location, name, what)
    except StorageError as error:
        raise RowError("load", error.reason) from error
    except OSError as error:
        raise RowError("load", f"{name}: cannot be fetched: {error.strerror or error}") from error
    with file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            raise RowError("load", f"{name}: is empty (0 bytes)")
        file.seek(0)
        yield file, size


def read_at(file: BinaryIO, offset: int, count: int) -> bytes:
    """``count`` bytes from a place, fewer where the file ends. The file's position stays as it was."""
    place = file.tell()
    file.seek(offset)
    data = file.read(count)
    file.seek(place)
    return data


def _open(location: str, name: str, what: str) -> BinaryIO:
    member = parse_member(location)
    if location.startswith(PIPE):
        return _cache.open(location) or _cache.keep(location, _read_stream(location), name)
    if member is None and not is_url(location):
        return _open_plain(location, name, what)
    if member is None and scheme_of(location) in ("file", "local"):
        return _open_plain(location.split("://", 1)[1], name, what)
    cached = _cache.open(location)
    if cached is not None:
        return cached
    return _cache.keep(location, fetch(location) if member is None else _read_member(member), name)


def _open_plain(path: str, name: str, what: str) -> BinaryIO:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise RowError("load", f"{name}: is a folder, not {what}")
        if not stat.S_ISREG(mode):
            raise RowError("load", f"{name}: is a pipe, device or socket, not a regular file")
        # Without a buffer: decoders read from the descriptor itself, and have buffers of their own.
        return cast(BinaryIO, open(path, "rb", buffering=0))
    except FileNotFoundError as error:
        raise RowError("load", f"{name}: no such file") from error
    except PermissionError as error:
        raise RowError("load", f"{name}: no permission to read it") from error
    except OSError as error:
        raise RowError("load", f"{name}: cannot be opened: {error.strerror}") from error
    except ValueError as error:
        # A NUL character, or a lone surrogate out of a JSON escape.
        raise RowError("load", f"{name}: not a possible path: {error}") from error


class _ContentCache:
    """The latest large content that was fetched: bytes, or the descriptor of a temporary file."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._location = ""
        self._content: bytes | int = b""
        # Another thread of the parent may hold the lock for ever.
        os.register_at_fork(after_in_child=lambda: setattr(self, "_lock", threading.Lock()))

    def open(self, location: str) -> BinaryIO | None:
        """A file object of its own over the content; None if it is not cached."""
        with self._lock:
            if not self._content or self._location != location:
                return None
            if isinstance(self._content, bytes):
                return io.BytesIO(self._content)  # shares the bytes
            try:
                return cast(BinaryIO, open(f"/proc/self/fd/{self._content}", "rb", buffering=0))
            except OSError:  # another system than Linux
                return None

    def keep(self, location: str, pieces: Iterator[bytes], name: str) -> BinaryIO:
        """A file object over the pieces put together, which are cached if they are large.

        Raises:
            StorageError: they are too many.
        """
        # A single small piece, the usual case, stays in memory; with a second one it is more than a block: to a file.
        first = next(pieces, b"")
        second = next(pieces, None)
        if second is None and len(first) <= _IN_MEMORY:
            if len(first) >= MIN_CACHED_BYTES:
                self._replace(location, first)
            return io.BytesIO(first)
        file = cast(BinaryIO, tempfile.TemporaryFile(prefix="batch_tokenizer-", buffering=0))  # noqa: SIM115
        try:
            for piece in chain((first, second or b""), pieces):
                rest = memoryview(piece)
                while rest:
                    rest = rest[file.write(rest) :]
                if file.tell() > MOST_BYTES:
                    raise StorageError(f"{name}: more than {MOST_BYTES:,} bytes")
            self._replace(location, os.dup(file.fileno()))
        except BaseException:
            file.close()
            raise
        return file

    def _replace(self, location: str, content: bytes | int) -> None:
        with self._lock:
            if not isinstance(self._content, bytes):
                os.close(self._content)
            self._location, self._content = location, content


_cache = _ContentCache()


def _read_stream(location: str) -> Iterator[bytes]:
    """What a command prints, in pieces.

    Raises:
        StorageError: commands may not be run, or it fails.
    """
    with contextlib.closing(StreamReader(location)) as reader:
        while piece := reader.read(BLOCK):
            yield piece


def _read_member(member: TarMember | StreamedMember) -> Iterator[bytes]:
    """A member's bytes, in pieces, usually one.

    Raises:
        StorageError: the archive does not have it, or not any more.
    """
    if isinstance(member, StreamedMember):
        yield read_member(member.archive, member.number, MOST_BYTES)
        return
    name, archive = display_name(member.name), display_name(member.archive)
    if member.size > MOST_BYTES:
        raise StorageError(f"{name}: {member.size:,} bytes, too large for a member")
    begin, stop = member.offset - HEADER, member.offset + member.size
    while begin < stop:
        data = read_bytes(member.archive, begin, min(begin + BLOCK, stop))
        if begin < member.offset:
            # The header is read with the content, to see that the archive is still the one that was listed.
            if not is_member_header(data[:HEADER], member.size):
                raise StorageError(f"{name}: {archive} has something else there: it has changed")
            data, begin = data[HEADER:], member.offset
        if not data and begin < stop:
            raise StorageError(f"{name}: {archive} is cut short")
        yield data
        begin += len(data)


class _Archive:
    """A local file that stays open."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        name = display_name(path)
        try:
            if not os.path.isfile(path):
                raise StorageError(f"{name}: {'is not a file' if os.path.exists(path) else 'no such file'}")
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise StorageError(f"{name}: cannot be opened: {error}") from error

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


#: Each thread's archives by path, the latest last. An opening may cost more than a member's bytes do.
_archives = threading.local()


def close_archives() -> None:
    """Closes what ``read_bytes`` keeps open in this thread, so that files that were replaced are read anew."""
    _archives.__dict__.pop("latest", None)


def read_bytes(path: str, begin: int, stop: int) -> bytes:
    """Bytes of a file or object that has many rows, by their places in it; fewer where it ends. Local files stay open.

    Raises:
        StorageError: they cannot be read.
    """
    if path.startswith(PIPE):
        raise StorageError(f"{display_name(path)}: a command's output has no places")
    if is_url(path):
        return read_range(path, begin, stop)
    latest: dict[str, _Archive] = _archives.__dict__.setdefault("latest", {})
    archive = latest.pop(path, None) or _Archive(path)
    latest[path] = archive
    if len(latest) > _OPEN_ARCHIVES:
        latest.pop(next(iter(latest)))
    return os.pread(archive.descriptor, stop - begin, begin)
