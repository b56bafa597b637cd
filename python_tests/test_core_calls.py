"""The native core does as it is told: by a code on addresses, by a plan on tensors."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

NUMBERS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
GATES = ("vector", "core", "mixed_vector", "mixed_core")
ADAPTERS = 5
STATES = (
    "_is_any_autocast_enabled",
    "_are_functorch_transforms_active",
    "_len_torch_dispatch_stack",
    "_len_torch_function_stack",
    "_get_tracing_state",
)
of_each_gate = pytest.mark.parametrize("gate", GATES)
of_both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


class Core(NamedTuple):
    """A copy of the core, apart from the package's, and where it notes what it was told."""

    c: Any
    last: dict[Any, Any]

    def code(self, column: str | None = None) -> int:
        return 1 + (self.c.columns.index(column) if column else self.c.best_column())


def _built() -> Path | None:
    package = importlib.util.find_spec("qrlora_kernels")
    assert package is not None
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    folders = [Path(folder) for folder in package.submodule_search_locations or ()]
    return next((path for folder in folders for path in folder.glob(f"_C{suffix}")), None)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Loaded from another file: what it is told must not reach the package."""
    built = _built()
    if built is None:
        pytest.skip("the native core is not built")
    copy = shutil.copy(built, tmp_path_factory.mktemp("core"))
    spec = importlib.util.spec_from_file_location("told._C", copy)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def core(loaded: ModuleType) -> Iterator[Core]:
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    states = tuple(getattr(torch._C, name, None) for name in STATES)
    if capsule is None or None in states:
        pytest.skip("this torch does not offer what calls on tensors need")
    last: dict[Any, Any] = {}
    arguments = (Tensor, torch.nn.Parameter, states, torch.is_grad_enabled, torch.get_num_threads)
    assert loaded.set_torch(capsule, *arguments, last)
    threads = torch.get_num_threads()
    yield Core(loaded, last)
    torch.set_num_threads(threads)
    loaded.forget_choices()


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def column(request: pytest.FixtureRequest, loaded: ModuleType) -> str:
    """Each instruction set that runs here."""
    name: str = request.param
    reason = loaded.instruction_sets().get(name, "it is not in this build")
    if reason:
        pytest.skip(f"{name}: {reason}")
    return name


# --- the low-rank operation


class LowRank(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    up: Tensor
    down: Tensor
    gate: Tensor
    index: Tensor | None
    scaling: float
    dy: Tensor

    @property
    def r(self) -> int:
        return self.gate.shape[-1]

    @property
    def kind(self) -> int:
        mixed = self.index is not None
        return 2 * mixed + (self.gate.dim() - mixed - 1)

    def forward_key(self) -> tuple[int, ...]:
        return self._key(0, 0, self.bias is not None)

    def backward_key(self, needs: int = 3) -> tuple[int, ...]:
        return self._key(1, needs, 0)

    def _key(self, step: int, needs: int, bias: int) -> tuple[int, ...]:
        n, k = self.weight.shape
        columns = int(self.weight.stride(1) != 1)
        m = self.x.numel() // k
        dtype = NUMBERS[self.x.dtype]
        return 0, step, dtype, m, n, k, self.r, self.kind, columns, needs, int(bias)

    def forward_operands(self) -> tuple[Any, ...]:
        return self[:8]

    def backward_operands(self, h: Tensor, dx: bool = True, dgate: bool = True) -> tuple[Any, ...]:
        frozen = (self.weight, self.up, self.down, self.gate, self.index)
        return (self.dy, *frozen, h, self.scaling, dx, dgate)


def low_rank(
    gate: str = "vector",
    dtype: torch.dtype = torch.float64,
    m: int = 7,
    n: int = 24,
    k: int = 36,
    r: int = 3,
    wider: int = 0,
    seed: int = 0,
) -> LowRank:
    """``wider``: so many columns and rows of the factors that do not count, all NaN."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, dtype=dtype)

    up, down = normal(n, r + wider), normal(r + wider, k) / k**0.5
    up[:, r:], down[r:] = torch.nan, torch.nan
    sizes = [ADAPTERS] * gate.startswith("mixed") + [r] * (1 + gate.endswith("core"))
    index = torch.randint(ADAPTERS - 1, (m,), generator=make) if len(sizes) > 1 else None
    if not gate.startswith("mixed"):
        index = None
    return LowRank(
        normal(m, k), normal(n, k) / k**0.5, normal(n), up, down, normal(*sizes), index, 0.7,
        normal(m, n),
    )  # fmt: skip


