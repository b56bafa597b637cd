"""The mathematics pinned against formulas that share no code with the package."""

from __future__ import annotations

import math

import helpers
import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels import linalg


def _linear(n, k, dtype=torch.float64, seed=0, decay=0.0):
    """A layer whose weight has singular values falling by e^-decay each."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator, dtype=torch.float64) / k**0.5
    if decay:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        weight = u * (s[0] * torch.exp(-decay * torch.arange(len(s)))) @ vh
    linear = nn.Linear(k, n, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return linear


def _close(got: Tensor, want: Tensor, tolerance: float = 1e-10):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# --- Kronecker


def test_kron_linear_is_torch_kron():
    torch.manual_seed(0)
    a, b = torch.randn(4, 3).double(), torch.randn(5, 3).double()
    x, weight = torch.randn(7, 15).double(), torch.zeros(12, 15).double()
    y = qk.functional.kron_linear(x, weight, None, a, b)
    _close(y, x @ torch.kron(a, b.T.contiguous()).T)


def test_kron_linear_is_vec_of_the_matrix_product():
    """(A ⊗ Bᵀ) vec(Z) = vec(Bᵀ Z Aᵀ), columns stacked (EMNLP 2025, eq. 6)."""
    torch.manual_seed(0)
    a, b, z = (torch.randn(*shape).double() for shape in ((4, 3), (5, 3), (5, 3)))
    x = z.T.reshape(-1)  # stacks the columns of Z
    y = qk.functional.kron_linear(x, torch.zeros(12, 15).double(), None, a, b)
    _close(y, (b.T @ z @ a.T).T.reshape(-1))


def test_ohora_starts_from_the_papers_factors():
    """A₀ = Q[:N/r, I₁] R[I₁, :r] and B₀ = Q[:K/r, I₂] R[I₂, :r] from numpy's QR (eq. 8, 9)."""
    linear, r = _linear(24, 36), 2
    q, upper = np.linalg.qr(linear.weight.detach().numpy())
    order = np.argsort(-np.abs(np.diag(upper)), kind="stable")
    first, second = order[:r], order[r : 2 * r]
    leading = qk.OHoRALinear.from_linear(linear, rank=r)
    _close(leading.a0, torch.from_numpy(q[:12, first] @ upper[first, :r]))
    _close(leading.b0, torch.from_numpy(q[:18, second] @ upper[second, :r]))
    selected = qk.OHoRALinear.from_linear(linear, rank=r, columns="selected")
    _close(selected.a0, torch.from_numpy(q[:12, first] @ upper[np.ix_(first, first)]))
    _close(selected.b0, torch.from_numpy(q[:18, second] @ upper[np.ix_(second, second)]))


# --- LoRA-XS


@pytest.mark.parametrize("sigma", ["in", "out", "split"])
def test_identity_core_gives_the_truncated_weight(sigma):
    """C = I and s = α/r: the update is s times the best rank-r approximation of W."""
    linear, r = _linear(24, 36), 5
    layer = qk.LoRAXSLinear.from_linear(linear, r, alpha=10, sigma=sigma)
    with torch.no_grad():
        layer.core.copy_(torch.eye(r))
    u, s, vh = np.linalg.svd(linear.weight.detach().numpy())
    truncated = (u[:, :r] * s[:r]) @ vh[:r]
    _close(layer.delta_weight(), 10 / 5 * torch.from_numpy(truncated), 1e-6)


@pytest.mark.parametrize("vectors", ["top", "middle", "bottom"])
def test_choice_of_singular_vectors(vectors):
    linear, r = _linear(24, 36), 4
    layer = qk.LoRAXSLinear.from_linear(linear, r, vectors=vectors)
    first = {"top": 0, "middle": 10, "bottom": 20}[vectors]
    s = np.linalg.svd(linear.weight.detach().numpy(), compute_uv=False)
    _close(layer.a.norm(dim=1), torch.from_numpy(s[first : first + r].copy()), 1e-6)
    peak = layer.b.gather(0, layer.b.abs().argmax(0, keepdim=True))
    assert (peak > 0).all(), "the sign of each pair of vectors is fixed by its largest entry"


