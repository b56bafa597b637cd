"""The C++ core knows nothing of Python, and one helper opens its parallel regions."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from golden_bits import TREE

CSRC = TREE / "csrc"
CORE = CSRC / "core"
MAIN = """\
#include "qrlora/cpu/pivoted_qr.h"
#include "qrlora/cpu/table.h"
using namespace qrlora;
int main() {
    const double x = 2, w = 3, bias = 4, addend = 5;
    double y = 0;
    const LinearAdd d{1, 1, 1, DType::f64, {&x, 1, 1}, {&w, 1, 1}, &bias, &addend, &y, 1};
    columns()[best_column()].linear_add(d);
    const PivotOptions options{1, RankRule::none, 0, 1, 1, {}};
    const MatrixView matrix{&w, DType::f64, 1, 1, 1, 1};
    const Pivots found = search_pivots(matrix, options, 1, [] { return false; });
    return y == 15 && found.columns.size() == 1 ? 0 : 1;
}
"""


def core_files(csrc: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(path for suffix in suffixes for path in (csrc / "core").rglob(f"*{suffix}"))


# --- headers


def includes(csrc: Path, path: Path) -> set[str]:
    """Everything that a file includes, through the core's own headers."""
    found: set[str] = set()
    open_ = [path]
    folders = [folder.parent for folder in csrc.rglob("qrlora") if folder.is_dir()]
    while open_:
        file = open_.pop()
        for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', file.read_text("utf-8"), re.M):
            if name not in found:
                found.add(name)
                around = (file.parent, *folders)
                open_ += [at / name for at in around if (at / name).is_file()][:1]
    return found


def of_python(csrc: Path) -> dict[str, set[str]]:
    """Files of the core that include something of Python's."""
    files = core_files(csrc, (".cpp", ".h", ".cu", ".cuh"))
    assert len(files) > 20
    all_ = {str(path.relative_to(csrc)): includes(csrc, path) for path in files}
    python = re.compile(r"^pybind11/|^Python\.h$|python/")
    return {name: hits for name, seen in all_.items() if (hits := set(filter(python.search, seen)))}


def test_the_core_includes_nothing_of_python() -> None:
    assert of_python(CSRC) == {}


def test_an_include_of_python_is_seen(tmp_path: Path) -> None:
    """Through a header of its own, too."""
    copy = tmp_path / "csrc"
    shutil.copytree(CSRC, copy)
    header = copy / "core" / "cpu" / "rows.h"
    header.write_text(header.read_text("utf-8") + "#include <pybind11/pybind11.h>\n", "utf-8")
    seen = of_python(copy)
    assert seen["core/cpu/rows.h"] == {"pybind11/pybind11.h"}
    assert any(name.endswith(".cpp") for name in seen)


# --- parallel regions


def regions(csrc: Path) -> dict[str, int]:
    """How many parallel regions each file opens."""
    pragma = re.compile(r"^\s*#\s*pragma\s+omp\s+parallel", re.M)
    files = [p for p in csrc.rglob("*.*") if p.suffix in (".cpp", ".h")]
    counts = {str(p.relative_to(csrc)): len(pragma.findall(p.read_text("utf-8"))) for p in files}
    return {name: count for name, count in counts.items() if count}


def test_one_helper_opens_parallel_regions() -> None:
    """It allocates before and carries exceptions out, which no region does by itself."""
    found = regions(CSRC)
    assert len(found) == 1, f"parallel regions are opened in {found}"
    assert all("in_parallel(" in (CSRC / name).read_text("utf-8") for name in found)


def test_a_parallel_region_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "cpu" / "sums.cpp"
    file.parent.mkdir()
    file.write_text("void f() {\n  #pragma omp parallel for\n  for (;;) {}\n}\n", "utf-8")
    (tmp_path / "simd.h").write_text("#pragma omp simd\n// no omp parallel\n", "utf-8")
    assert regions(tmp_path) == {"cpu/sums.cpp": 1}


# --- a program without Python

FLAGS = ["-std=c++17", "-O0", "-fopenmp", "-w", f"-I{CORE / 'include'}"]
INSTRUCTION_SETS: dict[str, list[str]] = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    wide = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]
    INSTRUCTION_SETS["avx512"] = [*wide, "-mfma", "-mf16c"]


@pytest.fixture(scope="module")
def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if found is None:
        pytest.skip("no C++ compiler was found")
    return found


def once_per_instruction_set() -> set[str]:
    """The sources that the build compiles so, as it lists them."""
    text = (CSRC.parent / "CMakeLists.txt").read_text("utf-8")
    lists = re.findall(r"set\(QRLORA_(?:CPU|HALF)_KERNELS([^)]*)\)", text)
    return {source for listed in lists for source in listed.split()}


def units() -> Iterator[tuple[Path, str, list[str]]]:
    """(source, name of the object, flags), once for each instruction set that it is for."""
    kernels = once_per_instruction_set()
    for source in core_files(CSRC, (".cpp",)):
        if "amx" in source.parts and source.name != "available.cpp":
            continue  # a core may be built without
        many = source.relative_to(CSRC.parent).as_posix() in kernels
        for name, flags in INSTRUCTION_SETS.items() if many else [("", [])]:
            stem = "_".join(source.relative_to(CSRC).with_suffix("").parts)
            yield source, f"{stem}_{name}.o", [*flags, f"-DQRLORA_ISA={name}"] if many else []


@pytest.fixture(scope="module")
def core(
    compiler: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """The objects of the core, unoptimised; kept from run to run while no source changes."""
    cache = getattr(request.config, "cache", None)
    kept = tmp_path_factory.mktemp("core") if cache is None else cache.mkdir("core")
    digest = hashlib.sha256(compiler.encode())
    for path in core_files(CSRC, (".cpp", ".h")):
        digest.update(path.read_bytes())
    folder = kept / digest.hexdigest()[:16]
    folder.mkdir(exist_ok=True)

    def build(unit: tuple[Path, str, list[str]]) -> Path:
        source, name, flags = unit
        made = folder / name
        if not made.is_file():
            draft = made.with_suffix(f".{os.getpid()}")
            command = [compiler, *FLAGS, *flags, "-c", str(source), "-o", str(draft)]
            subprocess.run(command, check=True)
            draft.replace(made)
        return made

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(build, units()))


def link(compiler: str, core: list[Path], main: str, folder: Path) -> str:
    """What stands in the way of the program, or ""; it has to answer 0."""
    (folder / "main.cpp").write_text(main, encoding="utf-8")
    program = folder / "main"
    command = [compiler, *FLAGS, str(folder / "main.cpp"), *map(str, core), "-o", str(program)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        return done.stderr
    answer = subprocess.run([program], check=False).returncode
    return f"the program answered {answer}" if answer else ""


def test_the_core_links_without_python(compiler: str, core: list[Path], tmp_path: Path) -> None:
    assert link(compiler, core, MAIN, tmp_path) == ""


def test_what_the_core_lacks_is_seen(compiler: str, core: list[Path], tmp_path: Path) -> None:
    missing = "namespace qrlora { void nowhere(); }\nint main() { qrlora::nowhere(); }\n"
    assert "nowhere" in link(compiler, core, missing, tmp_path)
    wrong = MAIN.replace("y == 15", "y == 16")
    assert link(compiler, core, wrong, tmp_path) == "the program answered 1"
