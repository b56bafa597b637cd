"""What an adapter file holds beside the adapters: heads, buffers, tied tensors, its base."""

from __future__ import annotations

import copy
import warnings

import helpers
import pytest
import torch
from saved import ADAPTERS, base, moved, x
from torch import nn

import qrlora_kernels as qk


def with_buffer(buffer):
    model = base()
    model.register_buffer("kept", buffer.clone())
    return model


def bits(tensor):
    return tensor.resolve_conj().contiguous().flatten().view(torch.uint8).tolist()


# --- buffers


@pytest.mark.parametrize(
    "value",
    [
        *(torch.tensor([True, False]), torch.tensor([2**40 + 1, -1]), torch.tensor(2**31)),
        *(torch.tensor([-7], dtype=d) for d in (torch.int8, torch.int16, torch.int32)),
        *(torch.tensor([7], dtype=d) for d in (torch.uint8, torch.uint16, torch.uint64)),
        *(torch.tensor([1 + 2j, 3 - 1j], dtype=d) for d in (torch.complex64, torch.complex128)),
        torch.tensor([1 + 2j, 3 - 1j]).conj(),
        torch.tensor([1.5, -0.0], dtype=torch.float64),
        torch.tensor([1.5, -2]).to(torch.float8_e4m3fn),
        *(torch.empty(0), torch.empty(0, 3), torch.empty(3, 0, dtype=torch.int64)),
        torch.tensor([-torch.inf, 0.0]),  # as a mask has them
        torch.eye(3)[:, 1:2].t(),
    ],
    ids=lambda t: f"{t.dtype} {list(t.shape)}",
)
def test_buffers_of_every_dtype_come_back(value, tmp_path):
    """Only floating ones were saved, and counts cut to 32 bits would end at 2³¹."""
    model = moved("qr", with_buffer(value))
    model.kept = value
    qk.save_adapter(model, tmp_path / "a.safetensors")
    fresh = qk.load_adapter(with_buffer(torch.zeros_like(value)), tmp_path / "a.safetensors")
    assert fresh.kept.dtype == value.dtype
    assert fresh.kept.shape == value.shape
    assert bits(fresh.kept) == bits(value)


def test_counts_of_a_batch_norm_that_trains_come_back(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8, momentum=None))

    model = qk.adapt(build(), ["0"], rank=2, trainable=["1"], progress=False).train()
    for _ in range(3):
        model(x())
    qk.save_adapter(model, tmp_path / "a.safetensors")
    fresh = qk.load_adapter(build(), tmp_path / "a.safetensors").train()
    assert int(fresh[1].num_batches_tracked) == 3
    model(x() + 1)
    fresh(x() + 1)  # a cumulative average depends on the count
    assert helpers.same_bits(fresh[1].running_mean, model[1].running_mean)


def test_a_sparse_buffer_is_named_and_left_alone(tmp_path):
    model = moved("qr", with_buffer(torch.eye(3).to_sparse()))
    with pytest.warns(UserWarning, match="sparse buffers are not saved.*: kept"):
        qk.save_adapter(model, tmp_path / "a.safetensors")
    fresh = qk.load_adapter(with_buffer(torch.eye(3).to_sparse()), tmp_path / "a.safetensors")
    assert torch.equal(fresh.kept.to_dense(), torch.eye(3))


# --- parameters


