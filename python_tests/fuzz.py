"""Random calls with operands that are not what they seem, in a process that may die of them.

    python python_tests/fuzz.py --calls 10000

Every public operation on every backend that runs here, forward and backward, and the starts of
linalg. A result is compared with fp64; without one there is a TypeError or ValueError. Any other
exception fails, unless the class or layout of an operand answers PyTorch's operations itself, and
the plain expression in PyTorch raises the same for it.
"""

from __future__ import annotations

import argparse
import random
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import disguises
import helpers
import torch
from helpers import OPERANDS, OPS, TRAINABLES
from torch import Tensor

from qrlora_kernels import linalg

STARTS = ("pivoted_qr", "truncated_svd", "kron_factors")
SHAPES = [(24, 36, 3), (32, 32, 4), (1, 6, 1), (6, 1, 1), (5, 1, 1), (48, 16, 2)]
LEADS: list[tuple[int, ...]] = [(1,), (3,), (7,), (40,), (70,), (0,), (), (2, 3), (1, 1), (2, 1, 2)]
KINDS = {
    **dict.fromkeys(disguises.SAME, "known"),
    **dict.fromkeys(disguises.OTHER, "known"),
    **dict.fromkeys(disguises.ANSWERING, "answering"),
    **dict.fromkeys(disguises.REFUSED, "refused"),
}
DISGUISES = {
    **disguises.SAME, **disguises.OTHER, **disguises.ANSWERING, **disguises.REFUSED,
}  # fmt: skip


class Call(NamedTuple):
    """What is called, and which operand wears which disguise."""

    op: str
    dtype: torch.dtype
    shape: tuple[int, int, int]
    lead: tuple[int, ...]
    backend: str | None
    worn: dict[str, str]
    training: bool
    seed: int

    @property
    def kind(self) -> str:
        """The least trustworthy of the disguises."""
        kinds = {KINDS[disguise] for disguise in self.worn.values()}
        return next((k for k in ("refused", "answering") if k in kinds), "known")


class Wrong(Exception):
    """A value that is not right, or a refusal of the wrong type."""


def drawn(seed: int) -> Call:
    """The call of this number, always the same."""
    pick = random.Random(seed)
    op = pick.choice(OPS + STARTS)
    dtype, shape, lead = pick.choice(helpers.DTYPES), pick.choice(SHAPES), pick.choice(LEADS)
    names = ["x", "weight", "bias", *OPERANDS[op], "dy"] if op in OPS else ["weight"]
    weights = [6 if KINDS[name] == "known" else 1 for name in DISGUISES]
    worn = pick.sample(names, min(len(names), pick.choice((1, 1, 2, 3))))
    backend = None
    if op in OPS and pick.random() < 0.6:
        backend = pick.choice(helpers.cpu_backends(op, dtype, *shape[:2]))
    return Call(
        op, dtype, shape, lead, backend,
        {name: pick.choices(list(DISGUISES), weights)[0] for name in worn},
        pick.random() < 0.7, seed,
    )  # fmt: skip


def run(call: Call) -> str:
    """Make the call and judge it: "right" or "refused", or raise :class:`Wrong`."""
    torch.manual_seed(call.seed)
    act = _operation if call.op in OPS else _start
    try:
        return act(call)
    except (TypeError, ValueError) as error:
        if call.kind == "known" and not _zero_start(call, error):
            raise Wrong(f"refused: {error}") from error
        return "refused"
    except Wrong:
        raise
    except Exception as error:
        if call.kind == "answering" and call.op in OPS and _plain_raises(call, type(error)):
            return "refused"
        raise Wrong(f"{type(error).__name__}: {error}") from error


# --- operations


def _operation(call: Call) -> str:
    given, dy, leaves = _operands(call)
    y = helpers.call(call.op, given, backend=call.backend)
    if y.requires_grad:
        y.backward(dy)
    if call.kind != "known":
        return _accepted(call, given | {"dy": dy}, y)
    exact = {n: _plain(t.double()) if isinstance(t, Tensor) else t for n, t in given.items()}
    for name in leaves:
        exact[name].requires_grad_()
    want = helpers.exact(call.op, exact)
    _compare("y", y, want, call.dtype)
    if y.requires_grad:
        want.backward(_plain(dy.double()))
        for name in leaves:
            _compare(name, given[name].grad, exact[name].grad, call.dtype)
    return "right"


def _accepted(call: Call, given: dict[str, Any], y: Tensor) -> str:
    """A result over operands that have no values to compare with: whether there may be one."""
    for name, disguise in call.worn.items():
        if name == "dy" and not y.requires_grad:
            continue
        t = given[name]
        if KINDS[disguise] == "refused" and t.numel() > 0:
            raise Wrong(f"{name}: memory that is not there was read")
        if name == "x" and disguise in ("one dimension more", "one short"):
            continue  # other tokens, or fewer
        if KINDS[disguise] == "answering" and name != "dy" and not _answers(y):
            raise Wrong(f"{name}: a plain result from {disguise}")
    return "answered"


