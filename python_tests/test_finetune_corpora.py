"""The rated sentences: the archive, its digest, the split of documents, and what is refused."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetuning import corpora
from finetuning.archives import cache_folder, digest
from finetuning.corpora import MEMBER, load_task
from finetuning.data import Data, same_text
from tiny_archive import write_archive

REVIEWS = MEMBER.format(corpus="amazonReviewSnippets")
MOVIES = MEMBER.format(corpus="movieReviewSnippets")


def _lines(rows: list[tuple[str, float, str]]) -> str:
    return "".join(f"{name}\t{rating}\t{text}\r\n" for name, rating, text in rows)


@pytest.fixture
def archive(tmp_path) -> Path:
    # Thirty documents of four sentences; every fifth sentence has no clear rating.
    rows = [
        (f"{d}_{i}", (-1) ** (d + i) * (0.1 if (4 * d + i) % 5 == 0 else 1.5), f"Text {d} of {i}.")
        for d in range(30)
        for i in range(4)
    ]
    rows.append(("30_0", 3.0, "TEXT 3 of 2"))  # a copy but for case and punctuation
    rows.append(("31_0", 0.5, "Fish &amp; chips: 'clichés'"))
    movies = [(str(i), i / 50 - 1, f"Movie number {i}") for i in range(100)]
    return write_archive(tmp_path / "a.zip", {REVIEWS: _lines(rows), MOVIES: _lines(movies)})


def _document(text: str) -> str:
    return text.split()[1]


def _texts(data: Data) -> tuple[list[str], list[str]]:
    return data.train.texts[0], data.evaluation.texts[0]


def test_the_split_shares_no_document_and_no_text(archive):
    data = load_task("reviews", 1000, 30, archive)
    train, held = _texts(data)
    assert len(held) == 30
    assert 60 <= len(train) <= 98 - 30
    assert not {_document(t) for t in train} & {_document(t) for t in held}
    assert len({same_text([t]) for t in train + held}) == len(train) + len(held)


def test_the_split_is_always_the_same_and_a_smaller_one_is_a_part(archive):
    assert load_task("reviews", 1000, 30, archive) == load_task("reviews", 1000, 30, archive)
    large, small = (_texts(load_task("reviews", n, 30, archive)) for n in (50, 20))
    assert (small[0], small[1]) == (large[0][:20], large[1])


def test_unclear_ratings_are_left_out_of_a_classification_alone(archive):
    data = load_task("reviews", 1000, 30, archive)
    assert data.labels == ("negative", "positive")
    assert set(data.train.targets) == {"negative", "positive"}
    kept = [t for texts in _texts(data) for t in texts if t.startswith("Text")]
    # As above: the rating depends on the numbers in the text.
    assert kept
    assert all((4 * int(t.split()[1]) + int(t.split()[3][:-1])) % 5 for t in kept)
    signs = zip(data.train.texts[0], data.train.targets, strict=True)
    for text, label in signs:
        if text.startswith("Text"):
            d, i = int(text.split()[1]), int(text.split()[3][:-1])
            assert label == ("negative" if (d + i) % 2 else "positive")


def test_ratings_are_a_regression_over_all_sentences(archive):
    data = load_task("movie-ratings", 1000, 40, archive)
    assert data.regression
    values = data.values(data.train) + data.values(data.evaluation)
    assert sorted(values) == pytest.approx([i / 50 - 1 for i in range(100)])


def test_texts_come_as_people_wrote_them(archive):
    train, held = _texts(load_task("reviews", 1000, 30, archive))
    assert "Fish & chips: 'clichés'" in train + held


@pytest.mark.parametrize(
    ("task", "train", "evaluation", "message"),
    [
        ("nonsense", 10, 10, "task must be one of .*got 'nonsense'"),
        ("movies", 0, 10, "train must be at least 1, got 0"),
        ("movies", 10, 0, "evaluation must be at least 1, got 0"),
        ("movies", 10, 40, "at most half of the 51 sentences of movies, got 40"),
    ],
)
def test_what_cannot_be_split_is_refused(archive, task, train, evaluation, message):
    with pytest.raises(ValueError, match=message):
        load_task(task, train, evaluation, archive)


def _link() -> tarfile.TarInfo:
    info = tarfile.TarInfo(MOVIES)
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"other.txt": "1\t1\tx"}, "must be vaderSentiment-0.5.zip with .*movieReview"),
        ({MOVIES: _link()}, "must hold .*movieReview.* as a file"),
    ],
    ids=["missing", "link"],
)
def test_an_archive_with_other_contents_is_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        load_task("movies", 1, 1, write_archive(tmp_path / "a.zip", files))


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(b"half of a download")
    with pytest.raises(ValueError, match=r"a\.zip must be vaderSentiment-0\.5\.zip"):
        load_task("movies", 1, 1, path)


Calls = list[list[str]]


@pytest.fixture
def pip(tmp_path, monkeypatch, archive) -> tuple[Calls, Callable[[int, str], None]]:
    """A pip that writes the archive, or fails with a message; the calls it got."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(corpora, "SHA256", digest(archive.read_bytes()))
    calls: Calls = []
    outcome: dict[str, Any] = {"code": 0, "said": ""}

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        wanted = Path(command[command.index("--requirement") + 1]).read_text()
        calls.append([*command, wanted])
        if outcome["code"] == 0:
            folder = Path(command[command.index("--dest") + 1])
            (folder / corpora.ARCHIVE).write_bytes(archive.read_bytes())
        return subprocess.CompletedProcess(command, outcome["code"], "", outcome["said"])

    monkeypatch.setattr(subprocess, "run", run)
    return calls, lambda code, said: outcome.update(code=code, said=said)


def test_the_archive_is_downloaded_once_against_its_digest(pip, tmp_path):
    calls, _ = pip
    path = corpora.download()
    assert path == tmp_path / "cache" / "qrlora_kernels" / "vaderSentiment-0.5.zip"
    assert corpora.download() == path
    assert len(calls) == 1
    assert calls[0][-1] == f"vaderSentiment==0.5 --hash=sha256:{corpora.SHA256}\n"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert len(load_task("movies", 20, 10).train) == 20


def test_a_damaged_archive_in_the_cache_is_downloaded_again(pip):
    calls, _ = pip
    path = corpora.download()
    path.write_bytes(path.read_bytes()[:-1])
    assert digest(corpora.download().read_bytes()) == corpora.SHA256
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("code", "said", "reason"),
    [(1, "warning: again\nERROR: No matching distribution\n", "No matching distribution"),
     (2, "", "it said nothing")],
)  # fmt: skip
def test_without_the_network_one_sentence_says_what_to_do(pip, code, said, reason):
    _, answer = pip
    answer(code, said)
    with pytest.raises(ValueError, match=reason) as error:
        corpora.download()
    assert "name a table of your own with --data" in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(cache_folder().iterdir())


def _real() -> Path:
    return cache_folder() / corpora.ARCHIVE


@pytest.mark.skipif(not _real().is_file(), reason=f"not downloaded yet: {_real()}")
def test_the_real_archive_holds_what_the_tasks_ask_for():
    assert digest(_real().read_bytes()) == corpora.SHA256
    for name, rows in (
        ("movies", 3000),
        ("movie-ratings", 3000),
        ("tweets", 2000),
        ("reviews", 1500),
    ):
        data = load_task(name, rows, 1000, _real())
        assert (len(data.train), len(data.evaluation)) == (rows, 1000)
        train, held = ({same_text([t]) for t in texts} for texts in _texts(data))
        assert not train & held
