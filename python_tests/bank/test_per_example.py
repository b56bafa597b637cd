"""Gradients of each example beside those of the batch."""

from __future__ import annotations

import bank_model
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import qrlora_kernels as qk

KINDS = sorted(bank_model.KINDS)


def trained(net):
    return [p for p in net.parameters() if p.requires_grad]


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_is_that_of_the_example_alone(kind, head):
    net = bank_model.model(kind, head)
    bank_model.put(net, bank_model.state(net, 1))
    x, labels = bank_model.batch(5), torch.tensor([0, 1, 2, 0, 1])
    with qk.per_example(net) as g:
        F.cross_entropy(net(x), labels, reduction="sum").backward()
    together = {n: p.grad.clone() for n, p in net.named_parameters() if p.requires_grad}
    for row in range(5):
        net.zero_grad()
        F.cross_entropy(net(x[row : row + 1]), labels[row : row + 1]).backward()
        for name, columns in g.columns.items():
            want = net.get_parameter(name).grad.flatten()
            torch.testing.assert_close(g.gradients[row, columns], want)
    assert g.gradients.shape == (5, sum(p.numel() for p in trained(net)))
    # The parameters have the batch's as ever.
    for name, columns in g.columns.items():
        torch.testing.assert_close(g.gradients[:, columns].sum(0), together[name].flatten())


def test_clipped_and_summed_as_differentially_private_training_does():
    net = bank_model.model("qr")
    x = bank_model.batch(4)
    with qk.per_example(net) as g:
        net(x).pow(2).sum().backward()
    norms = g.gradients.norm(dim=1, keepdim=True)
    bound = norms.median()
    clipped = g.gradients * (bound / norms).clamp(max=1.0)
    assert (clipped.norm(dim=1) <= bound + 1e-9).all()
    kept = (norms <= bound).flatten()
    assert torch.equal(clipped[kept], g.gradients[kept])
    assert not kept.all()


def test_backwards_add_up_and_a_layer_without_one_has_zeros():
    net = bank_model.model("qr")
    x = bank_model.batch(2)
    with qk.per_example(net) as g:
        for _ in range(2):
            net.first(x).sum().backward()
    with qk.per_example(net) as once:
        net.first(x).sum().backward()
    torch.testing.assert_close(g.gradients, 2 * once.gradients)
    assert once.gradients.any()
    assert not once.gradients[:, once.columns["second.lam"]].any()


def test_refusals():
    net = bank_model.model("qr")
    with qk.per_example(net) as g:
        net(bank_model.batch(2))
        with pytest.raises(ValueError, match="backward"):
            g.gradients  # noqa: B018
        with pytest.raises(ValueError, match="as many examples"):
            net(bank_model.batch(3))
    with pytest.raises(ValueError, match="adapt"), qk.per_example(bank_model.Net()):
        pass


@pytest.mark.parametrize("way", ["no_grad", "reentrant"])
def test_a_forward_without_gradients_comes_first(way):
    net, x = bank_model.model("qr"), bank_model.batch(3).requires_grad_()
    with qk.per_example(net) as found:
        if way == "no_grad":
            with torch.no_grad():
                net(x)
            net(x).sum().backward()
        else:
            checkpoint(net, x, use_reentrant=True).sum().backward()
    with qk.per_example(net) as want:
        net(x).sum().backward()
    torch.testing.assert_close(found.gradients, want.gradients)


def test_inside_a_batch_of_a_bank_it_is_refused():
    net = bank_model.model("qr")
    bank = qk.AdapterBank(net, 1)
    bank.add("a")
    with bank.use(["a"]), pytest.raises(ValueError, match="use"), qk.per_example(net):
        pass
    other = bank_model.model("qr")
    with bank.use(["a"]), qk.per_example(other):
        pass
