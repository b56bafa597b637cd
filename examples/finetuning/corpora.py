"""Sentences rated by people: movie reviews, tweets and product reviews, got from PyPI with pip.

The source distribution of vaderSentiment 0.5 (MIT licence; Hutto & Gilbert, ICWSM 2014) carries
sentences with the mean of twenty or so ratings from -4 to 4. The movie reviews are the sentences
of the Stanford Sentiment Treebank, which GLUE's SST-2 is made of.

The archive is kept in a cache folder and checked by its digest: pip refuses another one before it
runs any code of it. Nothing is unpacked to disk.
"""

from __future__ import annotations

import html
import io
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .archives import SourceArchive, digest
from .data import Data, Split, same_text

REQUIREMENT = "vaderSentiment==0.5"
ARCHIVE = "vaderSentiment-0.5.zip"
SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
INNER = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "hutto_ICWSM_2014/{corpus}_GroundTruth.txt"
LABELS = ("negative", "positive")


@dataclass(frozen=True)
class Task:
    """What is asked of a corpus: the rating itself, or its sign where it is ``clear`` enough."""

    corpus: str
    about: str
    clear: float | None = None  # least |rating| of a sentence that is called positive or negative


TASKS = {
    "movies": Task("movieReviewSnippets", "is a sentence of a movie review positive?", 0.5),
    "movie-ratings": Task("movieReviewSnippets", "how people rated it, from -4 to 4"),
    "tweets": Task("tweets", "is a tweet positive?", 0.5),
    "reviews": Task("amazonReviewSnippets", "is a sentence of a product review positive?", 0.5),
}


class Rated(NamedTuple):
    """A sentence, its mean rating, and the document that it stands in."""

    document: str
    rating: float
    text: str


def load_task(name: str, train: int, evaluation: int, archive: Path | None = None) -> Data:
    """``evaluation`` sentences to evaluate on and up to ``train`` others to train on.

    The split is always the same: whole documents, in an order given by the digest of their names,
    go to the one side or the other. A sentence that occurs twice, but for case and punctuation, is
    taken once.

    Parameters
    ----------
    name : str
        A key of ``TASKS``.
    train, evaluation : int
    archive : Path, optional
        The source distribution; without it the one in the cache folder, downloaded if need be.

    Raises
    ------
    ValueError
        If the archive is not to be had or not the expected one, or holds too few sentences.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {sorted(TASKS)}, got {name!r}")
    for argument, wanted in (("train", train), ("evaluation", evaluation)):
        if wanted < 1:
            raise ValueError(f"{argument} must be at least 1, got {wanted}")
    task = TASKS[name]
    rows = _in_order(read_corpus(task.corpus, archive or download()), task.clear or 0.0)
    if 2 * evaluation > len(rows):
        raise ValueError(
            f"evaluation must be at most half of the {len(rows)} sentences of {name}, "
            f"got {evaluation}"
        )
    held = rows[:evaluation]
    documents = {row.document for row in held}
    rest = [row for row in rows[evaluation:] if row.document not in documents]
    labels = () if task.clear is None else LABELS
    return Data(_split(rest[:train], task), _split(held, task), labels)


def _in_order(rows: list[Rated], clear: float) -> list[Rated]:
    """Each text once and clear enough, whole documents in a fixed order that looks random."""
    first = {same_text([row.text]): row for row in reversed(rows)}
    kept = [row for row in first.values() if abs(row.rating) >= clear]
    return sorted(kept, key=lambda row: (digest(row.document.encode()), row.text))


def _split(rows: list[Rated], task: Task) -> Split:
    if task.clear is None:
        targets = [repr(row.rating) for row in rows]
    else:
        targets = [LABELS[row.rating > 0] for row in rows]
    return Split(([row.text for row in rows],), targets)


def read_corpus(corpus: str, archive: Path) -> list[Rated]:
    """The rated sentences of a corpus, in the archive's order."""
    member = MEMBER.format(corpus=corpus)
    try:
        with zipfile.ZipFile(archive) as outer:
            inner = io.BytesIO(outer.read(INNER))
        with tarfile.open(fileobj=inner, mode="r:gz") as files:
            info = files.getmember(member)
            content = files.extractfile(info) if info.isfile() else None
            if content is None:
                raise ValueError(f"{archive} must hold {member} as a file, got something else")
            lines = content.read().decode("utf-8").split("\n")
    except (zipfile.BadZipFile, tarfile.TarError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{archive} must be {ARCHIVE} with {member} in it: {error}") from None
    return [_rated(line.rstrip("\r")) for line in lines if line.strip()]


def _rated(line: str) -> Rated:
    name, rating, text = line.split("\t")
    # Names are "document_sentence" where a document has several sentences.
    return Rated(name.partition("_")[0], float(rating), html.unescape(text))


def download() -> Path:
    """The archive in the cache folder, through pip where it is not there yet."""
    return SourceArchive(
        requirement=REQUIREMENT,
        file=ARCHIVE,
        about="the rated sentences",
        otherwise=", name a table of your own with --data",
        sha256=SHA256,
    ).download()