def tied_net(tie=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    model[2].weight = model[1].weight if tie else nn.Parameter(model[1].weight.detach().clone())
    return model


@pytest.mark.parametrize("tie", [True, False])
def test_a_tied_weight_that_trained_comes_under_all_its_names(tie, tmp_path):
    """In a base that does not tie them, the second one kept the old weight."""
    model = qk.adapt(tied_net(), ["0"], rank=2, trainable=["1"], progress=False)
    with torch.no_grad():
        model[1].weight.add_(0.1)
    qk.save_adapter(model, tmp_path / "a.safetensors")
    fresh = qk.load_adapter(tied_net(tie), tmp_path / "a.safetensors", strict=True)
    assert helpers.same_bits(fresh(x()), model(x()))
    assert (fresh[2].weight is fresh[1].weight) == tie
    qk.unload(fresh, merge=False)
    assert helpers.same_bits(fresh(x()), tied_net()(x()))


def test_a_frozen_tied_weight_is_compared_under_all_its_names(tmp_path):
    model = qk.adapt(tied_net(), ["0"], rank=2, progress=False)
    qk.save_adapter(model, tmp_path / "a.safetensors")
    other = tied_net(tie=False)
    with torch.no_grad():
        other[2].weight.add_(0.1)
    with pytest.raises(ValueError, match=r"differs .*: 2\.weight$"):
        qk.load_adapter(other, tmp_path / "a.safetensors", strict=True)
    assert type(other[0]) is nn.Linear


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_head_kept_wider_than_the_model_stays_as_wide(dtype, head_dtype, tmp_path):
    def trained():
        model = base(dtype)
        qk.adapt(model, ["0"], rank=2, trainable=["3"], head_dtype=head_dtype, progress=False)
        with torch.no_grad():
            model[3].weight.add_(1e-5)
        return model

    model = trained()
    qk.save_adapter(model, tmp_path / "a.safetensors")
    for fresh in (base(dtype), trained()):
        qk.load_adapter(fresh, tmp_path / "a.safetensors")
        assert helpers.same_bits(fresh[3].weight, model[3].weight)
        assert helpers.same_bits(fresh(x(dtype)), model(x(dtype)))
        assert fresh[3].weight.requires_grad


def test_a_head_whose_numbers_would_be_rounded_is_refused(tmp_path):
    model = base()
    model[3].double()
    qk.save_adapter(moved("qr", model, head=True), tmp_path / "a.safetensors")
    fresh = base()
    with pytest.raises(ValueError, match=r"dtype torch\.float64 .* got torch\.float32"):
        qk.load_adapter(fresh, tmp_path / "a.safetensors")
    assert type(fresh[0]) is nn.Linear


@pytest.mark.parametrize("where", ["3.weight", "0.weight", "0.lam"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told_by_saving_and_refused_by_loading(where, value, tmp_path):
    """In the adapter, in a head, or in a base weight that trained."""
    path = tmp_path / "a.safetensors"
    model = moved("qr", head=True)
    dict(model.named_parameters())[where].data.view(-1)[1] = value
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        qk.save_adapter(model, path)
    assert any(f"not to be loaded: {where}" in str(w.message) for w in told)
    fresh = base()
    with pytest.raises(ValueError, match=rf"{path} holds NaN or infinite numbers in {where}"):
        qk.load_adapter(fresh, path)
    assert type(fresh[0]) is nn.Linear


def test_tensors_without_data_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match=r"must hold data, got 0\.weight on the meta device"):
        qk.save_adapter(moved("qr").to("meta"), path)
    assert not path.exists()
    qk.save_adapter(moved("qr", head=True), path)
    fresh = base()
    fresh[3].to("meta")
    with pytest.raises(ValueError, match=r"must hold data, got 3\.\w+ on the meta device"):
        qk.load_adapter(fresh, path)
    assert type(fresh[0]) is nn.Linear


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
def test_a_layer_under_two_names_is_saved_and_loaded_as_one(merged, tmp_path, recwarn):
    """One of both names was left out, and its weight taken for a frozen one."""

    def build():
        torch.manual_seed(0)
        one = nn.Linear(16, 16)
        return nn.ModuleDict({"a": one, "b": one, "c": nn.Linear(16, 3)}).eval()

    model = qk.adapt(build(), ["a"], rank=3, progress=False)
    with torch.no_grad():
        model["a"].lam.add_(0.2)
    want = model["b"](x())
    if merged:
        qk.merge(model)
    qk.save_adapter(model, tmp_path / "a.safetensors")
    fresh = qk.load_adapter(build(), tmp_path / "a.safetensors", strict=True)
    assert fresh["b"] is fresh["a"]
    assert helpers.same_bits(fresh["b"](x()), want)
    assert not recwarn.list


# --- the base outside the adapted layers


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_another_base_outside_the_adapted_layers_is_named_and_refused_if_strict(adapter, tmp_path):
    """Another checkpoint of the family, or a fresh random head, loaded without a word."""
    path = tmp_path / "a.safetensors"
    qk.save_adapter(moved(adapter), path)
    other = base()
    with torch.no_grad():
        other[0].bias[3] += 1
        other[3].weight.normal_()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"beside the adapted layers: 0\.bias, 3\.weight$"):
        qk.load_adapter(other, path, strict=True)
    assert type(other[0]) is nn.Linear
    assert all(torch.equal(before[n], t) for n, t in other.state_dict().items())
    with pytest.warns(UserWarning, match=r"beside the adapted layers: 0\.bias, 3\.weight$") as told:
        qk.load_adapter(other, path)
    assert told[0].filename == __file__


def test_a_head_that_the_file_brings_is_no_reason_to_refuse(tmp_path, recwarn):
    path = tmp_path / "a.safetensors"
    model = moved("qr", head=True)
    qk.save_adapter(model, path)
    other = base()
    with torch.no_grad():
        other[3].weight.normal_()
    qk.load_adapter(other, path, strict=True)
    assert helpers.same_bits(other(x()), model(x()))
    qk.load_adapter(other, path, strict=True)  # over itself too
    assert not recwarn.list