class Outcome(NamedTuple):
    y: Tensor
    h: Tensor
    dx: Tensor
    dgate: Tensor


def expected(p: LowRank) -> Outcome:
    """Plain torch in fp64, its gradients by autograd."""
    x, gate = (t.double().detach().requires_grad_() for t in (p.x, p.gate))
    weight, up, down = (t.double() for t in (p.weight, p.up[:, : p.r], p.down[: p.r]))
    h = x @ down.T
    own = gate if p.index is None else gate[p.index.view(x.shape[:-1])]
    is_core = p.kind % 2 == 1
    mid = torch.einsum("...i,...ij->...j", h, own) if is_core else h * own
    y = x @ weight.T + p.scaling * mid @ up.T
    y = y if p.bias is None else y + p.bias.double()
    dx, dgate = torch.autograd.grad(y, (x, gate), p.dy.double())
    return Outcome(y.detach(), h.detach().view(-1, p.r), dx, dgate)


def by_tensors(core: Core, p: LowRank, code: int) -> Outcome:
    recorded = p._replace(x=p.x.detach().requires_grad_())
    core.c.tell(p.forward_key(), code, "forward", "told")
    y, h = core.c.low_rank_forward_call(*recorded.forward_operands())
    core.c.tell(p.backward_key(), code, "backward", "told")
    return Outcome(y, h, *core.c.low_rank_backward_call(*p.backward_operands(h)))


def matrix(t: Tensor) -> tuple[int, int, int]:
    return t.data_ptr(), *t.stride()


def by_addresses(core: Core, p: LowRank, code: int, threads: int = 1) -> Outcome:
    x, dy = (t.reshape(-1, t.shape[-1]) for t in (p.x, p.dy))
    (m, k), n, dtype = x.shape, p.weight.shape[0], p.x.dtype
    y, h, dx = x.new_empty(m, n), x.new_empty(m, p.r), x.new_empty(m, k)
    dgate = torch.empty_like(p.gate)
    shape = (m, n, k, p.r, NUMBERS[dtype], threads)
    frozen = (matrix(p.weight), matrix(p.down), matrix(p.up))
    gate = (p.gate.data_ptr(), NUMBERS[p.gate.dtype], p.kind % 2 == 1, p.scaling)
    bias = 0 if p.bias is None else p.bias.data_ptr()
    mixed = () if p.index is None else (p.index.data_ptr(), p.gate.shape[0])
    out = (y.data_ptr(), h.data_ptr())
    core.c.low_rank_forward(code, shape, matrix(x), *frozen, gate, bias, *out, *mixed)
    out = (h.data_ptr(), dx.data_ptr(), dgate.data_ptr())
    core.c.low_rank_backward(code, shape, matrix(dy), *frozen, gate, *out, *mixed)
    return Outcome(y.view_as(p.dy), h, dx.view_as(p.x), dgate)


def close(got: Outcome, want: Outcome) -> None:
    for name, a, b in zip(Outcome._fields, got, want, strict=True):
        bound = 1e-12 if a.dtype == torch.float64 else 2e-5
        message = f"{name}: {(a.double() - b).abs().max()}"
        torch.testing.assert_close(a.double(), b, rtol=bound, atol=bound, msg=message)


def strided(p: LowRank, columns: int) -> LowRank:
    """``columns``: which of weight, up and down lie by columns; x and dy have gaps between rows."""
    turned = {
        name: getattr(p, name).t().contiguous().t()
        for bit, name in enumerate(("weight", "up", "down"))
        if columns >> bit & 1
    }
    gaps = {name: torch.cat([getattr(p, name)] * 2, 1)[:, : t.shape[1]]
            for name in ("x", "dy") for t in [getattr(p, name)]}  # fmt: skip
    return p._replace(**turned, **gaps)


