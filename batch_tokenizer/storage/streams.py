"""Tars that can only be read from the front: compressed ones, and what a ``pipe:`` command prints.

``open_stream`` gives a tape over one. ``read_member`` reads the member with a number; a process keeps its place in the
streams it reads, so that members asked for in their order cost one reading of the whole, and only going back starts
over.
"""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import threading
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

from batch_tokenizer.storage.names import PIPE, is_url, spoken
from batch_tokenizer.storage.remote import RemoteFile, StorageError
from batch_tokenizer.storage.tar import Member, StreamTape, TornTar, walk

#: Set to 1 in a process, and so in its children, where ``pipe:`` commands may be run (``--allow_pipe``).
ALLOW_PIPE = "BATCH_TOKENIZER_ALLOW_PIPE"

GZIP_MAGIC = b"\x1f\x8b"

#: Audio hardly shrinks, and text not more than this. Beyond it a stream is a bomb, or zeros that nobody meant.
_MOST_RATIO = 100
#: Bytes that any stream may have before its ratio counts.
_RATIO_FREE = 64 * 2**20
#: Bytes that a stream may have at most.
MOST_STREAM = 1 << 42

#: Streams that a process keeps open.
_OPEN_STREAMS = 2


class _Counted(io.RawIOBase):
    """Passes reads on and counts the bytes."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self._source = source
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._source.readinto(buffer) or 0
        self.count += count
        return count

    def close(self) -> None:
        self._source.close()
        super().close()


class _Process(io.RawIOBase):
    """What a shell command prints. Its failure shows when its output ends."""

    def __init__(self, command: str) -> None:
        super().__init__()
        self._command = command
        self._owner = os.getpid()
        self._process = subprocess.Popen(command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        assert self._process.stdout is not None
        data = self._process.stdout.read1(len(buffer))  # type: ignore[attr-defined]
        buffer[: len(data)] = data
        if not data and len(buffer) and (status := self._process.wait()):
            raise StorageError(f"{PIPE}{self._command}: ended with status {status}")
        return len(data)

    def close(self) -> None:
        if not self.closed and self._process.stdout is not None:
            self._process.stdout.close()
            if self._owner == os.getpid():  # and not its forked child, which only forgets
                if self._process.poll() is None:
                    self._process.kill()
                self._process.wait()
        super().close()


class StreamReader:
    """Bytes of a plain or compressed file, object or command's output, from the front; closed by ``close``.

    Raises (from reading):
        StorageError: it cannot be read on: damaged, cut short, a bomb, or gone.
    """

    def __init__(self, location: str) -> None:
        self._location = location
        self._produced = 0
        try:
            self._raw = _Counted(_open_raw(location))
            buffered = io.BufferedReader(self._raw, 1 << 20)
            self._compressed = buffered.peek(2)[:2] == GZIP_MAGIC
            source: Any = gzip.GzipFile(fileobj=buffered, mode="rb") if self._compressed else buffered
            self._stream = cast(IO[bytes], source)
        except OSError as error:
            raise StorageError(f"{spoken(location)}: cannot be read: {error.strerror or error}") from error

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes, none at the end."""
        try:
            data = self._stream.read(size)
        except EOFError as error:
            raise StorageError(f"{spoken(self._location)}: it is cut short: its compressed data has no end") from error
        except (zlib.error, gzip.BadGzipFile) as error:
            raise StorageError(f"{spoken(self._location)}: its compressed data is damaged: {error}") from error
        except OSError as error:
            raise StorageError(f"{spoken(self._location)}: cannot be read: {error.strerror or error}") from error
        self._produced += len(data)
        if self._compressed and self._produced > max(_RATIO_FREE, _MOST_RATIO * self._raw.count):
            raise StorageError(
                f"{spoken(self._location)}: a compression bomb, {self._raw.count:,} bytes make over {self._produced:,}"
            )
        if self._produced > MOST_STREAM:
            raise StorageError(f"{spoken(self._location)}: more than {MOST_STREAM:,} bytes")
        return data

    def close(self) -> None:
        """Let go of it."""
        self._stream.close()
        self._raw.close()


def _open_raw(location: str) -> Any:
    if location.startswith(PIPE):
        if os.environ.get(ALLOW_PIPE) != "1":
            raise StorageError(
                f"{spoken(location)}: would run a shell command, which needs --allow_pipe; "
                "a URL (s3://…, https://…) needs none"
            )
        return _Process(location.removeprefix(PIPE))
    if is_url(location):
        return RemoteFile(location)
    if not os.path.isfile(location):
        raise StorageError(f"{spoken(location)}: {'is not a file' if os.path.exists(location) else 'no such file'}")
    return open(location, "rb", buffering=0)


class _Reel:
    """A stream with the place to which it was read."""

    def __init__(self, location: str) -> None:
        self.location = location
        self._reader = StreamReader(location)
        self._tape = StreamTape(self._reader.read)
        self._members: Iterator[Member] = walk(self._tape, lambda kind, name: None)
        self.next_number = 0

    def read(self, number: int, most: int) -> bytes:
        while True:
            member = next(self._members, None)
            if member is None:
                raise StorageError(f"{spoken(self.location)}: has no member number {number}: it has changed")
            self.next_number = member.number + 1
            if member.number == number:
                if member.size > most:
                    raise StorageError(f"{spoken(self.location)}: member of {member.size:,} bytes, too large")
                content = self._tape.read(member.size)
                if len(content) < member.size:
                    raise StorageError(f"{spoken(self.location)}: ends within the member: it is cut short")
                return content

    def close(self) -> None:
        self._reader.close()


_reels: list[_Reel] = []
_lock = threading.Lock()


def _forget_reels() -> None:
    global _lock
    _lock = threading.Lock()
    _reels.clear()  # a forked child shares its parent's place in a file, and must not move it


os.register_at_fork(after_in_child=_forget_reels)


def read_member(location: str, number: int, most: int) -> bytes:
    """The content of member ``number`` of the tar at ``location``.

    Args:
        most: bytes that it may have.

    Raises:
        StorageError: it cannot be had.
    """
    with _lock:
        reel = next((reel for reel in _reels if reel.location == location), None)
        if reel is not None:
            _reels.remove(reel)
            if reel.next_number > number:
                reel.close()
                reel = None
        reel = reel or _Reel(location)
        try:
            content = reel.read(number, most)
        except TornTar as error:
            reel.close()
            raise StorageError(f"{spoken(location)}: {error}") from error
        except BaseException:
            reel.close()
            raise
        _reels.append(reel)
        while len(_reels) > _OPEN_STREAMS:
            _reels.pop(0).close()
        return content
