"""The native product by a matrix in panels: every edge of its tiles, every element written."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import poisoned_memory
from torch import Tensor

from qrlora_kernels import native, panels

F16, F32, F64 = torch.float16, torch.float32, torch.float64
pytestmark = pytest.mark.skipif(native.CORE is None, reason=native.REASON)
# M, N, K: single rows and columns, around a panel, around the 192 terms and 192 rows of a block,
# rows of A that are copied because they lie far apart.
SIZES = [
    (1, 1, 1),
    (3, 15, 191),
    (6, 16, 192),
    (7, 17, 193),
    (13, 64, 385),
    (193, 33, 40),
    (200, 300, 800),
    (25, 129, 1600),
]


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def exact(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ w.double().T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_edge(size: tuple[int, ...], dtype: torch.dtype) -> None:
    m, n, k = size
    x, w, bias = drawn(m, k, dtype=dtype), drawn(n, k, dtype=dtype), drawn(n, dtype=dtype)
    addend = drawn(m, n, dtype=dtype)
    with poisoned_memory():
        in_panels = panels.Panels(w)
        plain = in_panels.product(x)
        with_bias = in_panels.product(x, bias)
        onto = [in_panels.product(x, b, onto=addend.clone()) for b in (None, bias)]
    close = {"rtol": 0, "atol": 80 * torch.finfo(dtype).eps * k**0.5}
    torch.testing.assert_close(plain.double(), exact(x, w), **close)
    torch.testing.assert_close(with_bias.double(), exact(x, w, bias), **close)
    for y, b in zip(onto, (None, bias), strict=True):
        torch.testing.assert_close(y.double(), exact(x, w, b) + addend.double(), **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lies", ["rows", "columns", "strided", "transposed"])
def test_however_the_matrix_and_the_rows_lie(lies: str, dtype: torch.dtype) -> None:
    w, x = drawn(34, 51, dtype=dtype), drawn(9, 51, dtype=dtype)
    want = panels.Panels(w).product(x)
    if lies == "columns":
        w = w.mT.contiguous().mT
    elif lies == "strided":
        w, x = w.repeat_interleave(2, 1)[:, ::2], x.repeat_interleave(3, 0)[::3]
    elif lies == "transposed":
        x = x.mT.contiguous().mT
    assert torch.equal(panels.Panels(w).product(x), want)


@pytest.mark.parametrize("size", [(0, 5, 7), (4, 5, 0), (0, 5, 0)], ids=str)
def test_without_a_row_or_a_term(size: tuple[int, int, int]) -> None:
    m, n, k = size
    bias = torch.arange(float(n))
    y = panels.Panels(torch.ones(n, k)).product(torch.ones(m, k), bias)
    assert torch.equal(y, bias.expand(m, n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [16, 400], ids=["by rows", "by columns"])
def test_the_bits_depend_on_neither_threads_nor_other_rows(n: int, dtype: torch.dtype) -> None:
    x, w = drawn(300, 700, dtype=dtype), drawn(n, 700, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = panels.Panels(w).product(x)
        torch.set_num_threads(3)
        three = panels.Panels(w).product(x)
        some = panels.Panels(w).product(x[41:48])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, three)
    assert torch.equal(one[41:48], some)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [384, 1536, 4096])
def test_no_worse_than_twice_the_error_of_linear(k: int, dtype: torch.dtype) -> None:
    """Contract 1: one chain of K additions would be worse from 768 on."""
    x, w = drawn(64, k, dtype=dtype), drawn(48, k, dtype=dtype)
    wide = np.float64 if dtype == torch.float32 else np.longdouble
    if np.finfo(wide).eps >= torch.finfo(dtype).eps:
        pytest.skip("this platform has no wider type")
    truth = x.numpy().astype(wide) @ w.numpy().astype(wide).T
    ours, theirs = (
        float(np.sqrt(np.mean((y.numpy() - truth) ** 2)))
        for y in (panels.Panels(w).product(x), torch.nn.functional.linear(x, w))
    )
    assert ours <= 2 * theirs


def test_what_they_take_in_memory() -> None:
    """A panel is filled up with zeros; of bf16 the last one is no wider than it has to be."""
    taken = panels.Panels(torch.zeros(64, 50)).nbytes
    assert taken == 64 * 50 * 4
    assert taken < panels.Panels(torch.zeros(65, 50)).nbytes <= 2 * taken
    assert panels.Panels(torch.zeros(64, 50, dtype=torch.bfloat16)).nbytes == 64 * 50 * 2
    assert panels.Panels(torch.zeros(65, 49, dtype=torch.bfloat16)).nbytes <= 80 * 50 * 2


def test_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of AVX2 for few tokens, where MKL's own kernels of it are as fast."""
    monkeypatch.setattr(panels, "_instructions", lambda: "avx2")
    sizes = {
        (4, 1024, 1024): True,
        (3, 1024, 1024): False,
        (512, 1024, 1024): True,
        (513, 4096, 4096): False,
        (256, 1536, 384): True,
        (257, 1536, 384): False,
        (16, 384, 384): False,
    }
    assert {size: panels.pays(*size, torch.float32) for size in sizes} == sizes
    assert panels.pays(16, 1024, 1024, torch.float64)
    assert not panels.pays(17, 1024, 1024, torch.float64)
    assert panels.pays_adapted(2048, 1024, 1024, torch.float64)
    assert panels.pays_adapted(32, 1024, 1024, torch.float64)
    assert not panels.pays_adapted(31, 1024, 1024, torch.float64)
    assert panels.pays_adapted(33, 1536, 384, torch.float32)
    assert not panels.pays_adapted(2048, 384, 384, torch.float32)
    assert panels.least_for_one() == math.inf
    halves = {(1, 1024, 512): True, (2048, 4096, 4096): True, (128, 384, 384): False}
    assert {size: panels.pays(*size, torch.bfloat16) for size in halves} == halves
    assert not panels.pays(16, 4096, 4096, torch.float16)


