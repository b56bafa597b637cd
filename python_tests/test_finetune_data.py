"""The example's data: mining docstrings, reading tables, and the metrics."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from finetuning import metrics
from finetuning.data import Data, Split, mined, read_glue, read_tsv, write_tsv
from finetuning.mining import documented, mine_pairs

SOURCE = '''
def scale(x):
    """Multiply every element by a constant.

    Args:
        x: This is not a sentence of the description.

    The ``result`` has the shape of its :class:`Tensor` input. A later one is not taken.
    """

class Empty:
    """Only a summary stands here alone."""

async def wait(
    a, b,
):  # a comment
    r"""Wait until both of them are done.

    >>> This is not prose but an example.

    No value is ever given back to the caller.
    """
'''


def test_documented_takes_a_summary_and_a_later_sentence_of_prose():
    assert documented(SOURCE, set()) == [
        ("Multiply every element by a constant.", "The result has the shape of its Tensor input."),
        ("Wait until both of them are done.", "No value is ever given back to the caller."),
    ]


def test_documented_never_repeats_a_sentence():
    seen: set[str] = set()
    assert len(documented(SOURCE, seen)) == 2
    assert documented(SOURCE, seen) == []


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A package of 20 files with 1 to 5 documented functions; sentences name their file."""
    root = tmp_path / "mined_library"
    for number in range(20):
        docs = [
            f'def f{i}():\n    """Object {i} of file {number} does its work.\n\n'
            f'    Details of object {i} in file {number} follow.\n    """\n'
            for i in range(1 + number % 5)
        ]
        root.mkdir(exist_ok=True)
        (root / f"part{number}.py").write_text("\n".join(docs))
    (root / "tests").mkdir()
    (root / "tests" / "test_part.py").write_text(SOURCE)
    (root / "__init__.py").write_text("raise RuntimeError('mining must not import')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return root.name


def _file_of(sentence: str) -> str:
    return sentence.split("file ")[1].split()[0]


def _object_of(sentence: str) -> str:
    return sentence.split("bject ")[1].split()[0]


def test_mined_splits_share_no_file_and_labels_are_true(library):
    train, held = mine_pairs(60, 16, seed=3, libraries=(library,))
    assert (len(train), len(held)) == (60, 16)
    files = [{_file_of(s) for p in part for s in p[:2]} for part in (train, held)]
    assert not files[0] & files[1]
    for first, second, same in train + held:
        assert same == (_file_of(first) == _file_of(second))
        assert not same or _object_of(first) == _object_of(second)


def test_no_sentence_tells_the_label_by_itself(library):
    pairs, _ = mine_pairs(60, 0, libraries=(library,))
    first = Counter((pair.first, pair.same) for pair in pairs)
    assert {first[sentence, same] for sentence, _ in first for same in (True, False)} == {1}
    assert max(Counter((pair.second, pair.same) for pair in pairs).values()) == 1


def test_mining_depends_on_the_seed_alone(library):
    first = mine_pairs(40, 10, seed=1, libraries=(library,))
    assert mine_pairs(40, 10, seed=1, libraries=(library,)) == first
    assert mine_pairs(40, 10, seed=2, libraries=(library,)) != first


def test_mining_too_much_says_how_much_there_is(library):
    with pytest.raises(ValueError, match=r"train must be at most \d+, .*got 5000"):
        mine_pairs(5000, 0, libraries=(library,))
    with pytest.raises(ValueError, match="'no_such_library_here'"):
        mine_pairs(2, 0, libraries=("no_such_library_here",))


def test_the_installed_libraries_hold_enough_text_and_are_not_imported():
    before = set(sys.modules)
    data = mined(3000, 600, seed=0)
    assert Counter(data.train.targets) == {"0": 1500, "1": 1500}
    assert Counter(data.evaluation.targets) == {"0": 300, "1": 300}
    loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert not loaded & {"transformers", "idlelib", "turtle"}


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
