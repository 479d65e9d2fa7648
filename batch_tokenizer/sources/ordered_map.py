"""``ordered``: as ``map``, on several threads, with the results in the order of the items."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")

Result = TypeVar("Result")


def ordered(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int,
    idle: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """As ``map``, with several items in work at once, and few ahead of the results that were taken.

    Args:
        idle: called while waiting; an exception of its ends the work.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 2 * threads:
                    yield _result(waiting.popleft(), idle)
            while waiting:
                yield _result(waiting.popleft(), idle)
        finally:
            for future in waiting:
                future.cancel()


def _result(future: Future[Result], idle: Callable[[], None]) -> Result:
    while not wait([future], timeout=0.5).done:
        idle()
    return future.result()
