"""Files that are whole or absent: what they replace, and what a failure leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qrlora_kernels import files
from qrlora_kernels.files import save_tensors, write_text

TENSORS = {"t": torch.arange(6.0)}


def assert_holds(path: Path) -> None:
    assert torch.equal(load_file(path)["t"], TENSORS["t"])


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    """Also along two links, of which one is relative, into another folder."""
    (tmp_path / "disk").mkdir()
    target, middle, link = tmp_path / "disk" / "real", tmp_path / "disk" / "middle", tmp_path / "a"
    target.write_text("before")
    middle.symlink_to("real")
    link.symlink_to(middle)
    save_tensors(link, TENSORS, {})
    assert link.is_symlink()
    assert middle.is_symlink()
    assert not target.is_symlink()
    assert_holds(target)
    write_text(link, "text")
    assert target.read_text() == "text"
    assert sorted(os.listdir(tmp_path / "disk")) == ["middle", "real"]
    assert sorted(os.listdir(tmp_path)) == ["a", "disk"]


def test_a_link_that_leads_nowhere_gets_its_file(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "new" / "file")
    save_tensors(link, TENSORS, {})
    assert link.is_symlink()
    assert_holds(tmp_path / "new" / "file")


def test_a_file_in_a_linked_folder(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "folder").symlink_to("disk")
    save_tensors(tmp_path / "folder" / "file", TENSORS, {})
    assert (tmp_path / "folder").is_symlink()
    assert_holds(tmp_path / "disk" / "file")


def test_links_in_a_circle_are_refused_and_stay(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.symlink_to(two)
    two.symlink_to(one)
    with pytest.raises(OSError, match="symbolic links"):
        write_text(one, "text")
    assert one.is_symlink()
    assert two.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_a_failure_leaves_the_file_behind_a_link_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "real", tmp_path / "link"
    target.write_text("before")
    link.symlink_to(target)

    def fail(_: object, path: str, __: object) -> None:
        assert Path(path).parent == target.parent, "a draft on another disk cannot be renamed"
        raise OSError("full")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="full"):
        save_tensors(link, TENSORS, {})
    assert target.read_text() == "before"
    assert link.is_symlink()
    assert os.listdir(tmp_path / "disk") == ["real"]
