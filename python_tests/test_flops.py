"""What PyTorch's counter of operations counts: the products of the plain expressions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from cases import LOW_RANK, MIXED_CORE, MIXED_VECTOR, Kind, draw, step
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import qrlora_kernels as qk
from qrlora_kernels import functional, kernels
from qrlora_kernels.backends import reference
from qrlora_kernels.ops import flops

M, N, K, R = 7, 24, 36, 6
OPS = ("qr_linear", "lora_xs_linear", "linear_add")


def counted(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as mode:
        run()
    return int(mode.get_total_flops())


def total(expression: Callable[..., Tensor], given: dict[str, Any], trains: list[str]) -> int:
    """Of the forward and, where anything trains, of the backward."""
    leaves = {name: given[name].clone().requires_grad_() for name in trains}

    def run() -> None:
        y = expression(**given | leaves)
        if leaves:
            y.backward(torch.ones_like(y))

    return counted(run)


def _subsets(names: tuple[str, ...]) -> Iterator[list[str]]:
    for chosen in range(2 ** len(names)):
        yield [name for i, name in enumerate(names) if chosen >> i & 1]


# --- the functions ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "reference", "composed"])
@pytest.mark.parametrize("op", OPS)
def test_a_function_counts_as_the_plain_expression(op: str, backend: str | None) -> None:
    """Forward and backward, whichever operands ask for a gradient."""
    given = helpers.operands(op, (2, M), N, K, R)
    for trains in _subsets(("x", "bias", *helpers.TRAINABLES[op])):
        want = total(lambda **t: helpers.plain(op, t), given, trains)
        got = total(lambda **t: helpers.call(op, t, backend=backend), given, trains)
        assert got == want > 0, trains


@pytest.mark.parametrize("kind", [MIXED_VECTOR, MIXED_CORE], ids=lambda kind: kind.gate)
def test_mixed_gates_count_as_the_plain_expression(kind: Kind) -> None:
    p = draw(kind, M, N, K, R, torch.float32).p
    given = {"x": p.x, "bias": p.bias, "gate": p.gate}

    def plain(x: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        h, gates = x @ p.down.mT, gate[p.index]
        h = h * gates if gate.dim() == 2 else (h[:, None] @ gates)[:, 0]
        return F.linear(x, p.weight, bias) + h @ p.up.mT

    def ours(x: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        return functional.mixed_low_rank_linear(x, p.weight, bias, p.down, p.up, gate, p.index)

    for trains in _subsets(("x", "bias", "gate")):
        assert total(ours, given, trains) == total(plain, given, trains) > 0, trains


@pytest.mark.parametrize("start", [True, False])
def test_the_kronecker_function_counts_two_products_more(start: bool) -> None:
    """It keeps x alone: the backward makes S = X B and, for either factor, T = Aᵀ dY again."""
    given = helpers.operands("kron_linear", M, N, K, R)
    if not start:
        given.pop("a0"), given.pop("b0")
    for trains, again in (
        ([], 0),
        (["x"], 0),
        (["a"], K),
        (["b"], 0),
        (["x", "b"], N),
        (["x", "a", "b"], N + K),
    ):
        want = total(lambda **t: helpers.plain("kron_linear", t), given, trains)
        got = total(lambda **t: helpers.call("kron_linear", t), given, trains)
        assert got == want + 2 * M * R * again, trains


# --- the steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOW_RANK, ids="-".join)
def test_a_step_counts_the_products_that_the_reference_makes(kind: Kind) -> None:
    """Of either form, for any gradients."""
    case = draw(kind, M, N, K, R, torch.float32)
    want = counted(lambda: step(reference, case.p))
    assert counted(lambda: kernels.low_rank_fwd(*case.p, None)) == want > 0
    _, h = case.forward(reference)
    for needs in ((True, True), (True, False), (False, True)):
        p = case.gradient(h, *needs)
        want = counted(lambda p=p: step(reference, p))
        assert counted(lambda p=p: kernels.low_rank_bwd(*p, None)) == want > 0, needs


# --- the layers ---------------------------------------------------------------------------------


class Plain(nn.Module):
    """An adapted layer's expression."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        t = self.layer
        y = F.linear(x, t.weight, t.bias)
        if isinstance(t, qk.QRLinear):
            return y + F.linear(F.linear(x, t.r) * t.lam, t.q)
        return y + F.linear(F.linear(x, t.a) @ t.core, t.b)


@pytest.mark.parametrize("kind", [qk.QRLinear, qk.LoRAXSLinear])
@pytest.mark.parametrize("tokens", [M, 300])
def test_a_layer_counts_as_its_plain_expression(tokens: int, kind: Any) -> None:
    layer = kind.from_linear(nn.Linear(K, N), R)
    x = torch.randn(tokens, K, requires_grad=True)
    want = counted(lambda: Plain(layer)(x).sum().backward())
    assert counted(lambda: layer(x).sum().backward()) == want > 0
    with torch.no_grad():
        assert counted(lambda: layer(x)) == counted(lambda: Plain(layer)(x))


def test_a_kronecker_layer_counts_as_its_function() -> None:
    layer = qk.OHoRALinear.from_linear(nn.Linear(K, N), 4)
    x = torch.randn(M, K, requires_grad=True)
    update = 2 * M * 4 * (N + K)
    base = 2 * M * N * K
    got = counted(lambda: layer(x).sum().backward())
    assert got == 2 * base + 6 * update
    with torch.no_grad():
        assert counted(lambda: layer(x)) == base + 2 * update


# --- when the counter learns of them ------------------------------------------------------------

PROGRAM = """
import sys
import torch
import qrlora_kernels as qk
assert not {"triton", "torch.utils.flop_counter"} & sys.modules.keys()
layer = qk.QRLinear.from_linear(torch.nn.Linear(36, 24), 6)
x = torch.randn(7, 36, requires_grad=True)
def step(): layer(x).sum().backward()
"""
MADE = {
    "before the first call": "from torch.utils.flop_counter import FlopCounterMode as Mode\n"
    "mode = Mode(display=False)\n",
    "after the first call": "step()\nfrom torch.utils.flop_counter import FlopCounterMode as Mode\n"
    "mode = Mode(display=False)\n",
    "after a counted call": "from torch.utils.flop_counter import FlopCounterMode as Mode\n"
    "with Mode(display=False): step()\nmode = Mode(display=False)\n",
    "before the package": "",
}
COUNT = """
with mode: step()
print(mode.get_total_flops(), flush=True)
"""


@pytest.mark.parametrize("when", MADE)
def test_a_mode_may_be_made_at_any_time(when: str) -> None:
    """And importing the package imports neither the counter nor Triton, which it brings along."""
    program = PROGRAM + MADE[when] + COUNT
    if when == "before the package":
        first = "from torch.utils.flop_counter import FlopCounterMode\n"
        program = first + "mode = FlopCounterMode(display=False)\n" + PROGRAM + COUNT
        program = "\n".join(line for line in program.split("\n") if "sys.modules" not in line)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    base, update = 2 * 7 * 24 * 36, 2 * 7 * 6 * (24 + 36)
    assert int(done.stdout) == 2 * (base + update)


def test_every_operator_has_a_formula() -> None:
    names = {str(operator).split(".")[1] for operator in flops._formulas}
    assert names == {"low_rank_fwd", "low_rank_bwd", "kron_fwd", "kron_bwd", "linear_add_fwd"}
