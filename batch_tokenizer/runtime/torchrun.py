"""torchrun with a clean end: a job that is stopped by signal n ends with status 128 + n, and none with a traceback.

    python -m batch_tokenizer.runtime.torchrun --nproc_per_node=8 -m batch_tokenizer --data_list data.jsonl

Arguments are torchrun's own. SIGUSR1, Slurm's warning before a time limit, is passed on to the ranks as well.
"""

from __future__ import annotations

import sys
from signal import Signals

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

_HANDLED = "--signals_to_handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def main() -> int:
    """Runs torchrun with the command line's arguments; returns the exit status."""
    try:
        torchrun([_HANDLED, *sys.argv[1:]])
    except SignalException as stopped:
        name = Signals(stopped.sigval).name
        print(f"torchrun: stopped by {name}; start the same command again to go on", file=sys.stderr)
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        print(failed, file=sys.stderr)  # a table of the ranks that failed, and why
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
