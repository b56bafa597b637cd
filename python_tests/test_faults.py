"""Faults that users found in other kernel packages; one test each for those a CPU can show.

The numbers are those of the list: 1 offsets beyond 2³¹, 4 strides and dimensions, 5 autocast, 6
frozen operands, 7 dropout, 8 odd ranks, 9 reproducibility, 10 empty sizes, 12 Python scalars, 13
aliasing and graph breaks, 14 imports, 15 builds, 16 masked reads, 18 merging, 19 silent fallbacks.
The rest (grids, streams, autotuning, shared memory) are a GPU's and tested with the GPU kernels.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import helpers
import pytest
import torch
from helpers import OPS, TRAINABLES
from test_layers import base, tokens, trained
from torch import nn

import qrlora_kernels as qk
from qrlora_kernels import backends

each_op = pytest.mark.parametrize("op", OPS)


def _compare(op, operands, dy, backend, tolerance=1e-5):
    wide = {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in operands.items()}
    truth = helpers.outcome(helpers.exact, op, wide, dy)
    run = lambda o, given: helpers.call(o, given, backend=backend)  # noqa: E731
    got = helpers.outcome(run, op, operands, dy)
    for name, want in truth.items():
        torch.testing.assert_close(
            got[name], want, rtol=tolerance, atol=tolerance, check_dtype=False
        )


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fault_01_offsets_beyond_int32(op, dtype):
    """1: rows that lie more than 2³¹ elements apart. Only the pages that are touched exist."""
    operands = helpers.operands(op, 3, 24, 36, 3, dtype)
    dy = helpers.gradient_like(op, operands)
    far = torch.empty(2 * 1_100_000_000 + 36, dtype=dtype)
    rows = far.as_strided((3, 36), (1_100_000_000, 1))
    rows.copy_(operands["x"])
    for backend in helpers.cpu_backends(op, dtype):
        want = helpers.call(op, operands, backend=backend)
        got = helpers.call(op, operands | {"x": rows}, backend=backend)
        torch.testing.assert_close(got, want)
        if op == "kron_linear":
            leaf = rows.detach().requires_grad_()
            helpers.call(op, operands | {"x": leaf}, backend=backend).backward(dy)
            assert leaf.grad.isfinite().all()


@each_op
def test_fault_04_strides_and_dimensions_of_both_passes(op):
    """4: a 4-D x that is a permuted view, and a gradient that is expanded over it."""
    operands = helpers.operands(op, (2, 3, 5), 24, 36, 3)
    operands["x"] = operands["x"].transpose(0, 2).contiguous().transpose(0, 2)
    for backend in helpers.cpu_backends(op, torch.float32):
        _compare(op, operands, torch.randn(5, 24).expand(2, 3, 5, 24), backend)


@pytest.mark.parametrize("kind", ["qr", "lora_xs", "ohora"])
def test_fault_05_autocast(kind):
    """5: under autocast a layer computes in bf16, as the frozen one; and autocast stays on."""
    linear = base()
    layer = trained(kind, linear)
    x = tokens().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert torch.is_autocast_enabled("cpu")
        assert y.dtype == linear(x).dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["qr", "lora_xs", "ohora"])
def test_fault_06_frozen_things(kind):
    """6: no gradient for the frozen, one for each that trains, and nothing else frozen by it."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 48))
    other = copy.deepcopy(model)
    qk.adapt(model, "1", kind, rank=4, progress=False, trainable="0")
    model(tokens()).square().sum().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    own = {f"1.{name}" for name in model[1].trainables}
    assert with_gradient == {"0.weight", "0.bias"} | own
    assert all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("kind", ["qr", "lora_xs", "ohora"])
def test_fault_07_dropout_reaches_dx(kind):
    """7: where the mask dropped an element of x, the update sends no gradient back."""
    layer = trained(kind, base(torch.float64), size=1.0, dropout=0.5)
    with torch.no_grad():
        layer.weight.zero_()
    x = tokens(torch.float64).requires_grad_()
    torch.manual_seed(0)
    layer(x).sum().backward()
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(torch.ones_like(x), 0.5) == 0
    assert (x.grad[dropped] == 0).all()
    assert (x.grad[~dropped] != 0).all()


