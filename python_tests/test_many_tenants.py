"""The example of many tenants on a tiny encoder: a tenant learns, files predict the same."""

from __future__ import annotations

import re

import finetuning.model
import many_tenants
import pytest
from finetuning import corpora
from finetuning.corpora import MEMBER, TASKS
from tiny_archive import write_archive
from tiny_encoder import WORDS, write_model


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> None:
    """A tiny model, and corpora in which a cat is positive and a dog negative."""
    folder = str(write_model(tmp_path))
    monkeypatch.setattr(finetuning.model, "model_folder", lambda name: folder)
    monkeypatch.setattr(many_tenants, "RANK", 4)
    others = [word for word in WORDS if word not in ("cat", "dog")]
    lines = "".join(
        f"{i}\t{1.5 if i % 2 else -1.5}\t{others[i % 8]} {('dog', 'cat')[i % 2]} "
        f"{others[i // 8 % 8]} {others[i // 64]}\r\n"
        for i in range(512)
    )
    names = {MEMBER.format(corpus=TASKS[task].corpus): lines for task in many_tenants.TASKS}
    archive = write_archive(tmp_path / "a.zip", names)
    monkeypatch.setattr(corpora, "download", lambda: archive)


def test_tenants_learn_and_are_served_from_one_file(tiny, capsys):
    many_tenants.main([])
    out = capsys.readouterr().out
    reached = re.findall(r"-\d +accuracy (\S+) -> (\S+)", out)
    assert len(reached) == 12
    before, after = (sum(map(float, column)) / 12 for column in zip(*reached, strict=True))
    assert after > max(0.75, before + 0.1)
    assert out.endswith("loaded, and served in one batch with a row of each: the same\n")


def test_quick_has_a_tenant_of_each_corpus(tiny, capsys):
    many_tenants.main(["--quick"])
    assert re.findall(r"(\w+)-0 +accuracy", capsys.readouterr().out) == list(many_tenants.TASKS)


def test_files_that_predict_something_else_end_the_example(tiny, monkeypatch):
    monkeypatch.setattr(many_tenants.qk.AdapterBank, "load", _load_and_change)
    with pytest.raises(SystemExit, match="do not predict the same"):
        many_tenants.main(["--quick"])


_load = many_tenants.qk.AdapterBank.load


def _load_and_change(bank, path):
    (first, *_) = _load(bank, path)
    bank.replace(first, {name: 2 * tensor + 1 for name, tensor in bank.state(first).items()})
