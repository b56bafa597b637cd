"""Imports run only downwards, and what belongs in one place is in one place.

    models -> nn -> adapters -> functional, kernels -> ops -> dispatch -> backends -> reference

:data:`ROOMS` says of each room what it may import; :data:`EXCEPTIONS` lists the imports that run
otherwise, one by one: one that nothing needs any more fails too. Backends are imported by name, by
the chooser alone.
"""

from __future__ import annotations

import ast
import functools
import re
import shutil
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from golden_bits import TREE

PACKAGE = "qrlora_kernels"
SOURCES = TREE / PACKAGE
GUIDE = TREE / "docs" / "architecture.md"

# Modules by the room that they stand in: the longest prefix counts.
ROOM_OF = {
    "__init__": "top",
    "__main__": "top",
    "model": "model",
    "peft": "peft",
    "bank": "bank",
    "export": "export",
    "nn": "nn",
    "adapters": "adapters",
    "functional": "public",
    "kernels": "public",
    "ops": "ops",
    "dispatch": "dispatch",
    "dispatch.problem": "problem",
    "backends": "names",  # its __init__ hands out public names
    "backends.amx": "backend amx",
    "backends.composed": "backend composed",
    "backends.cpu": "backend cpu",
    "backends.cuda": "backend cuda",
    "backends.reference": "backend reference",
    "backends.triton": "backend triton",
    "backends.products": "products",
    "backends.core_calls": "core calls",
    "backends.gates": "gates",
    "linalg": "linalg",
    "reference": "reference",
    "segments": "reference",
    "operands": "operands",
    "native": "native",
    "autocast": "leaf",
    "files": "leaf",
    "fingerprint": "leaf",
    "halves": "leaf",
    "modes": "leaf",
    "packed": "leaf",
    "panels": "panels",
    "version": "leaf",
}
# A room may import itself and these. A backend knows no other backend.
ROOMS: dict[str, set[str]] = {
    "top": {
        "export",
        "bank",
        "model",
        "nn",
        "names",
        "dispatch",
        "public",
        "linalg",
        "native",
        "leaf",
    },
    "peft": {"bank", "model", "nn", "adapters", "public", "linalg", "reference", "leaf"},
    "export": {"bank", "model", "nn", "adapters", "linalg", "reference", "leaf"},
    "bank": {"model", "nn", "adapters", "linalg", "leaf"},
    "model": {"nn", "adapters", "dispatch", "problem", "linalg", "reference", "leaf"},
    "nn": {
        "adapters",
        "public",
        "dispatch",
        "problem",
        "operands",
        "panels",
        "linalg",
        "reference",
        "leaf",
    },
    "adapters": {"public", "operands", "linalg", "reference", "leaf"},
    "public": {"ops"},
    "ops": {"dispatch", "problem", "operands", "native", "reference", "leaf"},
    "names": {"dispatch", "problem"},
    "dispatch": {"problem", "operands", "panels", "native", "reference", "leaf"},
    "problem": {"operands"},
    "backend amx": {"core calls", "problem", "operands", "native"},
    "backend composed": {"gates", "panels", "products", "problem", "operands", "reference"},
    "backend cpu": {"core calls", "products", "problem", "operands", "native"},
    "backend cuda": {"problem", "operands", "native", "reference"},
    "backend reference": {"problem", "operands", "reference"},
    "backend triton": {"products", "problem", "operands", "native", "reference"},
    "gates": {"products", "operands", "reference"},
    "products": {"panels", "problem", "reference", "leaf"},
    "panels": {"native"},
    "core calls": {"operands", "native", "reference"},
    "linalg": {"native", "leaf"},
    "reference": {"operands"},
    "operands": set(),
    "native": set(),
    "leaf": set(),
}
# Imports that run otherwise, one by one.
EXCEPTIONS: dict[tuple[str, str], str] = {}


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
        for target in _targets(path.read_text(encoding="utf-8"), name):
            while target not in known:  # a name that the module defines
                target = target.rpartition(".")[0] or "__init__"
            if target != _named(name):
                found.add((_named(name), target))
    return found


def _named(name: str) -> str:
    return name.removesuffix(".__init__")


@functools.cache  # the tests read copies of one package, each with a line of its own
def _targets(source: str, name: str) -> list[str]:
    """Everything imported from the package, as dotted names within it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            folder = [PACKAGE, *name.split(".")][: -node.level] if node.level else []
            start = ".".join([*folder, *([node.module] if node.module else [])])
            full = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [
            target.removeprefix(PACKAGE).lstrip(".") or "__init__"
            for target in full
            if target == PACKAGE or target.startswith(f"{PACKAGE}.")
        ]
    return found


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


# --- the picture in the guide


def drawn_arrows(text: str) -> set[tuple[str, str]]:
    """(room, room) of the picture, where the names of rooms have no spaces."""
    arrows = re.findall(r"^ *(\w+) --> (\w+)$", text, re.MULTILINE)
    return {(source.replace("_", " "), target.replace("_", " ")) for source, target in arrows}


def arrows_to_draw() -> set[tuple[str, str]]:
    """Those of :data:`ROOMS` that do not follow from others."""
    return {
        (source, target)
        for source, targets in ROOMS.items()
        for target in targets
        if not any(target in _below(other) for other in targets)
    }


def _below(room: str) -> set[str]:
    return ROOMS[room].union(*map(_below, ROOMS[room]))


def test_the_picture_has_the_arrows_that_there_are() -> None:
    assert drawn_arrows(GUIDE.read_text(encoding="utf-8")) == arrows_to_draw()


def test_every_arrow_is_an_import() -> None:
    """Else the picture shows what might be."""
    used = {(room(source), room(target)) for source, target in imports(SOURCES)}
    assert {(source, target) for source in ROOMS for target in ROOMS[source]} <= used


def test_the_table_has_every_room() -> None:
    table = GUIDE.read_text(encoding="utf-8").partition("| room |")[2].partition("\n\n")[0]
    found = {
        path.removeprefix(f"{PACKAGE}/").removesuffix(".py").strip("/").replace("/", "."): name
        for name, where in re.findall(r"^\| ([a-z ]+) \| (.+?) \|", table, re.MULTILINE)
        for path in re.findall(r"`(.+?)`", where)
    }
    assert {_named(module): name for module, name in found.items()} == ROOM_OF


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
        ("backends/triton/kron", "from ..composed import kron_terms", "backends.composed"),
        ("backends/cpu", "from ..dispatch.rules import RULES", "dispatch.rules"),
        ("linalg/svd", "import qrlora_kernels.ops.checks", "ops.checks"),
        ("ops/checks", "from .. import functional", "functional"),
        ("ops/kron", "from ..backends import cpu", "backends.cpu"),
        ("dispatch/problem", "from .chooser import run", "dispatch.chooser"),
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
