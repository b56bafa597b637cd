"""Files that are whole or absent: written under another name, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def as_path(argument: str, given: Any) -> Path:
    """``given`` as a path; an empty one, which would be the working folder, is refused."""
    named = os.fspath(given) if isinstance(given, os.PathLike) else given
    if not isinstance(named, str):
        kind = type(given).__name__
        raise TypeError(f"{argument} must be a string or a path, got {kind} {given!r}")
    if not named:
        raise ValueError(f"{argument} must name a file or a folder, got ''")
    return Path(given)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file in place of ``path``."""
    with _replacing(path) as draft:
        save_file(tensors, str(draft), metadata)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8 in place of ``path``."""
    with _replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def filling(folder: Path, instead_of: Iterable[str] = ()) -> Iterator[Path]:
    """A folder to write in; what lies in it afterwards takes its place in ``folder``.

    After an error ``folder`` is as it was. Weights are put in place before the files that speak of
    them, whose names come first in the alphabet. What fits a pattern of ``instead_of`` and was not
    written anew is taken away.

    Raises
    ------
    NotADirectoryError
        If ``folder`` is a file.
    IsADirectoryError
        If a folder lies where a file is to be.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{uuid.uuid4().hex}.tmp"  # on the same disk, for renames
    try:
        draft.mkdir()
        yield draft
        written = sorted((file.name for file in draft.iterdir()), reverse=True)
        for place in (folder / name for name in written):  # before the first of them moves
            if place.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(place))
        for name in written:
            os.replace(draft / name, folder / name)
        for old in [file for pattern in instead_of for file in folder.glob(pattern)]:
            if old.name not in written:
                old.unlink()
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write, which then takes the place of ``path`` with the permissions of any new one.

    Folders on the way are made. A symbolic link stays, and what it leads to is replaced: the draft
    lies beside that, since a rename cannot leave its disk.
    """
    path = _behind_links(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    # Made by hand: the umask decides its mode, which safetensors' own file would not have.
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = draft.stat().st_mode
    try:
        yield draft
        draft.chmod(mode)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _behind_links(path: Path) -> Path:
    """The file that ``path`` leads to, there or not."""
    real = Path(os.path.realpath(path))
    if real.is_symlink():  # realpath gives up on links that lead in a circle
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return real
