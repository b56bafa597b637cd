"""The folder that the suite runs in: PEFT's tests from its source distribution."""

from __future__ import annotations

import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from finetuning.archives import SourceArchive


def unpack_tests(folder: Path) -> None:
    """Write ``folder/tests``, a package, and the ``pytest.ini`` that makes the folder its root.

    Raises
    ------
    ValueError
        If the source distribution is not to be had or holds no tests.
    """
    installed = f"peft-{version('peft')}"
    archive = SourceArchive(
        requirement=installed.replace("-", "==", 1),
        file=f"{installed}.tar.gz",
        about="the tests of the installed PEFT",
    ).download()
    try:
        with tarfile.open(archive) as files:
            inside = f"{installed}/tests/"
            for member in files.getmembers():
                if member.isfile() and member.name.startswith(inside):
                    member.name = member.name.removeprefix(f"{installed}/")
                    files.extract(member, folder, filter="data")
    except tarfile.TarError as error:
        raise ValueError(f"{archive} must be the source distribution: {error}") from None
    if not (folder / "tests" / "testing_common.py").is_file():
        raise ValueError(f"{archive} must hold tests/testing_common.py, and holds none")
    (folder / "tests" / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
