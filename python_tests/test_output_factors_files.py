"""Files of QR-LoRA with factors="output", the base they belong to, and what is made of them."""

from __future__ import annotations

import json
import warnings

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file
from saved import base, drawn, metadata, moved, x
from torch import nn

import qrlora_kernels as qk
from qrlora_kernels.model.manifest import digest_of

OUTPUT = {"factors": "output"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


@torch.no_grad()
def answer(model):
    return model(x(model[0].weight.dtype))


def deltas(model):
    return {name: layer.delta_weight() for name, layer in qk.adapted_layers(model).items()}


# --- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
@pytest.mark.parametrize("factors", ["auto", "stored", "rebuild"])
def test_a_file_gives_the_same_model_over_any_that_is_there(factors, merged, dtype, path):
    model = moved("qr", base(dtype), **OUTPUT)
    want = answer(model)
    if merged:
        qk.merge(model)
    qk.save_adapter(model, path, factors)
    held = {key.partition(".")[2] for key in load_file(path)}
    assert held == {"lam", "pivots", "diagonal"} | ({"q"} if factors == "stored" else set())
    for over in (base(dtype), moved("qr", base(dtype)), qk.merge(moved("lora_xs", base(dtype)))):
        qk.load_adapter(over, path, strict=True)
        assert over[0].options == moved("qr", base(dtype), **OUTPUT)[0].options
        assert over[0].r is None
        assert helpers.same_bits(answer(over), want)


def test_a_file_of_two_factors_over_a_model_of_one_gives_both(path):
    model = moved("qr")
    qk.save_adapter(model, path)
    over = qk.load_adapter(moved("qr", **OUTPUT), path)
    assert helpers.same_bits(over[0].r, model[0].r)
    assert helpers.same_bits(answer(over), answer(model))


def test_a_file_names_the_option_only_where_earlier_releases_would_not_mean_it(path):
    for options, said in (({}, None), (OUTPUT, "output")):
        qk.save_adapter(moved("qr", **options), path)
        layers = json.loads(metadata(path)["manifest"])["layers"]
        assert {layer["options"].get("factors") for layer in layers.values()} == {said}


def test_an_unknown_value_in_a_file_is_named(path):
    qk.save_adapter(moved("qr", **OUTPUT), path)
    said, tensors = metadata(path), load_file(path)
    said["manifest"] = said["manifest"].replace('"factors": "output"', '"factors": "input"')
    said["digest"] = digest_of(tensors, said["manifest"])
    save_file(tensors, path, said)
    with pytest.raises(ValueError, match=r"damaged manifest.*factors must be one of both, output"):
        qk.load_adapter(base(), path)


def test_a_cast_adapter_comes_back_bit_for_bit(path):
    model = moved("qr", **OUTPUT).bfloat16()
    qk.save_adapter(model, path)
    assert helpers.same_bits(answer(qk.load_adapter(base().bfloat16(), path)), answer(model))


# --- another base


def moving_base(factors="output"):
    """A model whose first base weight has been written to since its adapter began."""
    model = moved("qr", factors=factors)
    with torch.no_grad():
        model[0].weight.add_(torch.linspace(-1, 1, 16))
    return model


def test_the_update_follows_a_changed_weight_and_with_two_factors_it_does_not():
    before, after = (deltas(moved("qr", **OUTPUT)), deltas(moving_base()))
    assert not torch.allclose(before["0"], after["0"], rtol=1e-2)
    torch.testing.assert_close(before["2"], after["2"])
    two = deltas(moving_base("both"))
    torch.testing.assert_close(two["0"], deltas(moved("qr"))["0"], rtol=0, atol=0)


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
def test_a_changed_base_is_told_and_goes_along_with_the_file(merged, path):
    model = moving_base()
    want, assigned = answer(model), nn.Parameter(model[0].weight.detach().clone())
    if merged:
        qk.merge(model)
    with pytest.warns(
        UserWarning, match="0 were changed .* With factors='output' the updates of 0"
    ):
        qk.save_adapter(model, path)
    for over in (base(), moved("qr"), moved("qr", **OUTPUT)):
        qk.load_adapter(over, path)
        assert helpers.same_bits(answer(over), want)
    other = moved("qr", **OUTPUT)
    other[0].weight = assigned
    assert helpers.same_bits(answer(other), want)
    table = qk.summary(other, show=False).table()
    assert "the weights of 0 are not those" in table
    assert "With factors='output' the updates of 0 are others as well" in table


def test_of_two_factors_nothing_more_is_told(path):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        qk.save_adapter(moving_base("both"), path)
    assert "were changed" in str(told[0].message)
    assert "factors='output'" not in str(told[0].message)


def test_other_weights_of_a_state_dict_are_told():
    model, other = moved("qr", **OUTPUT), base()
    with torch.no_grad():
        other[0].weight.add_(1.0)
    with pytest.warns(UserWarning, match=r"weights for 0 .*qk\.refresh.* the updates of 0 are"):
        model.load_state_dict(other.state_dict(), strict=False)


@pytest.mark.parametrize("factors", ["both", "output"])
def test_a_base_that_trains_is_told_at_the_first_step(factors):
    model = qk.adapt(base(), ["0", "2"], rank=4, factors=factors, progress=False).train()
    model[2].weight.requires_grad_(True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model(x()).sum().backward()
    said = [str(one.message) for one in told if "the weights of 2 train" in str(one.message)]
    assert len(said) == (factors == "output")
    assert model[2].weight.grad is not None


# --- what is made of it


def test_another_start_and_another_rank_keep_the_form():
    model = moved("qr", **OUTPUT)
    want = answer(model)
    qk.set_rank(model, 7)
    torch.testing.assert_close(answer(model), want)
    assert (model[0].rank, model[0].q.shape[1], model[0].r) == (7, 7, None)
    qk.set_rank(model, 4)
    torch.testing.assert_close(answer(model), want)
    cut = moved("qr", **OUTPUT).bfloat16()  # whose factors no start gives
    kept = cut[0].q[:, :2].clone()
    qk.set_rank(cut, 2)
    assert helpers.same_bits(cut[0].q, kept)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert qk.refresh(model)[0].r is None
    assert not model[0].base_changed()


@pytest.mark.parametrize("factors", ["auto", "stored"])
def test_a_sum_of_adapters_of_one_form(factors, path):
    parts = {drawn("qr", seed, **OUTPUT): w for seed, w in ((3, 0.5), (4, -2.0))}
    files = {}
    for number, (model, w) in enumerate(parts.items()):
        file = path.with_name(f"{number}.safetensors")
        qk.save_adapter(model, file, factors)
        files[file] = w
    qk.combine(files, path)
    got = deltas(qk.load_adapter(base(), path))
    for name, delta in got.items():
        torch.testing.assert_close(delta, sum(w * deltas(m)[name] for m, w in parts.items()))


def test_a_sum_of_stored_factors_of_both_forms_is_refused(path):
    files = [path, path.with_name("b.safetensors")]
    for file, options in zip(files, ({}, OUTPUT), strict=True):
        qk.save_adapter(drawn("qr", 3, **options), file, "stored")
    with pytest.raises(ValueError, match="must begin from the same factors"):
        qk.combine(dict.fromkeys(files, 1.0))


def test_exported_as_lora_the_other_factor_is_made(tmp_path):
    both, output = moved("qr"), moved("qr", **OUTPUT)
    for name, model in (("both", both), ("output", output)):
        qk.to_lora(model, tmp_path / name)
    one, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("both", "output"))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-5, atol=1e-6)


def test_a_file_alone_cannot_be_exported_without_its_base(tmp_path, path):
    qk.save_adapter(moved("qr", **OUTPUT), path, "stored")
    with pytest.raises(ValueError, match="lacks r of 0, which follows from its base"):
        qk.to_lora(path, tmp_path / "lora")


def test_a_bank_takes_a_file_of_either_form(path):
    qk.save_adapter(moved("qr"), path)
    model = moved("qr", **OUTPUT)
    bank = qk.AdapterBank(model, 1)
    bank.load({"a": path})
    with bank.use(["a"] * 5):
        torch.testing.assert_close(answer(model), answer(moved("qr")))
