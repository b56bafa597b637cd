"""Problems, what plain torch makes of them, and the calls of the core on them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

NUMBERS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
GATES = ("vector", "core", "mixed_vector", "mixed_core")
ADAPTERS = 5


class Core(NamedTuple):
    """A copy of the core, apart from the package's, and where it notes what it was told."""

    c: Any
    last: dict[Any, Any]

    def code(self, column: str | None = None) -> int:
        return 1 + (self.c.columns.index(column) if column else self.c.best_column())


class LowRank(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    up: Tensor
    down: Tensor
    gate: Tensor
    index: Tensor | None
    scaling: float
    dy: Tensor

    @property
    def r(self) -> int:
        return self.gate.shape[-1]

    @property
    def kind(self) -> int:
        mixed = self.index is not None
        return 2 * mixed + (self.gate.dim() - mixed - 1)

    def forward_key(self) -> tuple[int, ...]:
        return self._key(0, 0, self.bias is not None)

    def backward_key(self, needs: int = 3) -> tuple[int, ...]:
        return self._key(1, needs, 0)

    def _key(self, step: int, needs: int, bias: int) -> tuple[int, ...]:
        n, k = self.weight.shape
        columns = int(self.weight.stride(1) != 1)
        m = self.x.numel() // k
        dtype = NUMBERS[self.x.dtype]
        return 0, step, dtype, m, n, k, self.r, self.kind, columns, needs, int(bias)

    def forward_operands(self) -> tuple[Any, ...]:
        """With the axes of a gate without an index before, and no panels after the operands."""
        return (self.gate.dim(), *self[:8], None)

    def backward_operands(self, h: Tensor, dx: bool = True, dgate: bool = True) -> tuple[Any, ...]:
        frozen = (self.weight, self.up, self.down, self.gate, self.index)
        return (self.dy, *frozen, h, self.scaling, dx, dgate, None)


def low_rank(
    gate: str = "vector",
    dtype: torch.dtype = torch.float64,
    m: int = 7,
    n: int = 24,
    k: int = 36,
    r: int = 3,
    wider: int = 0,
) -> LowRank:
    """``wider``: so many columns and rows of the factors that do not count, all NaN."""
    make = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, dtype=dtype)

    up, down = normal(n, r + wider), normal(r + wider, k) / k**0.5
    up[:, r:], down[r:] = torch.nan, torch.nan
    sizes = [ADAPTERS] * gate.startswith("mixed") + [r] * (1 + gate.endswith("core"))
    index = None
    if gate.startswith("mixed"):  # the last adapter is in no row
        index = torch.randint(ADAPTERS - 1, (m,), generator=make)
    return LowRank(
        normal(m, k), normal(n, k) / k**0.5, normal(n), up, down, normal(*sizes), index, 0.7,
        normal(m, n),
    )  # fmt: skip


class Outcome(NamedTuple):
    y: Tensor
    h: Tensor
    dx: Tensor
    dgate: Tensor


def expected(p: LowRank) -> Outcome:
    """Plain torch in fp64, its gradients by autograd."""
    x, gate = (t.double().detach().requires_grad_() for t in (p.x, p.gate))
    weight, up, down = (t.double() for t in (p.weight, p.up[:, : p.r], p.down[: p.r]))
    h = x @ down.T
    own = gate if p.index is None else gate[p.index.view(x.shape[:-1])]
    is_core = p.kind % 2 == 1
    mid = torch.einsum("...i,...ij->...j", h, own) if is_core else h * own
    y = x @ weight.T + p.scaling * mid @ up.T
    y = y if p.bias is None else y + p.bias.double()
    dx, dgate = torch.autograd.grad(y, (x, gate), p.dy.double())
    return Outcome(y.detach(), h.detach().view(-1, p.r), dx, dgate)


def by_tensors(core: Core, p: LowRank, code: int) -> Outcome:
    recorded = p._replace(x=p.x.detach().requires_grad_())
    core.c.tell(p.forward_key(), code, "forward", "told")
    y, h = core.c.low_rank_forward_call(*recorded.forward_operands())
    core.c.tell(p.backward_key(), code, "backward", "told")
    return Outcome(y, h, *core.c.low_rank_backward_call(*p.backward_operands(h)))


def matrix(t: Tensor) -> tuple[int, int, int]:
    return t.data_ptr(), *t.stride()


def by_addresses(core: Core, p: LowRank, code: int, threads: int = 1) -> Outcome:
    x, dy = (t.reshape(-1, t.shape[-1]) for t in (p.x, p.dy))
    (m, k), n, dtype = x.shape, p.weight.shape[0], p.x.dtype
    y, h, dx = x.new_empty(m, n), x.new_empty(m, p.r), x.new_empty(m, k)
    dgate = torch.empty_like(p.gate)
    shape = (m, n, k, p.r, NUMBERS[dtype], threads)
    frozen = (matrix(p.weight), matrix(p.down), matrix(p.up))
    gate = (p.gate.data_ptr(), NUMBERS[p.gate.dtype], p.kind % 2 == 1, p.scaling)
    bias = 0 if p.bias is None else p.bias.data_ptr()
    mixed = () if p.index is None else (p.index.data_ptr(), p.gate.shape[0])
    out = (y.data_ptr(), h.data_ptr())
    core.c.low_rank_forward(code, shape, matrix(x), *frozen, gate, bias, *out, *mixed)
    out = (h.data_ptr(), dx.data_ptr(), dgate.data_ptr())
    core.c.low_rank_backward(code, shape, matrix(dy), *frozen, gate, *out, *mixed)
    return Outcome(y.view_as(p.dy), h, dx.view_as(p.x), dgate)


def close(got: Outcome, want: Outcome) -> None:
    for name, a, b in zip(Outcome._fields, got, want, strict=True):
        bound = 1e-12 if a.dtype == torch.float64 else 2e-5
        message = f"{name}: {(a.double() - b).abs().max()}"
        torch.testing.assert_close(a.double(), b, rtol=bound, atol=bound, msg=message)


def strided(p: LowRank, columns: int) -> LowRank:
    """``columns``: which of weight, up and down lie by columns; x and dy have gaps between rows."""
    turned = {
        name: getattr(p, name).t().contiguous().t()
        for bit, name in enumerate(("weight", "up", "down"))
        if columns >> bit & 1
    }
    with_gaps = {
        name: torch.cat([t, t], 1)[:, : t.shape[1]] for name, t in (("x", p.x), ("dy", p.dy))
    }
    return p._replace(**turned, **with_gaps)


def in_panels(core: Core, frozen: Tensor) -> Tensor:
    """[N, K] as the product by its transpose reads it."""
    (n, k), number = frozen.shape, NUMBERS[frozen.dtype]
    panels = frozen.new_full((core.c.panel_elements(number, k, n),), torch.nan)
    core.c.pack_panels((0, n, k, number, 1), matrix(frozen.mT), panels.data_ptr())
    return panels
