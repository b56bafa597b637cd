"""Training in a bank: each adapter as if it were alone, whatever else is in the batch."""

from __future__ import annotations

import bank_model
import pytest
import torch
import torch.nn.functional as F
from bank_model import RATES, alone, data, step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import qrlora_kernels as qk

KINDS = sorted(bank_model.KINDS)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_mixed_steps_are_those_of_each_alone(kind, head):
    net = bank_model.model(kind, head)
    bank = qk.AdapterBank(net, 4)
    states = {f"user {i}": bank_model.state(net, i) for i in range(4)}
    for name, state in states.items():
        bank.add(name, state)
    optimizer = bank.adamw(**RATES)
    seen = {name: [] for name in states}
    for number in range(100):
        # "user 3" comes in every third batch only, and rows in changing numbers and places.
        here = [n for i, n in enumerate(states) if i < 3 or number % 3 == 0]
        names = [here[i % len(here)] for i in torch.randperm(7).tolist()]
        x, labels = data(7, number)
        for name in set(names):
            own = [row for row, one in enumerate(names) if one == name]
            seen[name].append((x[own], labels[own]))
        step(net, bank, optimizer, names, x, labels)
    for name, state in states.items():
        want, found = alone(kind, state, seen[name], head), bank.state(name)
        assert len(seen[name]) >= 34
        for key in want:
            torch.testing.assert_close(found[key], want[key], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_in_fp32_who_else_is_in_the_batch_does_not_change_a_bit(kind: str) -> None:
    """Rows of others in the same places, as many of each or not: one product is for a number."""
    found = []
    for others in ("bcbc", "cddd", [None, *"bcd"]):
        net = bank_model.model(kind, True, torch.float32)
        bank = qk.AdapterBank(net, 4)
        for i, name in enumerate("abcd"):
            bank.add(name, bank_model.state(net, i))
        optimizer = bank.adamw(**RATES)
        for number in range(100):
            x, labels = data(6, number, torch.float32)
            names = ["a", others[0], "a", *others[1:]]
            step(net, bank, optimizer, names, x, labels)
        found.append(bank.state("a"))
    for other in found[1:]:
        assert all(torch.equal(found[0][key], other[key]) for key in other)


def test_the_row_wise_adamw_has_the_bits_of_pytorchs():
    torch.manual_seed(0)
    net = bank_model.model("qr", dtype=torch.float32)
    bank = qk.AdapterBank(net, 1)
    bank.add("a", bank_model.state(net, 1))
    own = [torch.nn.Parameter(t.clone()) for t in bank.state("a").values()]
    theirs = torch.optim.AdamW(own, **RATES)
    ours = bank.adamw(**RATES)
    for _ in range(50):
        gradients = [torch.randn_like(p) for p in own]
        for parameter, gradient in zip(own, gradients, strict=True):
            parameter.grad = gradient
        theirs.step()
        ours.zero_grad()
        with bank.use(["a"]) as batch:
            flat = torch.cat([g.flatten() for g in gradients])
            (batch.numbers * flat).sum().backward()
        ours.step()
    for parameter, tensor in zip(own, bank.state("a").values(), strict=True):
        assert torch.equal(parameter.detach(), tensor)


def test_gradients_add_up_over_batches_until_they_are_forgotten():
    net = bank_model.model("qr")
    bank = qk.AdapterBank(net, 2)
    bank.add("a", bank_model.state(net, 1))
    bank.add("b", bank_model.state(net, 2))
    optimizer = bank.adamw(**RATES)
    x, labels = data(4, 1)
    for half in (slice(0, 2), slice(2, 4)):
        with bank.use(["a", "b"]) as batch:
            losses = F.cross_entropy(net(x[half]), labels[half], reduction="none")
            (batch.mean(losses) / 2).backward()
    optimizer.step()
    for name, rows in (("a", [0, 2]), ("b", [1, 3])):
        start = bank_model.state(net, 1 if name == "a" else 2)
        want, found = alone("qr", start, [(x[rows], labels[rows])], False), bank.state(name)
        for key in want:
            torch.testing.assert_close(found[key], want[key])
    optimizer.zero_grad()
    before = bank.state("a")
    optimizer.step()
    assert all(torch.equal(before[k], t) for k, t in bank.state("a").items())


def test_every_adapter_has_its_own_rate_and_schedule():
    net = bank_model.model("qr")
    bank = qk.AdapterBank(net, 2)
    start = bank_model.state(net, 1)
    for name in ("still", "falling"):
        bank.add(name, start)
    optimizer = bank.adamw(lr=lambda steps: 0.1 / (1 + steps), weight_decay=0.0)
    optimizer.set_lr("still", 0.0)
    moved = []
    for number in range(3):
        before = bank.state("falling")["first.lam"]
        step(net, bank, optimizer, ["still", "falling"], *data(2, number))
        moved.append((bank.state("falling")["first.lam"] - before).abs().max().item())
    assert all(torch.equal(t, start[k]) for k, t in bank.state("still").items())
    assert moved[0] == pytest.approx(0.1, rel=1e-3)
    assert moved[2] < 0.06
    for wrong in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": "1"}):
        with pytest.raises((TypeError, ValueError)):
            bank.adamw(**wrong)


def test_one_adapter_is_saved_and_goes_on_elsewhere(tmp_path):
    def train(net, bank, optimizer, numbers):
        for number in numbers:
            step(net, bank, optimizer, ["a", "b"], *data(2, number))

    net = bank_model.model("lora_xs", head=True)
    bank = qk.AdapterBank(net, 2)
    for i, name in enumerate(("a", "b")):
        bank.add(name, bank_model.state(net, i))
    optimizer = bank.adamw(**RATES)
    train(net, bank, optimizer, range(3))
    bank.save("a", tmp_path / "a.safetensors")
    torch.save(optimizer.state_dict("a"), tmp_path / "a.pt")
    other = qk.AdapterBank(net, 5)
    other.add("c")
    other.load({"a": tmp_path / "a.safetensors"})
    other.add("b", bank.state("b"))
    resumed = other.adamw(**RATES)
    resumed.load_state_dict("a", torch.load(tmp_path / "a.pt"))
    resumed.load_state_dict("b", optimizer.state_dict("b"))
    train(net, bank, optimizer, range(3, 6))
    train(net, other, resumed, range(3, 6))
    assert all(torch.equal(t, other.state("a")[k]) for k, t in bank.state("a").items())
    with pytest.raises(ValueError, match="step"):
        resumed.load_state_dict("a", {})


def test_an_evicted_adapters_gradient_and_moments_reach_nobody():
    net = bank_model.model("qr")
    bank = qk.AdapterBank(net, 1)
    optimizer = bank.adamw(**RATES)
    bank.add("old", bank_model.state(net, 1))
    for number in range(3):
        step(net, bank, optimizer, ["old"], *data(1, number))
    optimizer.set_lr("old", 1.0)
    with bank.use(["old"]) as batch:
        batch.mean(net(bank_model.batch(1)).sum(1)).backward()
    bank.evict("old")
    start = bank_model.state(net, 2)
    bank.add("new", start)  # in the same row of the table
    optimizer.step()
    assert all(torch.equal(t, start[k]) for k, t in bank.state("new").items())
    step(net, bank, optimizer, ["new"], *data(1, 5))
    want = alone("qr", start, [data(1, 5)], False)
    for key, tensor in bank.state("new").items():
        torch.testing.assert_close(tensor, want[key])


def _stop(_):
    raise RuntimeError("stop")


def test_a_failure_in_the_middle_moves_nobody():
    net = bank_model.model("qr")
    bank = qk.AdapterBank(net, 2)
    for i, name in enumerate(("a", "b")):
        bank.add(name, bank_model.state(net, i))
    optimizer = bank.adamw(**RATES)
    before = {name: bank.state(name) for name in ("a", "b")}
    with bank.use(["a", "b"]) as batch:
        y = net(bank_model.batch(2))
        y.register_hook(_stop)
        with pytest.raises(RuntimeError, match="stop"):
            batch.mean(y.sum(1)).backward()
    optimizer.step()
    for name, state in before.items():
        assert all(torch.equal(t, bank.state(name)[k]) for k, t in state.items())
    assert net.first._asked == 0


def test_an_infinite_loss_stays_with_its_adapter():
    net = bank_model.model("qr", head=True)
    bank = qk.AdapterBank(net, 2)
    for i, name in enumerate(("good", "bad")):
        bank.add(name, bank_model.state(net, i))
    good = bank.state("good")
    optimizer = bank.adamw(**RATES)
    x, labels = data(4, 1)
    x[1] = float("nan")
    step(net, bank, optimizer, ["good", "bad", "good", "bad"], x, labels)
    assert not bank.state("bad")["first.lam"].isfinite().any()
    want = alone("qr", good, [(x[[0, 2]], labels[[0, 2]])], True)
    for key, tensor in bank.state("good").items():
        torch.testing.assert_close(tensor, want[key])


def test_checkpointed_activations_are_computed_with_the_same_rows():
    net = bank_model.model("qr")
    bank = qk.AdapterBank(net, 2)
    for i, name in enumerate(("a", "b")):
        bank.add(name, bank_model.state(net, i))
    found = []
    for way in (
        net,
        lambda x: checkpoint(net, x, use_reentrant=False),
        lambda x: checkpoint(net, x.requires_grad_(), use_reentrant=True),
    ):
        with bank.use(["a", "b"]) as batch:
            batch.mean(way(bank_model.batch(2)).sum(1)).backward()
        found.append(batch.numbers.grad)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("head", [False, True])
def test_a_checkpoint_is_not_computed_again_with_the_models_own_adapter(head: bool) -> None:
    net = bank_model.model("qr", head)
    bank = qk.AdapterBank(net, 1)
    bank.add("a", bank_model.state(net, 0))
    x = bank_model.batch(2).requires_grad_()
    with bank.use(["a", "a"]):
        y = checkpoint(net, x, use_reentrant=True)
    with pytest.raises(ValueError, match="inside `use`"):
        y.sum().backward()
    _trains_by_itself(net, x)


def test_looking_at_answers_while_training_leaves_the_model_its_own_checkpoints() -> None:
    net = bank_model.model("qr")
    bank = qk.AdapterBank(net, 1)
    bank.add("a", bank_model.state(net, 0))
    x = bank_model.batch(2).requires_grad_()
    with bank.use(["a", "a"]), torch.no_grad():
        net(x)
    _trains_by_itself(net, x)


def _trains_by_itself(net: torch.nn.Module, x: torch.Tensor) -> None:
    """With a checkpoint as without, though rows were asked for before."""
    found = []
    for way in (lambda x: checkpoint(net, x, use_reentrant=True), net):
        net.zero_grad()
        way(x).sum().backward()
        found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert found[0]
    assert all(map(torch.equal, *found))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_history_leaks_from_one_adapter_into_another(drawn):
    """Whatever happens to the others, each ends as one that was trained alone."""
    kind = drawn.draw(st.sampled_from(KINDS))
    net = bank_model.model(kind)
    bank = qk.AdapterBank(net, 3)
    optimizer = bank.adamw(**RATES)
    began: dict[str, tuple] = {}
    seen: dict[str, list] = {}
    for number in range(drawn.draw(st.integers(1, 8))):
        act = drawn.draw(st.sampled_from(["add", "evict", "replace", "step", "step", "fail"]))
        here = bank.names()
        if act == "add" and len(here) < 3:
            began[f"{number}"], seen[f"{number}"] = bank_model.state(net, number), []
            bank.add(f"{number}", began[f"{number}"])
        elif act == "evict" and here:
            bank.evict(drawn.draw(st.sampled_from(here)))
        elif act == "replace" and here:
            name = drawn.draw(st.sampled_from(here))
            fresh = f"{number}"
            began[fresh], seen[fresh] = bank_model.state(net, 50 + number), []
            bank.evict(name)
            bank.add(fresh, began[fresh])
        elif here:
            names = drawn.draw(st.lists(st.sampled_from([*here, None]), min_size=1, max_size=4))
            x, labels = data(len(names), number)
            if act == "fail":
                optimizer.zero_grad()
                with bank.use(names):
                    y = net(x)
                    y.register_hook(_stop)
                    with pytest.raises(RuntimeError, match="stop"):
                        y.sum().backward()
                optimizer.step()
                continue
            for name in {n for n in names if n is not None}:
                own = [row for row, one in enumerate(names) if one == name]
                seen[name].append((x[own], labels[own]))
            step(net, bank, optimizer, names, x, labels)
    for name in bank.names():
        want = alone(kind, began[name], seen[name], False)
        for key, tensor in bank.state(name).items():
            torch.testing.assert_close(tensor, want[key], rtol=1e-8, atol=1e-10)


# --- numbers, moments and states
