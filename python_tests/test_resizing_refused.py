"""Adapters that have no other rank over the same start are named, and the model stays as it is."""

from __future__ import annotations

import pytest
import torch
from helpers import same_bits
from saved import base, drawn
from torch import nn
from torch.distributed.fsdp import fully_shard

import qrlora_kernels as qk


def changed():
    model = drawn("qr", 1)
    with torch.no_grad():
        model[2].weight.copy_(torch.randn(16, 32, generator=torch.Generator().manual_seed(9)))
    return model


def parametrised():
    model = drawn("qr", 1)
    nn.utils.parametrizations.weight_norm(model[2])
    return model


def ohora():
    return qk.adapt(base(), ["0", "2"], "ohora", columns="selected", progress=False)


REFUSED = {
    "merged": (lambda: qk.merge(drawn("qr", 1)), 6, ValueError, "0 must not be merged"),
    "of OHoRA": (ohora, 2, ValueError, "0 must be of QR-LoRA or LoRA-XS"),
    "no adapter": (base, 2, ValueError, "must hold adapted layers"),
    "another weight": (changed, 6, ValueError, "must begin with the factors of 2, got others"),
    "cast": (
        lambda: drawn("qr", 1).bfloat16(),
        6,
        ValueError,
        "must begin with the factors of 0, got others",
    ),
    "something on top": (parametrised, 6, TypeError, "something stands on top of it"),
    "wrapped": (
        lambda: nn.Sequential(nn.DataParallel(drawn("lora_xs", 1, vectors="bottom"))),
        2,
        ValueError,
        "needs directions in order",
    ),
    "rank 0": (lambda: drawn("qr", 1), 0, ValueError, "rank must be at least 1, got 0"),
    "a rank too large": (
        lambda: drawn("qr", 1),
        17,
        ValueError,
        r"at most 16.*0\.weight|0\.weight.*16",
    ),
    "no rank": (lambda: drawn("qr", 1), 2.5, TypeError, "rank must be an int"),
}


@pytest.mark.parametrize(("make", "rank", "kind", "says"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_changes(make, rank, kind, says):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(kind, match=says):
        qk.set_rank(model, rank)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(same_bits(after[name], before[name]) for name in before)


def test_a_layer_later_on_is_found_before_the_first_changes():
    model = drawn("qr", 1, rank=2)
    qk.adapt(model, ["3"], "lora_xs", rank=2, vectors="bottom", progress=False)
    with pytest.raises(ValueError, match=r"directions in order.* in 3$"):
        qk.set_rank(model, 1)
    assert model[0].rank == 2


def test_directions_of_a_randomised_svd_are_not_guessed():
    """At another rank they agree up to its error, which is more than rounding."""
    torch.manual_seed(0)
    model = qk.adapt(nn.Sequential(nn.Linear(256, 256)), ["0"], "lora_xs", rank=4, progress=False)
    a = model[0].a.clone()
    with pytest.raises(ValueError, match="must begin with the factors of 0, got others"):
        qk.set_rank(model, 8)
    qk.set_rank(model, 3)  # the first three are there
    assert same_bits(model[0].a, a[:3])


def test_refused_while_disabled():
    model = drawn("qr", 1)
    with (
        qk.disabled(model),
        pytest.raises(ValueError, match="set_rank needs adapters that are on"),
    ):
        qk.set_rank(model, 2)
    assert qk.set_rank(model, 2)[0].rank == 2


def test_refused_under_inference_mode():
    model = drawn("qr", 1)
    with torch.inference_mode(), pytest.raises(ValueError, match="set_rank must not be called"):
        qk.set_rank(model, 2)


def test_before_it_is_sharded_or_wrapped(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="not be in DistributedDataParallel yet"):
            qk.set_rank(nn.parallel.DistributedDataParallel(drawn("qr", 1)), 2)
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = fully_shard(drawn("qr", 1), mesh=mesh)
        with pytest.raises(ValueError, match=r"not be sharded yet.* set the rank, then call fully"):
            qk.set_rank(sharded, 2)
        with pytest.raises(ValueError, match=r"not be sharded yet.* combine the files"):
            qk.combine({sharded: 1.0})
    finally:
        torch.distributed.destroy_process_group()
