"""A low-rank update onto a base product that somebody else made."""

from __future__ import annotations

import pytest
import torch
from helpers import update_gain

from qrlora_kernels.functional import low_rank_onto

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
N, K, R = 24, 16, 3


def operands(dtype, square=False, m=(7,), wide=0):
    torch.manual_seed(0)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "y0": torch.randn(*m, N, dtype=kept),
        "x": torch.randn(*m, K).to(dtype),
        "a": torch.randn(R + wide, K).to(dtype),
        "b": torch.randn(N, R + wide).to(dtype),
        "gate": torch.randn(R, R) if square else torch.randn(R),
    }


def exact(o, scaling=1.0):
    o = {name: t.double() for name, t in o.items()}
    h = o["x"] @ o["a"][:R].t()
    gated = h * o["gate"] if o["gate"].dim() == 1 else h @ o["gate"]
    return o["y0"] + scaling * gated @ o["b"][:, :R].t()


def fitting(o):
    """The gate in the dtype that goes with fp64 operands."""
    return o | ({"gate": o["gate"].double()} if o["x"].dtype == torch.float64 else {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("m", [(), (0,), (1,), (7,), (2, 3, 5)])
@pytest.mark.parametrize("wide", [0, 2])
def test_it_is_the_sum(dtype, square, m, wide):
    o = fitting(operands(dtype, square, m, wide))
    y = low_rank_onto(*o.values(), 0.5)
    want = exact(o, 0.5)
    assert y.dtype == dtype
    assert y.shape == want.shape
    eps = torch.finfo(dtype).eps
    assert (y.double() - want).norm() <= 4 * eps * (want - o["y0"]).norm() + eps * want.norm()


@pytest.mark.parametrize("square", [False, True])
def test_its_gradients(square):
    o = fitting(operands(torch.float64, square))
    for name in ("y0", "x", "gate"):
        o[name].requires_grad_()
    assert torch.autograd.gradcheck(low_rank_onto, (*o.values(), 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_small_update_survives_onto_an_unrounded_product(dtype):
    """And is lost onto a rounded one, which is why it takes the other."""
    o = operands(dtype, m=(8192,))
    update = exact(o) - o["y0"].double()
    small = 1e-4 * float(o["y0"].norm() / update.norm())
    still = o["y0"].to(dtype)
    y = low_rank_onto(*o.values(), small)
    assert update_gain(y, still, small * update) == pytest.approx(1, abs=0.06)
    rounded = low_rank_onto(still, *list(o.values())[1:], small)
    if dtype == torch.bfloat16:
        assert abs(update_gain(rounded, still, small * update) - 1) > 0.2


def test_x_is_not_kept():
    o = operands(torch.bfloat16)
    o["gate"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        low_rank_onto(*o.values())
    assert not any(t.shape == o["x"].shape for t in kept)


def test_under_autocast_and_a_compiler():
    o = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = low_rank_onto(*o.values())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact(o), rtol=2e-2, atol=2e-1)
    compiled = torch.compile(low_rank_onto, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*o.values()), low_rank_onto(*o.values()))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.randn(7, K + 1)}, r"a must have shape \[3, 17\]"),
        ({"x": torch.ones(7, K, dtype=torch.int64)}, "x must be float16"),
        ({"x": torch.tensor(1.0)}, r"x must have shape \[..., K\]"),
        ({"a": torch.randn(R - 1, K)}, r"a must have shape \[3, 16\]"),
        ({"b": torch.randn(N)}, "b must have shape"),
        ({"b": torch.randn(N, R).half()}, "b must be torch.float32 like x"),
        ({"gate": torch.randn(R, R - 1)}, r"gate must have shape \[r\] or \[r, r\]"),
        ({"gate": torch.tensor(1.0)}, r"gate must have shape \[r\] or \[r, r\]"),
        ({"gate": torch.randn(R).double()}, "gate must be torch.float32 like x"),
        ({"y0": torch.randn(7, N + 1)}, r"y0 must have shape \[7, 24\]"),
        ({"y0": torch.randn(7, N).half()}, "y0 must be torch.float32 like x"),
        ({"y0": torch.randn(7, N, device="meta")}, "y0 must be on cpu like x"),
        ({"y0": [1.0]}, "y0 must be a torch.Tensor, got list"),
        ({"scaling": "1"}, "scaling must be a float"),
    ],
)
def test_what_does_not_fit_is_named(wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        low_rank_onto(**(operands(torch.float32) | wrong))


def test_other_kinds_of_tensors_meet_one_function():
    seen = []

    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return torch.zeros(1)

    o = operands(torch.float32)
    low_rank_onto(o["y0"], o["x"].as_subclass(Own), o["a"], o["b"], o["gate"])
    assert seen == [low_rank_onto]
