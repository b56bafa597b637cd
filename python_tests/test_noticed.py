"""Adapters that take no part in training are named once; ordinary models hear nothing."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import qrlora_kernels as qk

ADAPTERS = {"qr": {"rank": 4}, "lora_xs": {"rank": 4}, "ohora": {}}


class Reads(nn.Module):
    """Reads the weight of ``up`` and never calls it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.down(F.linear(x, self.up.weight))


class Calls(Reads):
    def forward(self, x):
        return self.down(self.up(x))


class Listed(nn.Module):
    """Holds its layers in a list, which nothing calls, and reads the weight of the first."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x):
        return self.layers[1](F.linear(x, self.layers[0].weight))


class Picks(nn.Module):
    """Calls the first of its blocks only, as layer drop and routing to experts do."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Calls() for _ in range(2))

    def forward(self, x):
        return self.blocks[0](x)


def adapted(model, targets=("up", "down"), adapter="qr", **options):
    torch.manual_seed(0)
    options = {**ADAPTERS[adapter], **options}
    return qk.adapt(model, list(targets), adapter, progress=False, **options)


def x(*shape):
    return torch.randn(*(shape or (3, 16)), generator=torch.Generator().manual_seed(0))


def heard(work):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    said = [str(one.message) for one in caught]
    return [text for text in said if "adapted layers" in text or "gradient to" in text]


def step(model, given=None):
    return lambda: model(x() if given is None else given).sum().backward()


@pytest.mark.parametrize("adapter", list(ADAPTERS))
@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential, nn.DataParallel])
def test_a_parent_that_reads_the_weight_is_noticed_once(wrap, adapter):
    """Such an adapter is dead, training runs, and nothing was said."""
    model = wrap(adapted(Reads(), adapter=adapter))
    (said,) = heard(step(model))
    assert "did not call the adapted layers up, though" in said
    assert heard(step(model)) == []


def test_the_parent_of_a_list_is_who_has_to_call():
    (said,) = heard(step(adapted(Listed(), ["0", "1"])))
    assert "did not call the adapted layers layers.0, though" in said


def test_what_was_dropped_is_told_apart():
    (said,) = heard(step(adapted(Picks())))
    assert "blocks.1.up, blocks.1.down, nor the modules that hold them" in said
    assert "has no effect" not in said


def test_the_first_training_forward_counts_and_no_other():
    model = adapted(Reads()).eval()
    assert heard(lambda: model(x())) == []
    model.train()
    with torch.no_grad():
        assert heard(lambda: model(x())) == []
    with qk.disabled(model):
        assert heard(lambda: model(x())) == []
    assert len(heard(step(model))) == 1


def test_after_a_forward_that_failed():
    model = adapted(Reads())
    with pytest.raises(RuntimeError):
        model(x(3, 5))
    assert pickle.loads(pickle.dumps(model)).up.rank == 4
    (said,) = heard(step(model))
    assert "layers up, though" in said
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())


def test_a_copy_looks_for_itself():
    model = adapted(Reads())
    other = copy.deepcopy(model)
    assert len(heard(step(model))) == 1
    assert len(heard(step(other))) == 1


def test_a_second_adapt_looks_again():
    model = adapted(nn.ModuleDict({"a": Reads()})["a"], ["down"])
    assert heard(step(model)) == []
    adapted(model, ["up"])
    assert len(heard(step(model))) == 1


def test_unload_looks_no_more():
    model = adapted(Reads())
    qk.unload(model)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())


# --- gradients


class Detaches(Calls):
    def forward(self, x):
        return self.down(self.up(x).detach())


@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_a_tensor_without_gradient_is_named_once(adapter):
    model = adapted(Detaches(), adapter=adapter)
    (said,) = heard(step(model))
    names = ", ".join(f"up.{key}" for key in model.up.trainables)
    assert f"gave no gradient to {names}: they do not train" in said
    assert heard(step(model)) == []


def test_a_strength_of_zero_trains_nothing():
    model = qk.scale(adapted(Calls()), 0.0)
    model.down.scaling = 1.0
    model.down.options = type(model.down.options)(rank=4)
    (said,) = heard(step(model))
    assert "no gradient to up.lam:" in said


