"""PEFT's adapters through get_peft_model, in the three ways people run them in half precision.

The default keeps the adapter in fp32 and casts the activations; ``autocast_adapter_dtype=False``
keeps it in the weight's dtype; under ``torch.autocast`` the casts are autocast's.
"""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..problem import LayerProblem, Runner, Unavailable
from ..registry import Case
from .registry import LAYERS, Layer

MODES = {"": True, "/off": False, "/autocast": True}


def _config(name: str, **options: Any) -> Any:
    import peft

    if not hasattr(peft, name):
        raise Unavailable(f"peft {peft.__version__} has no {name}")
    return getattr(peft, name)(target_modules=["linear"], **options)


def _lora(case_rank: int, **options: Any) -> Any:
    return _config("LoraConfig", r=case_rank, **options)


def _kasa(case_rank: int) -> Any:
    import peft.tuners.lora as lora

    if not hasattr(lora, "KasaConfig"):
        raise Unavailable("this peft has no KaSA")
    return _lora(case_rank, kasa_config=lora.KasaConfig())


def _psoft(case_rank: int) -> Any:
    """With a free core: no Cayley map, no magnitudes; the nearest PEFT has to LoRA-XS."""
    return _config(
        "PsoftConfig", r=case_rank, psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False
    )


# VeRA and TinyLoRA at the rank that is PEFT's default for them; the others at the case's.
CONFIGS: dict[str, Callable[[int], Any]] = {
    "lora": _lora,
    "vera": lambda rank: _config("VeraConfig"),
    "kasa": _kasa,
    "tinylora": lambda rank: _config("TinyLoraConfig"),
    "psoft": _psoft,
}
# Their start is a full SVD of the weight, minutes on a CPU beyond this side.
_SVD_START = {"kasa", "tinylora", "psoft"}
_LARGEST_SVD_ON_CPU = 1024
_BUILT: dict[tuple[str, str, Case, str], Runner] = {}


def wrap(problem: LayerProblem, config: Any, mode: str) -> tuple[nn.Module, nn.Module]:
    """(PEFT model, its one adapted layer) over a copy of the problem's linear."""
    import peft

    model = nn.Sequential(OrderedDict(linear=problem.linear()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=MODES[mode])
    return adapted, adapted.base_model.model.linear


def _runner(problem: LayerProblem, adapted: nn.Module, layer: nn.Module, mode: str) -> Runner:
    trainables = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    runner = Runner(layer, trainables, save=adapted.save_pretrained)
    if mode == "/autocast":
        device = problem.device.type
        runner.context = functools.partial(torch.autocast, device, dtype=problem.dtype)
    return runner


def _neighbour(adapter: str, mode: str, problem: LayerProblem) -> Runner:
    """Kept for the next case that differs in tokens alone: it has the same weight."""
    case = replace(problem.case, m=0)
    key = (adapter, mode, case, str(problem.device))
    if key not in _BUILT:
        if _BUILT and next(iter(_BUILT))[2] != case:
            _BUILT.clear()
        _BUILT[key] = _build_neighbour(adapter, mode, problem)
    return _BUILT[key]


def _build_neighbour(adapter: str, mode: str, problem: LayerProblem) -> Runner:
    side = min(problem.case.n, problem.case.k)
    if adapter in _SVD_START and problem.device.type == "cpu" and side > _LARGEST_SVD_ON_CPU:
        raise Unavailable(f"starts with a full SVD: above {_LARGEST_SVD_ON_CPU} only on a GPU")
    config = CONFIGS[adapter](min(problem.case.r, side))
    adapted, layer = wrap(problem, config, mode)
    runner = _runner(problem, adapted, layer, mode)
    runner.rank = config.r
    return runner


def _lokr(mode: str, problem: LayerProblem) -> Runner:
    """Both Kronecker factors whole, as OHoRA's, which a rank beyond their sides asks for."""
    case, r = problem.case, problem.case.kron_rank()
    largest = max(case.n, case.k)
    config = _config("LoKrConfig", r=largest, alpha=largest, decompose_factor=r)
    adapted, layer = wrap(problem, config, mode)
    w1, w2 = layer.lokr_w1["default"], layer.lokr_w2["default"]
    a, b = (problem.operands("lokr")[name] for name in ("a", "b"))
    runner = _runner(problem, adapted, layer, mode)
    runner.rank = r
    # Where r² is not N and K, PEFT splits the sides otherwise: another product of the same kind.
    runner.equal = w1.shape == a.shape and w2.shape == b.mT.shape
    if runner.equal:
        w1.data.copy_(a.detach())
        w2.data.copy_(b.detach().mT)
        runner.trainables, runner.transposed = {"a": w1, "b": w2}, ("b",)
    return runner


for _mode in MODES:
    _shared: dict[str, Any] = {"needs": ("peft",), "half_only": bool(_mode)}
    for _name in CONFIGS:
        _build = functools.partial(_neighbour, _name, _mode)
        LAYERS.append(Layer(f"peft{_mode}", _name, _build, **_shared))
    LAYERS.append(Layer(f"peft{_mode}", "lokr", functools.partial(_lokr, _mode), **_shared))
