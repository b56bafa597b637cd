"""``bench.papers``: a cell of each table at toy size, its row against what it claims was run."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning import adapters, run
from finetuning.cells import DIVERGED
from finetuning.corpora import MEMBER
from finetuning.methods import METHODS
from finetuning.model import load_model
from finetuning.settings import Settings
from finetuning.targets import target_names
from tiny_archive import write_archive
from tiny_encoder import WORDS, write_model

import qrlora_kernels as qk
from bench.papers import __main__ as command
from bench.papers import page, runner
from bench.papers.cell import Cell
from bench.papers.records import Records, Run
from bench.papers.runner import Workshop
from bench.papers.scale import FULL, QUICK, Scale
from bench.papers.table import MeasuredTable, TrainedTable
from bench.papers.tables import TABLES

WIDTH, LAYERS = 256, 4  # r_high = 16, and four layers for "last:4"
TRAINED = [table for table in TABLES.values() if isinstance(table, TrainedTable)]
MEASURED = [table for table in TABLES.values() if isinstance(table, MeasuredTable)]
TOY = Scale("toy", 24, 8, 1, 1, 1, ("movies", "reviews"), (8, 24), (64,))


@dataclass
class Toy:
    """A scale of the tiny encoder, and a workshop that runs cells in this process."""

    scale: Scale
    workshop: Workshop
    results: list[dict[str, Any]] = field(default_factory=list)  # as the example wrote them
    attached: list[dict[str, Any]] = field(default_factory=list)  # options of the layers


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Iterator[Toy]:
    folder = tmp_path_factory.mktemp("papers")
    generator = torch.Generator().manual_seed(0)
    rows = [
        f"{i}\t{(-1.0) ** i * 2}\t"
        + " ".join(WORDS[w] for w in torch.randperm(10, generator=generator))
        for i in range(60)
    ]
    corpora = ("movieReviewSnippets", "amazonReviewSnippets")
    archive = write_archive(
        folder / "archive.zip", {MEMBER.format(corpus=c): "\n".join(rows) for c in corpora}
    )
    model = folder / "model"
    model.mkdir()
    scale = replace(TOY, model=str(write_model(model, WIDTH, LAYERS)))
    own = Toy(scale, Workshop(Records.read(folder / "rows.jsonl"), folder / "out", archive))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_alone", lambda settings, log: _here(own, settings))
        patch.setattr(adapters, "attach", _recorded(own, adapters.attach))
        yield own


def _here(toy: Toy, settings: Settings) -> int:
    toy.results.append(run.fine_tune(settings))
    return 0


def _recorded(toy: Toy, attach: Any) -> Any:
    def attach_and_record(model: Any, settings: Settings) -> Any:
        model = attach(model, settings)
        toy.attached.append({n: a.options for n, a in qk.adapted_layers(model).items()})
        return model

    return attach_and_record


@pytest.mark.parametrize("table", TRAINED, ids=lambda table: table.name)
def test_a_cell_of_each_table_ran_what_its_row_claims(toy, table):
    # The last variant: the first of a table is often the default of everything.
    cells = table.cells(toy.scale)
    cell = [c for c in cells if c.task == cells[0].task][-1]
    before = len(toy.workshop.records.lines)
    toy.workshop.run([cell])
    row = toy.workshop.records.find(cell.digest())
    assert row["cell"] == cell.claims()
    if len(toy.workshop.records.lines) > before:  # tables share cells; it has just been run
        _check_settings(toy.results[-1], row["cell"])
        for options in toy.attached[-1].values():
            assert all(getattr(options, n) == v for n, v in row["cell"]["options"].items())
    steps = cell.epochs * math.ceil(cell.train_rows / cell.batch_size)
    assert (len(row["losses"]), len(row["scores"])) == (steps, cell.epochs)
    assert row["rows"] == [cell.train_rows, cell.eval_rows]
    assert row["trained"] == _numbers(cell, row)
    assert set(row["measured"]) == set(cell.measures)
    assert table.lines(toy.scale, [Run(cell, row)])


def _check_settings(result: dict[str, Any], claims: dict[str, Any]) -> None:
    ran = json.loads(json.dumps(result["settings"])) | {"lr": result["learning_rate"]}
    own = set(claims) - {"train_rows", "eval_rows", "measures"}
    assert {name: ran[name] for name in own} == {name: claims[name] for name in own}


def _numbers(cell: Cell, row: dict[str, Any]) -> int:
    """How many numbers the claimed options train, from the shapes of the layers alone."""
    encoder = load_model(cell.model, 2, 0).encoder
    names = target_names(encoder, cell.targets, cell.layers)
    shapes = [tuple(encoder.get_submodule(name).weight.shape) for name in names]
    rank = cell.claims()["options"].get("rank")
    if cell.adapter == "none":
        return 0
    if cell.adapter == "full":
        return sum(p.numel() for p in encoder.parameters())
    if cell.adapter == "qr" and cell.warmup_epochs:
        return sum(row["ranks"].values())  # of other weights than the pretrained
    if cell.adapter == "qr":
        rule, tau = cell.options["rank_rule"], cell.options["tau"]
        weights = [encoder.get_submodule(name).weight.detach() for name in names]
        return sum(qk.linalg.rank_profile(w, [tau]).ranks[rule][0] for w in weights)
    each = {
        "lora_xs": lambda n, k: rank * rank,
        "ohora": lambda n, k: (n + k) * (rank if cell.options.get("product") == "lora" else 1),
        "vera": lambda n, k: n + rank,
    }.get(cell.adapter, lambda n, k: rank * (n + k))
    return sum(each(n, k) for n, k in shapes)


def test_every_variant_of_every_table_can_be_attached(toy):
    """Each way of adapting the model once; the tables differ in little else."""
    seen, base = set(), load_model(toy.scale.model, 2, 0)
    for cell in (cell for table in TRAINED for cell in table.cells(toy.scale)):
        way = json.dumps([cell.claims()[n] for n in ("adapter", "options", "targets", "layers")])
        if way not in seen:
            seen.add(way)
            settings = cell.settings((Path(), Path()), Path())
            model = copy.deepcopy(base)
            for parameter in model.encoder.parameters():
                parameter.grad = torch.ones_like(parameter)  # for the basis of a gradient
            adapters.attach(model, settings)
    assert len(seen) > 30


@pytest.mark.parametrize("table", MEASURED, ids=lambda table: table.name)
def test_a_measured_table_at_toy_size(toy, table):
    table.run(toy.workshop, toy.scale, 1)
    rows = table.results(toy.scale, toy.workshop.records)
    assert table.lines(toy.scale, rows)
    assert table.missing(toy.workshop, toy.scale) == (0, 1)
    assert table.missing(toy.workshop, replace(toy.scale, widths=(33,))) == (1, 1)


def test_theorem_3_1_holds_and_another_core_is_told_from_it(toy):
    from bench.papers.weights import projection_error, theorem_rows

    rows = theorem_rows(toy.scale, toy.workshop)
    assert max(row["off"] for row in rows) < 1e-10
    best: dict[str, dict[str, float]] = {}
    for row in rows:
        best.setdefault(row["layer"], {})[row["basis"]] = row["held"]
    for held in best.values():
        assert max(held, key=held.__getitem__) == "SVD of the mean gradient"
    # Of factors that are not orthonormal uᵀ M vᵀ is not the nearest core.
    u, vh = torch.randn(8, 3).double(), torch.randn(3, 8).double()
    assert projection_error(torch.randn(8, 8).double(), u, vh) > 1e-3


def test_what_has_a_row_is_not_run_again_and_new_data_or_versions_are(toy, monkeypatch):
    cell = toy.scale.cell("none", "movies", 0)
    assert toy.workshop.run([cell, cell]) == 0
    assert toy.workshop.missing([cell]) == []
    reread = replace(toy.workshop, records=Records.read(toy.workshop.records.path))
    assert reread.missing([cell]) == []
    assert reread.missing([replace(cell, lr=1e-9)])
    monkeypatch.setattr(runner, "versions", lambda: {"torch": "another"})
    assert reread.missing([cell])
    monkeypatch.undo()
    monkeypatch.setattr(runner, "data_digest", lambda files: "another")
    assert reread.missing([cell])


def test_a_diverged_run_is_a_row_and_a_failed_one_is_not(toy, monkeypatch, tmp_path, capsys):
    workshop = replace(toy.workshop, records=Records.read(tmp_path / "rows.jsonl"))
    cell = toy.scale.cell("none", "movies", 0)
    monkeypatch.setattr(runner, "run_alone", lambda settings, log: 1)
    assert workshop.run([cell]) == 1
    assert "ended with status 1" in capsys.readouterr().err
    assert workshop.missing([cell]) == [cell]
    monkeypatch.setattr(runner, "run_alone", lambda settings, log: DIVERGED)
    assert workshop.run([cell]) == 0
    assert workshop.missing([cell]) == []
    assert workshop.records.runs([cell])[0].score is None


def test_a_cell_says_all_that_decides_it():
    """Its digest changes with each field, and its claims hold the method's own defaults."""
    cell = Cell("lora", "movies", 0, 8, 8, 1)
    assert cell.claims()["options"] == METHODS["lora"].defaults
    assert cell.claims()["lr"] == METHODS["lora"].rate
    others = [
        replace(cell, adapter="pissa"),
        replace(cell, options={"rank": 2}),
        replace(cell, model="another"),
        replace(cell, layers="last:1"),
        replace(cell, warmup_epochs=1),
        replace(cell, measures=("retention",)),
    ]
    assert len({c.digest() for c in (cell, *others)}) == 1 + len(others)