@of_each_gate
@of_both_dtypes
@pytest.mark.parametrize("wider", [0, 2])
@pytest.mark.parametrize("m", [1, 7, 48])
def test_both_ways_give_what_torch_gives(core, column, gate, dtype, wider, m):
    for r in (1, 3, 20):
        p = low_rank(gate, dtype, m, r=r, wider=wider)
        want = expected(p)
        by_address = by_addresses(core, p, core.code(column))
        close(by_address, want)
        got = by_tensors(core, p, core.code(column))
        close(got, want)
        assert all(map(torch.equal, got, by_address))


@of_each_gate
@pytest.mark.parametrize("columns", range(8))
def test_strides(core, gate, columns):
    p = strided(low_rank(gate, wider=columns % 2), columns)
    want = expected(p)
    close(by_addresses(core, p, core.code()), want)
    close(by_tensors(core, p, core.code()), want)


@of_each_gate
@pytest.mark.parametrize("lead", [(), (1,), (2, 1, 3)], ids=str)
def test_leading_dimensions(core, gate, lead):
    m = torch.Size(lead).numel()
    p = low_rank(gate, m=m)
    p = p._replace(x=p.x.view(*lead, -1), dy=p.dy.view(*lead, -1), bias=None)
    want = expected(p)
    close(by_tensors(core, p, core.code()), want)
    if p.index is not None:
        p = p._replace(index=p.index.view(lead))
        close(by_tensors(core, p, core.code()), want)


def test_large_cores_and_many_rows(core):
    """Sums in chunks, blocks of columns, two threads: the same bits as one."""
    for gate, m, r in (("core", 1500, 70), ("mixed_core", 5300, 70), ("mixed_vector", 5300, 70)):
        p = low_rank(gate, torch.float32, m, n=130, k=90, r=r)
        one, two = (by_addresses(core, p, core.code(), threads) for threads in (1, 2))
        assert all(map(torch.equal, one, two))
        exact = by_addresses(core, low_rank(gate, torch.float64, m, 130, 90, r), core.code())
        close(exact, expected(low_rank(gate, torch.float64, m, 130, 90, r)))
        want = expected(p)
        assert ((one.dgate - want.dgate).norm() / want.dgate.norm()).item() < 1e-6


# --- mixed batches


@pytest.mark.parametrize("gate", GATES[2:])
@of_both_dtypes
@pytest.mark.parametrize("m", [13, 5300])
def test_nobody_feels_who_else_is_in_the_batch(core, column, gate, dtype, m):
    """Rows and gradients have the bits of the adapter's batch alone, as a mixed one and without."""
    code = core.code(column)
    p = low_rank(gate, dtype, m, n=24, k=36, r=17)
    all_ = by_addresses(core, p, code, 2)
    for a in range(ADAPTERS - 1):
        at = (p.index == a).nonzero()[:, 0]
        assert len(at), "the test needs each of them"
        own = p._replace(x=p.x[at], dy=p.dy[at], index=p.index[at])
        alone = by_addresses(core, own, code)
        unmixed = by_addresses(core, own._replace(index=None, gate=p.gate[a].clone()), code)
        for name in ("y", "h", "dx"):
            mine = getattr(all_, name)[at]
            assert torch.equal(mine, getattr(alone, name)), name
            assert torch.equal(mine, getattr(unmixed, name)), name
        assert torch.equal(all_.dgate[a], alone.dgate[a])
        assert torch.equal(all_.dgate[a], unmixed.dgate)


@pytest.mark.parametrize("gate", GATES[2:])
@pytest.mark.parametrize("scaling", [-1.0, torch.inf])
def test_an_adapter_in_no_row_gets_exactly_zero(core, gate, scaling):
    p = low_rank(gate)._replace(scaling=scaling)
    for got in (by_addresses(core, p, core.code()), by_tensors(core, p, core.code())):
        absent = got.dgate[ADAPTERS - 1]
        assert torch.equal(absent, torch.zeros_like(absent))
        assert not absent.signbit().any()


@pytest.mark.parametrize("gate", GATES[2:])
def test_far_more_adapters_than_rows(core, gate):
    p = low_rank(gate, m=3)
    p = p._replace(gate=p.gate.repeat(400, *[1] * (p.gate.dim() - 1)),
                   index=torch.tensor([1999, 0, 1999]))  # fmt: skip
    close(by_tensors(core, p, core.code()), expected(p))


