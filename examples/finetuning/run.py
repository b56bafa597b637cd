"""One fine-tuning run: data, model, adapter, training, saving, and the reload check."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import qrlora_kernels as qk

from . import adapters, gradients
from .data import Data, read_tsv
from .memory import peak_memory
from .metrics import scores
from .model import load_model, load_tokenizer
from .report import write_result
from .settings import Settings
from .training import (
    Encoded,
    Log,
    encode,
    evaluation_batches,
    faster_precision,
    predict,
    predict_batches,
    train,
)
from .warmup import warm_up

# Largest difference of a reloaded model's predictions, relative to their largest magnitude. The
# same bits are expected; a rebuilt factor may differ in its last digit on another machine.
RELOAD_LIMIT = {"fp32": 1e-5, "bf16": 1e-2}
RELOAD_STEP = 4  # every so many batches of evaluation are compared, short and long ones


class ReloadError(RuntimeError):
    """The saved adapter does not predict what the trained model predicts."""


class Interrupted(KeyboardInterrupt):
    """Stopped by the user; the message says what is left behind."""


def fine_tune(settings: Settings) -> dict[str, Any]:
    """Fine-tune, save after every epoch, reload into a fresh base and compare.

    Returns
    -------
    dict
        What ``result.json`` holds: losses, scores, times in seconds, sizes in bytes.

    Raises
    ------
    Interrupted
        On Ctrl-C; the adapter of the last complete epoch stays on disk.
    ReloadError
        If the reloaded adapter predicts something else.
    """
    settings.result_file.unlink(missing_ok=True)  # it would not belong to this run's adapter
    if settings.precision == "auto":
        settings = replace(settings, precision=faster_precision(settings.device))
    data = read_tsv(settings.train_file, settings.eval_file)
    train_set, eval_set = encoded(data, settings)
    base = base_model(data, train_set, settings)
    before = peak_memory(settings.device)
    start = time.perf_counter()
    if settings.options.get("basis") == "gradient":
        gradients.accumulate(base.get_submodule(adapters.ENCODER), base, train_set, settings)
    model = adapters.attach(base, settings)
    model.zero_grad()
    seconds_to_start = time.perf_counter() - start
    log = Log()
    _train_and_save(model, train_set, eval_set, data, settings, log)
    peak = peak_memory(settings.device)
    trained, head = adapters.trained_numbers(model)
    result = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()},
        "learning_rate": settings.learning_rate,
        "trained": trained,
        "head": head,
        "rows": [len(data.train), len(data.evaluation)],
        "scores": log.scores,
        "losses": log.losses,
        "seconds_an_epoch": log.seconds,
        "seconds_to_start": seconds_to_start,
        "adapter_bytes": settings.adapter_file.stat().st_size,
        "peak_memory": peak,
        "memory_before": before,
        "reload_difference": _check_reload(log, (train_set, eval_set), data, settings),
        "layers": _layers(model),
        "versions": _versions(),
    }
    write_result(settings.result_file, result)
    return result


def encoded(data: Data, settings: Settings) -> tuple[Encoded, Encoded]:
    tokenizer = load_tokenizer(settings.model)
    first, second = (
        encode(tokenizer, split, data.values(split), settings.max_length)
        for split in (data.train, data.evaluation)
    )
    return first, second


def fresh_model(data: Data, settings: Settings) -> nn.Module:
    outputs = max(len(data.labels), 1)
    return load_model(settings.model, outputs, settings.seed, settings.device)


def base_model(data: Data, train_set: Encoded, settings: Settings) -> nn.Module:
    """What the adapter is attached to: the pretrained model under its head, warmed up or not."""
    model = fresh_model(data, settings)
    warm_up(model, train_set, settings)
    return model


def _train_and_save(
    model: nn.Module,
    train_set: Encoded,
    eval_set: Encoded,
    data: Data,
    settings: Settings,
    log: Log,
) -> None:
    def after_epoch(epoch: int) -> None:
        target = np.array(data.values(data.evaluation))
        log.predictions = predict(model, eval_set, settings)
        reached = scores(log.predictions.double().numpy(), target)
        adapters.save(model, settings)
        log.scores.append(reached)  # one entry an adapter that was saved
        print(f"epoch {epoch}: {_one_line(reached)}, saved {settings.adapter_file}", flush=True)

    try:
        train(model, train_set, settings, log, after_epoch)
    except KeyboardInterrupt:
        raise Interrupted(_left_behind(log, settings)) from None


def _left_behind(log: Log, settings: Settings) -> str:
    if not log.scores:
        return "interrupted in the first epoch: nothing was saved"
    return f"interrupted: {settings.adapter_file} holds the adapter of epoch {len(log.scores)}"


def _check_reload(log: Log, sets: tuple[Encoded, Encoded], data: Data, settings: Settings) -> float:
    """Load the saved file into a fresh base; the largest difference of its predictions."""
    train_set, eval_set = sets
    batches = evaluation_batches(eval_set)[::RELOAD_STEP]
    want = log.predictions[[row for batch in batches for row in batch]]
    model = adapters.load(base_model(data, train_set, settings), settings)
    got = predict_batches(model, eval_set, batches, settings)
    difference = _relative(got, want)
    if not difference <= RELOAD_LIMIT[settings.precision]:
        raise ReloadError(
            f"{settings.adapter_file}, loaded into a fresh base, must predict as the trained "
            f"model does: the predictions differ by {difference:.1e} of their largest magnitude"
        )
    how = "bit for bit" if torch.equal(got, want) else f"within {difference:.1e}"
    print(f"reloaded into a fresh base: {len(want)} predictions agree {how}")
    return difference


def _relative(got: Tensor, want: Tensor) -> float:
    scale = want.abs().max().clamp_min(torch.finfo(want.dtype).tiny)
    return float((got - want).abs().max() / scale)


def _layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Of each QR-LoRA layer the whole |R_ii| spectrum, the kept rank and the learned λ."""
    layers = {
        name: layer
        for name, layer in qk.adapted_layers(model).items()
        if isinstance(layer, qk.QRLinear)
    }
    matrices = [layer.matrix().detach() for layer in layers.values()]
    whole = [qk.linalg.pivoted_qr(w, rank=min(w.shape)).diagonal for w in matrices]
    return {
        name: {
            "spectrum": [float(f"{value:.6g}") for value in diagonal.tolist()],
            "rank": layer.rank,
            "lam": [float(f"{value:.6g}") for value in layer.lam.tolist()],
        }
        for (name, layer), diagonal in zip(layers.items(), whole, strict=True)
    }


def _versions() -> dict[str, str]:
    threads = torch.get_num_threads()
    return {
        "qrlora_kernels": qk.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{_cpu_name()}, {threads} thread{'s' * (threads > 1)}",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _one_line(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())
