"""One matrix of a list per thread, or all threads on one matrix, as its size decides."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from .checks import Named

T = TypeVar("T")
# torch keeps the number for threads made later in the process: two starts at once, from two threads
# of the caller's, would each put back what the other has set.
_THREADS_LOCK = threading.Lock()

# As SHARED_ELEMENTS of csrc/python/linalg.cpp: from here all threads work on one matrix.
SHARED_ELEMENTS = 1 << 22


def map_matrices(
    task: Callable[[str, Tensor], T], named: Named, title: str, progress: bool
) -> list[T]:
    """``task(name, matrix)`` of each matrix, in order, with a bar over them if ``progress``.

    A small CPU matrix gets one thread, also when it is alone: library products on another number
    of threads have other bits, and a result must not depend on the rest of the list. Threads that
    use torch for the first time meanwhile start with one, too.
    """
    small = {name: matrix for name, matrix in named.items() if _is_small(matrix)}
    results: dict[str, T] = {}
    with tqdm(total=len(named), desc=title, unit="matrix", disable=not progress) as bar:
        for name, matrix in named.items():
            if name not in small:
                results[name] = task(name, matrix)
                bar.update()
        for name, result in zip(small, _one_thread_each(task, small), strict=True):
            results[name] = result
            bar.update()
    return [results[name] for name in named]


def in_threads(task: Callable[..., T], *items: Iterable[Any]) -> list[T]:
    """``list(map(task, *items))`` for what releases the GIL, as hashing and reading do."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(task, *items))


def _is_small(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu" and matrix.numel() < SHARED_ELEMENTS


def _one_thread_each(task: Callable[[str, Tensor], T], named: Named) -> Iterator[T]:
    with _THREADS_LOCK:
        threads = torch.get_num_threads()
        workers = min(threads, len(named))
        # set_num_threads holds for the calling thread, and as the start of threads made later.
        try:
            if workers <= 1:
                torch.set_num_threads(1)
                yield from (task(*item) for item in named.items())
                return
            pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
            try:
                yield from pool.map(task, named.keys(), named.values())
            finally:
                pool.shutdown(cancel_futures=True)
        finally:
            torch.set_num_threads(threads)
