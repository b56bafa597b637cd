"""Files and state dicts of adapters over quantised weights: exact, and of that base alone."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantised_models import ADAPTERS, KINDS, adapt, library, move, net, x
from torch import nn

import qrlora_kernels as qk
from qrlora_kernels.model.manifest import read
from qrlora_kernels.nn import base_weight

of_each_kind = pytest.mark.parametrize("kind", KINDS)
of_each_adapter = pytest.mark.parametrize("adapter", ADAPTERS)
HERE = Path(__file__).parent

AGAIN = """
import sys, torch
import qrlora_kernels as qk
from quantised_models import KINDS, net, x
folder = sys.argv[1]
answers = {kind: qk.load_adapter(net(kind), f"{folder}/{kind}")(x()) for kind in KINDS}
torch.save(answers, f"{folder}/answers")
"""


@of_each_kind
@of_each_adapter
def test_it_comes_back_bit_for_bit(kind, adapter, tmp_path):
    model = move(adapt(net(kind), adapter, trainable=["head"]))
    with torch.no_grad():
        model.head.weight.add_(1)
    want = model(x())
    qk.save_adapter(model, tmp_path / "a")
    other = qk.load_adapter(net(kind), tmp_path / "a")
    assert torch.equal(other(x()), want)
    assert torch.equal(qk.load_adapter(other, tmp_path / "a")(x()), want)


def test_it_comes_back_in_another_process(tmp_path):
    """All kinds in one, since starting it takes the time."""
    wanted = {}
    for kind in KINDS:
        model = move(adapt(net(kind)))
        qk.save_adapter(model, tmp_path / kind)
        wanted[kind] = model(x())
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), *sys.path])
    command = [sys.executable, "-c", AGAIN, str(tmp_path)]
    subprocess.run(command, check=True, env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    answers = torch.load(tmp_path / "answers")
    for kind, y in wanted.items():
        assert torch.equal(answers[kind], y), kind


@of_each_kind
def test_factors_follow_from_the_weight(kind, tmp_path):
    """So that the file holds pivots alone; cast since, the factors lie in it."""
    model = move(adapt(net(kind)))
    qk.save_adapter(model, tmp_path / "a")
    assert "first.q" not in read(tmp_path / "a").tensors
    model.half()
    qk.save_adapter(model, tmp_path / "b")
    assert ("first.q" in read(tmp_path / "b").tensors) == (model.first.q.dtype == torch.float16)


@of_each_kind
def test_the_file_is_of_these_bits(kind, tmp_path):
    model = move(adapt(net(kind)))
    qk.save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match=r"first.weight is not the weight.* its fingerprint"):
        qk.load_adapter(net(kind, seed=1), tmp_path / "a")


@of_each_kind
def test_scales_count(kind, tmp_path):
    model = move(adapt(net(kind)))
    qk.save_adapter(model, tmp_path / "a")
    other = net(kind)
    parts = base_weight.quantised(other.second).parts()
    with torch.no_grad():
        next(parts[n] for n in ("absmax", "SCB", "scale") if n in parts).view(-1)[3:4].mul_(2)
    with pytest.raises(ValueError, match=r"second.weight is not the weight.* its fingerprint"):
        qk.load_adapter(other, tmp_path / "a")


def test_the_offset_of_nested_scales_counts():
    first, second = (net("nf4_nested").first for _ in range(2))
    digests = [base_weight.exact_digest(layer, layer.weight) for layer in (first, second)]
    assert digests[0] == digests[1]
    second.weight.quant_state.offset.add_(1e-3)
    assert base_weight.exact_digest(second, second.weight) != digests[0]
    assert base_weight.digest(second) != base_weight.digest(first)


@pytest.mark.parametrize(
    ("kind", "other"),
    [("nf4", "fp4"), ("bnb_int8", None), ("int8", "float8"), (None, "nf4"), (None, "int8_groups")],
)
def test_another_kind_of_base_is_refused(kind, other, tmp_path):
    def make(kind):
        torch.manual_seed(0)
        plain = {"first": nn.Linear(64, 96), "second": nn.Linear(96, 64), "head": nn.Linear(64, 3)}
        return net(kind) if kind else nn.ModuleDict(plain).bfloat16()

    qk.save_adapter(adapt(make(kind)), tmp_path / "a")
    with pytest.raises(ValueError, match=r"its dtype must be [^:]*$"):
        qk.load_adapter(make(other), tmp_path / "a")


@of_each_kind
def test_another_layer_beside_the_adapted_ones_is_told(kind, tmp_path):
    """The second layer is quantised too, and not adapted."""
    model = qk.adapt(net(kind), ["first"], rank=6, progress=False)
    qk.save_adapter(model, tmp_path / "a")
    qk.load_adapter(net(kind), tmp_path / "a", strict=True)
    other = net(kind, seed=1)
    other.first, other.head = net(kind).first, net(kind).head
    with pytest.raises(ValueError, match=r"differs .* second.weight"):
        qk.load_adapter(other, tmp_path / "a", strict=True)


@of_each_kind
def test_a_changed_base_is_not_saved(kind, tmp_path):
    model = adapt(net(kind))
    other = net(kind, seed=1)
    model.first.weight = other.first.weight
    if kind == "bnb_int8":
        model.first.state = other.first.state
    assert model.first.base_changed()
    with pytest.raises(ValueError, match=r"first must have the quantised weight"):
        qk.save_adapter(model, tmp_path / "a")
    qk.refresh(model)
    qk.save_adapter(model, tmp_path / "a")


# --- state dicts


@of_each_kind
@of_each_adapter
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_goes_there_and_back(kind, adapter, assign):
    model = move(adapt(net(kind), adapter))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    other = adapt(net(kind), adapter)
    assert not torch.equal(other(x()), model(x()))
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other(x()), model(x()))
    assert not other.first.base_changed()


@of_each_kind
def test_a_state_dict_has_what_the_library_saves(kind):
    plain = set(net(kind).state_dict())
    own = {f"{n}.{t}" for n in ("first", "second") for t in ("lam", "q", "r", "pivots", "diagonal")}
    assert set(adapt(net(kind)).state_dict()) == plain | own


@of_each_kind
def test_a_state_dict_of_another_base_is_refused_before_anything_is_taken(kind):
    model = adapt(net(kind))
    want = model(x())
    state = move(adapt(net(kind, seed=1))).state_dict()
    with pytest.raises(RuntimeError, match=r"must get the quantised weight that it has"):
        model.load_state_dict({n: t for n, t in state.items() if not n.startswith("head")}, False)
    assert torch.equal(model(x()), want)


@of_each_kind
def test_what_a_state_dict_lacks_is_named(kind):
    model = adapt(net(kind))
    state = {n: t for n, t in model.state_dict().items() if n != "first.weight"}
    with pytest.raises(RuntimeError, match=r'Missing key.* "first.weight"'):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == ["first.weight"]


def test_scales_that_the_first_forward_moved():
    """bitsandbytes' int8 layer keeps them in its weight before it and in its state after."""
    library("bitsandbytes")
    early, late = net("bnb_int8"), net("bnb_int8")
    late(x())
    assert late.first.weight.SCB is None
    digests = [base_weight.digest(m.first) for m in (early, late)]
    assert digests[0] == digests[1]
    model = move(adapt(late))
    other = adapt(early)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x()), model(x()))
