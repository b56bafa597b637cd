"""Sentence pairs mined from the docstrings of installed libraries: real text on every machine.

The question a pair asks: *do the two sentences document the same object?* The first sentence of a
docstring and a later one make a positive pair; the same first sentence and a later one from
another file of the same library make a negative pair. Every first sentence thus occurs once in
each class, and a later one at most once: nothing can be read from one sentence alone, a model has
to compare the two.

Sources are read as text and never imported: no side effects, no network, and the same pairs for
the same versions of the libraries.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import random
import re
import sysconfig
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

# Present wherever this example runs.
LIBRARIES = ("stdlib", "torch", "numpy", "transformers")
# Tests document little; vendored copies would put the same text into both splits.
SKIPPED_FOLDERS = {"test", "tests", "testing", "site-packages", "dist-packages", "_vendor"}
WORDS = (5, 24)  # of a usable sentence
PER_FILE = 24  # objects taken from one file at most, so that no file fills a split
# The docstring of a function or class. Parsing the sources finds the same at a tenth of the speed.
DOCSTRING = re.compile(
    r'^ *(?:async def|def|class) [^"]*?:[ \t]*(?:#.*)?\n\s*[rR]?"""(.*?)"""',
    re.MULTILINE | re.DOTALL,
)
# A paragraph that is a list, a table, code or a section of parameters.
NOT_PROSE = re.compile(r"(>>>|[-=.*|+:#]|\w+ ?-{3,}|[A-Z]\w*:|(Parameters|Returns|See Also) )")


class Documented(NamedTuple):
    """One documented object: the first sentence of its docstring and a later one."""

    first: str
    later: str


class Pair(NamedTuple):
    """Two sentences, and whether they document the same object."""

    first: str
    second: str
    same: bool


def mine_pairs(
    train: int,
    evaluation: int,
    seed: int = 0,
    libraries: tuple[str, ...] = LIBRARIES,
    progress: bool = False,
) -> tuple[list[Pair], list[Pair]]:
    """Mine a training and an evaluation split that share no source file.

    Parameters
    ----------
    train, evaluation : int
        Pairs wanted in each split; half of them are positive (to within one).
    seed : int
        Decides which files are held out, which objects are taken and their order.
    libraries : tuple of str
        Importable packages, or "stdlib".
    progress : bool
        Show a bar over the libraries.

    Raises
    ------
    ValueError
        If a library is not installed or all together hold fewer pairs than wanted.
    """
    rng = random.Random(seed)
    pools: dict[str, list[Pair]] = {"train": [], "evaluation": []}
    share = evaluation / max(train + evaluation, 1)
    seen: set[str] = set()
    for library in tqdm(libraries, "reading docstrings", leave=False, disable=not progress):
        files = library_objects(library, seen)
        rng.shuffle(files)
        held_out = round(share * len(files))
        pools["evaluation"] += _pairs(files[:held_out])
        pools["train"] += _pairs(files[held_out:])
    splits = []
    for name, wanted in (("train", train), ("evaluation", evaluation)):
        if len(pools[name]) < wanted:
            raise ValueError(
                f"{name} must be at most {len(pools[name])}, all that {libraries} hold, "
                f"got {wanted}"
            )
        splits.append(_balanced(pools[name], wanted, rng))
    return splits[0], splits[1]


def library_objects(library: str, seen: set[str]) -> list[list[Documented]]:
    """The documented objects of each file of a library; adds their sentences to ``seen``."""
    root = _root(library)
    paths = (p.relative_to(root) for p in root.rglob("*.py"))
    kept = sorted((p for p in paths if not SKIPPED_FOLDERS & set(p.parts)), key=_digest)
    files = [documented(_read(root / path), seen)[:PER_FILE] for path in kept]
    return [objects for objects in files if objects]


def documented(source: str, seen: set[str]) -> list[Documented]:
    """The objects of one source whose sentences were not ``seen`` before."""
    objects = []
    for docstring in DOCSTRING.findall(source):
        summary, *rest = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
        first = next(iter(_sentences(summary)), None)
        later = next((s for part in rest for s in _sentences(part) if s != first), None)
        if first and later and seen.isdisjoint((first, later)):
            seen.update((first, later))
            objects.append(Documented(first, later))
    return objects


def _pairs(files: list[list[Documented]]) -> list[Pair]:
    """Each object with its own later sentence, then with that of an object of another file."""
    objects = [item for objects in files for item in objects]
    # Files lie together, so the object this far on, in a circle, is never of the same file.
    shift = max(map(len, files), default=0)
    if len(objects) < 2 * shift:
        return []
    pairs = []
    for index, (first, later) in enumerate(objects):
        other = objects[(index + shift) % len(objects)].later
        pairs += [Pair(first, later, True), Pair(first, other, False)]
    return pairs


def _balanced(pairs: list[Pair], wanted: int, rng: random.Random) -> list[Pair]:
    """A random choice of ``wanted`` pairs, both pairs of an object or none, in random order."""
    starts = rng.sample(range(0, len(pairs), 2), -(-wanted // 2))
    chosen = [pair for start in starts for pair in pairs[start : start + 2]][:wanted]
    rng.shuffle(chosen)
    return chosen


def _root(library: str) -> Path:
    if library == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"libraries must be installed packages or 'stdlib', got {library!r}")
    return Path(next(iter(spec.submodule_search_locations)))


def _digest(path: Path) -> str:
    """A fixed order that mixes the parts of a library."""
    return hashlib.sha256(path.as_posix().encode()).hexdigest()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # a broken link
        return ""


def _sentences(paragraph: str) -> list[str]:
    """The plain English sentences of a paragraph, without markup."""
    if NOT_PROSE.match(paragraph):
        return []
    text = re.sub(r":\w+:`([^`]*)`", r"\1", " ".join(paragraph.split()))
    text = re.sub(r"[`*]+|\[`?|`?\]", "", text)
    sentences = (" ".join(s.split()) for s in re.split(r"(?<=[.!?]) +(?=[A-Z])", text))
    return [s for s in sentences if _is_prose(s)]


def _is_prose(sentence: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in sentence)
    return (
        WORDS[0] <= len(sentence.split()) <= WORDS[1]
        and sentence[:1].isupper()
        and sentence.endswith(".")
        and letters >= 0.85 * len(sentence)
    )