@pytest.mark.parametrize("gate", GATES[2:])
def test_an_index_that_does_not_fit_is_refused(core, gate):
    p = low_rank(gate)
    y, h, *_ = by_tensors(core, p, core.code())
    wrong = {
        "negative": p.index - 1 - p.index.min(),
        "past the end": p.index + ADAPTERS - p.index.max(),
        "int32": p.index.int(),
        "floating": p.index.double(),
        "short": p.index[1:],
        "a row too many": torch.zeros(len(p.index) + 1, dtype=torch.int64),
        "another shape": p.index.view(1, -1),
        "gaps": p.index.repeat_interleave(2)[::2],
        "a number": 1,
    }
    for name, index in wrong.items():
        changed = p._replace(index=index)
        assert core.c.low_rank_forward_call(*changed.forward_operands()) is None, name
        assert core.c.low_rank_backward_call(*changed.backward_operands(h)) is None, name
    assert torch.equal(core.c.low_rank_forward_call(*p.forward_operands()), y)


# --- answers


def answers(core: Core, p: LowRank) -> tuple[Any, Any]:
    """To a forward and a backward."""
    h = torch.zeros(p.x.shape[0], p.r, dtype=p.x.dtype)
    forward = core.c.low_rank_forward_call(*p.forward_operands())
    return forward, core.c.low_rank_backward_call(*p.backward_operands(h))


def tell_both(core: Core, p: LowRank, code: int) -> None:
    core.c.tell(p.forward_key(), code, ("low_rank", "fwd"), f"forward by {code}")
    core.c.tell(p.backward_key(), code, ("low_rank", "bwd"), f"backward by {code}")


def test_what_was_not_told_is_not_implemented(core):
    assert answers(core, low_rank()) == (NotImplemented, NotImplemented)
    assert core.last == {}


def test_what_is_somebody_elses_is_none_and_not_noted(core):
    tell_both(core, low_rank(), -1)
    assert answers(core, low_rank()) == (None, None)
    assert core.last == {}


def test_library_products_are_named_and_noted(core):
    p = low_rank()
    tell_both(core, p, 0)
    assert answers(core, p) == (["forward by 0", False], ["backward by 0"])
    recorded = p._replace(gate=p.gate.requires_grad_())
    assert answers(core, recorded)[0] == ["forward by 0", True]
    with torch.no_grad():
        assert answers(core, recorded)[0] == ["forward by 0", False]
    assert core.last == {
        ("low_rank", "fwd"): "forward by 0",
        ("low_rank", "bwd"): "backward by 0",
    }


@pytest.mark.parametrize("who", ["x", "bias", "gate"])
def test_h_is_handed_out_where_autograd_must_record(core, who):
    p = low_rank()
    tell_both(core, p, core.code())
    y = core.c.low_rank_forward_call(*p.forward_operands())
    recorded = p._replace(**{who: getattr(p, who).requires_grad_()})
    again, h = core.c.low_rank_forward_call(*recorded.forward_operands())
    assert torch.equal(y, again)
    assert torch.equal(h, by_addresses(core, p, core.code()).h)
    frozen = p._replace(up=p.up.requires_grad_())
    assert core.c.low_rank_forward_call(*frozen.forward_operands()) is None


@pytest.mark.parametrize(("dx", "dgate"), [(True, False), (False, True)])
@of_each_gate
def test_gradients_that_nobody_asks_for_are_not_made(core, gate, dx, dgate):
    p = low_rank(gate)
    whole = by_tensors(core, p, core.code())
    operands = p.backward_operands(whole.h, dx, dgate)
    assert core.c.low_rank_backward_call(*operands) is NotImplemented
    core.c.tell(p.backward_key(dx + 2 * dgate), core.code(), "part", "told")
    got_dx, got_dgate = core.c.low_rank_backward_call(*operands)
    assert torch.equal(got_dx, whole.dx) if dx else got_dx is None
    assert torch.equal(got_dgate, whole.dgate) if dgate else got_dgate is None


