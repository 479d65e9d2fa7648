"""``publish``: an output file appears whole at its path, or a ``RowError`` says why not.

The bytes are written beside their place and renamed into it, so that a reader sees the old file, none, or the new one.
The name they are written under depends on the path alone: a file that a killed run left is removed when its row is
done again, and no stray file stays. The claiming of rows sees to one writer per path, except where a process outlives
its job for some seconds and the job that replaced it does the same row. So a writer renames a file only if it is its
own, and starts over if another one took the name. Files are not synced to the disk one by one: that outlives a
process's death, as promised, but not the machine's.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat

from batch_tokenizer.records import RowError
from batch_tokenizer.storage.names import is_url
from batch_tokenizer.storage.remote import StorageError, put

_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the file system or the limit on file sizes allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EISDIR: "it is a folder",
    errno.ENOTDIR: "a part of its path is not a folder",
    errno.EEXIST: "a part of its path is not a folder",
    errno.ENAMETOOLONG: "its name is too long",
    errno.ELOOP: "a link on its path points back to itself",
    errno.EMFILE: "too many open files; raise the limit (ulimit -n)",
    errno.EIO: "input/output error",
}


def publish(path: str, content: bytes | memoryview) -> None:
    """Make ``content`` the file at ``path``, with the folders above it.

    A URL (s3://…) is put as a whole object. A file that is there is replaced. So is a symbolic link to a file, not what
    it points to. A folder, pipe or device, or a link to one, is left alone.

    Raises:
        RowError: in stage ``write``, naming the path and the cause. The file at ``path`` is then as it was.
    """
    if is_url(path):
        _put(path, content)
        return
    try:
        folder, name = os.path.split(path)
        aside = os.path.join(folder, _temporary_name(name))
        if name in ("", ".", ".."):
            raise IsADirectoryError(errno.EISDIR, "names a folder")
        _refuse_special(path)
        while not _write_and_rename(aside, path, content):
            pass
    except OSError as error:
        cause = _CAUSES.get(error.errno or 0, error.strerror)
        raise RowError("write", f"{path}: cannot be written: {cause}") from error
    except ValueError as error:  # a zero byte, or half of a surrogate pair
        raise RowError("write", f"{path!r}: no file can have this name: {error}") from error


def _temporary_name(name: str) -> str:
    """The name that a file is written under before it is published as ``name``."""
    return f".{hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()}.part"


def is_temporary(name: str) -> bool:
    """Whether a file has such a name, which remains only after a kill."""
    return re.fullmatch(r"\.[0-9a-f]{16}\.part", name) is not None


def _put(url: str, content: bytes | memoryview) -> None:
    try:
        put(url, bytes(content))
    except StorageError as error:
        # A store that does not answer is to the run what a broken disk is: no row's fault, and it stops.
        cause = OSError(errno.EIO, error.reason) if error.transient else error
        raise RowError("write", error.reason) from cause


def _refuse_special(path: str) -> None:
    """Renaming would put a file in the place of /dev/null, if the user may."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a pipe, socket or device, not a file")


def _write_and_rename(aside: str, path: str, content: bytes | memoryview) -> bool:
    """False if another writer of the same path took the file away in the meantime."""
    # 1. Write the whole content under the temporary name.
    descriptor = _create(aside)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        # On a network file system a full disk may show only at a closing. The file itself stays open, so that no other
        # file can get its number.
        os.close(os.dup(descriptor))
        # 2. Rename it, unless another writer has replaced the file under that name.
        try:
            if not os.path.samestat(os.stat(aside), os.fstat(descriptor)):
                return False
            os.replace(aside, path)
        except FileNotFoundError:
            return False
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        raise
    finally:
        os.close(descriptor)
    return True


def _create(path: str) -> int:
    """A new file, in the place of one that a killed run left."""
    while True:
        try:
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
