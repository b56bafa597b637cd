"""A source distribution as that of the rated sentences: a tar of the corpora inside of a zip."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from finetuning.corpora import INNER


def write_archive(path: Path, files: Mapping[str, str | tarfile.TarInfo]) -> Path:
    """``path`` with ``files`` in it, by the names of their members; a TarInfo has no content."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content.encode())
            tar.addfile(info, io.BytesIO(content.encode()))
    with zipfile.ZipFile(path, "w") as outer:
        outer.writestr(INNER, inner.getvalue())
    return path
