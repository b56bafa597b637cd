"""A code names a column, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import NUMBERS, Core, by_tensors, low_rank


def test_the_columns_are_named_in_their_order(core):
    assert core.c.columns == tuple(core.c.build_config()["cpu_kernels"].split(","))
    assert core.c.columns[0] == "baseline"
    sets = [name for name in core.c.columns if name != "amx"]
    assert 0 <= core.c.best_column() < len(sets)
    assert set(core.c.instruction_sets()) == set(core.c.columns)
    runs = [name for name in sets if not core.c.instruction_sets()[name]]
    assert core.c.columns[core.c.best_column()] == runs[-1]


REFUSED = [
    ("low_rank", torch.float32, -2, "no such column"),
    ("low_rank", torch.float32, 16, "no such column"),
    ("low_rank", torch.float32, 17, "only kron has an update alone"),
    ("linear_add", torch.float32, 17, "only kron has an update alone"),
    ("kron", torch.float32, 32, "no such column"),
    ("kron", torch.float32, 33, "only low_rank is a step by panels"),
    ("linear_add", torch.float32, 33, "only low_rank is a step by panels"),
    ("low_rank", torch.float32, 48, "no such column"),
    ("low_rank", torch.float16, 1, "baseline has no kernel for low_rank in fp16"),
    ("linear_add", torch.float16, 1, "baseline has no kernel for linear_add in fp16"),
    ("kron", torch.float16, 1, "baseline has no kernel for kron in fp16"),
]


def on_addresses(core: Core, operation: str, dtype: torch.dtype) -> list[Callable[[int], None]]:
    """The calls, each with null pointers: they must be refused before they look."""
    number, nowhere = NUMBERS[dtype], (0, 1, 1)
    c = core.c
    shape, gate = (1, 1, 1, 1, number, 1), (0, 0, False, 1.0)
    if operation == "linear_add":
        shape = (1, 1, 1, number, 1)
        return [lambda code: c.linear_add(code, shape, nowhere, nowhere, 0, 0, 0)]
    if operation == "kron":
        rows, factors = (0, 1), (0, 0, 0, 0, 0, 1.0)
        return [
            lambda code: c.kron_forward(code, shape, rows, factors, 0),
            lambda code: c.kron_backward(code, shape, rows, rows, factors, 0, 0, 0),
        ]
    return [
        lambda code: c.low_rank_forward(code, shape, *[nowhere] * 4, gate, 0, 0, 0),
        lambda code: c.low_rank_backward(code, shape, *[nowhere] * 4, gate, 0, 0, 0),
    ]


def key(operation: str, dtype: torch.dtype, gate: int = 0) -> tuple[int, ...]:
    return ("low_rank", "kron").index(operation), 0, NUMBERS[dtype], 1, 1, 1, 1, gate, 0, 0, 0


@pytest.mark.parametrize(("operation", "dtype", "code", "reason"), REFUSED, ids=str)
def test_a_code_that_nothing_follows_is_named(core, operation, dtype, code, reason):
    for call in on_addresses(core, operation, dtype):
        with pytest.raises(RuntimeError, match=f"^code {code}: {reason}"):
            call(code)
    if operation != "linear_add":
        with pytest.raises(RuntimeError, match=f"^code {code}: {reason}"):
            core.c.tell(key(operation, dtype), code, "op", "choice")


@pytest.mark.parametrize("operation", ["low_rank", "linear_add", "kron"])
@pytest.mark.parametrize("code", [-1, 0])
def test_kernels_are_not_called_by_a_code_without_a_column(core, operation, code):
    for call in on_addresses(core, operation, torch.float32):
        with pytest.raises(RuntimeError, match=f"^code {code}: "):
            call(code)


def test_what_can_be_told_of_kron(core):
    with pytest.raises(RuntimeError, match=r"^code 0: kron has no step of library products"):
        core.c.tell(key("kron", torch.float32), 0, "op", "choice")
    for code in (1, 17):
        core.c.tell(key("kron", torch.bfloat16), code, "op", "choice")
    with pytest.raises(RuntimeError, match="no operation has the number 2"):
        core.c.tell((2, *key("kron", torch.float32)[1:]), 1, "op", "choice")
    with pytest.raises(RuntimeError, match="no element type has the number 4"):
        core.c.tell((0, 0, 4, *key("kron", torch.float32)[3:]), 1, "op", "choice")
    with pytest.raises(TypeError):
        core.c.tell(key("kron", torch.float32)[1:], 1, "op", "choice")


def test_the_tile_unit_computes_bf16_and_one_gate(core):
    """Where the machine has none, every code of it is refused with the reason."""
    if "amx" not in core.c.columns:
        pytest.skip("it is not in this build")
    code, obstacle = core.code("amx"), core.c.amx_obstacle()
    assert obstacle == core.c.instruction_sets()["amx"]
    here = f"amx does not run here: {obstacle}" if obstacle else None
    for operation in ("low_rank", "linear_add", "kron"):
        for call in on_addresses(core, operation, torch.float32):
            reason = here or f"amx has no kernel for {operation} in fp32"
            with pytest.raises(RuntimeError, match=f"^code {code}: {reason}"):
                call(code)
    for gate in (2, 3):
        reason = here or "amx has no kernel for gates by row in bf16"
        with pytest.raises(RuntimeError, match=f"^code {code}: {reason}"):
            core.c.tell(key("low_rank", torch.bfloat16, gate), code, "op", "choice")
    if here:
        with pytest.raises(RuntimeError, match=here):
            core.c.tell(key("kron", torch.bfloat16), code + 16, "op", "choice")


@pytest.mark.parametrize("gate", [2, 3])
def test_bf16_has_no_gates_by_row(core, gate):
    reason = r"^code 1: baseline has no kernel for gates by row in bf16"
    with pytest.raises(RuntimeError, match=reason):
        core.c.tell(key("low_rank", torch.bfloat16, gate), 1, "op", "choice")
    core.c.tell(key("low_rank", torch.float32, gate), 1, "op", "choice")


def test_a_lower_set_by_its_code_is_another_kernel(core):
    """The column is what runs: codes are not read as one."""
    names = [name for name in core.c.columns if not core.c.instruction_sets()[name]]
    if len(names) < 2:
        pytest.skip("one column alone runs here")
    p = low_rank("core", torch.float32, 33, n=300, k=500, r=20)
    low, best = (by_tensors(core, p, core.code(name)) for name in (names[0], names[-1]))
    assert not torch.equal(low.y, best.y), "other sums, other bits"
    torch.testing.assert_close(low.y, best.y, rtol=1e-4, atol=1e-4)
