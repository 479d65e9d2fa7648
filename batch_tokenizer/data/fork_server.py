"""Imported by ``multiprocessing``'s fork server before it forks the first loader process; nothing else imports this.

The server's own errors become one line. There is one in practice: no process can be forked, as the limit is reached.
"""

from __future__ import annotations

import sys
from types import TracebackType


def _print_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, (FileNotFoundError, ConnectionError)):
        return  # the rank has ended, and with it the socket's folder; the rank's own last line says why
    print(f"batch_tokenizer: loader processes' fork server: {error or kind.__name__}", file=sys.stderr)


sys.excepthook = _print_one_line
