"""What QR-LoRA and LoRA-XS share: ΔW = s · up gateᵀ down, with a vector or a matrix as the gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import functional
from ..autocast import outside_autocast
from ..operands import Kept
from ..reference import accumulation_dtype, hidden_dtype, low_rank_delta_ref
from .adapter import Adapter, Own, State, Tensors


class LowRank(Adapter[Own]):
    """The names of up [N, r], of down [r, K] and of the gate, λ [r] or C [r, r], which trains."""

    up: ClassVar[str]
    down: ClassVar[str]
    gate: ClassVar[str]
    square: ClassVar[bool]  # whether the gate is C and not λ
    function: ClassVar[Callable[..., Tensor]]  # of functional, which takes ``operands`` in order

    @classmethod
    def fused(
        cls, x: Tensor, weight: Tensor, bias: Tensor | None, tensors: Tensors, strength: float
    ) -> Tensor:
        of_three = map(tensors.get, cls.operands)  # down is None in the output form
        return cls.function(x, weight, bias, *of_three, strength)

    @classmethod
    def frozen_of(cls, options: Own, step: str) -> tuple[str, ...] | None:
        if options.form != "two_sided":
            return None
        return (cls.down, cls.up) if step == "fwd" else (cls.up, cls.down)

    @classmethod
    def fused_of_kept(
        cls,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tensors: Tensors,
        strength: float,
        kept: Callable[[bool], tuple[Kept, ...] | None],
    ) -> Tensor | None:
        of_three = tensors[cls.up], tensors[cls.down], tensors[cls.gate]
        return functional.kept_low_rank(x, weight, bias, *of_three, strength, cls.square, kept)

    @classmethod
    def silent(cls, factors: Tensors, options: Own) -> State:
        up = factors[cls.up]
        rank, dtype = up.shape[1], accumulation_dtype(up.dtype)
        shape = (rank, rank) if cls.square else (rank,)
        return {cls.gate: torch.zeros(shape, dtype=dtype, device=up.device)}

    @classmethod
    def fused_by_row(
        cls,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tensors: Tensors,
        own: Tensors,
        index: Tensor,
        options: Own,
        strength: float,
    ) -> Tensor:
        of_tokens = index.reshape(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1])
        return functional.mixed_low_rank_linear(
            x,
            weight,
            bias,
            tensors.get(cls.down),
            tensors[cls.up],
            own[cls.gate],
            of_tokens,
            strength,
        )

    @classmethod
    def update_by_row(
        cls,
        x: Tensor,
        tensors: Tensors,
        own: Tensors,
        index: Tensor,
        options: Own,
        strength: float,
    ) -> Tensor:
        gates = own[cls.gate][index]
        beside_tokens = gates if cls.square else gates.unsqueeze(1)
        of_rows = {**tensors, cls.gate: beside_tokens}
        update = cls.update(cls.flat_rows(x), of_rows, options, strength)
        return update.reshape(*x.shape[:-1], update.shape[-1])

    @classmethod
    def can_train(cls, state: Tensors) -> bool:
        return bool(state[cls.up].any()) and bool(state[cls.down].any())

    @classmethod
    def update(cls, x: Tensor, tensors: Tensors, options: Own, strength: float) -> Tensor:
        up, down, gate = tensors[cls.up], tensors[cls.down], strength * tensors[cls.gate]
        dtype = hidden_dtype(x.dtype)
        h = linear(x.to(dtype), down.to(dtype))
        gated = h @ gate.to(dtype) if cls.square else (h * gate).to(dtype)
        return linear(gated, up.to(dtype)).to(x.dtype)

    @classmethod
    def delta(cls, tensors: Tensors, options: Own, strength: float) -> Tensor:
        up, down, gate = tensors[cls.up], tensors[cls.down], tensors[cls.gate]
        with outside_autocast(up.device.type):
            return low_rank_delta_ref(up, down, gate, strength)

    @classmethod
    def lora_factors(cls, tensors: Tensors, options: Own, strength: float) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(tensors[cls.up].dtype)
        up, gate = strength * tensors[cls.up].to(dtype), tensors[cls.gate].to(dtype)
        with outside_autocast(up.device.type):
            return tensors[cls.down].to(dtype), up @ gate.mT if cls.square else up * gate
