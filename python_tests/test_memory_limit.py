"""A failed allocation is a Python error, in whatever thread it happens, and the next call works.

Each case runs in a process of its own whose address space ends a little above what it has mapped.
The limit is moved up in steps, so that every allocation of a call is one of those that fail.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qrlora_kernels import native

pytestmark = [
    pytest.mark.skipif(native.CORE is None, reason=native.REASON),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no RLIMIT_AS to speak of"),
    pytest.mark.skipif(
        "sanitizers" in native.build_config(), reason="AddressSanitizer maps terabytes"
    ),
]

CASES = {
    # 2 r² of scratch for each thread
    "kron_linear": """
n, r = 1024, 512
x, w = draw(34, n), draw(n, n)
factors = [draw(n // r, r) for _ in range(4)]
call = lambda: F.kron_linear(x, w, None, *factors, scaling=0.7, backend="cpu")
""",
    "kron_linear as one native call": """
n, r = 1024, 512
x, w = draw(4, n), draw(n, n)
factors = [draw(n // r, r) for _ in range(4)]
call = lambda: F.kron_linear(x, w, None, *factors, scaling=0.7)
""",
    "kron_linear backward": """
n, r = 1024, 512
x, dy = draw(34, n), draw(34, n)
factors = [draw(n // r, r) for _ in range(4)]
call = lambda: torch.cat([
    t.flatten() for t in cpu.core_calls.kron_gradients(
        KronGradient(dy, x, x, *factors, 0.7), cpu.core_calls.code(update_alone=True))])
""",
    "qr_linear": """
m, n, r = 2048, 200, 600
x, w, q, d, lam = draw(m, n), draw(n, n), draw(n, r), draw(r, n), draw(r)
call = lambda: F.qr_linear(x, w, None, q, d, lam, 0.7, backend="cpu")
""",
    "pivoted_qr": """
w = draw(900, 900)
call = lambda: pivoted_qr(w, rank=250).r
""",
    "pivoted_qr of several": """
w = [draw(600, 600) for _ in range(4)]
call = lambda: torch.stack([found.r for found in pivoted_qr(w, rank=100)])
""",
}

CHILD = """
import gc, resource, sys
import torch
from qrlora_kernels import functional as F
from qrlora_kernels.backends import cpu
from qrlora_kernels.operands import KronGradient
from qrlora_kernels.linalg import pivoted_qr

torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
# Threads and the library's own buffers are there before memory is scarce: a thread that cannot be
# started ends the process, in whoever's OpenMP.
draw(600, 600) @ draw(600, 600)
warm = pivoted_qr([draw(64, 64), draw(64, 64)], rank=4)
{case}

def mapped():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()

failed = 0
for above in (0, 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96):
    gc.collect()
    resource.setrlimit(resource.RLIMIT_AS, (mapped() + (above << 20), resource.RLIM_INFINITY))
    try:
        short = call()
    except MemoryError:
        failed += 1
    except RuntimeError as error:  # torch's allocator
        assert "memory" in str(error), error
        failed += 1
    else:
        break
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert failed, "no allocation failed"
again = call()
assert torch.equal(again, short)
# Results have the same bits for every number of threads.
torch.set_num_threads(1)
assert torch.equal(call(), again)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_a_failed_allocation_is_a_memory_error(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD.replace("{case}", CASES[name])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
