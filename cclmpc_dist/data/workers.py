"""A function over many items in several processes or threads, results in order, memory bounded."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from cclmpc_dist.errors import InputError

AHEAD = 2  # results a worker that are under way or wait for an earlier one
Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """function(item) of each item, in order. One worker is this process. Raises what the function raises."""
    if workers == 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _attend)
    try:
        yield from in_order(pool, function, items, AHEAD * workers - 1)
    except BrokenProcessPool:
        remedy = "give fewer --workers, and the same command goes on"
        raise InputError(f"a worker was killed, perhaps for want of memory: {remedy}") from None


def in_order(
    pool: Executor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    ahead: int,
    stop: threading.Event | None = None,
) -> Generator[Result, None, None]:
    """function(item) of each item by `pool`, in order; then `stop` is set and the pool shut down. While the caller has
    a result, up to `ahead` others are under way or wait. Raises what the function raises."""
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        if stop:
            stop.set()
        pool.shutdown(cancel_futures=True)


def _attend() -> None:
    """Leave an interrupt to the parent, and end with it: a worker would wait for ever for one that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
