"""Between merge and unmerge the weight is the merged one, whoever reads or replaces it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers.pytorch_utils import Conv1D

import qrlora_kernels as qk

ADAPTERS = {"qr": {"rank": 3}, "lora_xs": {"rank": 3}, "ohora": {}}


def linear(conv1d: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Conv1D(16, 8) if conv1d else nn.Linear(8, 16)


def net(conv1d: bool = False) -> nn.Sequential:
    return nn.Sequential(linear(conv1d), nn.Tanh(), nn.Linear(16, 8))


def adapted(adapter: str = "qr", conv1d: bool = False, dtype=torch.float32) -> nn.Sequential:
    """A net with an adapter that is as large as the weight."""
    torch.manual_seed(1)
    model = qk.adapt(
        net(conv1d).to(dtype), ["0", "2"], adapter, progress=False, **ADAPTERS[adapter]
    )
    with torch.no_grad():
        for layer in qk.adapted_layers(model).values():
            for name in layer.trainables:
                getattr(layer, name).add_(0.5 * torch.randn(getattr(layer, name).shape))
    return model.eval()


def x(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(2)).to(dtype)


def plain_answer(state: dict[str, torch.Tensor], conv1d: bool = False) -> torch.Tensor:
    model = net(conv1d).to(state["0.weight"].dtype)
    model.load_state_dict(state)
    return model(x(state["0.weight"].dtype))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


# --- what reads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_merged_state_dict_is_a_plain_models_with_the_update(adapter, conv1d, dtype):
    model = adapted(adapter, conv1d, dtype)
    y = model(x(dtype))
    qk.merge(model)
    state = model.state_dict()
    assert sorted(state) == sorted(net(conv1d).state_dict())
    assert torch.equal(plain_answer(state, conv1d), model(x(dtype)))
    if dtype != torch.bfloat16:
        assert close(model(x(dtype)), y)
    assert not close(net(conv1d).to(dtype)(x(dtype)), y)


def test_hooks_of_the_state_dict_see_the_merged_weight():
    model = qk.merge(adapted())
    seen = {}
    model[0].register_state_dict_post_hook(
        lambda module, state, prefix, meta: seen.update({n: t.clone() for n, t in state.items()})
    )
    model.state_dict()
    assert torch.equal(seen["0.weight"], model[0].weight)
    assert "0.lam" not in seen


def test_reading_changes_nothing():
    model = qk.merge(adapted())
    for _ in range(2):
        model.state_dict(), model.state_dict(keep_vars=True), list(model.parameters())
        assert all(model[i].merged for i in (0, 2))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "deepcopy of the layer"])
def test_a_copy_of_a_merged_model_is_merged_and_unmerges(adapter, way):
    model = adapted(adapter)
    y = model(x())
    qk.merge(model)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "deepcopy of the layer":
        other = nn.Sequential(*(copy.deepcopy(one) for one in model))
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert other[0].merged
    assert torch.equal(other(x()), model(x()))
    assert torch.equal(plain_answer(other.state_dict()), model(x()))
    assert torch.equal(qk.unmerge(other)(x()), y)
    assert model[0].merged
    assert torch.equal(qk.unmerge(model)(x()), y)


# --- what replaces


def test_a_merged_state_is_refused_by_an_adapted_model():
    state = qk.merge(adapted()).state_dict()
    model = adapted()
    y = model(x())
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="is that of a merged layer"):
            model.load_state_dict(state, strict=strict)
        assert torch.equal(model(x()), y)


def test_a_merged_state_is_refused_without_its_metadata():
    """As safetensors and plain dictionaries hand it on."""
    state = dict(qk.merge(adapted()).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.lam"):
        adapted().load_state_dict(state)
    copied = adapted()
    copied.load_state_dict(state, strict=False)
    # Nothing tells such a state from a checkpoint that was loaded after adapt: it is noticed.
    assert copied[0].base_changed()


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_an_unmerged_state_unmerges_first(adapter, strict, assign):
    model = adapted(adapter)
    y, state = model(x()), copy.deepcopy(model.state_dict())
    qk.merge(model)
    model.load_state_dict(state, strict=strict, assign=assign)
    assert not any(model[i].merged for i in (0, 2))
    assert torch.equal(model(x()), y)
    assert not model[0].base_changed()
    qk.merge(model)
    assert close(model(x()), y)
    assert torch.equal(qk.unmerge(model)(x()), y)


@pytest.mark.parametrize("assign", [True, False])
def test_a_plain_checkpoint_into_a_merged_model_is_its_new_base(assign):
    model = adapted()
    qk.merge(model)
    torch.manual_seed(7)
    other = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    model.load_state_dict(copy.deepcopy(other.state_dict()), strict=False, assign=assign)
    assert not model[0].merged
    assert torch.equal(model[0].weight, other[0].weight)
    assert model[0].base_changed()
    delta = model[0].delta_weight()
    want = F.linear(x(), other[0].weight + delta, other[0].bias)
    assert close(model[0](x()), want)


def test_a_layer_that_a_parent_replaces_parameters_of_follows():
    """A tie: transformers assigns the embedding's weight to the head."""
    model = adapted()
    qk.merge(model)
    tied = nn.Parameter(torch.randn(16, 8))
    model[0].weight = tied
    assert not model[0].merged
    assert "0.lam" in model.state_dict()
    want = F.linear(x(), tied + model[0].delta_weight(), model[0].bias)
    assert close(model[0](x()), want)
    qk.unmerge(model)
    assert model[0].weight is tied


