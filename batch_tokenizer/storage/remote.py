"""Objects behind URLs, through fsspec: their bytes, or one ``StorageError`` that names cause and remedy.

What a network does now and then (5xx, dropped connections, timeouts) is tried again a few times with growing waits;
what will not get better by waiting (no such object, no permission, no backend) is reported at once. Backends raise what
their libraries raise, so the cause is read from the error's type, its HTTP status and its message.
"""

from __future__ import annotations

import io
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec

from batch_tokenizer.storage.names import display_name, scheme_of

log = logging.getLogger(__name__)

#: Seconds to wait before each further try. A loader's row may take ``--row_timeout`` in all.
WAITS = (0.5, 1.5, 4.0)

#: Most bytes that one request asks for.
BLOCK = 64 * 2**20

#: Bytes that a file object reads ahead.
_READ_AHEAD = 5 * 2**20

#: Seconds to connect, and between two packets.
_CONNECT_SECONDS, _SILENCE_SECONDS = 15, 60

#: Schemes that are opened, and the package that reads each. fsspec knows many more, some of which (``reference``,
#: ``filecache``, ``ssh``) would open other addresses or log in on a manifest's behalf.
_PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp",
    "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs", "oss": "ossfs", "hdfs": "pyarrow", "hf": "huggingface_hub",
    "file": "fsspec", "local": "fsspec", "memory": "fsspec",
}  # fmt: skip

Answer = TypeVar("Answer")