# --- QR-LoRA


def test_qr_is_scipys_with_the_permutation_undone():
    linear, r = _linear(24, 36), 6
    layer = qk.QRLinear.from_linear(linear, rank=r)
    q, upper, pivots = scipy.linalg.qr(linear.weight.detach().numpy(), pivoting=True)
    assert layer.pivots.tolist() == pivots[:r].tolist()
    signs = np.sign(np.diag(upper))
    original_order = np.empty_like(upper)
    original_order[:, pivots] = upper
    _close(layer.q, torch.from_numpy(q[:, :r] * signs[:r]), 1e-8)
    _close(layer.r, torch.from_numpy(signs[:r, None] * original_order[:r]), 1e-8)
    _close(layer.diagonal, torch.from_numpy(np.abs(np.diag(upper))[:r]), 1e-8)


def test_unit_lambda_gives_the_truncation():
    linear, r = _linear(24, 36), 6
    layer = qk.QRLinear.from_linear(linear, rank=r, scaling=0.5)
    with torch.no_grad():
        layer.lam.fill_(1.0)
    q, upper, pivots = scipy.linalg.qr(linear.weight.detach().numpy(), pivoting=True)
    truncated = np.empty((24, 36))
    truncated[:, pivots] = q[:, :r] @ upper[:r]
    _close(layer.delta_weight(), 0.5 * torch.from_numpy(truncated), 1e-8)
    # Each direction can be moved alone: one λ is one rank-one term of the sum.
    with torch.no_grad():
        layer.lam.copy_(torch.eye(r)[2])
    _close(layer.delta_weight(), 0.5 * torch.outer(layer.q[:, 2], layer.r[2]))


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9])
def test_rank_rules_by_hand(tau):
    linear = _linear(24, 36, decay=0.2)
    upper = scipy.linalg.qr(linear.weight.detach().numpy(), mode="r", pivoting=True)[0]
    diagonal = np.abs(np.diag(upper))
    squares = diagonal**2

    def first_reaching(terms):
        return next(i + 1 for i in range(24) if terms[: i + 1].sum() >= tau * terms.sum())

    want = {
        "magnitude": sum(d > tau * diagonal[0] for d in diagonal),
        "energy": first_reaching(squares),
        "abs_sum": first_reaching(diagonal),
    }
    for rule, rank in want.items():
        assert qk.QRLinear.from_linear(linear, tau=tau, rank_rule=rule).rank == rank, rule
        capped = qk.QRLinear.from_linear(linear, tau=tau, rank_rule=rule, max_rank=3)
        assert capped.rank == min(rank, 3)
    assert len(set(want.values())) > 1, "the rules must differ here for this to test them"


def test_default_rule_is_magnitude_at_one_half():
    linear = _linear(24, 36, decay=0.2)
    default = qk.QRLinear.from_linear(linear)
    assert default.rank == qk.QRLinear.from_linear(linear, tau=0.5, rank_rule="magnitude").rank


# --- for all three


