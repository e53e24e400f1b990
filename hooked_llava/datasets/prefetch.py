"""Preparing what comes next in one background thread, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetched(make: Callable[[], T | None], ahead: int) -> Iterator[T]:
    """What `make` returns, call after call, until it returns None; up to `ahead` calls run before they are asked for.

    All calls run in one thread, one after the other. An error in a call is raised where its result is asked for; when the
    iterator is closed, calls that have not begun are dropped. With `ahead=0` there is no thread.

    >>> numbers = iter([1, 2, None])
    >>> list(prefetched(lambda: next(numbers), ahead=2))
    [1, 2]
    """
    if ahead == 0:
        while (made := make()) is not None:
            yield made
        return
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    try:
        calls: deque[Future[T | None]] = deque(pool.submit(make) for _ in range(ahead))
        while (made := calls.popleft().result()) is not None:
            calls.append(pool.submit(make))
            yield made
    finally:
        pool.shutdown(cancel_futures=True)
