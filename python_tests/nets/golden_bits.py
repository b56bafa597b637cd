"""Digests of the bits of every operation, to show that a change of structure changes none of them.

    python python_tests/nets/golden_bits.py --compare OTHER_TREE [--only REGEX]

runs this tree and another checkout in child processes of this interpreter, in turn, and names what
differs. The digests belong to a processor, a torch and a number of threads, so they are compared on
one machine and never committed. Only public names of the package are used: what moves inside it
does not disturb the comparison. A backend that refuses a case is noted as such, which also has to
stay.

Not here, because their results are wrong: negated views, subclasses that wrap another tensor,
tensors without storage, and a bias that is not contiguous.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # not in the tests' process, where others choose backends too
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

import torch
from torch import Tensor
from tqdm import tqdm

TREE = Path(__file__).parents[2]
REFUSED = "refused"
SCALING = 0.5

BACKENDS = ("free", "reference", "composed", "cpu", "amx", "triton")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
THREADS = (1, 2)
FACTORS = {
    "qr_linear": ("q", "r", "lam"),
    "lora_xs_linear": ("a", "b", "core"),
    "kron_linear": ("a", "b", "a0", "b0"),
    "linear_add": ("addend",),
}
TRAINED = {
    "qr_linear": ("lam",),
    "lora_xs_linear": ("core",),
    "kron_linear": ("a", "b"),
    "linear_add": ("addend",),
}

Shape = tuple[int, int, int, int]  # tokens, output features, input features, rank
Operands = dict[str, Any]

# Few tokens and many, ranks of every kind, a weight that has to come from memory, long sums.
SHAPES: tuple[Shape, ...] = (
    (1, 48, 96, 3),
    (7, 33, 31, 1),
    (33, 80, 112, 16),
    (130, 300, 450, 150),
    (1, 300, 450, 150),
    (7, 1024, 1040, 16),
    (33, 64, 4640, 16),
)
# The layouts and options are tried where native kernels run and where library products do.
VARIED: tuple[Shape, ...] = ((7, 48, 80, 16), (130, 48, 80, 16))
# Triton's interpreter takes a second for what a GPU does in microseconds, always on one thread.
INTERPRETED: tuple[Shape, ...] = ((1, 48, 96, 3), (7, 33, 31, 1), (33, 80, 112, 16))
INTERPRETED_VARIED: tuple[Shape, ...] = ((7, 24, 40, 8),)


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else t


def strided(t: Tensor) -> Tensor:
    """No dimension is contiguous."""
    return torch.stack([t, -t], -1)[..., 0]


def within(t: Tensor) -> Tensor:
    """Rows that lie apart."""
    return torch.cat([t, -t], -1)[..., : t.shape[-1]]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": transposed,
    "strided": strided,
    "rows apart": within,
}
OPTIONS = ("dy expanded", "no bias", "no start", "narrow trainables", "inference")
VARIANTS = (
    *(f"{what} {how}" for what in ("x", "dy", "weight", "factors") for how in LAYOUTS),
    *OPTIONS,
)


class Case(NamedTuple):
    op: str
    backend: str
    dtype: torch.dtype
    variant: str
    shape: Shape
    threads: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = "x".join(map(str, self.shape))
        return f"{self.op}/{self.backend}/{dtype}/{self.variant}/{shape}/{self.threads} threads"


def cases(only: str = "") -> list[Case]:
    """Every case whose name ``only`` is found in; threads change slowest."""
    return [case for case in _cases() if re.search(only, str(case))]


def _cases() -> Iterator[Case]:
    for threads, op, backend, dtype in product(THREADS, FACTORS, BACKENDS, DTYPES):
        shapes, varied = SHAPES, VARIED
        if backend == "triton":
            shapes, varied = INTERPRETED, INTERPRETED_VARIED
            if threads > 1:
                continue
        variants = [v for v in VARIANTS if v != "no start" or op == "kron_linear"]
        for variant, shape in (*product(["rows"], shapes), *product(variants, varied)):
            yield Case(op, backend, dtype, variant, shape, threads)


# --- one case -----------------------------------------------------------------------------------


def operands(case: Case) -> tuple[Operands, Tensor]:
    """The operands of the public function, and dy."""
    m, n, k, r = case.shape
    generator = torch.Generator().manual_seed(0)
    half = case.dtype in (torch.float16, torch.bfloat16)
    wide = torch.float32 if half and case.variant != "narrow trainables" else case.dtype

    def draw(*shape: int, to: torch.dtype = case.dtype) -> Tensor:
        t = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
        return t.to(to)

    given: Operands = {"x": draw(m, k), "weight": draw(n, k), "bias": draw(n)}
    if case.op == "qr_linear":
        given |= {"q": draw(n, r), "r": draw(r, k), "lam": draw(r, to=wide)}
    elif case.op == "lora_xs_linear":
        given |= {"a": draw(r, k), "b": draw(n, r), "core": draw(r, r, to=wide)}
    elif case.op == "kron_linear":
        for name in FACTORS[case.op]:
            given[name] = draw((n if "a" in name else k) // r, r, to=wide)
    else:
        given["addend"] = draw(m, n)
    return _varied(case, given, draw(m, n))


def _varied(case: Case, given: Operands, dy: Tensor) -> tuple[Operands, Tensor]:
    what, _, how = case.variant.partition(" ")
    if case.variant == "no bias":
        given["bias"] = None
    elif case.variant == "no start":
        given["a0"] = given["b0"] = None
    elif case.variant == "dy expanded":
        dy = dy[:1, :1].expand_as(dy)
    elif how in LAYOUTS:
        names = FACTORS[case.op] if what == "factors" else (what,)
        if what == "dy":
            dy = LAYOUTS[how](dy)
        else:
            given |= {name: LAYOUTS[how](given[name]) for name in names}
    return given, dy


def results(case: Case) -> dict[str, Tensor]:
    """y and the gradient of everything that may ask for one."""
    from qrlora_kernels import functional

    given, dy = operands(case)
    options: dict[str, Any] = {} if case.backend == "free" else {"backend": case.backend}
    if case.op != "linear_add":
        options["scaling"] = SCALING
    function = getattr(functional, case.op)
    if case.variant == "inference":
        with torch.no_grad():
            return {"y": function(**given, **options)}
    names = [name for name in ("x", "bias", *TRAINED[case.op]) if given[name] is not None]
    # detach keeps the strides, where clone may not.
    leaves = {name: given[name].detach().requires_grad_() for name in names}
    y = function(**(given | leaves), **options)
    return {"y": y.detach()} | dict(
        zip(names, torch.autograd.grad(y, list(leaves.values()), dy), strict=True)
    )


def digest(t: Tensor) -> str:
    """Of dtype, shape and every bit."""
    told = hashlib.blake2b(f"{t.dtype} {tuple(t.shape)}".encode(), digest_size=16)
    told.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    return told.hexdigest()


def digests(only: str = "", progress: bool = False) -> dict[str, str]:
    """{case:tensor: digest}, or :data:`REFUSED` for a case that its backend does not run."""
    found: dict[str, str] = {}
    before = torch.get_num_threads()
    try:
        for case in tqdm(cases(only), disable=not progress, mininterval=1):
            torch.set_num_threads(case.threads)
            try:
                found |= {f"{case}:{name}": digest(t) for name, t in results(case).items()}
            except ValueError as error:
                if "cannot run" not in str(error):
                    raise
                found[str(case)] = REFUSED
    finally:
        torch.set_num_threads(before)
    return found


# --- two trees ----------------------------------------------------------------------------------


def differences(left: dict[str, str], right: dict[str, str]) -> list[str]:
    """What differs, or is on one side alone."""
    return [key for key in {**left, **right} if left.get(key) != right.get(key)]


def of_tree(tree: Path, only: str = "") -> dict[str, str]:
    """:func:`digests` of the package in ``tree``, by a child process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "digests.json"
        command = [sys.executable, __file__, "--tree", tree, "--only", only, "--out", out]
        subprocess.run(command, check=True)
        return json.loads(out.read_text())  # type: ignore[no-any-return]