@pytest.mark.parametrize("amd", [False, True], ids=["", "AMD"])
@pytest.mark.parametrize("column", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_they_are_used_where_they_were_measured(
    column: str, amd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Core:
        columns = (column,)

        def best_column(self) -> int:
            return 0

        def made_by_amd(self) -> bool:
            return amd

    monkeypatch.setattr(native, "CORE", Core())
    for known in (panels._instructions, panels.amd):
        known.cache_clear()
    try:
        half = column == "avx512_bf16" and amd
        wide = half or column == "avx2"
        for dtype, used in {F32: wide, F64: wide, torch.bfloat16: half, F16: False}.items():
            assert panels.used(dtype) == used
        assert panels.made_pays(33, F32) == panels.made_pays(512, F64) == (wide and amd)
        assert not any(panels.made_pays(*few) for few in ((32, F32), (511, F64), (512, F16)))
    finally:
        for known in (panels._instructions, panels.amd):
            known.cache_clear()


def test_where_they_pay_with_avx512_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of tokens: MKL takes AVX2 there."""
    monkeypatch.setattr(panels, "_instructions", lambda: "avx512_bf16")
    assert all(panels.pays(m, 1024, 1024, d) for m in (4, 4096) for d in (F32, F64))
    assert not panels.pays(3, 1024, 1024, F32)
    assert panels.pays(2048, 384, 384, F32)
    assert not panels.pays(16, 384, 384, F32)
    assert panels.pays_adapted(4096, 1024, 1024, F64)
    assert panels.pays_adapted(4, 4096, 4096, F32)
    assert panels.pays_adapted(33, 1536, 384, F32)
    assert not panels.pays_adapted(32, 1024, 1024, F32)
    assert not panels.pays_adapted(2048, 384, 384, F32)
    assert not panels.pays(2048, 1024, 1024, F16)
    assert panels.least_for_one() == 1024