ADAPTERS = {
    "qr": lambda linear: qk.QRLinear.from_linear(linear, rank=4, scaling=0.7),
    "lora_xs": lambda linear: qk.LoRAXSLinear.from_linear(linear, 4, alpha=3.0),
    "ohora": lambda linear: qk.OHoRALinear.from_linear(linear, rank=4, alpha=2.0),
    "ohora-lora": lambda linear: qk.OHoRALinear.from_linear(linear, rank=4, product="lora"),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_forward_is_the_dense_product_with_the_update(adapter):
    torch.manual_seed(0)
    linear = _linear(32, 16)
    layer = ADAPTERS[adapter](linear)
    x = torch.randn(5, 16, dtype=torch.float64)
    start = layer(x)
    if adapter != "lora_xs":
        _close(start, linear(x), 1e-12)  # the model starts unchanged
    with torch.no_grad():
        for name in layer.trainables:
            getattr(layer, name).add_(torch.randn_like(getattr(layer, name)))
    assert (layer(x) - start).abs().max() > 0.1
    _close(layer(x), x @ (linear.weight + layer.delta_weight()).T + linear.bias, 1e-11)


@pytest.mark.parametrize("adapter", [a for a in ADAPTERS if a != "ohora"])
def test_lora_factors_multiply_to_the_update(adapter):
    layer = ADAPTERS[adapter](_linear(32, 16))
    with torch.no_grad():
        for name in layer.trainables:
            getattr(layer, name).add_(torch.randn_like(getattr(layer, name)))
    a, b = layer.lora_factors()
    assert a.shape[1] == 16
    assert b.shape[0] == 32
    _close(b @ a, layer.delta_weight(), 1e-12)


def test_kronecker_update_has_no_low_rank_factors():
    with pytest.raises(TypeError, match="not low-rank"):
        ADAPTERS["ohora"](_linear(32, 16)).lora_factors()


def test_scaling_is_alpha_over_r_and_one_without_alpha():
    linear = _linear(32, 16)
    assert qk.LoRAXSLinear.from_linear(linear, 4).scaling == 1.0
    assert qk.LoRAXSLinear.from_linear(linear, 4, alpha=8).scaling == 2.0
    assert qk.OHoRALinear.from_linear(linear, rank=4).scaling == 1.0
    assert qk.OHoRALinear.from_linear(linear, rank=4, alpha=2).scaling == 0.5
    assert qk.QRLinear.from_linear(linear, rank=4).scaling == 1.0


# --- counts and ranks


def test_high_rank_by_hand():
    for n, k in ((4096, 4096), (11008, 4096), (768, 3072), (30, 42), (7, 11), (1, 1)):
        want = max(i for i in range(1, 200) if i * i <= min(n, k) and n % i == 0 == k % i)
        assert linalg.high_rank(n, k) == want
        assert linalg.high_rank(k, n) == want


def test_ohora_on_llama_2_7b_trains_the_papers_number():
    """2,498,560 over q, k, v, o, gate, up and down of 32 layers, as the paper's table says."""
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    trained = 0
    for n, k in shapes:
        r = linalg.high_rank(n, k)
        trained += (n // r) * r + (k // r) * r
    assert 32 * trained == 2_498_560


def test_layers_train_the_papers_numbers():
    """LoRA-XS on RoBERTa-large: r² = 256 for query and value of 24 layers is 12,288."""
    linear = _linear(48, 64, torch.float32)
    assert 24 * 2 * qk.LoRAXSLinear.from_linear(linear, 16).trained_parameters() == 12_288
    assert qk.QRLinear.from_linear(linear, rank=16).trained_parameters() == 16
    assert qk.OHoRALinear.from_linear(linear, rank=4).trained_parameters() == 48 + 64


def test_effective_rank():
    """exp of the entropy of the normalised singular values (OHoRA, eq. 17)."""
    assert linalg.effective_rank(torch.eye(7)) == pytest.approx(7)
    assert linalg.effective_rank(torch.outer(torch.ones(5), torch.ones(3))) == pytest.approx(1)
    weights = [0.5, 0.25, 0.25]
    want = math.exp(-sum(p * math.log(p) for p in weights))
    assert linalg.effective_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))) == pytest.approx(want)


def test_kronecker_product_multiplies_ranks():
    """Why OHoRA: a product of two r-column factors has rank up to r², a LoRA of its size only r."""
    torch.manual_seed(0)
    layer = qk.OHoRALinear.from_linear(_linear(32, 16), rank=4, columns="selected")
    with torch.no_grad():
        layer.a.add_(torch.randn_like(layer.a))
    assert int(torch.linalg.matrix_rank(layer.delta_weight())) == 16


def test_helpers_delta_agrees_with_the_reference():
    """The exact answers of the other tests and the reference are two writings of one formula."""
    from qrlora_kernels import reference

    operands = helpers.operands("kron_linear", 1, 12, 18, 3, torch.float64)
    factors = (operands[name] for name in ("a", "b", "a0", "b0"))
    delta = reference.kron_delta_ref(*factors, scaling=helpers.SCALING)
    _close(delta, helpers.delta_weight("kron_linear", operands))
