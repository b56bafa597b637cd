"""The start of an adapter on all layers of a model that its config names, as one batch."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from ..adapters import Options, State
from ..linalg import StartRunner
from ..linalg.parallel import in_threads
from ..model.advice import warn_if_large
from ..model.targets import bypassed
from ..nn import base_weight
from ..reference import accumulation_dtype
from . import merging, record
from .config import AdapterConfig, QRLoraConfig
from .held import AdaptedLayer, Made
from .layer import _Linear, check_supported


def start(
    model: nn.Module, targets: Mapping[str, nn.Module], config: AdapterConfig
) -> dict[str, Made]:
    """Trainables and factors for each of ``targets``, before anything in ``model`` changes.

    Raises
    ------
    TypeError, ValueError
        If a layer cannot be adapted or gives no start; the message names it.
    """
    modules = dict(model.named_modules())
    bases = {name: check_supported(name, target) for name, target in targets.items()}
    for name in targets:
        parent = bypassed(name, modules)
        if parent:
            raise ValueError(
                f"{name} belongs to an {parent}, which reads its weight and never calls it: an "
                "adapter there would have no effect; name it in exclude_modules"
            )
    made: dict[str, Made] = {}
    by_options: dict[Options, dict[str, Tensor]] = defaultdict(dict)
    with ExitStack() as here:
        here.enter_context(base_weight.present(*bases.values()))
        weights = {name: _weight(name, targets[name], bases[name]) for name in targets}
        options = _bounded(config, weights)
        heads = dict(zip(targets, in_threads(_head, targets.values()), strict=True))
        devices = {name: cast(Tensor, base.weight).device for name, base in bases.items()}
        gradients = {name: base_weight.gradient(base) for name, base in bases.items()}
        for name, weight in weights.items():
            zeros = _put_off(config, weight, options[name], devices[name])
            shared = _shared(targets[name], heads[name], options[name], gradients[name])
            if zeros is not None:
                made[name] = Made(options[name], 1.0, zeros, heads[name])
            elif shared is None:
                by_options[options[name]][name] = weight
            else:
                state = shared | fresh(config, shared, options[name], weight.dtype)
                made[name] = Made(options[name], 1.0, state, heads[name])
        run = StartRunner(config.progress, config.cache, config.distributed)
        for opts, group in by_options.items():
            run.require_agreement(facts={"adapter": config.kind.value} | opts.to_dict())
            for names in _batches(group):
                batch = config.adapter.start(_dense(names, group, bases), opts, run, gradients)
                for name, state in batch.items():
                    made[name] = Made(opts, 1.0, state, heads[name])
    for name, one in made.items():
        one.scaling = config.scaling_of(name, config.adapter.rank(one.state))
        one.from_file = config.brings_factors
        if not config.init_weights:
            one.state |= _random(config, one.state)
    _tell_large(weights, made)
    return {name: made[name] for name in targets}


def _tell_large(weights: Mapping[str, Tensor], made: Mapping[str, Made]) -> None:
    ruled = [n for n, one in made.items() if "q" in one.state and one.options.rank is None]  # type: ignore[attr-defined]
    matrices = (t for n in ruled for t in made[n].state.values() if t.dim() == 2)
    factors = sum(matrix.numel() for matrix in matrices)
    ranks = [len(made[n].state["lam"]) for n in ruled]
    warn_if_large(sum(weights[n].numel() for n in ruled), factors, ranks, "r=, max_rank=")


def fresh(config: AdapterConfig, factors: State, options: Options, dtype: torch.dtype) -> State:
    """What trains over factors that are there, in fp32 or wider."""
    found = config.adapter.fresh(factors, options)
    return {key: tensor.to(accumulation_dtype(dtype)) for key, tensor in found.items()}


def _head(target: nn.Module) -> Tensor:
    if isinstance(target, _Linear):
        return record.head_of(merging.original_stored(target), target.get_base_layer())
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    return record.head_of(merging.stored(base), base)


def _batches(group: Mapping[str, Tensor]) -> list[list[str]]:
    """What starts together: a quantised weight alone, so that one dense at a time is there."""
    together = [name for name, weight in group.items() if not weight.is_meta]
    alone = [[name] for name, weight in group.items() if weight.is_meta]
    return ([together] if together else []) + alone


def _dense(names: list[str], group: Mapping[str, Tensor], bases: Mapping[str, nn.Module]) -> State:
    return {n: base_weight.matrix(bases[n]) if group[n].is_meta else group[n] for n in names}


def _weight(name: str, target: nn.Module, base: nn.Module) -> Tensor:
    """W [N, K] as it was before merges; of a quantised one only what it is like, on meta."""
    if isinstance(target, _Linear) and not base_weight.is_quantised(base):
        return merging.original_matrix(target)
    if getattr(base.weight, "is_meta", False):
        raise ValueError(
            f"{name}.weight must hold data, got a tensor on the meta device: load the base's "
            "weights before the adapter, which starts from them"
        )
    if base_weight.is_quantised(base):
        base_weight.check_quantised(base, f"{name}.weight")
        few = base_weight.quantised(base)
        return torch.empty(few.shape, dtype=few.dtype, device="meta")
    backend = resolve_quantization_backend(base)
    if backend is not None:
        weight: Tensor = backend.get_base_weight(base).detach()
        return weight
    base_weight.check_weight(base.weight, f"{name}.weight")
    return base_weight.matrix(base)


def _bounded(config: AdapterConfig, weights: Mapping[str, Tensor]) -> dict[str, Options]:
    """Options of each layer, with a rank that the layer is too small for brought down to its size.

    A Kronecker product's rank divides both sides, so there it is left to the start to refuse.
    """
    found, small = {}, []
    for name, weight in weights.items():
        rank, most = config.rank_of(name), min(weight.shape)
        divides = config.adapter.kind == "ohora"
        if rank is not None and rank > most and not divides:
            small.append(f"{name} ({most})")
            rank = most
        found[name] = config.options_of(name, rank)
    if small:
        warnings.warn(
            f"r is bounded by the smaller side of these layers: {', '.join(small)}", stacklevel=2
        )
    return found


_OF_A_RUN: dict[str, Any] = {"dropout": 0.0, "strength": 1.0}


def _put_off(
    config: AdapterConfig, weight: Tensor, options: Options, device: torch.device
) -> State | None:
    """Zeros for a layer whose factors a file is about to bring, where their shape is known."""
    outline = config.adapter.outline(weight, options) if config.brings_factors else None
    if outline is None:
        return None
    return {key: torch.zeros_like(one, device=device) for key, one in outline.items()}


def _shared(
    target: nn.Module, base: Tensor, options: Options, gradient: Tensor | None
) -> State | None:
    """The factors of an adapter of ``target`` that began with the same options from ``base``."""
    if not isinstance(target, AdaptedLayer) or not isinstance(options, target.adapter.options_type):
        return None  # no layer of ours, or one of another kind that this goes around
    if target.adapter.needs_gradients(options) and gradient is not None:
        return None  # which may be another than the one at that time
    for name, have in target.options.items():
        same = torch.equal(record.head(target.expected[name]), base)
        if same and target.awaited(name) is None and _shaping(have) == _shaping(options):
            return target.factors(name)
    return None


def _shaping(options: Options) -> Options:
    """Without what does not shape the factors."""
    own = {"init_std": 0.0} if hasattr(options, "init_std") else {}
    return replace(options, **_OF_A_RUN, **own)


def _random(config: AdapterConfig, state: State) -> State:
    """Numbers that make a difference, where ``init_weights`` is off."""
    spread = 0.02 if isinstance(config, QRLoraConfig) else 0.1
    return {
        key: state[key] + spread * torch.randn_like(state[key]) for key in config.adapter.trainables
    }
