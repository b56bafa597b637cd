"""Tables that follow from the pretrained weights: ranks, the projection theorem, bytes of files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from finetuning import adapters, gradients
from finetuning.data import read_tsv
from finetuning.methods import METHODS
from finetuning.model import load_model
from finetuning.run import encoded, fresh_model
from finetuning.targets import target_names
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels.linalg import RANK_RULES, rank_profile, truncated_svd

from ..memory import disk_bytes
from . import pictures
from .cell import ALL_LINEAR
from .choices import RANK, SETTINGS
from .kinds import module_kind
from .measures import retained
from .records import Record
from .runner import Workshop
from .scale import Scale
from .table import NOT_AT_HAND, Line, MeasuredTable

TAUS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
PAPER_SHARES = {0.5: ".185", 0.7: ".341", 0.8: ".440"}  # of W_o's width, QR-LoRA's tables 1 and 2
W_O = "attention.output.dense"
MILLION = 10**6


def rank_rows(scale: Scale, _: Workshop) -> list[Record]:
    """The rank of every linear layer by each rule at each τ."""
    encoder = load_model(scale.model, 1, 0).encoder
    rows = []
    for name in target_names(encoder, ALL_LINEAR, "all"):
        weight = encoder.get_submodule(name).weight.detach()
        profile = rank_profile(weight, TAUS)
        rows += [
            {
                "layer": name,
                "kind": module_kind(name),
                "rule": rule,
                "tau": tau,
                "rank": rank,
                "width": min(weight.shape),
            }
            for rule in RANK_RULES
            for tau, rank in zip(TAUS, profile.ranks[rule], strict=True)
        ]
    return rows


def rank_lines(_: Scale, rows: Sequence[Record]) -> list[Line]:
    """By kind of layer and rule: the mean share of the width, and the range over layers."""
    return [
        {"layers": kind, "rule": rule}
        | {f"τ = {tau:g}": _share(own) for tau, own in _by(rows_of, "tau").items()}
        | ({"paper": _paper_shares()} if (kind, rule) == (W_O, "energy") else {})
        for kind, rows_of_kind in _by(rows, "kind").items()
        for rule, rows_of in _by(rows_of_kind, "rule").items()
    ]


def _share(rows: Sequence[Record]) -> str:
    ranks = [row["rank"] for row in rows]
    share = mean(row["rank"] / row["width"] for row in rows)
    return f"{share:.2f} ({min(ranks)} … {max(ranks)})"


def _paper_shares() -> str:
    return ", ".join(f"{share} at {tau:g}" for tau, share in PAPER_SHARES.items())


def _by(rows: Sequence[Record], column: str) -> dict[Any, list[Record]]:
    found: dict[Any, list[Record]] = defaultdict(list)
    for row in rows:
        found[row[column]].append(row)
    return dict(found)


def draw_ranks(axes: Any, scale: Scale, rows: Sequence[Record]) -> None:
    points = [
        {
            "τ": tau,
            "share": mean(row["rank"] / row["width"] for row in own),
            "line": f"{kind}, {rule}",
        }
        for kind, of_kind in _by(rows, "kind").items()
        if kind in ("query", W_O)
        for rule, of_rule in _by(of_kind, "rule").items()
        for tau, own in _by(of_rule, "tau").items()
    ]
    pictures.lines_of("τ", "share", "line", ylabel="mean rank over the width")(axes, scale, points)


def theorem_rows(scale: Scale, workshop: Workshop) -> list[Record]:
    """Theorem 3.1 on the gradients of the first task: which basis holds most of them."""
    rows = []
    for name, weight, gradient in mean_gradients(scale, workshop):
        rank = min(RANK, *weight.shape)
        bases = {
            "SVD of W": truncated_svd(weight, rank),
            "random": truncated_svd(torch.randn(weight.shape, generator=_seeded()).double(), rank),
            "SVD of the mean gradient": truncated_svd(gradient, rank),
        }
        for basis, (u, _, vh) in bases.items():
            rows.append(
                {
                    "layer": name,
                    "kind": module_kind(name),
                    "basis": basis,
                    "rank": rank,
                    "held": retained(gradient, u, vh),
                    "off": projection_error(gradient, u, vh),
                }
            )
    return rows


def projection_error(update: Tensor, u: Tensor, vh: Tensor) -> float:
    """How far the least-squares core is from the projection that theorem 3.1 names.

    The core that brings u C vh nearest to ``update`` is uᵀ update vhᵀ; here it is found without
    that formula, by least squares from both sides.
    """
    inner = torch.linalg.lstsq(u, update).solution
    core = torch.linalg.lstsq(vh.mT, inner.mT).solution.mT
    want = u.mT @ update @ vh.mT
    return float((core - want).norm() / want.norm())


def mean_gradients(scale: Scale, workshop: Workshop) -> list[tuple[str, Tensor, Tensor]]:
    """Name, weight and mean gradient of the loss, in fp64, of query and value layers."""
    cell = scale.cell("none", scale.tasks[0], 0)
    settings = cell.settings(workshop.files(cell), workshop.folder)
    data = read_tsv(settings.train_file, settings.eval_file)
    train_set, _ = encoded(data, settings)
    model = fresh_model(data, settings)
    encoder = model.get_submodule(adapters.ENCODER)
    gradients.accumulate(encoder, model, train_set, settings)
    found = []
    for name in target_names(encoder, cell.targets, "all"):
        weight = encoder.get_submodule(name).weight
        found.append((name, weight.detach().double(), weight.grad.double()))
    return found


def theorem_lines(_: Scale, rows: Sequence[Record]) -> list[Line]:
    return [
        {"layers": kind, "basis": basis, "paper": NOT_AT_HAND}
        | {"of the gradient's square in it": f"{mean(row['held'] for row in own):.4f}"}
        | {"least squares against projection": f"{max(row['off'] for row in own):.1e}"}
        for kind, of_kind in _by(rows, "kind").items()
        for basis, own in _by(of_kind, "basis").items()
    ]


def theorem_remark(_: Scale, rows: Sequence[Record]) -> str:
    worst = max(row["off"] for row in rows)
    holds = "holds" if worst < 1e-9 else "does NOT hold"
    return f"The theorem {holds}: the largest relative difference is {worst:.1e}, in fp64."


def user_rows(scale: Scale, workshop: Workshop) -> list[Record]:
    """Bytes of the file of one user on query and value, head included, nothing trained."""
    cell = scale.cell("none", scale.tasks[0], 0)
    settings = cell.settings(workshop.files(cell), workshop.folder)
    forms = {"qr": ("rebuild",), "lora_xs": ("stored", "rebuild"), "ohora": ("stored", "rebuild")}
    rows = []
    for name in ("qr", "lora_xs", "ohora", "vera", "lora"):
        for form in forms.get(name, ("",)):
            options = SETTINGS[name]["options"]
            own = replace(settings, adapter=name, options={**METHODS[name].defaults, **options})
            model = adapters.attach(load_model(scale.model, 2, 0), own)
            rows.append(
                {
                    "method": METHODS[name].label,
                    "options": options,
                    "factors": form,
                    "trained": adapters.trained_numbers(model)[0],
                    "bytes": disk_bytes(lambda path: _save(model, own, form, path)),  # noqa: B023
                }
            )
    return rows


def _save(model: nn.Module, settings: Any, form: Any, folder: Any) -> None:
    if form:
        qk.save_adapter(model, folder / "adapter.safetensors", factors=form)
    else:
        adapters.save(model, replace(settings, out=folder))


def user_lines(_: Scale, rows: Sequence[Record]) -> list[Line]:
    return [
        {
            "method": row["method"]
            + "".join(f", {name} = {value}" for name, value in row["options"].items()),
            "factors in the file": row["factors"] or "-",
            "paper": NOT_AT_HAND,
            "trained": f"{row['trained']:,}",
            "bytes a user": f"{row['bytes']:,}",
            "a million users": f"{row['bytes'] * MILLION / 1e9:,.1f} GB",
            "numbers alone, fp32": f"{4 * row['trained'] * MILLION / 1e9:,.1f} GB",
        }
        for row in rows
    ]


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


TABLES = (
    MeasuredTable(
        name="qr-ranks",
        paper="QR-LoRA, section 3.1",
        title="Rank by rule, τ and layer",
        about="Mean share of the width that a rule keeps, and the least and largest rank.",
        not_shown="The paper's layers; its shares of W_o are beside ours, by the rule they follow.",
        measure=rank_rows,
        lines=rank_lines,
        draw=draw_ranks,
    ),
    MeasuredTable(
        name="xs-theorem",
        paper="LoRA-XS, theorem 3.1",
        title="The projection theorem, and the basis that it calls best",
        about=f"The core that brings U C Vᵀ nearest to a given update is Uᵀ ΔW V. ΔW is the mean "
        f"gradient of {gradients.ROWS} sentences at the pretrained weights; what part of its "
        f"square a basis of r = {RANK} holds is what one step of gradient descent can reach.",
        not_shown="The paper's models; what training from each basis gives is in `xs-start`.",
        measure=theorem_rows,
        lines=theorem_lines,
        remark=theorem_remark,
    ),
    MeasuredTable(
        name="xs-users",
        paper="LoRA-XS, storage of a million users",
        title="Bytes for a million users",
        about="Measured files, each with the task's head, on query and value. Factors that can be "
        "rebuilt from the base need not be in each user's file.",
        not_shown="The paper's models.",
        measure=user_rows,
        lines=user_lines,
    ),
)
