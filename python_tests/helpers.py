"""What the tests share: problems with known exact answers, the error bound, poisoned memory.

The exact answers come from the dense update in fp64 (``exact``), not from the package.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import error_bound
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qrlora_kernels import backends, functional, linalg
from qrlora_kernels.backends import Problem
from qrlora_kernels.dispatch import chooser
from qrlora_kernels.dispatch.problem import joined
from qrlora_kernels.operands import Kron, LowRank

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


def record(op: str, t: Operands) -> LowRank | Kron:
    """The operands of a public function as backends take them."""
    base = t["x"], t["weight"], t["bias"]
    if op == "kron_linear":
        return Kron(*base, t["a"], t["b"], t.get("a0"), t.get("b0"), SCALING)
    names = ("q", "r", "lam") if op == "qr_linear" else ("b", "a", "core")
    return LowRank(*base, *(t[name] for name in names), None, SCALING)


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


def in_fp64(op: str, given: Operands, dy: Tensor) -> dict[str, Tensor]:
    """What ``outcome`` is exactly: y and the gradients through the dense weight, in fp64."""
    wide = {name: t.double() if isinstance(t, Tensor) else t for name, t in given.items()}
    return outcome(exact, op, wide, dy)


def assert_error_bound(op: str, given: Operands, dy: Tensor, got: dict[str, Tensor]) -> None:
    """Every element of ``got``, an ``outcome`` under ``dy``, within the bound of the arithmetic."""
    truth = in_fp64(op, given, dy)
    truth = {name: truth[name] for name in got}
    error_bound.assert_within_bound(got, truth, error_bound.bounds(op, given, dy, SCALING, truth))


def pooled(
    op: str,
    backend: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    draws: int,
    first_seed: int = 0,
) -> tuple[list[dict[str, Tensor]], ...]:
    """What ``backend`` finds in so many draws, what the plain expression finds, and what is exact.

    Of the gradients only those that an adapter has a say in.
    """
    got, eager, truth = [], [], []
    for seed in range(first_seed, first_seed + draws):
        given = operands(op, *shape, dtype, bias=seed % 2 == 0, seed=seed)
        dy = gradient_like(op, given, seed + 1)
        got.append(outcome(lambda o, t: call(o, t, backend=backend), op, given, dy))
        eager.append(outcome(plain, op, given, dy))
        exactly = in_extended(op, given, dy) if dtype == torch.float64 else in_fp64(op, given, dy)
        names = ("y", "x", *TRAINABLES[op]) if op != "linear_add" else ("y", "x")
        truth.append({name: exactly[name] for name in names})
    return got, eager, truth


# Whether NumPy's long double is wider than fp64 here; it is not on every platform.
EXTENDED = np.finfo(np.longdouble).nmant > np.finfo(np.float64).nmant


def in_extended(op: str, given: Operands, dy: Tensor) -> dict[str, Tensor]:
    """``in_fp64`` with every step in long double, rounded to fp64 once: the truth for fp64."""
    t = {n: v.double().numpy().astype(np.longdouble) for n, v in given.items() if v is not None}
    x, grad = t["x"], dy.double().numpy().astype(np.longdouble)
    found = {}
    weight = t["weight"]
    if op == "kron_linear":
        pairs = [("a", "b", 1), ("a0", "b0", -1)]
        weight = weight + SCALING * sum(s * np.kron(t[a], t[b].T) for a, b, s in pairs)
        m, r = len(x), t["a"].shape[1]
        tokens, grads = x.reshape(m, r, -1), grad.reshape(m, -1, r)
        found["a"] = SCALING * np.einsum("mnj,mij->ni", grads, tokens @ t["b"])
        found["b"] = SCALING * np.einsum("mik,mij->kj", tokens, t["a"].T @ grads)
    elif op == "qr_linear":
        weight = weight + SCALING * (t["q"] * t["lam"]) @ t["r"]
        found["lam"] = SCALING * ((x @ t["r"].T) * (grad @ t["q"])).sum(0)
    elif op == "lora_xs_linear":
        weight = weight + SCALING * t["b"] @ t["core"].T @ t["a"]
        found["core"] = SCALING * (x @ t["a"].T).T @ (grad @ t["b"])
    found["x"] = grad @ weight
    found["y"] = x @ weight.T + t.get("bias", 0) + t.get("addend", 0)
    return {name: torch.from_numpy(v.astype(np.float64)) for name, v in found.items()}


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


def supports(backend: str, problem: Problem) -> bool:
    """Whether ``backend`` can run it."""
    return bool(chooser.recipes(backend, joined(problem)))


def cpu_backends(op: str, dtype: torch.dtype, m: int = 7, n: int = 32, k: int = 32) -> list[str]:
    """The backends that run this problem here."""
    problem = Problem(op, torch.device("cpu"), dtype, m, n, k, 4)
    return [name for name in backends.BACKENDS if supports(name, problem)]


def ways(op: str, dtype: torch.dtype) -> list[str | None]:
    """Nobody's choice, which may be one native call, and each backend by name."""
    return [None, *cpu_backends(op, dtype)]