class StorageError(Exception):
    """An object cannot be read or written.

    Attributes:
        reason: one line that names the URL, the cause and the remedy.
        transient: waiting longer may help: the store could not be reached, or was not well.
    """

    def __init__(self, reason: str, *, transient: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.transient = transient


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes ``start`` to ``stop`` of an object, fewer where it ends before.

    Raises:
        StorageError: they cannot be read.
    """
    data = _answer(url, start, stop)
    if len(data) > stop - start and start:
        raise StorageError(f"{display_name(url)}: its server does not send parts of a file: download it first")
    return data[: stop - start]


def fetch(url: str) -> Iterator[bytes]:
    """All of an object, in pieces, usually one.

    Raises:
        StorageError: it cannot be read.
    """
    start = 0
    while True:
        data = _answer(url, start, start + BLOCK)
        if start and len(data) > BLOCK:
            raise StorageError(f"{display_name(url)}: its server does not send parts of a file: download it first")
        yield data
        if len(data) != BLOCK:  # the end, or, of a server that knows no parts, all at once
            return
        start += BLOCK


def _answer(url: str, start: int, stop: int) -> bytes:
    """A range of an object; from a server that knows no ranges, all of it."""
    try:
        return bytes(_tried(url, lambda system, path: system.cat_file(path, start=start, end=stop)))
    except StorageError as error:
        # A range that begins at the end or behind it has an answer of its own, instead of no bytes.
        if isinstance(error.__cause__, Exception) and _status(error.__cause__) == 416:
            return b""
        raise


def put(url: str, content: bytes) -> None:
    """Make ``content`` the object, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    _tried(url, lambda system, path: system.pipe_file(path, content))


def exists(url: str) -> bool:
    """Whether there is such an object.

    Raises:
        StorageError: the store does not say.
    """
    return bool(_tried(url, lambda system, path: system.exists(path)))


def remove(url: str) -> None:
    """Remove an object, if it is there.

    Raises:
        StorageError: it cannot be removed.
    """
    if exists(url):
        _tried(url, lambda system, path: system.rm_file(path))


def find(pattern: str) -> list[str]:
    """URLs of the objects that match a pattern with ``*``, ``?`` or ``[…]``, sorted.

    Raises:
        StorageError: the store does not list them.
    """
    return sorted(_tried(pattern, lambda system, path: [system.unstrip_protocol(name) for name in system.glob(path)]))


def list_folder(url: str) -> list[str]:
    """URLs of all objects below ``url``, sorted.

    Raises:
        StorageError: the store does not list them.
    """
    return sorted(_tried(url, lambda system, path: [system.unstrip_protocol(name) for name in system.find(path)]))


def describe(url: str) -> tuple[int | None, str]:
    """An object's size, where the store says, and a text that changes when the object does.

    Raises:
        StorageError: there is no such object, or the store does not say.
    """
    info = _tried(url, lambda system, path: dict(system.info(path)))
    size = info.get("size")
    names = ("ETag", "etag", "LastModified", "last_modified", "mtime", "updated", "md5Hash", "generation")
    return (int(size) if size is not None else None), " ".join(str(info[name]) for name in names if info.get(name))


class RemoteFile(io.RawIOBase):
    """An object read from its beginning to its end through fsspec's read-ahead; a read that fails is tried again."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            StorageError: it cannot be opened.
        """
        super().__init__()
        self._url = url
        self._file = _tried(url, lambda system, path: system.open(path, cache_type="readahead", block_size=_READ_AHEAD))

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes; 0 at the end.

        Raises:
            StorageError: they cannot be read.
        """
        data = _tried(self._url, lambda system, path: self._file.read(len(buffer)))
        memoryview(buffer)[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the connection."""
        self._file.close()
        super().close()


class RangeFile(io.RawIOBase):
    """An object of which any part can be read, each by a request of its own."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            StorageError: there is no such object, or its store does not say how large it is.
        """
        super().__init__()
        size = describe(url)[0]
        if size is None:
            raise StorageError(f"{display_name(url)}: its server does not say how large it is: download it first")
        self._url, self._size, self._place = url, size, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The place of the next byte."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place; returns it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        """The next bytes; 0 at the end.

        Raises:
            StorageError: they cannot be read.
        """
        stop = min(self._place + len(buffer), self._size)
        if stop <= self._place:
            return 0
        data = read_range(self._url, self._place, stop)
        memoryview(buffer)[: len(data)] = data
        self._place += len(data)
        return len(data)


# ------------------------------------------------------------------------------------------------------------- backends


def _tried(url: str, ask: Callable[[Any, str], Answer]) -> Answer:
    system, path = _file_system(url)
    for number in range(len(WAITS) + 1):
        try:
            return ask(system, path)
        except Exception as error:  # types of libraries that may not be installed
            # Waits grow, and differ by chance, so that many processes do not ask again at the same moment.
            lasting = _lasting_cause(error)
            if lasting is not None:
                raise StorageError(f"{display_name(url)}: {lasting}") from error
            if number == len(WAITS):
                raise StorageError(
                    f"{display_name(url)}: {_error_text(error)}, in {number + 1} tries: check the network and the "
                    "address, then start the same command again",
                    transient=True,
                ) from error
            log.info("%s: %s; trying again", display_name(url), _error_text(error))
            time.sleep(WAITS[number] * random.uniform(0.75, 1.25))
    raise AssertionError("not reached")


def _file_system(url: str) -> tuple[Any, str]:
    scheme = scheme_of(url) or ""
    if "::" in url:
        raise StorageError(f"{display_name(url)}: chained URLs are not opened: name the object itself")
    if scheme not in _PACKAGES:
        raise StorageError(f"{display_name(url)}: {scheme}:// addresses are not read, only {', '.join(_PACKAGES)}")
    package = _PACKAGES[scheme]
    try:
        options: dict[str, Any] = {}
        if scheme in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
            # Bytes as they are stored: a compressed answer would not fit the ranges that are asked for.
            options = {"client_kwargs": {"timeout": timeout}, "headers": {"Accept-Encoding": "identity"}}
            if not urlsplit(url).netloc:
                raise ValueError("no host in it")
        for library in ("botocore", "aiobotocore"):  # which log in each process where they found credentials
            logging.getLogger(library).setLevel(logging.WARNING)
        system, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        raise StorageError(f"{display_name(url)}: pip install {package}, which reads {scheme}:// addresses") from error
    except ValueError as error:
        raise StorageError(f"{display_name(url)}: not an address that can be opened: {_error_text(error)}") from error
    return system, path


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error carries, whichever backend raised it; on the way down its causes."""
    seen = 0
    current: BaseException | None = error
    while current is not None and seen < 5:
        # An answer that breaks off has a code in aiohttp too, which is none that the server sent.
        is_aiohttp = type(current).__module__.startswith("aiohttp")
        status = getattr(current, "status", None) or (None if is_aiohttp else getattr(current, "code", None))
        if isinstance(status, int) and 100 <= status < 600:
            return status
        response = getattr(current, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(status, int):
                return status
        current, seen = current.__cause__ or current.__context__, seen + 1
    return None


def _lasting_cause(error: Exception) -> str | None:
    """Why waiting will not help; None where it may."""
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status == 404:
        return "no such file"
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"no permission to use it ({_error_text(error)}): check the credentials"
    if isinstance(error, IsADirectoryError):
        return "is a folder"
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "GoogleAuthError", "ProfileNotFound"):
        return f"no credentials: {_error_text(error)}"
    if status is not None and 400 <= status < 500 and status not in (408, 425, 429):
        return _error_text(error)
    if isinstance(error, (NotImplementedError, ValueError, TypeError)):
        return _error_text(error)
    return None


def _error_text(error: BaseException) -> str:
    """The error on one line, without the credentials in the addresses that it quotes."""
    status = _status(error)
    text = re.sub(r"\?[^\s'\"]+|(?<=://)[^\s'\"/]*@", "", " ".join(str(error).split()))
    if status is not None and status not in (200, 206) and str(status) not in text:
        text = f"{text} (HTTP {status})"
    if len(text) > 200:
        text = text[:200] + "…"
    return text or type(error).__name__
