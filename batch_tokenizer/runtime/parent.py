"""Ending with the launcher that started this process. Imports nothing heavy, so that this can be done first of all."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def stop_with_parent() -> None:
    """Under torchrun on Linux: get SIGTERM when the agent dies, even by SIGKILL, which it cannot pass on.

    Without this, ranks of a killed agent would work on beside those of the job that is started in its place.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    # If the agent died before the call, no signal will come.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
