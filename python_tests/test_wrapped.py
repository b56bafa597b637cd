"""Names without those of wrappers, and loading through each of them."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import qrlora_kernels as qk


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.down(self.up(x).relu())


def net():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(16, 3))


TARGETS = ["up", "1.down"]
NAMES = ["0.up", "1.up", "1.down"]
X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def adapt(model, **options):
    return qk.adapt(model, TARGETS, progress=False, **{"rank": 4, "trainable": ["2"], **options})


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


def blocks(wrap):
    def wrapped(model):
        for i in range(2):
            model[i] = wrap(model[i])
        return model

    return wrapped


def layers(model):
    model[0].up = checkpoint_wrapper(model[0].up)
    model[1].down = compiled(model[1].down)
    return model


WRAPPERS = {
    "compiled": compiled,
    "data parallel": nn.DataParallel,
    "checkpointed blocks": blocks(checkpoint_wrapper),
    "compiled blocks": blocks(compiled),
    "wrapped layers": layers,
    "nested": lambda m: compiled(nn.DataParallel(blocks(checkpoint_wrapper)(m))),
}
LATE = {
    "distributed": nn.parallel.DistributedDataParallel,
    "distributed, compiled": lambda m: compiled(nn.parallel.DistributedDataParallel(m)),
    "compiled, distributed": lambda m: nn.parallel.DistributedDataParallel(compiled(m)),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A file of a plain model, and what that model answers."""
    path = tmp_path_factory.mktemp("plain") / "a.safetensors"
    model = move(adapt(net()))
    qk.save_adapter(model, path)
    return path, model(X).detach()


@torch.no_grad()
def move(model):
    torch.manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p))
    return model


def contents(path):
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118
        return file.metadata(), tensors


@pytest.mark.parametrize("wrap", list(WRAPPERS))
def test_a_plain_file_loads_into_a_wrapped_model(wrap, trained):
    """It did nothing, and nothing was said."""
    path, want = trained
    model = WRAPPERS[wrap](net())
    before = model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert qk.load_adapter(model, path) is model
    assert list(qk.adapted_layers(model)) == NAMES
    torch.testing.assert_close(model(X), want)
    assert not torch.allclose(model(X), before)


@pytest.mark.parametrize("wrap", list(WRAPPERS))
def test_a_wrapped_model_saves_what_the_plain_one_saves(wrap, trained, tmp_path):
    """Names with ``_orig_mod.`` or ``module.`` went into the file; now it fits what that fits."""
    qk.save_adapter(move(adapt(WRAPPERS[wrap](net()))), tmp_path / "a.safetensors")
    assert contents(tmp_path / "a.safetensors") == contents(trained[0])


@pytest.mark.parametrize("wrap", [*WRAPPERS, *LATE])
def test_wrapped_after_adapt(wrap, group, trained, tmp_path):
    path, want = trained
    inner = adapt(net())
    model = {**WRAPPERS, **LATE}[wrap](inner)
    tensors = [p for p in model.parameters() if p.requires_grad]
    qk.load_adapter(model, path)
    now = [p for p in model.parameters() if p.requires_grad]
    assert all(p is q for p, q in zip(tensors, now, strict=True))
    torch.testing.assert_close(model(X), want)
    qk.save_adapter(model, tmp_path)
    torch.testing.assert_close(qk.load_adapter(net(), tmp_path)(X), want)
    with qk.disabled(model):
        plain = net()
        plain[2].load_state_dict(inner[2].state_dict())
        torch.testing.assert_close(model(X), plain(X))


@pytest.mark.parametrize("wrap", list(WRAPPERS))
def test_targets_and_trainable_go_by_the_names_without_wrappers(wrap):
    model = WRAPPERS[wrap](net())
    qk.adapt(model, ["0.up", "1.down"], rank=4, trainable=["1.up"], progress=False)
    assert list(qk.adapted_layers(model)) == ["0.up", "1.down"]
    assert qk.count_parameters(model)["other"] == 16 * 17
    qk.merge(model.eval())
    qk.unload(model)
    assert not qk.adapted_layers(model)


@pytest.mark.parametrize("wrap", list(WRAPPERS))
def test_names_may_be_those_of_the_wrapped_model(wrap):
    model = WRAPPERS[wrap](net())
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    layer, head, left = linear[0], linear[4], linear[3]
    qk.adapt(model, [layer, left], rank=4, trainable=[head], skip=[left], progress=False)
    assert list(qk.adapted_layers(model)) == ["0.up"]
    assert qk.count_parameters(model)["other"] == 16 * 3 + 3


@pytest.mark.parametrize("wrap", list(LATE))
def test_distributed_already_is_refused_in_a_sentence(wrap, group, trained):
    model = LATE[wrap](net())
    for call in (adapt, lambda m: qk.load_adapter(m, trained[0])):
        with pytest.raises(ValueError, match="adapt the model, then wrap it"):
            call(model)
    assert not qk.adapted_layers(model)


def test_nothing_frozen_is_sent_between_ranks(group):
    model = nn.parallel.DistributedDataParallel(adapt(net()))
    model(X).sum().backward()
    assert not list(model.module.buffers())


def test_flattened_by_fsdp_is_refused_in_a_sentence(group, trained, tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel

    def wrap(model):
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))

    plain = wrap(net())
    for call in (adapt, lambda m: qk.load_adapter(m, trained[0])):
        with pytest.raises(ValueError, match="FullyShardedDataParallel"):
            call(plain)
    inside = wrap(adapt(net()))
    with pytest.raises(ValueError, match="FullyShardedDataParallel"):
        qk.load_adapter(inside, trained[0])
    with pytest.raises(ValueError, match="FullyShardedDataParallel"):
        qk.save_adapter(inside, tmp_path)
    with pytest.raises(ValueError, match="FullyShardedDataParallel"):
        qk.adapt(nn.Sequential(wrap(net())), ["0.0.down"], rank=4, progress=False)
