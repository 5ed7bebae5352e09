"""Work on several blocks at once and take the results in order; the BLAS below is held to one thread meanwhile.

Decoding is memory-bound NumPy that releases the interpreter lock, and a block's GEMM is too small to be worth
splitting: one core per block beats a BLAS that spreads each block over all cores, threefold on a machine that does
other work too.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from threading import Lock
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController  # pyright: ignore[reportMissingTypeStubs]

T = TypeVar("T")

_lock = Lock()
_users = 0
_restore: Callable[[], None] | None = None


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(tasks: Iterable[Callable[[], T]], threads: int) -> Iterator[T]:
    """Results in the order of the tasks, with at most `threads + 1` of them begun and not yet taken."""
    if threads == 1:
        for task in tasks:
            yield task()
        return
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads, "gradstore-search") as pool:
        try:
            for task in tasks:
                pending.append(pool.submit(task))
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


@contextmanager
def one_blas_thread() -> Generator[None]:
    """Hold BLAS libraries to one thread; searches that overlap share the limit, the last one lifts it."""
    global _users, _restore
    with _lock:
        if _users == 0:
            _restore = _limit_all()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _restore is not None:
                _restore()
                _restore = None


def _limit_all() -> Callable[[], None]:
    restore = _controller().limit(limits=1, user_api="blas").restore_original_limits
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "set_num_threads"):
        return restore
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def restore_both() -> None:
        restore()
        torch.set_num_threads(threads)

    return restore_both


@lru_cache(maxsize=1)
def _controller() -> Any:
    return ThreadpoolController()  # walks the loaded libraries, which takes milliseconds
