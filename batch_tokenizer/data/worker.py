"""The other side of ``Loader``: a small fork server, and the loader processes that it forks.

The server is a fresh interpreter that imports, once, whatever the load function needs, and then forks a process for
each request, in milliseconds and sharing its memory pages. It has no threads and no CUDA context, which a fork of the
computing process would tear. It outlives no parent: at the end of file on its control connection it kills its children
and leaves, and the kernel kills them if it is killed itself.

``multiprocessing``'s fork server was not used for three reasons. It imports the caller's main module into every process
(``torchrun``'s entry script, or a script without a main guard). It dies of a signal that is sent to a whole job step
(Slurm's SIGTERM and SIGUSR1), taking the loader down while the parent still finishes its work. And with it gone, a
killed process is reported as status 255, so nobody learns that it was the out-of-memory killer.

Control connection, parent to server:  ("start", number) then a socket · ("kill", number)
                    server to parent:  ("ready",) · ("refused", text) · ("unforked", number, text)
                                       ("exited", number, status), status as ``os.waitstatus_to_exitcode`` gives it
Worker's socket,    parent to worker:  pickled ``ManifestRow`` after pickled ``ManifestRow``
                    worker to parent:  messages as ``pack`` makes them: first None, then one per row in order
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from batch_tokenizer.records import LoadedRow, ManifestRow, Pieces, RowError, RowFailure, Stage

#: Signals that a launcher sends to every process of a job. Only the computing process answers them; it ends the loader.
JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

#: Bytes of a message's body, of its features and of its codes, which follow in this order.
HEAD = struct.Struct("<QQQ")

_PR_SET_PDEATHSIG = 1


class Loaded(NamedTuple):
    """A ``LoadedRow`` on its way to the parent, which has the row itself already."""

    features: npt.NDArray[np.float32] | None
    codes: npt.NDArray[np.uint16] | None
    num_samples: int
    frames: int
    load_seconds: float
    pieces: Pieces | None


class Failed(NamedTuple):
    """A row that could not be loaded. ``bug`` is the traceback if the fault is the program's own, else None."""

    stage: Stage
    reason: str
    bug: str | None = None


def pack(content: Loaded | Failed | None) -> list[memoryview]:
    """``content`` as a message: parts to be sent one after the other. Arrays are not copied.

    What describes the arrays is pickled without numpy's help, which would take longer than all the rest.
    """
    arrays = content[:2] if isinstance(content, Loaded) else (None, None)
    forms = [None if array is None else (array.dtype.str, array.shape) for array in arrays]
    rest = content[2:] if isinstance(content, Loaded) else content
    body = pickle.dumps((isinstance(content, Loaded), forms, rest), protocol=5)
    raw = [memoryview(b"") if array is None else _raw(array) for array in arrays]
    return [memoryview(HEAD.pack(len(body), *map(len, raw))), memoryview(body), *raw]


def unpack(body: bytearray, arrays: Sequence[npt.NDArray[np.uint8]]) -> Loaded | Failed | None:
    """What was packed, with arrays in the memory of ``arrays``, which has the bytes of features and codes."""
    is_loaded, forms, rest = pickle.loads(body)
    if not is_loaded:
        return rest
    features, codes = (
        None if form is None else array.view(form[0]).reshape(form[1])
        for form, array in zip(forms, arrays, strict=True)
    )
    return Loaded(features, codes, *rest)


