"""``RowCounter``: how many rows a command has worked through. A terminal has a moving bar, a log a plain line now and
then."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)

#: Seconds between two lines in a log.
_LINE_SECONDS = 30.0


class RowCounter:
    """A context manager; nothing is shown of what takes less than ``delay`` seconds.

    Args:
        what: what is done with the rows.
        total: how many there are, where that is known.
    """

    def __init__(self, what: str, total: int | None = None, *, delay: float = 2.0) -> None:
        self._what = what
        self._total = total
        self._count = 0
        self._logged = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, unit=" rows", delay=delay, dynamic_ncols=True, mininterval=0.5, desc=what)

    def update(self, count: int = 1) -> None:
        """So many rows more."""
        self._count += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._logged >= _LINE_SECONDS:
            self._logged = time.monotonic()
            of_all = f" of {self._total:,}" if self._total is not None else ""
            log.info("%s: %s%s rows", self._what, f"{self._count:,}", of_all)

    def __enter__(self) -> RowCounter:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
