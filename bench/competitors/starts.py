"""Everything that turns a pretrained weight into factors: ours, LAPACK's, PyTorch's, PEFT's."""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

import qrlora_kernels as qk

from ..problem import Unavailable
from .lapack import geqp3rk
from .registry import STARTS, Start

FLOOR = "one product"
Factors = tuple[Tensor, Tensor, Tensor]  # (q, r, pivots) or (u, s, vh)


def _product(prepared: tuple[Tensor, Tensor], rank: int) -> Tensor:
    weight, q = prepared
    return q.mT @ weight


def _draw_basis(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    return weight, torch.randn(weight.shape[0], rank).to(weight)


def _wide(weight: Tensor) -> Tensor:
    """LAPACK computes in fp32 or fp64 only."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _pivoted_qr(weight: Tensor, rank: int) -> Factors:
    found = qk.linalg.pivoted_qr(weight, rank)
    return found.q, found.r, found.pivots


def _truncated_svd(weight: Tensor, rank: int) -> Factors:
    return tuple(qk.linalg.truncated_svd(weight, rank))  # type: ignore[return-value]


def _scipy_qr(weight: Tensor, rank: int) -> Factors:
    import scipy.linalg

    q, r, pivots = scipy.linalg.qr(_wide(weight).numpy(), pivoting=True, mode="economic")
    original = torch.empty(rank, weight.shape[1], dtype=_wide(weight).dtype)
    original[:, torch.from_numpy(pivots).long()] = torch.from_numpy(r[:rank])
    return torch.from_numpy(q[:, :rank]), original, torch.from_numpy(pivots[:rank]).long()


def _geqp3rk(weight: Tensor, rank: int) -> Factors:
    q, r, pivots = geqp3rk(_wide(weight).numpy(), rank)
    return torch.from_numpy(q), torch.from_numpy(r), torch.from_numpy(pivots)


def _full_svd(weight: Tensor, rank: int) -> Factors:
    u, s, vh = torch.linalg.svd(_wide(weight), full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]


def _svd_lowrank(weight: Tensor, rank: int) -> Factors:
    u, s, v = torch.svd_lowrank(_wide(weight), q=rank)
    return u, s, v.mT


def _kron_factors(weight: Tensor, rank: int) -> Any:
    return qk.linalg.kron_factors(weight)


def _peft(init: str, weight: Tensor, rank: int) -> nn.Module:
    """get_peft_model on one layer. It changes the weight, so each run wraps a copy of it."""
    import peft

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    model = nn.Sequential(OrderedDict(linear=linear))
    options: dict[str, Any] = {"init_lora_weights": init}
    config = peft.LoraConfig(r=rank, target_modules=["linear"], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def _needs_lapack(weight: Tensor, rank: int) -> Tensor:
    try:
        geqp3rk(torch.eye(2).numpy(), 1)
    except AttributeError as error:
        raise Unavailable(str(error)) from None
    return weight


_OURS = "qrlora_kernels"
_CPU: dict[str, Any] = {"devices": ("cpu",)}
STARTS += [
    Start(FLOOR, "floor", _product, _draw_basis),
    Start(f"{_OURS} pivoted_qr", "qr", _pivoted_qr),
    Start("scipy geqp3", "qr", _scipy_qr, needs=("scipy",), **_CPU),
    Start("LAPACK geqp3rk", "qr", _geqp3rk, _needs_lapack, needs=("scipy",), **_CPU),
    Start(f"{_OURS} truncated_svd", "svd", _truncated_svd),
    Start("torch.linalg.svd", "svd", _full_svd, largest=1024),
    Start("torch.svd_lowrank", "", _svd_lowrank),
    Start(f"{_OURS} kron_factors", "", _kron_factors),
    Start("torch.linalg.qr", "", lambda weight, rank: torch.linalg.qr(_wide(weight))),
    Start("peft olora", "", functools.partial(_peft, "olora"), needs=("peft",)),
    Start("peft pissa", "", functools.partial(_peft, "pissa"), needs=("peft",), largest=1024),
    Start("peft pissa_niter_4", "", functools.partial(_peft, "pissa_niter_4"), needs=("peft",)),
]