def test_written_in_place_it_stays_a_plain_layer():
    """As DistributedDataParallel writes when it starts: an update on top would count twice."""
    model = adapted()
    y = model(x())
    qk.merge(model)
    with torch.no_grad():
        model[0].weight.mul_(2)
    want = F.linear(x(), model[0].weight, model[0].bias)
    assert torch.equal(model[0](x()), want)
    assert torch.equal(plain_answer(model.state_dict()), model(x()))
    model[0].merge()
    assert torch.equal(model[0](x()), want)
    assert torch.equal(qk.unmerge(model)(x()), y)


def test_written_to_by_its_data_it_stays_a_plain_layer():
    """``p.data = new``, as loaders write: no version tells."""
    model = adapted()
    y = model(x())
    qk.merge(model)
    model[0].weight.data = torch.randn(16, 8)
    assert torch.equal(model[0](x()), F.linear(x(), model[0].weight, model[0].bias))
    assert torch.equal(qk.unmerge(model)(x()), y)


def test_called_with_copies_of_its_parameters_it_stays_a_plain_layer():
    model = qk.merge(adapted())
    for copies in (
        {n: p.detach() for n, p in model.named_parameters()},
        {n: p.detach().clone() for n, p in model.named_parameters()},
        dict(copy.deepcopy(model).named_parameters()),
    ):
        assert torch.equal(torch.func.functional_call(model, copies, x()), model(x()))
    assert model[0].merged


def parametrised(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    layer(x())
    parametrize.remove_parametrizations(layer, "weight")


def pruned(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", 0.5)
    layer(x())
    prune.remove(layer, "weight")


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("change", [parametrised, pruned])
def test_parametrised_or_pruned_and_back_it_is_merged(change, cast):
    model = adapted()
    if cast:
        model.double().float()
    y = model(x())
    qk.merge(model)
    if cast:
        model.double().float()
    change(model[0])
    assert model[0].merged
    assert torch.equal(model[0](x()), F.linear(x(), model[0].weight, model[0].bias))
    assert sorted(model.state_dict()) == sorted(net().state_dict())
    assert torch.equal(qk.unmerge(model)(x()), y)


def test_compiled_it_follows_merge_and_unmerge():
    model = adapted()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    y = model(x())
    assert close(compiled(x()), y)
    for _ in range(2):
        qk.merge(model)
        assert torch.equal(compiled(x()), model(x()))
        qk.unmerge(model)
        assert close(compiled(x()), y)


def test_the_fold_follows_an_assigned_weight():
    torch.manual_seed(0)
    layer = qk.OHoRALinear.from_linear(linear(), fold=True).eval()
    with torch.no_grad():
        layer.a.add_(0.5)
    layer.weight = nn.Parameter(torch.randn(16, 8), requires_grad=False)
    assert close(layer(x()), F.linear(x(), layer.weight + layer.delta_weight(), layer.bias))
    y = layer(x())
    layer.merge()
    assert close(layer(x()), y)
    layer.unmerge()
    assert torch.equal(layer(x()), y)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to(torch.float64),
        lambda m: m.bfloat16(),
        lambda m: m.half().float(),
        lambda m: m.to("cpu"),
        lambda m: m.share_memory(),
        lambda m: m.double().float(),
    ],
    ids=["fp64", "bf16", "fp16 and back", "cpu", "shared", "fp64 and back"],
)
def test_casts_and_moves_keep_it_merged(adapter, change):
    model = adapted(adapter)
    base = change(nn.ParameterList([model[0].weight.detach().clone()]))[0]
    merged = change(nn.ParameterList([qk.merge(model)[0].weight.detach().clone()]))[0]
    change(model)
    assert model[0].merged
    assert torch.equal(model[0].weight, merged)
    assert torch.equal(model[0].base_weight, base)
    assert torch.equal(qk.unmerge(model)[0].weight, base)
    lost = not torch.equal(base.to(torch.float32), net()[0].weight) and base.dtype == torch.float32
    assert model[0].base_changed() == lost  # rounded on the way there and back


@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        ("qr", {"rank": 4}),
        ("lora_xs", {"rank": 4, "init_std": 0.1}),
        ("ohora", {"product": "lora"}),
    ],
)
def test_autocast_rounds_no_merged_weight(adapter, options):
    """The update was multiplied out in bf16 there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32))
    qk.adapt(model, ["0"], adapter, progress=False, **options)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    wanted = qk.merge(model)[0].weight.clone()
    qk.unmerge(model)
    with torch.autocast("cpu", torch.bfloat16):
        qk.merge(model)
    assert torch.equal(model[0].weight, wanted)