def test_a_plan_is_for_its_problem_alone(core):
    """Each part of the key tells problems apart."""
    p = low_rank()
    tell_both(core, p, core.code())
    core_gate, mixed = low_rank("core"), low_rank("mixed_vector")
    others = {
        "dtype": low_rank(dtype=torch.float32),
        "m": low_rank(m=8),
        "n": low_rank(n=25),
        "k": low_rank(k=35),
        "r": low_rank(r=4),
        "core": p._replace(gate=core_gate.gate),
        "mixed": p._replace(gate=mixed.gate, index=mixed.index),
        "mixed core": p._replace(gate=low_rank("mixed_core").gate, index=mixed.index),
        "layout": p._replace(weight=p.weight.t().contiguous().t()),
    }
    for name, other in others.items():
        assert answers(core, other) == (NotImplemented, NotImplemented), name
    no_bias = p._replace(bias=None)
    assert core.c.low_rank_forward_call(*no_bias.forward_operands()) is NotImplemented
    assert core.last == {}
    forward, backward = answers(core, p)
    assert isinstance(forward, Tensor)
    assert isinstance(backward, tuple)
    wide = low_rank(wider=3)
    assert isinstance(answers(core, wide)[0], Tensor), "how wide the factors are decides nothing"


def test_the_last_call_is_noted_last(core):
    problems = [low_rank(m=m) for m in (1, 2, 3)]
    for p in problems:
        core.c.tell(p.forward_key(), core.code(), p.x.shape[0], f"choice {p.x.shape[0]}")
    for p in (*problems, problems[0]):
        core.c.low_rank_forward_call(*p.forward_operands())
    assert list(core.last.items()) == [(2, "choice 2"), (3, "choice 3"), (1, "choice 1")]


def test_a_plan_told_anew_replaces_the_old_one(core):
    p = low_rank()
    tell_both(core, p, core.code())
    tell_both(core, p, -1)
    assert answers(core, p) == (None, None)


def test_forgetting(core):
    tell_both(core, low_rank(), core.code())
    core.c.forget_choices()
    assert answers(core, low_rank()) == (NotImplemented, NotImplemented)


def test_another_number_of_threads_drops_all_plans(core):
    p, other = low_rank(), low_rank(m=8)
    torch.set_num_threads(1)
    tell_both(core, p, core.code())
    tell_both(core, other, core.code())
    torch.set_num_threads(2)
    assert answers(core, other) == (NotImplemented, NotImplemented)
    torch.set_num_threads(1)
    assert answers(core, p) == (NotImplemented, NotImplemented)
    tell_both(core, p, core.code())
    assert isinstance(answers(core, p)[0], Tensor)


def test_at_most_4096_plans_are_kept(core):
    first, newest = low_rank(), low_rank(m=9)
    core.c.tell(first.forward_key(), core.code(), "op", "first")
    for m in range(1000, 1000 + 4096):
        core.c.tell((*first.forward_key()[:3], m, *first.forward_key()[4:]), 0, "op", "one more")
    core.c.tell(newest.forward_key(), core.code(), "op", "newest")
    assert core.c.low_rank_forward_call(*first.forward_operands()) is NotImplemented
    assert isinstance(core.c.low_rank_forward_call(*newest.forward_operands()), Tensor)


def test_operands_that_do_not_fit_are_refused(core):
    p = low_rank(wider=1)
    h = by_tensors(core, p, core.code()).h
    wrong = {
        "no down": {"down": None},
        "up narrower than down": {"up": p.up[:, :3]},
        "narrower than the gate": {"up": p.up[:, :2], "down": p.down[:2]},
        "down of another K": {"down": p.down[:, 1:]},
        "a gate with gaps": {"gate": p.gate.repeat_interleave(2)[::2]},
        "a gate of another dtype": {"gate": p.gate.float()},
        "a core that is not square": {"gate": p.gate.new_ones(2, 3)},
        "a scaling that is no number": {"scaling": True},
        "a subclass": {"weight": p.weight.as_subclass(type("Own", (Tensor,), {}))},
        "a negated view": {"down": torch.complex(p.down, p.down).conj().imag},
    }
    for name, changed in wrong.items():
        q = p._replace(**changed)
        assert core.c.low_rank_forward_call(*q.forward_operands()) is None, name
        backward = p._replace(**changed).backward_operands(h)
        assert core.c.low_rank_backward_call(*backward) is None, name
    gaps = torch.cat([h, h], 1)[:, :3]
    assert core.c.low_rank_backward_call(*p.backward_operands(gaps)) is None