def compare(one: Path, other: Path, only: str = "", rounds: int = 1) -> list[str]:
    """What differs between two trees that take turns, ``rounds`` times each."""
    different: dict[str, None] = {}
    first: dict[str, str] = {}
    for _, tree in product(range(rounds), (one, other)):
        found = of_tree(tree, only)
        different |= dict.fromkeys(differences(first or found, found))
        first = first or found
    run = sum(value != REFUSED for value in first.values())
    print(f"{run} tensors, {len(first) - run} refusals, {len(different)} differ")
    return list(different)


def _import_from(tree: Path) -> None:
    sys.path.insert(0, str(tree))
    import qrlora_kernels

    if Path(qrlora_kernels.__file__).parents[1] != tree:
        raise SystemExit(f"{tree} holds no package: found {qrlora_kernels.__file__}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--compare", type=Path, metavar="TREE", help="another checkout, built")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each tree (default 1)")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--tree", type=Path, default=TREE, help="digest this checkout's package")
    parser.add_argument("--out", type=Path, help="write the digests as JSON (default: print them)")
    args = parser.parse_args()
    tree = args.tree.absolute()
    if args.compare is not None:
        different = compare(tree, args.compare.absolute(), args.only, args.rounds)
        print(*different, sep="\n")
        return int(bool(different))
    _import_from(tree)
    text = json.dumps(digests(args.only, progress=True), indent=1)
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
