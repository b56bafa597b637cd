"""The example's data: reading tables, holding rows out, and the metrics."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from finetuning import metrics
from finetuning.data import Data, Split, read_glue, read_tsv, same_text, write_tsv


def _write(path: Path, *rows: str) -> Path:
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_float_target_is_a_score_and_an_index_column_is_passed_over(tmp_path):
    rows = [f"{i}\tone {i}\tother {i}\t{i / 2}" for i in range(20)]
    data = read_tsv(_write(tmp_path / "a.tsv", "index\tfirst\tsecond\tvalue", *rows))
    assert data.regression
    assert (len(data.train), len(data.evaluation)) == (17, 3)
    assert {row.split()[0] for row in data.train.texts[0]} == {"one"}
    assert sorted(data.values(data.train) + data.values(data.evaluation)) == [
        i / 2 for i in range(20)
    ]


def test_rows_of_the_same_text_are_held_out_together(tmp_path):
    rows = [
        f"{text}\t{i % 2}" for i in range(30) for text in (f"Row {i}.", f"row  {i}", f"ROW {i}!")
    ]
    data = read_tsv(_write(tmp_path / "a.tsv", "text\tlabel", *rows))
    train, held = (
        {same_text([t]) for t in part.texts[0]} for part in (data.train, data.evaluation)
    )
    assert len(data.train) + len(data.evaluation) == 90
    assert 13 <= len(data.evaluation) <= 15
    assert not train & held


def test_texts_without_a_word_are_told_apart():
    assert same_text([":)"]) != same_text([":("])
    assert same_text(["A b", "c"]) != same_text(["A", "b c"])


def test_whole_numbers_are_classes_unless_the_column_is_a_score(tmp_path):
    rows = ["a b\t3", "c d\t1", "e f\t3"]
    held = _write(tmp_path / "e.tsv", "text\tlabel", "g h\t1")
    data = read_tsv(_write(tmp_path / "a.tsv", "text\tlabel", *rows), held)
    assert data.labels == ("1", "3")
    assert data.values(data.train) == [1.0, 0.0, 1.0]
    assert len(data.train.texts) == 1
    assert read_tsv(_write(tmp_path / "b.tsv", "text\tscore", *rows)).regression


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["text\tlabel"], "got no rows"),
        (["text\tlabel", "a\tx\ty"], r":2 must have 2 cells, got 3"),
        (["a\tb\tc\tlabel", "x\ty\tz\t1"], "one or two columns of text"),
        (["text\tlabel", "a\tx", "b\tx", "c\tx"], "two or more labels"),
    ],
)
def test_a_table_that_cannot_be_read_says_why(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_tsv(_write(tmp_path / "a.tsv", *rows))


def test_a_label_that_training_never_saw_is_an_error(tmp_path):
    train = _write(tmp_path / "a.tsv", "text\tlabel", "a\tx", "b\ty")
    held = _write(tmp_path / "b.tsv", "text\tlabel", "c\tz")
    with pytest.raises(ValueError, match=r"labels \['x', 'y'\], got also \['z'\]"):
        read_tsv(train, held)


def test_written_data_come_back(tmp_path):
    split = Split((['a "quoted" word', "b"], ["c", "d"]), ["yes", "no"])
    data = Data(split, split, ("no", "yes"))
    assert read_tsv(*write_tsv(data, tmp_path)) == data
    assert not list(tmp_path.glob("*.tmp"))


def test_a_task_without_the_package_datasets_is_a_plain_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        read_glue("rte")
    with pytest.raises(ValueError, match="'nonsense'"):
        read_glue("nonsense")


def test_correlations_equal_scipys_with_ties():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=50).round(1), rng.normal(size=50).round(1)
    assert metrics.pearson(a, b) == pytest.approx(scipy.stats.pearsonr(a, b).statistic)
    assert metrics.spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert metrics.pearson(np.ones(50), b) == 0.0


def test_f1_of_two_classes_is_that_of_class_one():
    target = np.array([1.0, 1.0, 1.0, 0.0, 0.0])
    predicted = np.array([1.0, 1.0, 0.0, 1.0, 0.0])
    assert metrics.f1(predicted, target) == pytest.approx(2 / 3)
    assert metrics.accuracy(predicted, target) == pytest.approx(3 / 5)
    # Three classes: F1 of 0 is 2/3, of 1 is 0, of 2 is 1.
    three = metrics.f1(np.array([0.0, 0.0, 2.0]), np.array([0.0, 1.0, 2.0]))
    assert three == pytest.approx((2 / 3 + 0 + 1) / 3)
