"""Tensor files that are whole or absent: written under another name, then renamed."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file in place of ``path``, with the permissions of any new file.

    Folders on the way are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    # Made by hand: the umask decides its mode, which safetensors' own file would not have.
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = draft.stat().st_mode
    try:
        save_file(tensors, str(draft), metadata)
        draft.chmod(mode)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
