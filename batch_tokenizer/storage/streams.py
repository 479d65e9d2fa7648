"""Tars that can only be read from the front: compressed ones, and what a ``pipe:`` command prints.

``read_member`` reads the member with a number; a process keeps its place in the streams it reads, so that members asked
for in their order cost one reading of the whole, and only going back starts over.
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

from batch_tokenizer.storage.names import PIPE, display_name, is_url
from batch_tokenizer.storage.remote import RemoteFile, StorageError
from batch_tokenizer.storage.tar import ByteStream, Member, TornTar, walk

#: Set to 1 in a process, and so in its children, where ``pipe:`` commands may be run (``--allow_pipe``).
ALLOW_PIPE = "BATCH_TOKENIZER_ALLOW_PIPE"

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def is_compressed(head: bytes) -> bool:
    """Whether a file that begins so is compressed in a way that is read here: by gzip or by zstd."""
    return head.startswith((GZIP_MAGIC, ZSTD_MAGIC))


#: Compression ratio above which a stream is a compression bomb: audio hardly shrinks, and text less than this.
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


#: Compressed bytes that are unpacked at once. One of them can make thousands.
_ZSTD_BYTES = 1 << 13


class _Zstd(io.RawIOBase):
    """What a stream that zstd compressed holds."""

    def __init__(self, source: Any, name: str) -> None:
        """
        Raises:
            StorageError: the library is not installed.
        """
        super().__init__()
        try:
            import zstandard
        except ImportError as error:
            raise StorageError(
                f"{name}: is compressed by zstd: pip install zstandard, or compress it by gzip"
            ) from error
        self._source = source
        self._library: Any = zstandard
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._rest = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while not self._rest:
            if self._frame.eof:  # frames may follow each other
                data = self._frame.unused_data or self._source.read(_ZSTD_BYTES)
                if not data:
                    return b""
                self._frame = self._library.ZstdDecompressor().decompressobj()
            elif not (data := self._source.read(_ZSTD_BYTES)):
                raise EOFError
            try:
                self._rest = self._frame.decompress(data)
            except self._library.ZstdError as error:
                raise zlib.error(str(error)) from error
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def close(self) -> None:
        self._source.close()
        super().close()


class StreamReader:
    """Bytes of a plain or compressed file, object or command's output, from the front; closed by ``close``.

    Raises (from reading):
        StorageError: the rest cannot be read: damaged, cut short, a compression bomb, or removed.
    """

    def __init__(self, location: str) -> None:
        self._name = display_name(location)
        self._produced = 0
        try:
            self._raw = _Counted(_open_raw(location))
            buffered = io.BufferedReader(self._raw, 1 << 20)
            head = buffered.peek(4)[:4]
            self._compressed = is_compressed(head)
            source: Any = buffered
            if head.startswith(ZSTD_MAGIC):
                source = _Zstd(buffered, self._name)
            elif self._compressed:
                source = gzip.GzipFile(fileobj=buffered, mode="rb")
            self._stream = cast(IO[bytes], source)
        except OSError as error:
            raise StorageError(f"{self._name}: cannot be read: {error.strerror or error}") from error

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes, none at the end."""
        try:
            data = self._stream.read(size)
        except EOFError as error:
            raise StorageError(f"{self._name}: it is cut short: its compressed data has no end") from error
        except (zlib.error, gzip.BadGzipFile) as error:
            raise StorageError(f"{self._name}: its compressed data is damaged: {error}") from error
        except OSError as error:
            raise StorageError(f"{self._name}: cannot be read: {error.strerror or error}") from error
        self._produced += len(data)
        if self._compressed and self._produced > max(_RATIO_FREE, _MOST_RATIO * self._raw.count):
            raise StorageError(
                f"{self._name}: a compression bomb, {self._raw.count:,} bytes make over {self._produced:,}"
            )
        if self._produced > MOST_STREAM:
            raise StorageError(f"{self._name}: more than {MOST_STREAM:,} bytes")
        return data

    def close(self) -> None:
        """Close it."""
        self._stream.close()
        self._raw.close()


def _open_raw(location: str) -> Any:
    name = display_name(location)
    if location.startswith(PIPE):
        if os.environ.get(ALLOW_PIPE) != "1":
            raise StorageError(
                f"{name}: would run a shell command, which needs --allow_pipe; a URL (s3://…, https://…) needs none"
            )
        return _Process(location.removeprefix(PIPE))
    if is_url(location):
        return RemoteFile(location)
    if not os.path.isfile(location):
        raise StorageError(f"{name}: {'is not a file' if os.path.exists(location) else 'no such file'}")
    return open(location, "rb", buffering=0)


class _SequentialTar:
    """A tar that is read from the front, and the place to which it was read."""

    def __init__(self, location: str) -> None:
        self.location = location
        self._reader = StreamReader(location)
        self._stream = ByteStream(self._reader.read)
        self._members: Iterator[Member] = walk(self._stream, lambda kind, name: None)
        self.next_number = 0

    def read(self, number: int, most: int) -> bytes:
        while True:
            member = next(self._members, None)
            if member is None:
                raise StorageError(f"{display_name(self.location)}: has no member number {number}: it has changed")
            self.next_number = member.number + 1
            if member.number == number:
                if member.size > most:
                    raise StorageError(f"{display_name(self.location)}: member of {member.size:,} bytes, too large")
                content = self._stream.read(member.size)
                if len(content) < member.size:
                    raise StorageError(f"{display_name(self.location)}: ends within the member: it is cut short")
                return content

    def close(self) -> None:
        self._reader.close()


_open_tars: list[_SequentialTar] = []
_lock = threading.Lock()


def _forget_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    _open_tars.clear()  # a forked child shares its parent's place in a file, and must not move it


os.register_at_fork(after_in_child=_forget_in_child)


def read_member(location: str, number: int, most: int) -> bytes:
    """The content of member ``number`` of the tar at ``location``.

    Args:
        most: bytes that it may have.

    Raises:
        StorageError: it cannot be read.
    """
    with _lock:
        tar = next((tar for tar in _open_tars if tar.location == location), None)
        if tar is not None:
            _open_tars.remove(tar)
            if tar.next_number > number:
                tar.close()
                tar = None
        tar = tar or _SequentialTar(location)
        try:
            content = tar.read(number, most)
        except TornTar as error:
            tar.close()
            raise StorageError(f"{display_name(location)}: {error}") from error
        except BaseException:
            tar.close()
            raise
        _open_tars.append(tar)
        while len(_open_tars) > _OPEN_STREAMS:
            _open_tars.pop(0).close()
        return content