def _raw(array: npt.NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def without(parts: Sequence[memoryview], count: int) -> list[memoryview]:
    """``parts`` less their first ``count`` bytes, and less empty ones."""
    left = []
    for part in parts:
        if count < len(part):
            left.append(part[count:] if count else part)
        count = max(0, count - len(part))
    return left


def send(connection: socket.socket, parts: Sequence[memoryview]) -> None:
    """Send all of ``parts``; waits for the other side."""
    while parts := without(parts, connection.sendmsg(parts)):
        pass


def attempt(load: Callable[[ManifestRow], LoadedRow], row: ManifestRow) -> Loaded | Failed:
    """Load one row; whatever goes wrong becomes that row's failure, also a bug of ours, as a million others wait."""
    try:
        loaded = load(row)
    except RowError as error:
        return Failed(error.stage, error.reason)
    except MemoryError:
        return Failed("load", "not enough memory to load this row; lower --num_workers or give the job more memory")
    except OSError as error:
        return Failed("load", str(error) or type(error).__name__)
    except Exception as error:  # noqa: BLE001 - reported as a bug with its traceback, by the process that has the log
        return Failed("load", f"internal error: {type(error).__name__}: {error}", traceback.format_exc())
    return Loaded(loaded.features, loaded.codes, loaded.num_samples, loaded.frames, loaded.load_seconds, loaded.pieces)


def outcome(row: ManifestRow, result: Loaded | Failed) -> LoadedRow | RowFailure:
    """The record that ``attempt``'s result stands for."""
    if isinstance(result, Loaded):
        return LoadedRow(row, *result)
    return RowFailure.of(row, result.stage, result.reason)


def die_with_parent(parent: int) -> None:
    """Have the kernel (Linux's only) kill this process when process ``parent``, which forked it, ends."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)


def work(load: Callable[[ManifestRow], LoadedRow], connection: socket.socket) -> None:
    """A loader process: rows in, one message a row out, until the parent closes its end."""
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)  # as many processes as there are cores already
    rows = connection.makefile("rb", buffering=1 << 16)
    send(connection, pack(None))
    while True:
        try:
            row: ManifestRow = pickle.load(rows)
        except EOFError:
            return
        send(connection, pack(attempt(load, row)))


class ForkServer:
    """Forks loader processes on request and reports their ends. Single-threaded; lives in its own interpreter."""

    def __init__(self, control: Connection) -> None:
        self._control = control
        self._process = os.getpid()
        self._children: dict[int, int] = {}  # process id -> the parent's number for it

    def run(self) -> None:
        """Serve until the parent closes the control connection or dies."""
        try:
            load: Callable[[ManifestRow], LoadedRow] = pickle.loads(self._control.recv_bytes())
        except Exception:  # noqa: BLE001 - any import may fail in any way; the parent raises it
            self._control.send(("refused", traceback.format_exc()))
            return
        gc.collect()
        gc.freeze()  # children that collect garbage would otherwise copy every page of the modules' objects
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self._control.send(("ready",))
        while True:
            readable, _, _ = select.select([self._control.fileno(), wake_read], [], [])
            if wake_read in readable:
                os.read(wake_read, 4096)
                self._reap()
            if self._control.fileno() in readable:
                try:
                    request, number = self._control.recv()
                except (EOFError, ConnectionResetError):
                    break
                if request == "start":
                    self._start(number, load, (wake_read, wake_write))
                else:
                    self._kill(number)
        for number in list(self._children.values()):
            self._kill(number)

    def _start(self, number: int, load: Callable[[ManifestRow], LoadedRow], unneeded: tuple[int, ...]) -> None:
        handle = recv_handle(self._control)
        try:
            child = os.fork()
        except OSError as error:
            os.close(handle)
            self._control.send(("unforked", number, error.strerror))
            return
        if child:
            os.close(handle)
            self._children[child] = number
            return
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._become_worker(load, handle, unneeded)

    def _become_worker(
        self, load: Callable[[ManifestRow], LoadedRow], handle: int, unneeded: tuple[int, ...]
    ) -> NoReturn:
        status = 0
        try:
            die_with_parent(self._process)
            self._control.close()
            for descriptor in unneeded:
                os.close(descriptor)
            work(load, socket.socket(fileno=handle))
        except (BrokenPipeError, ConnectionResetError):
            pass  # the parent is gone or has given this process up
        except BaseException:  # noqa: BLE001 - the server's own stack must not be unwound in a child
            traceback.print_exc()
            status = 1
        os._exit(status)

    def _reap(self) -> None:
        while self._children:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                return
            number = self._children.pop(child)
            self._control.send(("exited", number, os.waitstatus_to_exitcode(status)))

    def _kill(self, number: int) -> None:
        """SIGKILL; safe, because a process that has not been waited for keeps its process id."""
        for child, its_number in self._children.items():
            if its_number == number:
                os.kill(child, signal.SIGKILL)


def main(descriptor: int) -> None:
    """Entry of the server's interpreter; ``descriptor`` is its end of the control connection."""
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the parent ended while this one was speaking
        ForkServer(Connection(descriptor)).run()
    sys.stderr.flush()
    os._exit(0)  # taking torch's modules down would take half a second
