"""Source distributions that pip downloads once, kept in a cache folder as they came."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SourceArchive:
    """The file that ``pip download`` leaves for a requirement, and what it is wanted for.

    Attributes
    ----------
    requirement : str
        ``NAME==VERSION``.
    file : str
        The name of the file that pip leaves.
    about : str
        What the archive holds, for messages: "the rated sentences".
    otherwise : str
        What a reader can do who has no network, besides putting the file into the cache.
    sha256 : str, optional
        The digest that pip asks of the file before it runs any code of it.
    """

    requirement: str
    file: str
    about: str
    otherwise: str = ""
    sha256: str | None = None

    @property
    def path(self) -> Path:
        return cache_folder() / self.file

    def download(self) -> Path:
        """The archive in the cache folder, through pip where it is not there yet.

        Raises
        ------
        ValueError
            If pip could not get it.
        """
        path = self.path
        if path.is_file() and self.sha256 in (None, digest(path.read_bytes())):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {self.requirement} ({self.about}) to {path.parent}", flush=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            self._pip_download(Path(folder))
            os.replace(Path(folder, self.file), path)
        return path

    def _pip_download(self, folder: Path) -> None:
        wanted = folder / "requirements.txt"
        pin = f" --hash=sha256:{self.sha256}" if self.sha256 else ""
        wanted.write_text(f"{self.requirement}{pin}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet"]
        command += ["--disable-pip-version-check", "--retries", "1", "--no-deps"]
        command += ["--no-binary", self.requirement.partition("==")[0]]
        command += ["--dest", str(folder), "--requirement", str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not (folder / self.file).is_file():
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            raise ValueError(
                f"{self.about} are not at {self.path} and pip could not download them "
                f"({said[-1].removeprefix('ERROR: ')}): connect to the network once"
                f"{self.otherwise}, or put the file there"
            )


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/qrlora_kernels``, by default in ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "qrlora_kernels"


def digest(content: bytes) -> str:
    """The SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
