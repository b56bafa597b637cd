"""Columns that are hardly longer than others: candidates stay candidates from block to block.

Fault: a product read whole tiles of the basis from a row that is no multiple of a tile, past the
rows that were allocated. Large matrices ended the process, small ones need AddressSanitizer
(``make test-sanitize``) to fail.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from pivot_matrices import gaussian
from torch import Tensor

from qrlora_kernels.linalg import RANK_RULES, PivotedQR, cpu_core, pivoted_qr

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Whole tiles of 8 rows and not, each of which once read too far for one of the matrices or more;
# the last is above where the residual is kept.
RANKS = (13, 24, 32, 61, 72, 96, 101, 203)


@pytest.fixture(autouse=True)
def _native() -> None:
    if cpu_core.CORE is None:
        pytest.fail("the native core is not built, so its pivots cannot be tested")


def uniform(rows: int, columns: int) -> Tensor:
    """As ``nn.Linear`` is initialised."""
    generator = torch.Generator().manual_seed(rows + columns)
    bound = columns**-0.5
    return torch.empty(rows, columns, dtype=torch.float64).uniform_(
        -bound, bound, generator=generator
    )


def signs(rows: int, columns: int) -> Tensor:
    """Columns of one length, exactly, in every dtype."""
    return gaussian(rows, columns, 1).sign()


def nearly_tied(rows: int, columns: int) -> Tensor:
    """Columns of one length, but for 1e-14 of it in fp64 and the rounding of the other dtypes."""
    matrix = torch.nn.functional.normalize(gaussian(rows, columns, 2), dim=0)
    return matrix * (1 + 1e-14 * gaussian(1, columns, 3))


def doubled(rows: int, columns: int) -> Tensor:
    """Every column is there twice."""
    return uniform(rows, columns // 2).repeat(1, 2)


MATRICES = {make.__name__: make for make in (uniform, signs, nearly_tied, doubled)}


def assert_greedy(found: PivotedQR, weight: Tensor) -> None:
    """q (fp64) and r are those of the pivots, each of which was a longest column.

    What is left of a column's squared length is its own less that of r's column above the step.
    """
    wide, q = weight.double(), found.q
    lengths2 = wide.square().sum(0)
    r = q.mT @ wide
    rounding = (1e-13 if weight.dtype == torch.float64 else 2e-6) * lengths2.max().sqrt()
    assert (q.mT @ q - torch.eye(found.rank, dtype=q.dtype)).abs().max() <= 1e-12
    assert (r - found.r).abs().max() <= rounding
    left2 = lengths2 - torch.cat([torch.zeros_like(r[:1]), r[:-1].square().cumsum(0)])
    chosen2 = left2.gather(1, found.pivots[:, None])[:, 0]
    assert (chosen2 >= left2.max(1).values - 1e-9 * lengths2.max()).all()
    torch.testing.assert_close(found.diagonal, chosen2.sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(MATRICES))
def test_ranks_of_whole_tiles_and_others(name: str, dtype: torch.dtype) -> None:
    weight = MATRICES[name](516, 512).to(dtype)
    for rank in RANKS:
        found = pivoted_qr(weight, rank=rank, out_dtype=torch.float64)
        assert found.rank == rank
        assert_greedy(found, weight)


@pytest.mark.parametrize("rule", RANK_RULES)
@pytest.mark.parametrize("name", list(MATRICES))
def test_every_rule(name: str, rule: str) -> None:
    weight = MATRICES[name](260, 256).float()
    diagonal = pivoted_qr(weight, rank=130, out_dtype=torch.float64).diagonal
    energy = float(diagonal.square().cumsum(0)[62] / diagonal.square().sum())
    tau = {"magnitude": float(diagonal[63] / diagonal[0]), "energy": 0.5 * energy, "abs_sum": 0.2}
    found = pivoted_qr(weight, tau=tau[rule], rank_rule=rule, out_dtype=torch.float64)
    assert 8 < found.rank <= 256
    assert_greedy(found, weight)
    torch.testing.assert_close(found.diagonal[:130], diagonal[: found.rank], rtol=1e-6, atol=0)
    capped = pivoted_qr(weight, tau=tau[rule], rank_rule=rule, max_rank=21)
    assert torch.equal(capped.pivots, found.pivots[:21])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [512, 1024])
def test_columns_that_are_all_the_same(size: int, dtype: torch.dtype) -> None:
    weight = gaussian(size, 1).to(dtype).repeat(1, size)
    for options in ({"rank": 61}, {"tau": 0.5}):
        found = pivoted_qr(weight, **options)
        assert (found.rank, found.pivots.tolist()) == (1, [0])
        torch.testing.assert_close(found.q @ found.r, weight)


@pytest.mark.parametrize(
    ("rows", "columns", "rank", "dtype"),
    [
        (4096, 4096, 64, "float32"),
        (4096, 2048, 64, "float32"),
        (5120, 4096, 64, "float32"),
    ],
)
def test_large_layers_as_they_are_initialised(
    rows: int, columns: int, rank: int, dtype: str
) -> None:
    """In a fresh process: what lies behind an array depends on what was allocated before."""
    code = (
        "import torch\n"
        "from qrlora_kernels.linalg import pivoted_qr\n"
        "from test_pivoted_qr_ties import assert_greedy\n"
        "torch.manual_seed(0)\n"
        f"weight = torch.nn.Linear({columns}, {rows}, bias=False).weight.detach()\n"
        f"weight = weight.to(torch.{dtype})\n"
        f"found = pivoted_qr(weight, rank={rank}, out_dtype=torch.float64)\n"
        "assert_greedy(found, weight)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