def test_seeds_are_outermost_and_a_prefix_of_the_rules_compares_all():
    cells = TABLES["rules"].cells(FULL)
    seeds = [cell.seed for cell in cells]
    assert seeds == sorted(seeds)
    for trio in zip(cells[::3], cells[1::3], cells[2::3], strict=True):
        rules = [(cell.options["rank_rule"], cell.options["tau"]) for cell in trio]
        assert rules == [("magnitude", 0.5), ("energy", 0.5), ("energy", 0.7)]
        assert all(replace(c, options={}) == replace(trio[0], options={}) for c in trio)


def test_the_whole_has_three_seeds_and_fits_its_time():
    """Four hours at fifteen seconds a run, two at a time; ten minutes at five."""
    for scale, most in ((FULL, 960), (QUICK, 120)):
        cells = {cell.digest(): cell for table in TRAINED for cell in table.cells(scale)}
        assert len(cells) <= most
    assert {cell.seed for table in TRAINED for cell in table.cells(FULL)} >= {0, 1, 2}


def test_the_page_agrees_with_the_recorded_rows(tmp_path):
    """There is a page where there are rows, and it is the one that they give."""
    assert command.PAGE.exists() == command.RESULTS.exists()
    if command.RESULTS.exists():
        written = tmp_path / "papers.md"
        page.write(written, TABLES.values(), FULL, Records.read(command.RESULTS))
        assert written.read_text() == command.PAGE.read_text()