def _answers(y: Tensor) -> bool:
    """Whether a result is what another class, or the meta device, made of the operation."""
    return type(y) is not Tensor or y.is_meta or torch._is_functional_tensor(y)


def _operands(call: Call) -> tuple[dict[str, Any], Tensor, list[str]]:
    """The operands and dy in their disguises, and the names of those that ask for a gradient."""
    given = helpers.operands(call.op, call.lead, *call.shape, call.dtype, seed=call.seed)
    dy = helpers.gradient_like(call.op, given, seed=call.seed + 1)
    for name, disguise in call.worn.items():
        if name == "dy":
            dy = DISGUISES[disguise](dy)
        else:
            given[name] = DISGUISES[disguise](given[name])
    leaves: list[str] = []
    for name in ("x", "bias", *TRAINABLES[call.op]) if call.training else ():
        trusted = KINDS[call.worn.get(name, "plain")] == "known"
        if trusted and random.Random(f"{call.seed} {name}").random() < 0.7:
            given[name] = given[name].detach().requires_grad_()
            leaves.append(name)
    return given, dy, leaves


def _plain_raises(call: Call, error: type[Exception]) -> bool:
    """Whether the plain expression in PyTorch raises the same."""
    given, dy, _ = _operands(call)
    try:
        y = helpers.plain(call.op, given)
        if y.dim() != 2:  # reshaped as the operations do it
            y = y.reshape(-1, y.shape[-1]).view(y.shape)
        if y.requires_grad:
            y.backward(dy)
    except error:
        return True
    except Exception:
        return False
    return False


def _plain(t: Any) -> Any:
    """The values alone."""
    if not isinstance(t, Tensor):
        return t
    return t.detach().as_subclass(Tensor).resolve_neg().clone(memory_format=torch.contiguous_format)


def _compare(name: str, got: Tensor | None, want: Tensor | None, dtype: torch.dtype) -> None:
    if got is None or want is None:
        raise Wrong(f"{name}: {'no' if got is None else 'a'} gradient")
    if got.shape != want.shape:
        raise Wrong(f"{name}: shape {tuple(got.shape)}, not {tuple(want.shape)}")
    if want.numel() == 0:
        return
    error = float((_plain(got).double() - want.detach()).abs().max())
    units = 12 if dtype in helpers.HALF else 200  # a planted fault is of the size of the values
    limit = units * torch.finfo(dtype).eps * (1 + float(want.detach().abs().max()))
    if not error <= limit:  # NaN included
        raise Wrong(f"{name}: off by {error:.3g}, of which {limit:.3g} may be rounding")


# --- starts


def _start(call: Call) -> str:
    n, k, r = call.shape
    generator = torch.Generator().manual_seed(call.seed)
    weight = torch.randn(n, k, generator=generator, dtype=torch.float64).to(call.dtype)
    given = DISGUISES[call.worn["weight"]](weight)
    function: Callable[..., Any] = getattr(linalg, call.op)
    result = function(given, r, out_dtype=call.dtype)
    if call.kind != "known" and call.worn["weight"] != "one short":
        raise Wrong("took a matrix that has no elements")
    exact = _plain(given.double())
    size, unit = float(exact.norm()), 20 * torch.finfo(call.dtype).eps
    for name, error in _errors(call, result, exact).items():
        if not float(error.norm()) <= unit * (1 + size):
            raise Wrong(f"{name}: off by {float(error.norm()):.3g}, for a matrix of {size:.3g}")
    return "right"


def _errors(call: Call, result: Any, exact: Tensor) -> dict[str, Tensor]:
    """What has to vanish, by name."""
    if call.op == "pivoted_qr":
        q, r, pivots = result.q.double(), result.r.double(), result.pivots
        return {
            "columns": exact[:, pivots] - q @ r[:, pivots],
            "q": q.mT @ q - torch.eye(len(pivots), dtype=q.dtype),
            "r": q.mT @ exact - r,
        }
    if call.op == "truncated_svd":
        u, s, vh = (t.double() for t in result)
        return {"right": exact @ vh.mT - u * s, "left": u.mT @ exact - s[:, None] * vh}
    again = linalg.kron_factors(exact.to(call.dtype), call.shape[2], out_dtype=call.dtype)
    return {"a0": result.a0.double() - again.a0.double(), "b0": (result.b0 - again.b0).double()}


def _zero_start(call: Call, error: Exception) -> bool:
    """Whether a matrix was refused for its values or its shape, from which there is no start."""
    return call.op in STARTS and any(
        text in str(error) for text in ("must not be zero", "other than zero", "2r =", "at most")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=600)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--note", type=Path, help="holds the call that is being made")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    counts: dict[str, int] = {}
    failures = 0
    for seed in range(options.first, options.first + options.calls):
        call = drawn(seed)
        if options.note:
            options.note.write_text(repr(call))
        try:
            verdict = run(call)
        except Wrong as error:
            verdict, failures = "wrong", failures + 1
            print(f"{call}\n    {error}", flush=True)
            if error.__cause__ is not None and failures <= 3:
                traceback.print_exception(error.__cause__, limit=-4, file=sys.stdout)
        counts[verdict] = counts.get(verdict, 0) + 1
    print(counts)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