def test_refusals_of_modes(core, monkeypatch):
    p = low_rank()
    tell_both(core, p, core.code())
    monkeypatch.setenv("QRLORA_BACKEND", "composed")
    assert answers(core, p) == (None, None)
    monkeypatch.setenv("QRLORA_BACKEND", "")
    with torch.autocast("cpu", torch.bfloat16):
        assert answers(core, p) == (None, None)
    assert core.last == {}
    assert isinstance(answers(core, p)[0], Tensor)


# --- codes


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
    ("low_rank", torch.bfloat16, 1, "baseline has no kernel for low_rank in bf16"),
    ("low_rank", torch.float16, 1, "baseline has no kernel for low_rank in fp16"),
    ("linear_add", torch.bfloat16, 1, "baseline has no kernel for linear_add in bf16"),
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
    reason = r"^code 1: baseline has no kernel for kron's base product in bf16"
    with pytest.raises(RuntimeError, match=reason):
        core.c.tell(key("kron", torch.bfloat16), 1, "op", "choice")
    core.c.tell(key("kron", torch.bfloat16), 17, "op", "choice")
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
        reason = here or "amx has no kernel for gates by row"
        with pytest.raises(RuntimeError, match=f"^code {code}: {reason}"):
            core.c.tell(key("low_rank", torch.bfloat16, gate), code, "op", "choice")
    if here:
        with pytest.raises(RuntimeError, match=here):
            core.c.tell(key("kron", torch.bfloat16), code + 16, "op", "choice")


# --- the Kronecker update and the base product


class Kron(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    a0: Tensor | None
    b0: Tensor | None
    scaling: float
    dy: Tensor

    def key(self, step: int, needs: int = 0) -> tuple[int, ...]:
        n, k = self.weight.shape
        bias = int(step == 0 and self.bias is not None)
        columns = int(self.weight.stride(1) != 1)
        shape = (self.x.shape[0], n, k, self.a.shape[1])
        return 1, step, NUMBERS[self.x.dtype], *shape, 0, columns, needs, bias

    def backward_operands(self, *needs: bool) -> tuple[Any, ...]:
        factors = (self.a, self.b, self.a0, self.b0)
        return (self.dy, self.x, self.weight, *factors, self.scaling, *needs)


def kron(dtype: torch.dtype = torch.float64, m: int = 7, *, start: bool = True) -> Kron:
    make = torch.Generator().manual_seed(m)
    n, k, r = 8, 6, 3

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, dtype=dtype)

    a, b = normal(n, r), normal(k, r)
    a0, b0 = (a + normal(n, r) / 8, b + normal(k, r) / 8) if start else (None, None)
    x, dy, weight = normal(m, r * k), normal(m, n * r), normal(n * r, r * k)
    return Kron(x, weight, normal(n * r), a, b, a0, b0, 0.7, dy)


