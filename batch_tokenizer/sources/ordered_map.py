"""``ordered``: as ``map``, on several threads or processes, with the results in the order of the items."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
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
    with ThreadPoolExecutor(threads) as pool:
        yield from ordered_in(pool, function, items, 2 * threads, idle)


def ordered_in(
    pool: Executor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    ahead: int,
    idle: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """As ``ordered``, in a pool that is there; takes at most ``ahead`` items beyond the results that were taken."""
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
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