@each_op
@pytest.mark.parametrize("r", [1, 3, 15, 17, 150])
def test_fault_08_ranks_that_no_tile_divides(op, r):
    """8: ranks below 16 and ranks that are no power of two."""
    operands = helpers.operands(op, 19, 150 if r == 150 else 2 * r, 3 * r, r)
    dy = helpers.gradient_like(op, operands)
    for backend in helpers.cpu_backends(op, torch.float32):
        _compare(op, operands, dy, backend, tolerance=2e-4)


def _train(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 48))
    qk.adapt(model, ["0", "2"], kind, rank=4, progress=False)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    x, target = torch.randn(500, 32), torch.randn(500, 48)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), target).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["qr", "lora_xs", "ohora"])
def test_fault_09_training_is_reproducible(kind):
    """9: two runs of one seed end at the same bits."""
    assert all(map(helpers.same_bits, _train(kind), _train(kind)))


@each_op
@pytest.mark.parametrize("sizes", [(0, 24, 36, 3), (7, 0, 36, 3), (7, 24, 0, 3), (0, 0, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fault_10_empty_sizes(op, sizes, dtype):
    """10: no tokens, no outputs, no inputs."""
    operands = helpers.operands(op, *sizes, dtype)
    dy = helpers.gradient_like(op, operands)
    for backend in helpers.cpu_backends(op, dtype):
        _compare(op, operands, dy, backend, 1e-5 if dtype == torch.float32 else 0.02)


@each_op
def test_fault_12_python_scalars_stay_out_of_fp64(op):
    """12: the scaling is a Python float; no tensor of the compiled graphs may become fp64."""
    from torch._dynamo.backends.common import aot_autograd

    operands = helpers.operands(op, 7, 24, 36, 3, torch.bfloat16)
    seen: set[torch.dtype] = set()

    def note(graph, inputs):
        for node in graph.graph.nodes:
            values = node.meta.get("val")
            values = values if isinstance(values, (tuple, list)) else [values]
            seen.update(v.dtype for v in values if isinstance(v, torch.Tensor))
        return graph.forward

    backend = aot_autograd(fw_compiler=note, bw_compiler=note)
    compiled = torch.compile(lambda given: helpers.call(op, given), fullgraph=True, backend=backend)
    leaves = {n: operands[n].requires_grad_() for n in ("x", "bias", *TRAINABLES[op])}
    compiled(operands).sum().backward()
    assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves.values())
    assert seen == {torch.bfloat16, *(t.dtype for t in leaves.values())}


@pytest.mark.parametrize("kind", ["qr", "lora_xs", "ohora"])
def test_fault_13_modules_compile_whole_and_refuse_a_second_derivative(kind):
    """13: no graph break, no aliasing (see test_ops), no silently wrong double backward."""
    layer = trained(kind)
    x = tokens().requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_fault_14_import_leaves_cuda_alone_and_can_fork():
    """14: nothing at import may touch CUDA, so that a data loader can still fork."""
    code = (
        "import os, torch\n"
        "def fail(*a, **k): raise SystemExit('CUDA was initialised')\n"
        "torch.cuda._lazy_init = torch.cuda.init = torch.cuda.is_available = fail\n"
        "torch.cuda.device_count = fail\n"
        "import qrlora_kernels as qk\n"
        "layer = qk.QRLinear.from_linear(torch.nn.Linear(8, 8), 2)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    torch.set_num_threads(1)\n"
        "    layer(torch.randn(3, 8))\n"
        "    os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


def test_fault_15_the_report_says_what_the_build_left_out():
    """15: with or without a native core and its CUDA part, a sentence says which and why."""
    from qrlora_kernels import native
    from qrlora_kernels.__main__ import report

    text = report()
    assert native.REASON in text
    if config := qk.build_config():
        assert "cuda" in {key.lower().split("_")[0] for key in config}
        assert all(f"{key}: {value}" in text for key, value in config.items())
    for name, (ok, reason) in backends.report().items():
        assert any(name in line and reason in line for line in text.splitlines())
        assert ok or reason


@each_op
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fault_16_one_bad_token_stays_alone(op, value, dtype):
    """16: NaN and Inf in one token reach no other token, and no element is left unwritten."""
    for backend in helpers.cpu_backends(op, dtype):
        operands = helpers.operands(op, 19, 24, 36, 3, dtype)
        clean = helpers.call(op, operands, backend=backend)
        operands["x"][5] = value
        with helpers.poisoned_memory():
            leaf = operands["x"].requires_grad_()
            y = helpers.call(op, operands, backend=backend)
            y.sum().backward()
        others = torch.arange(19) != 5
        assert helpers.same_bits(y.detach()[others], clean[others])
        assert leaf.grad.isfinite().all()  # dx depends on dy alone


@pytest.mark.parametrize("kind", ["qr", "lora_xs", "ohora"])
def test_fault_18_merging_does_not_drift(kind):
    """18: a hundred rounds of merge and unmerge in bf16, and a start, leave every bit in place."""
    linear = base(torch.bfloat16)
    bits = linear.weight.detach().clone()
    layer = trained(kind, linear)
    want = layer(tokens(torch.bfloat16))
    for _ in range(100):
        layer.merge()
        layer.unmerge()
    assert helpers.same_bits(linear.weight, bits)
    assert helpers.same_bits(layer(tokens(torch.bfloat16)), want)


def test_fault_18_signs_do_not_change_on_reload(tmp_path):
    """18: LoRA-XS factors recomputed with other signs would be another model; they are stored."""
    model = nn.Sequential(base())
    qk.adapt(model, "0", "lora_xs", rank=4, progress=False)
    with torch.no_grad():
        model[0].core.normal_()
        model[0].a.neg_()  # as another machine's SVD might have had them
        model[0].b.neg_()
        model[0].a[0].neg_()
    qk.save_adapter(model, tmp_path / "a.safetensors")
    fresh = qk.load_adapter(nn.Sequential(base()), tmp_path / "a.safetensors")
    assert helpers.same_bits(fresh(tokens()), model(tokens()))


@each_op
def test_fault_19_a_backend_that_is_asked_for_runs_or_raises(op, monkeypatch):
    """19: no silent fallback, and the choice of every call can be looked up, with its reason."""
    operands = helpers.operands(op, 7, 24, 36, 3)
    for backend in helpers.cpu_backends(op, torch.float32):
        helpers.call(op, operands, backend=backend)
        assert backends.last_choice(op).name == backend
    helpers.call(op, operands)
    choice = backends.last_choice(op)
    assert choice.name == helpers.cpu_backends(op, torch.float32)[0]
    refused = [
        n for n in list(backends.BACKENDS) if n not in helpers.cpu_backends(op, torch.float32)
    ]
    for backend in refused:
        with pytest.raises(ValueError, match=f"backend '{backend}' cannot run {op} here: "):
            helpers.call(op, operands, backend=backend)


@each_op
def test_results_are_on_the_device_of_x(op):
    """A default device other than x's must not receive what a CPU kernel writes."""
    operands = helpers.operands(op, 4, 24, 36, 3)
    dy = helpers.gradient_like(op, operands)
    for backend in helpers.cpu_backends(op, torch.float32):
        run = lambda o, given: helpers.call(o, given, backend=backend)  # noqa: E731, B023
        want = helpers.outcome(run, op, operands, dy)
        with torch.device("meta"):
            got = helpers.outcome(run, op, operands, dy)
        for name, value in want.items():
            assert helpers.same_bits(got[name], value), (backend, name)


@pytest.mark.parametrize("kind", ["qr", "lora_xs", "ohora"])
def test_a_start_is_computed_on_the_device_of_the_weight(kind):
    model = nn.Sequential(base())
    with torch.device("meta"):
        qk.adapt(model, "0", kind, rank=4, progress=False)
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}
