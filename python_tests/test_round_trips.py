"""What loads answers as what was saved, whatever dtype, wrapper or state it was in."""

from __future__ import annotations

import helpers
import pytest
import torch
from saved import ADAPTERS, DTYPES, base, moved, x
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import qrlora_kernels as qk


def compiled(model):
    torch.compiler.reset()
    return torch.compile(model, backend="eager")


def checkpointed_inside(model):
    model[0] = checkpoint_wrapper(model[0])
    return model


def compiled_inside(model):
    model[2] = compiled(model[2])
    return model


WRAPPERS = {
    "plain": lambda model: model,
    "parallel": nn.DataParallel,
    "compiled": compiled,
    "checkpointed": checkpoint_wrapper,
    "checkpointed inside": checkpointed_inside,
    "compiled inside": compiled_inside,
    "checkpointed, then parallel": lambda model: nn.DataParallel(checkpoint_wrapper(model)),
}

# Every adapter in every wrapper that costs nothing to make, and one in those that compile.
WRAPPED = [(w, a) for w in WRAPPERS for a in ADAPTERS if "compiled" not in w or a == "qr"]


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
@pytest.mark.parametrize("saved", DTYPES, ids=str)
@pytest.mark.parametrize("adapted", DTYPES, ids=str)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_model_cast_after_adapt_comes_back_bit_for_bit(adapter, adapted, saved, merged, tmp_path):
    """A cast changes factors and weight apart, so that pivots alone gave other factors, or none."""
    path = tmp_path / "a.safetensors"
    model = moved(adapter, base(adapted)).to(saved)
    want = model(x(saved))
    if merged:
        qk.merge(model)
    qk.save_adapter(model, path)
    fresh = qk.load_adapter(base(adapted).to(saved), path)
    assert helpers.same_bits(fresh(x(saved)), want)
    for name, layer in qk.adapted_layers(fresh).items():
        for key in (*layer.factors, *layer.trainables):
            other = getattr(qk.adapted_layers(model)[name], key)
            assert helpers.same_bits(getattr(layer, key), other), (name, key)


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
@pytest.mark.parametrize(("wrapper", "adapter"), [w for w in WRAPPED if w[0] != "plain"])
def test_what_a_wrapper_holds_loads_without_it(wrapper, adapter, merged, tmp_path):
    """Names with ``module.`` or ``_orig_mod.`` in a file fit no plain model."""
    path = tmp_path / "a.safetensors"
    inner = moved(adapter, head=True)
    want = inner(x())
    model = WRAPPERS[wrapper](inner)
    if merged:
        qk.merge(model)
    qk.save_adapter(model, path)
    assert helpers.same_bits(qk.load_adapter(base(), path)(x()), want)


@pytest.mark.parametrize(("wrapper", "adapter"), WRAPPED)
def test_loading_reaches_what_a_wrapper_holds(wrapper, adapter, tmp_path):
    """It changed the model inside and not its compiled graph, or nothing at all."""
    path = tmp_path / "a.safetensors"
    model = moved(adapter, head=True)
    qk.save_adapter(model, path)
    fresh = WRAPPERS[wrapper](base())
    fresh(x())  # compiled before the file comes
    qk.load_adapter(fresh, path)
    assert helpers.same_bits(fresh(x()), model(x()))


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
@pytest.mark.parametrize(("wrapper", "adapter"), WRAPPED)
def test_loading_over_other_numbers_that_a_wrapper_holds(wrapper, adapter, merged, tmp_path):
    path = tmp_path / "a.safetensors"
    model = moved(adapter, head=True)
    qk.save_adapter(model, path)
    other = moved(adapter, head=True, dropout=0.1)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    other = WRAPPERS[wrapper](other)
    if merged:
        qk.merge(other)
    other(x())
    qk.load_adapter(other, path)
    assert helpers.same_bits(other(x()), model(x()))


@pytest.mark.parametrize("saved", DTYPES, ids=str)
@pytest.mark.parametrize("loaded", DTYPES, ids=str)
def test_a_base_in_another_dtype_is_refused_by_it(saved, loaded, tmp_path):
    path = tmp_path / "a.safetensors"
    qk.save_adapter(moved("qr", base(saved)), path)
    model = base(loaded)
    if saved == loaded:
        qk.load_adapter(model, path)
        return
    name = str(saved).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"dtype must be {name}.*model\.to\(torch\.{name}\)"):
        qk.load_adapter(model, path)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_cast_down_and_back_up_the_file_brings_the_rounded_weight(adapter, tmp_path):
    """For an evaluation in half precision: the weight is another than the base's from then on."""
    path = tmp_path / "a.safetensors"
    model = moved(adapter).half().float()
    with pytest.warns(UserWarning, match="base weights of 0, 2 were changed"):
        qk.save_adapter(model, path)
    with pytest.warns(UserWarning, match=r"differs .* 0\.bias, 2\.bias, 3\.weight"):
        fresh = qk.load_adapter(base(), path)
    assert helpers.same_bits(fresh[0].weight, model[0].weight)
    fresh.load_state_dict({n: t for n, t in model.state_dict().items() if "bias" in n}, False)
    fresh[3].load_state_dict(model[3].state_dict())
    assert helpers.same_bits(fresh(x()), model(x()))


def test_cast_up_and_back_down_nothing_has_changed(tmp_path, recwarn):
    path = tmp_path / "a.safetensors"
    model = moved("qr", base(torch.bfloat16)).double().bfloat16()
    qk.save_adapter(model, path)
    fresh = qk.load_adapter(base(torch.bfloat16), path, strict=True)
    assert helpers.same_bits(fresh(x(torch.bfloat16)), model(x(torch.bfloat16)))
    assert not recwarn.list


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_factors_that_a_cast_changed_are_not_left_to_be_rebuilt(adapter, tmp_path):
    """It was written all the same, and no base loaded it."""
    with pytest.raises(ValueError, match="'auto' or 'stored' for 0, whose factors do not follow"):
        qk.save_adapter(moved(adapter).bfloat16(), tmp_path / "a.safetensors", factors="rebuild")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("factors", ["auto", "stored", "rebuild"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_saving_what_was_loaded_gives_the_same_file(adapter, factors, tmp_path):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    qk.save_adapter(moved(adapter, head=True), first, factors)
    qk.save_adapter(qk.load_adapter(base(), first), second, factors)
    assert sorted(first.read_bytes()) == sorted(second.read_bytes())  # metadata have no order


def test_neither_saving_nor_loading_draws_from_the_generator(tmp_path):
    path = tmp_path / "a.safetensors"
    model, fresh = moved("lora_xs"), base()
    before = torch.get_rng_state()
    qk.save_adapter(model, path, factors="rebuild")
    qk.load_adapter(fresh, path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 1), (5, 1, 1), (7, 3, 1), (3, 7, 2)])
@pytest.mark.parametrize("adapter", ["qr", "lora_xs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rank_one_and_layers_of_one_row_or_column(shape, adapter, dtype, tmp_path):
    """Such tensors pass for contiguous with any stride, and had no fingerprint."""
    n, k, rank = shape

    def one():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(k, n, dtype=dtype))

    model = qk.adapt(one(), ["0"], adapter, rank=rank, progress=False)
    with torch.no_grad():
        getattr(model[0], model[0].trainables[0]).fill_(0.3)
    for factors in ("auto", "stored", "rebuild"):
        qk.save_adapter(model, tmp_path / "a.safetensors", factors)
        fresh = qk.load_adapter(one(), tmp_path / "a.safetensors")
        tokens = torch.ones(2, k, dtype=dtype)
        assert helpers.same_bits(fresh(tokens), model(tokens))