def test_remarks_say_who_is_ahead_and_by_how_much(toy):
    """From rows with scores that are made up: energy 0.1 ahead on one task, LoRA on another."""
    scale = replace(toy.scale, seeds=3)

    def told(name: str, score: Any) -> str:
        cells = TABLES[name].cells(scale)
        runs = [Run(c, {"cell": c.claims(), "scores": [score(c)], "trained": 1}) for c in cells]
        return TABLES[name].remark(scale, runs)

    def by_rule(cell: Cell) -> float:
        ahead = cell.options["rank_rule"] == "energy" and cell.task == "movies"
        return 0.5 + 0.1 * ahead + 0.01 * (cell.lr == 0.1)

    assert "movies +0.100 ± 0.000; reviews +0.000 ± 0.000" in told("rules", by_rule)

    def by_method(cell: Cell) -> float:
        behind = cell.adapter == "qr" and cell.task == "movies"
        return 0.8 - 0.1 * behind + 0.01 * cell.seed

    assert "on 1 of 2 tasks: movies -0.100 (deviation 0.010)" in told("qr-pretrained", by_method)


def test_the_page_says_which_tables_have_no_rows(toy, tmp_path):
    records = Records.read(tmp_path / "rows.jsonl")
    written = tmp_path / "page.md"
    page.write(written, TABLES.values(), toy.scale, records)
    text = written.read_text()
    assert text.count("No rows yet.\n") == len(TABLES)
    assert all(f"`{name}` (" in text.split("## ")[0] for name in TABLES)
    assert not list(tmp_path.rglob("*.svg"))
    table = TABLES["xs-rank"]
    cells = table.cells(toy.scale)[:1]
    toy.workshop.run(cells)
    records.add(toy.workshop.records.find(cells[0].digest()))
    page.write(written, TABLES.values(), toy.scale, records)
    text = written.read_text()
    assert "`xs-rank` (" not in text.split("## ")[0]
    wanted = len({cell.digest() for cell in table.cells(toy.scale)})
    assert f" {wanted - 1} of {wanted} runs have no row yet." in text
    score = records.lines[0]["scores"][-1]
    assert f"| LoRA-XS, r = 4 | not at hand | 128 | {score:.3f} (1) | no rows yet |" in text
    assert "<svg" in (tmp_path / "images/papers-xs-rank.svg").read_text()
