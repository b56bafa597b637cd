"""What the tests share: problems with known exact answers, the error rule, poisoned memory.

The exact answers come from the dense update in fp64 (``exact``), not from the package.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qrlora_kernels import backends, functional, linalg
from qrlora_kernels.backends import Problem, chooser

OPS = ("qr_linear", "lora_xs_linear", "kron_linear", "linear_add")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)
SCALING = 0.5

# The operands of each operation after (x, weight, bias), and those that train.
OPERANDS = {
    "qr_linear": ("q", "r", "lam"),
    "lora_xs_linear": ("a", "b", "core"),
    "kron_linear": ("a", "b", "a0", "b0"),
    "linear_add": ("addend",),
}
TRAINABLES = {
    "qr_linear": ("lam",),
    "lora_xs_linear": ("core",),
    "kron_linear": ("a", "b"),
    "linear_add": ("addend",),
}
# Starts of a matrix [32, 32].
STARTS = {
    "pivoted_qr": lambda w: linalg.pivoted_qr(w, 4),
    "truncated_svd": lambda w: linalg.truncated_svd(w, 4),
    "kron_factors": lambda w: linalg.kron_factors(w, 4),
}

Operands = dict[str, Any]


def operands(
    op: str,
    m: int | tuple[int, ...],
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    change: float | None = None,
    seed: int = 0,
) -> Operands:
    """Random operands of ``op``; ``change`` is the wanted ‖ΔW‖/‖W‖ (about 0.5 without it).

    Trainables are fp32 over half precision, as in the layers. Values are drawn in fp64 and rounded.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    lead = (m,) if isinstance(m, int) else m
    wide = torch.float32 if dtype in HALF else dtype
    out: Operands = {
        "x": draw(*lead, k).to(dtype),
        "weight": (draw(n, k) / k**0.5).to(dtype),
        "bias": draw(n).to(dtype) if bias else None,
    }
    size = (change or 0.5) * n**0.5  # ‖ΔW‖ for ‖W‖ = √N
    if op == "linear_add":
        return out | {"addend": ((change or 0.5) * draw(*lead, n)).to(dtype)}
    if op == "kron_linear":
        a0, b0 = draw(n // r, r) / r**0.5, draw(k // r, r) / r**0.5
        step_a, step_b = draw(n // r, r), draw(k // r, r)
        for _ in range(4):  # the norm of the change is not linear in the steps
            change_now = _kron(a0 + step_a, b0 + step_b) - _kron(a0, b0)
            ratio = size / SCALING / change_now.norm() if n and k else 1.0
            step_a, step_b = ratio * step_a, ratio * step_b
        tensors = {"a": a0 + step_a, "b": b0 + step_b, "a0": a0, "b0": b0}
        return out | {name: t.to(wide) for name, t in tensors.items()}
    left, right = draw(n, r) / n**0.5, draw(r, k) / r**0.5
    middle = draw(r) if op == "qr_linear" else draw(r, r)
    update = (left * middle) @ right if op == "qr_linear" else left @ middle.mT @ right
    middle *= size / SCALING / update.norm().clamp(min=1e-30)
    if op == "qr_linear":
        return out | {"q": left.to(dtype), "r": right.to(dtype), "lam": middle.to(wide)}
    return out | {"a": right.to(dtype), "b": left.to(dtype), "core": middle.to(wide)}


def call(op: str, given: Operands, **options: Any) -> Tensor:
    """The operation under test."""
    if op != "linear_add":
        options = {"scaling": SCALING, **options}
    result: Tensor = getattr(functional, op)(**given, **options)
    return result


def delta_weight(op: str, given: Operands) -> Tensor:
    """ΔW [N, K] in fp64, written as the papers write it."""
    t = {name: v.double() for name, v in given.items() if isinstance(v, Tensor)}
    if op == "qr_linear":
        return SCALING * t["q"] @ torch.diag(t["lam"]) @ t["r"]
    if op == "lora_xs_linear":
        return SCALING * t["b"] @ t["core"].T @ t["a"]
    delta = _kron(t["a"], t["b"])
    if "a0" in t:
        delta = delta - _kron(t["a0"], t["b0"])
    return SCALING * delta


def _kron(a: Tensor, b: Tensor) -> Tensor:
    """A ⊗ Bᵀ; torch.kron takes no transposed view of a single row."""
    return torch.kron(a, b.T.clone(memory_format=torch.contiguous_format))


def exact(op: str, given: Operands) -> Tensor:
    """y in fp64 through the dense weight."""
    x, weight = given["x"].double(), given["weight"].double()
    if op == "linear_add":
        y = x @ weight.T + given["addend"].double()
    else:
        y = x @ (weight + delta_weight(op, given)).T
    return y if given["bias"] is None else y + given["bias"].double()


def plain(op: str, given: Operands) -> Tensor:
    """The eager expression in the operands' own dtype, as a user would write it."""
    x, dtype = given["x"], given["x"].dtype
    base = F.linear(x, given["weight"], given["bias"])
    t = {name: given[name].to(dtype) for name in OPERANDS[op] if given.get(name) is not None}
    if op == "linear_add":
        return base + t["addend"]
    if op == "qr_linear":
        return base + SCALING * F.linear(F.linear(x, t["r"]) * t["lam"], t["q"])
    if op == "lora_xs_linear":
        return base + SCALING * F.linear(F.linear(x, t["a"]) @ t["core"], t["b"])

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a @ (x.reshape(*x.shape[:-1], a.shape[1], b.shape[0]) @ b)).flatten(-2)

    update = product(t["a"], t["b"])
    if "a0" in t:
        update = update - product(t["a0"], t["b0"])
    return base + SCALING * update


def outcome(
    function: Callable[[str, Operands], Tensor], op: str, given: Operands, dy: Tensor
) -> dict[str, Tensor]:
    """y and the gradients of x, bias and the trainables, under the incoming gradient ``dy``."""
    names = [name for name in ("x", "bias", *TRAINABLES[op]) if given[name] is not None]
    leaves = {name: given[name].detach().clone().requires_grad_() for name in names}
    y = function(op, given | leaves)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def gradient_like(op: str, given: Operands, seed: int = 1) -> Tensor:
    """An incoming gradient in x's dtype."""
    shape = (*given["x"].shape[:-1], given["weight"].shape[0])
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(given["x"].dtype)


def assert_error_rule(
    got: dict[str, Tensor],
    eager: dict[str, Tensor],
    truth: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """|got - truth| ≤ 2 |eager - truth| + tiny, largest and root mean square, for every tensor.

    tiny is one rounding of the largest entry in the computing dtype: what a correct result may be
    off by where the eager one happens to be exact. In fp64 it is eight, since the truth is then
    rounded like the others.
    """
    unit = torch.finfo(dtype).eps / 2 * (8 if dtype == torch.float64 else 1)
    for name, want in truth.items():
        assert got[name].shape == want.shape, f"{name}: {got[name].shape}, not {want.shape}"
        if want.numel() == 0:
            continue
        error, allowed = got[name].double() - want, eager[name].double() - want
        worst, limit = float(error.abs().max()), 2 * float(allowed.abs().max())
        tiny = unit * float(want.abs().max())
        assert worst <= limit + tiny, f"{name}: error {worst:.3e} over {limit:.3e} + {tiny:.1e}"
        if want.numel() >= 256:
            worst, limit = float(error.norm()), 2 * float(allowed.norm())
            tiny = 0.01 * unit * float(want.norm())
            assert worst <= limit + tiny, f"{name}: rms error {worst:.3e} over {limit:.3e}"


def update_gain(adapted: Tensor, base: Tensor, update: Tensor) -> float:
    """Which share of ``update`` survives in ``adapted`` - ``base``; 1 is all of it."""
    update = update.double()
    difference = adapted.double() - base.double()
    return float((difference * update).sum() / (update * update).sum())


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN inside the block, so that an element never written shows."""
    mode = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[assignment]


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal in shape, dtype and every bit, the sign of zero and NaN payloads included."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(
        left.detach().contiguous().view(torch.uint8), right.detach().contiguous().view(torch.uint8)
    )


def cpu_backends(op: str, dtype: torch.dtype, m: int = 7, n: int = 32, k: int = 32) -> list[str]:
    """The backends that run this problem here."""
    problem = Problem(op, torch.device("cpu"), dtype, m, n, k, 4)
    return [name for name in backends.BACKENDS if chooser.load(name).supports(problem)[0]]


def ways(op: str, dtype: torch.dtype) -> list[str | None]:
    """Nobody's choice, which may be one native call, and each backend by name."""
    return [None, *cpu_backends(op, dtype)]