class Recomputes(nn.Module):
    def __init__(self, reentrant, body=Calls):
        super().__init__()
        self.blocks, self.reentrant = nn.ModuleList(body() for _ in range(3)), reentrant

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return {"logits": x, "cache": None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_ordinary(reentrant):
    model = adapted(Recomputes(reentrant))
    given = x().requires_grad_()
    assert heard(lambda: model(given)["logits"].sum().backward()) == []
    assert all(layer.lam.grad is not None for layer in qk.adapted_layers(model).values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_hides_nothing(reentrant):
    model = adapted(Recomputes(reentrant, Detaches))
    model.blocks[0].forward = Calls.forward.__get__(model.blocks[0])
    given = x().requires_grad_()
    (said,) = heard(lambda: model(given)["logits"].sum().backward())
    assert "blocks.1.up.lam" in said
    assert "blocks.2.down.lam" not in said


def test_autograd_grad_is_ordinary():
    model = adapted(nn.Sequential(Calls(), Calls()))
    tensors = [layer.lam for layer in qk.adapted_layers(model).values()]
    given = x().requires_grad_()

    def work():
        torch.autograd.grad(model(given).sum(), [given])
        torch.autograd.grad(model(given).sum(), tensors[:1])
        model(given).sum().backward()

    assert heard(work) == []


def test_autograd_grad_after_a_backward_of_something_else_is_ordinary():
    model = adapted(nn.Sequential(Calls(), nn.Linear(16, 2)), trainable=["1"])
    model[1](x()).sum().backward()
    given = x().requires_grad_()
    assert heard(lambda: torch.autograd.grad(model(given).sum(), [given])) == []


def test_accumulated_and_functional_gradients_are_ordinary():
    model = adapted(Calls())
    assert heard(lambda: (model(x()) + model(x())).sum().backward()) == []
    model = adapted(Calls())
    own = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x(),)).sum()

    assert heard(lambda: torch.func.grad(loss)(own)) == []


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("first", ["eval", "train"])
def test_compiled_models_are_ordinary(first, part):
    torch._dynamo.reset()
    model = adapted(nn.Sequential(Calls(), Calls()))
    if part:
        for block in model:
            block.compile(backend="eager", fullgraph=True)
        call = model
    else:
        call = torch.compile(model, backend="eager", fullgraph=True)
    if first == "eval":
        model.eval()(x())
        model.train()
    assert heard(step(call)) == []
    assert heard(step(call)) == []


def test_distributed_data_parallel_is_ordinary(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(adapted(Calls()))
        assert heard(step(model)) == []
        model = nn.parallel.DistributedDataParallel(adapted(Reads()), find_unused_parameters=True)
        assert len(heard(step(model))) == 1
    finally:
        torch.distributed.destroy_process_group()


# --- known families


def test_multihead_attention_is_refused_at_once():
    model = nn.Sequential(nn.MultiheadAttention(16, 2))
    with pytest.raises(ValueError, match=r"0\.out_proj belongs to an nn.MultiheadAttention"):
        adapted(model, ["out_proj"])


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "out_proj"])
def test_wavlm_is_refused_at_once(name):
    wavlm = pytest.importorskip("transformers.models.wavlm.modeling_wavlm")
    model = nn.ModuleDict({"attention": wavlm.WavLMAttention(16, 2)})
    with pytest.raises(ValueError, match=f"attention.{name} belongs to an WavLMAttention"):
        adapted(model, [name])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_model_that_is_the_adapted_layer_is_not_told_that_nothing_called_it(adapter, tmp_path):
    kind = {"qr": qk.QRLinear, "lora_xs": qk.LoRAXSLinear, "ohora": qk.OHoRALinear}[adapter]
    linear = nn.Linear(16, 16)
    qk.save_adapter(kind.from_linear(copy.deepcopy(linear), **ADAPTERS[adapter]), tmp_path)
    model = qk.load_adapter(linear, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(3, 16)).sum().backward()
