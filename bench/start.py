"""Pivoted QR against scipy's geqp3 and LAPACK's truncated geqp3rk, and a list against a loop.

Variants are interleaved in one process and the ratio of medians is printed. A row is refused when
the pivots of the same run differ. With one thread the times are CPU times of the process, which a
busy machine disturbs less; with more they are wall times.

    python bench/start.py --sizes 768 1024 4096 --ranks 16 64 150 --threads 1
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

THREADS = argparse.ArgumentParser(add_help=False)
THREADS.add_argument("--threads", type=int, default=1)
threads = THREADS.parse_known_args()[0].threads
os.environ["OPENBLAS_NUM_THREADS"] = str(threads)  # read when scipy is imported

import numpy as np  # noqa: E402
import scipy  # noqa: E402
import scipy.linalg  # noqa: E402
import torch  # noqa: E402

from qrlora_kernels.linalg import pivoted_qr  # noqa: E402


def geqp3rk(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Pivots of the truncated QR in the OpenBLAS that scipy carries; Q is not formed."""
    folder = Path(scipy.__file__).parent.parent / "scipy.libs"
    library = ctypes.CDLL(glob.glob(str(folder / "libscipy_openblas-*"))[0])
    single = matrix.dtype == np.float32
    routine = library.scipy_sgeqp3rk_ if single else library.scipy_dgeqp3rk_
    real = ctypes.c_float if single else ctypes.c_double
    a = np.array(matrix, order="F")
    rows, columns = a.shape
    work = np.empty(34 * (columns + 64), a.dtype)
    pivots, iwork = np.zeros(columns, np.int32), np.zeros(columns, np.int32)
    tau = np.empty(min(rows, columns), a.dtype)
    number = [ctypes.c_int(v) for v in (rows, columns, 0, rank, rows, 0, len(work), 0)]
    m, n, nrhs, kmax, lda, k, lwork, info = [ctypes.byref(v) for v in number]
    off, norm, relative = (ctypes.byref(real(v)) for v in (-1.0, 0.0, 0.0))
    pointer = [ctypes.c_void_p(x.ctypes.data) for x in (a, pivots, tau, work, iwork)]
    routine(
        m, n, nrhs, kmax, off, off, pointer[0], lda, k, norm, relative, pointer[1], pointer[2],
        pointer[3], lwork, pointer[4], info,
    )  # fmt: skip
    if number[7].value:
        raise RuntimeError(f"geqp3rk returned info = {number[7].value}")
    return pivots[:rank] - 1


def clock() -> float:
    return time.process_time() if threads == 1 else time.perf_counter()


def timed(call: Callable[[], object]) -> tuple[float, object]:
    start = clock()
    result = call()
    return clock() - start, result


def compare(size: int, dtype: torch.dtype, rank: int, repeats: int) -> None:
    generator = torch.Generator().manual_seed(size)
    weight = torch.randn(size, size, generator=generator, dtype=torch.float64).to(dtype)
    array = weight.numpy()
    variants: dict[str, Callable[[], object]] = {
        "ours": lambda: pivoted_qr(weight, rank=rank).pivots.numpy(),
        "scipy": lambda: scipy.linalg.qr(array, mode="economic", pivoting=True)[2][:rank],
        "geqp3rk": lambda: geqp3rk(array, rank),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    pivots = {}
    for _ in range(repeats):
        for name, call in variants.items():
            seconds, pivots[name] = timed(call)
            times[name].append(seconds)
    label = f"{size:5d} {str(dtype)[6:]:8s} r={rank:<5d}"
    exact = np.array_equal(pivots["ours"], _fp64_pivots(weight)[:rank])
    if not exact:
        print(f"{label} refused: pivots differ from dgeqp3")
        return
    median = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"{label} ours {1e3 * median['ours']:8.1f} ms   scipy {1e3 * median['scipy']:9.1f} ms "
        f"({median['scipy'] / median['ours']:5.1f}x)   geqp3rk {1e3 * median['geqp3rk']:8.1f} ms "
        f"({median['geqp3rk'] / median['ours']:5.1f}x)",
        flush=True,
    )


_known: dict[tuple[int, torch.dtype], np.ndarray] = {}


def _fp64_pivots(weight: torch.Tensor) -> np.ndarray:
    key = (weight.shape[0], weight.dtype)
    if key not in _known:
        _known[key] = scipy.linalg.qr(weight.double().numpy(), mode="r", pivoting=True)[1]
    return _known[key]


def compare_list(repeats: int) -> None:
    """24 matrices of RoBERTa-base: two per layer of the attention, in one call and in a loop."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(768, 768, generator=generator) for _ in range(24)]
    together, loop = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        pivoted_qr(weights, rank=150)
        middle = time.perf_counter()
        for weight in weights:
            pivoted_qr(weight, rank=150)
        together.append(middle - start)
        loop.append(time.perf_counter() - middle)
    one, many = statistics.median(together), statistics.median(loop)
    print(
        f"24 x 768² r=150: one call {1e3 * one:.1f} ms, loop {1e3 * many:.1f} ms "
        f"({many / one:.2f}x), {torch.get_num_threads()} threads"
    )


LLAMA_SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))


def compare_llama(rank: int) -> None:
    """bf16 weights of LLaMA-3-8B's shapes: pivots against dgeqp3rk, and the extra memory."""
    for rows, columns in LLAMA_SHAPES:
        generator = torch.Generator().manual_seed(rows)
        weight = torch.empty(rows, columns, dtype=torch.bfloat16)
        weight.normal_(0.0, 0.02, generator=generator)
        ballast = torch.ones(_peak_bytes() // 8, dtype=torch.float64)  # so that a new peak shows
        before = _peak_bytes()
        seconds, found = timed(lambda weight=weight: pivoted_qr(weight, rank=rank))
        extra = (_peak_bytes() - before) / 2**20
        del ballast
        reference, pivots = timed(lambda weight=weight: geqp3rk(weight.double().numpy(), rank))
        same = np.array_equal(found.pivots.numpy(), pivots)
        print(
            f"{rows:5d} x {columns:5d} bfloat16 r={rank}: "
            + (f"pivots of dgeqp3rk, {1e3 * seconds:.0f} ms " if same else "REFUSED: other pivots ")
            + f"(dgeqp3rk in fp64 {1e3 * reference:.0f} ms), at most {extra:.0f} MiB more memory",
            flush=True,
        )


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(parents=[THREADS], description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[768, 1024, 2048, 4096])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 150])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float64"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="also r = size")
    parser.add_argument("--list", action="store_true", help="only the list against the loop")
    parser.add_argument("--llama", action="store_true", help="only the shapes of LLaMA-3-8B")
    options = parser.parse_args()
    torch.set_num_threads(threads)
    print(
        f"{platform.processor() or platform.machine()}, {threads} thread(s), torch "
        f"{torch.__version__}, scipy {scipy.__version__}, load {os.getloadavg()[0]:.1f}"
    )
    if options.list:
        compare_list(options.repeats)
        return
    if options.llama:
        compare_llama(options.ranks[-1])
        return
    for size in options.sizes:
        for dtype in options.dtypes:
            for rank in [*options.ranks, *([size] if options.full else [])]:
                compare(size, getattr(torch, dtype), rank, options.repeats)


if __name__ == "__main__":
    main()