def kron_expected(p: Kron, *, base: bool = True) -> dict[str, Tensor]:
    x, a, b = (t.double().detach().requires_grad_() for t in (p.x, p.a, p.b))
    delta = torch.kron(a, b.T.contiguous())
    if p.a0 is not None and p.b0 is not None:
        delta = delta - torch.kron(p.a0.double(), p.b0.double().T.contiguous())
    y = p.scaling * x @ delta.T
    if base:
        y = y + x @ p.weight.T + (0 if p.bias is None else p.bias)
    dx, da, db = torch.autograd.grad(y, (x, a, b), p.dy.double())
    return {"y": y.detach(), "dx": dx, "da": da, "db": db}


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("m", [1, 7, 40])
def test_kron_calls(core, column, start, alone, bias, m):
    """The whole step, or the update with the choice for whoever adds the base product."""
    p = kron(m=m, start=start)._replace(**({} if bias else {"bias": None}))
    want = kron_expected(p, base=not alone)
    code = core.code(column) + 16 * alone
    assert core.c.kron_forward_call(*p[:8]) is NotImplemented
    core.c.tell(p.key(0), code, "kron", "forward")
    core.c.tell(p.key(1, 7), code, "kron", "backward")
    y, base, record = core.c.kron_forward_call(*p[:8])
    assert (base, record) == ("forward" if alone else None, False)
    assert core.last == {"kron": "forward"}
    torch.testing.assert_close(y, want["y"])
    assert core.c.kron_forward_call(*p[:3], p.a.requires_grad_(), *p[4:8])[2] is True
    *gradients, base = core.c.kron_backward_call(*p.backward_operands(True, True, True))
    assert base == ("backward" if alone else None)
    assert core.last == {"kron": "backward"}
    for name, got in zip(("dx", "da", "db"), gradients, strict=True):
        torch.testing.assert_close(got, want[name])


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_kron_gradients_that_nobody_asks_for(core, needs):
    p = kron()
    bits = sum(need << bit for bit, need in enumerate(needs))
    operands = p.backward_operands(*needs)
    assert core.c.kron_backward_call(*operands) is NotImplemented
    core.c.tell(p.key(1, bits), core.code() + 16, "kron", "told")
    *gradients, base = core.c.kron_backward_call(*operands)
    assert base == ("told" if needs[0] else None), "without dx no base product is due"
    want = kron_expected(p, base=False)
    for need, name, got in zip(needs, ("dx", "da", "db"), gradients, strict=True):
        assert (got is not None) == need
        if need:
            torch.testing.assert_close(got, want[name])


def test_kron_of_somebody_else_and_in_another_layout(core):
    p = kron()
    core.c.tell(p.key(0), -1, "kron", "told")
    core.c.tell(p.key(1, 7), -1, "kron", "told")
    assert core.c.kron_forward_call(*p[:8]) is None
    assert core.c.kron_backward_call(*p.backward_operands(True, True, True)) is None
    turned = p._replace(weight=p.weight.t().contiguous().t())
    assert core.c.kron_forward_call(*turned[:8]) is NotImplemented
    assert core.c.kron_forward_call(p.x, p.weight, None, *p[3:8]) is NotImplemented
    assert core.last == {}


def test_kron_in_bf16_is_an_update(core, column):
    """Factors in fp32 over bf16, sums in fp32, one rounding."""
    exact = kron()
    half = {name: getattr(exact, name).bfloat16() for name in ("x", "weight", "bias", "dy")}
    factors = {name: getattr(exact, name).float() for name in ("a", "b", "a0", "b0")}
    p = exact._replace(**half, **factors)
    core.c.tell(p.key(0), core.code(column) + 16, "kron", "told")
    y, base, _ = core.c.kron_forward_call(*p[:8])
    assert (y.dtype, base) == (torch.bfloat16, "told")
    want = kron_expected(p, base=False)["y"]
    torch.testing.assert_close(y.double(), want, rtol=8e-3, atol=1e-5)


@of_both_dtypes
@pytest.mark.parametrize("columns", [False, True])
def test_linear_add(core, column, dtype, columns):
    p = low_rank(dtype=dtype)
    weight = p.weight.t().contiguous().t() if columns else p.weight
    y = torch.empty_like(p.dy)
    core.c.linear_add(
        core.code(column), (*p.dy.shape, p.x.shape[1], NUMBERS[dtype], 1), matrix(p.x),
        matrix(weight), p.bias.data_ptr(), p.dy.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    want = p.x.double() @ weight.double().T + p.bias.double() + p.dy.double()
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(y.double(), want, rtol=bound, atol=bound)


def test_a_lower_set_by_its_code_is_another_kernel(core):
    """The column is what runs: codes are not read as one."""
    names = [name for name in core.c.columns if not core.c.instruction_sets()[name]]
    if len(names) < 2:
        pytest.skip("one column alone runs here")
    p = low_rank("core", torch.float32, 33, n=300, k=500, r=20)
    low, best = (by_tensors(core, p, core.code(name)) for name in (names[0], names[-1]))
    assert not torch.equal(low.y, best.y), "other sums, other bits"
    torch.testing.assert_close(low.y, best.y, rtol=1e-4, atol=1e-4)
