"""End to end: one training step of a model with every linear layer adapted, in tokens a second."""

from __future__ import annotations

import contextlib
import copy
import functools
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels.nn import AdapterLinear

from ..competitors.plain import EAGER
from ..competitors.registry import R_KRON, require
from ..gate import judge
from ..losses import OURS
from ..memory import disk_bytes, peak_bytes
from ..models import base_model, inputs
from ..problem import TRAINABLES, Unavailable
from ..registry import DTYPES, ModelCase
from ..rows import OK, OTHER, RED, SKIPPED, Row, with_ratios
from .common import FLOOR, Options, timed_rows

FAMILIES = ("qr", "lora_xs", "ohora")


@dataclass
class Trained:
    """A model, what trains in it, how its users save that, and how long it took to start."""

    model: nn.Module
    save: Callable[[Any], object] | None = None
    context: Callable[[], Any] = contextlib.nullcontext
    seconds: float | None = None

    def trainables(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


class EagerLinear(nn.Module):
    """The three-line expression over the tensors of an adapted layer."""

    def __init__(self, layer: AdapterLinear) -> None:
        super().__init__()
        self.layer, self.expression = layer, EAGER[layer.kind]
        self.names = [n for n in (*layer.trainables, *layer.factors) if n in _OPERANDS[layer.kind]]

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        operands = {name: getattr(layer, name) for name in self.names}
        y = self.expression(x.flatten(0, -2), layer.weight, layer.bias, **operands)
        return y.view(*x.shape[:-1], -1)


_OPERANDS = {
    "qr": ("lam", "q", "r"),
    "lora_xs": ("core", "a", "b"),
    "ohora": ("a", "b", "a0", "b0"),
}


def run(case: ModelCase, options: Options) -> list[Row]:
    """Rows of the frozen model, of each adapter fused and eager, and of PEFT's LoRA."""
    base, note = base_model(case, options.device)
    embeds = inputs(base, case, options.device)
    built: list[tuple[Row, Trained]] = []
    rows: list[Row] = []
    for name, adapter, build in _variants(options):
        row = Row(
            "model",
            name,
            "step",
            adapter=adapter,
            model=str(case),
            r=case.r if adapter else 0,
            dtype=case.dtype,
            device=options.device,
            cache=options.cache,
            note=note,
        )
        try:
            trained = build(base, case)
        except Unavailable as reason:
            rows.append(replace(row, status=SKIPPED, note=str(reason)))
            continue
        row = _gated(row, trained, embeds)
        built.append((row, trained))
        if trained.seconds is not None:
            rows.append(replace(row, metric="start", unit="s", value=trained.seconds))
    if options.gate_only:
        return [replace(row, metric="gate", unit="", value=row.gate) for row, _ in built] + rows
    rows += _bytes(built, embeds, options)
    tasks = [(row, _step(trained, embeds)) for row, trained in built]
    timed = timed_rows(tasks, options, m=1 << 30, warmed=True)
    return with_ratios([*timed, *(_per_second(r, case) for r in timed)], FLOOR) + rows


def _variants(options: Options) -> list[tuple[str, str, Callable[[nn.Module, ModelCase], Trained]]]:
    found: list[tuple[str, str, Callable[[nn.Module, ModelCase], Trained]]]
    found = [(FLOOR, "", lambda model, case: Trained(model))]
    for family in FAMILIES:
        ours = functools.lru_cache(1)(functools.partial(_ours, family))
        found.append((OURS, family, ours))
        found.append(("eager", family, functools.partial(_eager, ours)))
    found.append((R_KRON, "ohora", functools.partial(_ours, "ohora", product="materialised")))
    for mode in ("", "/off", "/autocast"):
        found.append((f"peft{mode}", "lora", functools.partial(_peft, mode)))
    return [
        (name, adapter, build)
        for name, adapter, build in found
        if not adapter
        or (
            (not options.adapters or adapter in options.adapters)
            and (not options.variants or any(v in f"{adapter} {name}" for v in options.variants))
        )
    ]


# --- variants


def _ours(family: str, base: nn.Module, case: ModelCase, **more: Any) -> Trained:
    model = copy.deepcopy(base)
    # The paper's leading columns give some of MiniLM's layers a zero start, which adapt refuses.
    options: dict[str, Any] = {"columns": "selected"} if family == "ohora" else {"rank": case.r}
    options |= more
    begin = time.perf_counter()
    qk.adapt(model, "all-linear", adapter=family, progress=False, **options)
    seconds = _since(begin, model)
    _perturb(model)
    save = functools.partial(_save, model)
    return Trained(model, save, seconds=seconds)


def _save(model: nn.Module, folder: Any) -> None:
    qk.save_adapter(model, f"{folder}/adapter.safetensors")


def _eager(
    ours: Callable[[nn.Module, ModelCase], Trained], base: nn.Module, case: ModelCase
) -> Trained:
    """The same start as the fused variant's, which it shares, since it is not what is timed."""
    return Trained(_with_eager_layers(ours(base, case).model))


def _with_eager_layers(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for name, layer in qk.adapted_layers(model).items():
        model.set_submodule(name, EagerLinear(layer))
    return model


def _peft(mode: str, base: nn.Module, case: ModelCase) -> Trained:
    require(("peft",))
    import peft

    if mode and DTYPES[case.dtype] == torch.float32:
        raise Unavailable("the same as peft over fp32 weights")
    config = peft.LoraConfig(r=case.r, target_modules="all-linear")
    model, begin = copy.deepcopy(base), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(
            copy.deepcopy(base), config, autocast_adapter_dtype=mode != "/off"
        )
    seconds = _since(begin, model)
    context: Callable[[], Any] = contextlib.nullcontext
    if mode == "/autocast":
        device = next(base.parameters()).device.type
        context = functools.partial(torch.autocast, device, dtype=DTYPES[case.dtype])
    return Trained(adapted, adapted.save_pretrained, context, seconds)


def _since(begin: float, model: nn.Module) -> float:
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


# --- gate


def _gated(row: Row, trained: Trained, embeds: Tensor) -> Row:
    """Fused and eager of one family, with an update that matters, against the eager one in fp64."""
    if row.adapter not in FAMILIES:
        return replace(row, status=OTHER if row.adapter else OK)
    fused = row.variant != "eager"
    plain = _with_eager_layers(trained.model) if fused else trained.model
    x = embeds.detach()[:1]
    expected = _results(copy.deepcopy(plain).double(), x.double())
    verdict = judge(_results(trained.model, x), _results(plain, x), expected, slack=2.0)
    status = OK if verdict.ok else RED
    note = row.note if verdict.ok else verdict.detail
    choice = qk.backends.last_choice(_OPERATION[row.adapter])
    backend = choice.name if choice and row.variant == OURS else ""
    return replace(row, status=status, gate=verdict.excess, note=note, backend=backend)


_OPERATION = {"qr": "qr_linear", "lora_xs": "lora_xs_linear", "ohora": "kron_linear"}


# A tenth of W, whatever the parametrisation.
_SCALE: dict[str, Callable[[Tensor], float]] = {
    "qr": lambda lam: 1.0,
    "lora_xs": lambda core: core.shape[0] ** -0.5,
    "ohora": lambda factor: float(factor.abs().mean()),
}


def _perturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for layer in qk.adapted_layers(model).values():
        for name in TRAINABLES[layer.kind]:
            value = getattr(layer, name).data
            change = 0.1 * torch.randn(value.shape, generator=generator).to(value)
            value.add_(change * _SCALE[layer.kind](value))


def _results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_(True)
    y = model(inputs_embeds=x).last_hidden_state
    names, values = zip(
        *((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True
    )
    grads = torch.autograd.grad(y, [x, *values], torch.ones_like(y) / y.numel())
    trained = torch.cat([g.flatten() for g in grads[1:]])
    return {"y": y.detach(), "dx": grads[0], f"gradients of {len(names)} tensors": trained}


# --- measurements


def _step(trained: Trained, embeds: Tensor) -> dict[str, Callable[[Any], Any]]:
    values = trained.trainables()
    optimizer = torch.optim.AdamW(values, lr=1e-5) if values else None

    def step(_: Any) -> None:
        embeds.grad = None
        with trained.context():
            y = trained.model(inputs_embeds=embeds).last_hidden_state
        y.float().square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return {"step": step}


def _bytes(built: list[tuple[Row, Trained]], embeds: Tensor, options: Options) -> list[Row]:
    rows = []
    for row, trained in built:
        step = _step(trained, embeds)["step"]
        peak = peak_bytes(functools.partial(step, None), options.device)
        if peak is not None:
            rows.append(replace(row, metric="peak", value=float(peak), unit="B", clock=""))
        if trained.save is not None:
            size = float(disk_bytes(trained.save))
            rows.append(replace(row, metric="disk", value=size, unit="B", clock=""))
    return with_ratios(rows, FLOOR)


def _per_second(row: Row, case: ModelCase) -> Row:
    def tokens(ms: float | None) -> float | None:
        return None if not ms else 1e3 * case.batch * case.length / ms

    times = {name: tokens(getattr(row, name)) for name in ("value", "first", "second")}
    swapped = {"q20": tokens(row.q80), "q80": tokens(row.q20)}
    return Row(**{**asdict(row), "metric": "tokens", "unit": "tokens/s", **times, **swapped})
