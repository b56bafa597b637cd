"""Imports run only downwards, and what belongs in one place is in one place.

    models -> nn -> adapters -> functional, kernels -> ops -> dispatch -> backends -> reference

:data:`ROOMS` says of each room what it may import; :data:`EXCEPTIONS` lists the imports of today
that run otherwise, one by one: one that nothing needs any more fails too.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from golden_bits import TREE

PACKAGE = "qrlora_kernels"
SOURCES = TREE / PACKAGE

# Modules by the room that they stand in: the longest prefix counts.
ROOM_OF = {
    "__init__": "top",
    "__main__": "top",
    "model": "model",
    "tune": "model",
    "contest": "dispatch",
    "nn": "nn",
    "adapters": "adapters",
    "functional": "public",
    "kernels": "public",
    "ops": "ops",
    "backends": "dispatch",  # its __init__, and who chooses
    "backends.chooser": "dispatch",
    "backends.measured": "dispatch",
    "backends.problem": "problem",
    "backends.tuning": "dispatch",
    "backends.amx": "backend amx",
    "backends.composed": "backend composed",
    "backends.cpu": "backend cpu",
    "backends.cuda": "backend cuda",
    "backends.reference": "backend reference",
    "backends.triton": "backend triton",
    "backends.base_product": "core calls",
    "backends.low_rank": "core calls",
    "linalg": "linalg",
    "reference": "reference",
    "native": "native",
    "autocast": "leaf",
    "chip": "leaf",
    "files": "leaf",
    "fingerprint": "leaf",
    "version": "leaf",
}
# A room may import itself and these. A backend knows no other backend.
ROOMS: dict[str, set[str]] = {
    "top": {"model", "nn", "public", "dispatch", "linalg", "native", "leaf"},
    "model": {"nn", "adapters", "dispatch", "problem", "linalg", "reference", "leaf"},
    "nn": {"adapters", "public", "dispatch", "linalg", "reference", "leaf"},
    "adapters": {"public", "linalg", "reference", "leaf"},
    "public": {"ops"},
    "ops": {"dispatch", "problem", "native", "reference", "leaf"},
    "dispatch": {"problem", "native", "leaf"},
    "problem": set(),
    "backend amx": {"core calls", "problem", "native"},
    "backend composed": {"problem", "reference"},
    "backend cpu": {"core calls", "problem", "native", "reference"},
    "backend cuda": {"problem", "native"},
    "backend reference": {"problem", "reference"},
    "backend triton": {"problem", "native"},
    "core calls": {"native", "reference"},
    "linalg": {"native", "leaf"},
    "reference": set(),
    "native": set(),
    "leaf": set(),
}
# Today's imports that run otherwise. Each goes away with the house issue, and its line with it.
EXCEPTIONS = {
    ("backends.amx", "backends.cpu"): "the Kronecker calls of the core stand in cpu",
    ("backends.cpu", "backends.composed"): "library products stand in composed",
    ("backends.cpu", "backends.measured"): "cpu decides between two base products",
    ("backends.cuda", "backends.composed"): "cuda turns to composed unasked",
}


# --- imports of the package


def modules(package: Path) -> Iterator[tuple[str, Path]]:
    """(name within the package, file)."""
    for path in sorted(package.rglob("*.py")):
        yield ".".join(path.relative_to(package).with_suffix("").parts), path


def imports(package: Path) -> set[tuple[str, str]]:
    """(module, module that it imports) within the package, imports inside functions included.

    ``__init__`` of a folder is called by the folder's name, that of the package ``__init__``.
    """
    known = {_named(name) for name, _ in modules(package)}
    found = set()
    for name, path in modules(package):
        for target in _targets(ast.parse(path.read_text(encoding="utf-8")), name):
            while target not in known:  # a name that the module defines
                target = target.rpartition(".")[0] or "__init__"
            if target != _named(name):
                found.add((_named(name), target))
    return found


def _named(name: str) -> str:
    return name.removesuffix(".__init__")


def _targets(tree: ast.Module, name: str) -> Iterator[str]:
    """Everything imported from the package, as dotted names within it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            folder = [PACKAGE, *name.split(".")][: -node.level] if node.level else []
            start = ".".join([*folder, *([node.module] if node.module else [])])
            full = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in full:
            if target == PACKAGE or target.startswith(f"{PACKAGE}."):
                yield target.removeprefix(PACKAGE).lstrip(".") or "__init__"


def room(module: str) -> str:
    while module not in ROOM_OF:
        module, _, _ = module.rpartition(".")
        assert module, "every module stands in a room"
    return ROOM_OF[module]


def wrong_arrows(package: Path) -> set[tuple[str, str]]:
    """Imports that :data:`ROOMS` does not allow."""
    return {
        (source, target)
        for source, target in imports(package)
        if room(source) != room(target) and room(target) not in ROOMS[room(source)]
    }


def pointers_outside(package: Path, home: str = "native.pointers") -> list[str]:
    """Where an address is taken of a tensor, but for the one module that makes pointers."""
    return [
        f"{name}:{node.lineno}"
        for name, path in modules(package)
        if name != home
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "data_ptr"
    ]


def test_imports_run_downwards() -> None:
    wrong = wrong_arrows(SOURCES)
    assert wrong - set(EXCEPTIONS) == set()
    assert set(EXCEPTIONS) - wrong == set(), "listed, but not there any more"


def test_the_rooms_have_an_order() -> None:
    """No room is reached from itself; every room is one that modules stand in."""
    assert set(TopologicalSorter(ROOMS).static_order()) == set(ROOMS) == set(ROOM_OF.values())
    assert {room(_named(name)) for name, _ in modules(SOURCES)} == set(ROOMS)


def test_one_module_makes_pointers() -> None:
    assert (SOURCES / "native" / "pointers.py").is_file()
    assert pointers_outside(SOURCES) == []


# --- planted faults


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package's Python files."""
    copy = tmp_path / PACKAGE
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(SOURCES, copy, ignore=ignored)
    return copy


@pytest.mark.parametrize(
    ("module", "line", "target"),
    [
        ("reference", "def f():\n    from .nn.layer import State", "nn.layer"),
        ("backends/composed", "from . import triton", "backends.triton"),
        ("backends/triton/kron", "from ..composed import add_base", "backends.composed"),
        ("linalg/svd", "import qrlora_kernels.ops.common", "ops.common"),
        ("ops/common", "from .. import functional", "functional"),
        ("backends/problem", "from .chooser import run", "backends.chooser"),
        ("files", "from . import BACKENDS", "__init__"),
        ("nn/rounding", "import qrlora_kernels as qk", "__init__"),
        ("adapters/qr", "from ..nn import base_weight", "nn.base_weight"),
    ],
)
def test_an_arrow_upwards_is_seen(package: Path, module: str, line: str, target: str) -> None:
    before = wrong_arrows(package)
    with (package / f"{module}.py").open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    assert wrong_arrows(package) - before == {(module.replace("/", "."), target)}


def test_a_module_in_no_room_is_seen(package: Path) -> None:
    (package / "attic.py").write_text("from . import native\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="every module stands in a room"):
        wrong_arrows(package)


def test_a_pointer_elsewhere_is_seen(package: Path) -> None:
    before = pointers_outside(package)
    with (package / "files.py").open("a", encoding="utf-8") as file:
        file.write("\ndef at(t):\n    return t.data_ptr()\n")
    (seen,) = set(pointers_outside(package)) - set(before)
    assert seen.startswith("files:")
    assert seen not in pointers_outside(package, home="files")
