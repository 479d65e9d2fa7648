"""The processes in which ``verify`` checks files. They import neither torch nor a codec."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from batch_tokenizer.commands.verify_rows import CHUNK_LINES, Chunk, ChunkReport, RowChecker
from batch_tokenizer.commands.verify_shards import Shard, ShardChecker, ShardReport
from batch_tokenizer.manifest.manifest import Manifest
from batch_tokenizer.records import RunError
from batch_tokenizer.runtime.processes import num_cores
from batch_tokenizer.sources.ordered_map import ordered_in

#: A manifest of fewer lines is checked by this process alone.
_LEAST_LINES_FOR_PROCESSES = 4 * CHUNK_LINES


@dataclass(frozen=True, slots=True)
class Checkers:
    """What a process that checks files needs."""

    rows: RowChecker
    shards: ShardChecker


#: A function over items, as ``map``.
Map = Callable[[Callable[[Any], Any], Iterator[Any]], Iterator[Any]]

_checkers: Checkers


def _start_process(checkers: Checkers) -> None:
    global _checkers
    _checkers = checkers


def check_chunk(chunk: Chunk) -> ChunkReport:
    """What is found in a chunk of the manifest, in the process that checks it."""
    return _checkers.rows.check(chunk)


def check_shard(shard: Shard) -> ShardReport:
    """What is found in a shard, in the process that checks it."""
    return _checkers.shards.check(shard)


def _map_ahead(
    pool: ProcessPoolExecutor, ahead: int, function: Callable[[Any], Any], items: Iterator[Any]
) -> Iterator[Any]:
    """As ``ordered_in``.

    Raises:
        RunError: a process died.
    """
    try:
        yield from ordered_in(pool, function, items, ahead)
    except BrokenProcessPool as error:
        raise RunError(
            "a process that checked files died (out of memory?): try fewer --workers", exit_code=1
        ) from error


@contextmanager
def checking_processes(checkers: Checkers, manifest: Manifest, workers: int | None) -> Iterator[Map]:
    """A ``map`` over processes that check files, with results in the order of the items.

    Args:
        workers: how many; None for one a core, or this process alone where the manifest is small.
    """
    if workers is None:
        workers = num_cores() if manifest.num_lines >= _LEAST_LINES_FOR_PROCESSES else 1
    if workers == 1:
        _start_process(checkers)
        yield map
        return
    # Not a fork of this process, which has torch's threads. The server imports this module once for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_process, initargs=(checkers,))
    try:
        yield partial(_map_ahead, pool, 4 * workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
