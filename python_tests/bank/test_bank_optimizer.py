"""The optimizer of a bank: what it holds, what it refuses, and whose numbers it moves."""

from __future__ import annotations

import threading
import weakref

import bank_model
import pytest
import torch
from bank_model import RATES, data, step

import qrlora_kernels as qk


def one_step(net, bank, optimizer, name: str = "a") -> None:
    step(net, bank, optimizer, [name], *data(1, 1))


def with_one(**options):
    net = bank_model.model("qr")
    bank = qk.AdapterBank(net, 2)
    bank.add("a", bank_model.state(net, 1))
    return net, bank, bank.adamw(**{**RATES, **options})


def test_the_numbers_of_a_batch_are_freed():
    net, bank, optimizer = with_one()
    with bank.use(["a"]) as batch:
        batch.mean(net(bank_model.batch(1)).sum(1)).backward()
    numbers = weakref.ref(batch.numbers)
    optimizer.step()
    optimizer.zero_grad()
    del batch
    assert numbers() is None


def test_a_graph_that_is_kept_begins_anew_after_zero_grad():
    net, bank, optimizer = with_one()
    with bank.use(["a"]) as batch:
        loss = batch.mean(net(bank_model.batch(1)).sum(1))
        loss.backward(retain_graph=True)
        once = batch.numbers.grad.clone()
        optimizer.zero_grad()
        loss.backward()
    assert torch.equal(batch.numbers.grad, once)


def test_a_rate_may_ask_the_bank():
    net, bank, optimizer = with_one(lr=lambda steps: 0.1 / len(bank.names()))
    thread = threading.Thread(target=one_step, args=(net, bank, optimizer), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


def test_a_bank_and_an_optimizer_of_inference_mode_train_outside():
    net = bank_model.model("qr")
    with torch.inference_mode():
        bank = qk.AdapterBank(net, 1)
        optimizer = bank.adamw(**RATES)
        bank.add("a", bank_model.state(net, 1))
    one_step(net, bank, optimizer)
    assert int(optimizer.state_dict("a")["step"]) == 1


def test_moments_of_heads_in_half_precision_come_back_whole():
    net = qk.adapt(
        bank_model.Net().bfloat16(),
        ["first"],
        "qr",
        rank=4,
        trainable=["head"],
        head_dtype=torch.bfloat16,
    )
    bank = qk.AdapterBank(net, 1)
    bank.add("a")
    first, second = bank.adamw(), bank.adamw()
    with bank.use(["a"]) as batch:
        batch.mean(net(bank_model.batch(1, torch.bfloat16)).float().square().sum(1)).backward()
    first.step()
    second.load_state_dict("a", first.state_dict("a"))
    assert torch.equal(first._moments, second._moments)


@pytest.mark.parametrize("wrong", [float("nan"), -1.0, float("inf")])
def test_a_state_that_is_refused_changes_nothing(wrong):
    net, bank, optimizer = with_one()
    one_step(net, bank, optimizer)
    before = optimizer.state_dict("a")
    state = {key: tensor + 1 for key, tensor in before.items()} | {"step": torch.tensor(wrong)}
    with pytest.raises(ValueError, match="step"):
        optimizer.load_state_dict("a", state)
    assert all(torch.equal(t, before[k]) for k, t in optimizer.state_dict("a").items())
    with pytest.raises(TypeError, match="state"):
        optimizer.load_state_dict("a", [])


@pytest.mark.parametrize("wrong", [{"betas": 0.9}, {"eps": -1.0}, {"weight_decay": -0.1}])
def test_options_out_of_range_are_named(wrong):
    _, bank, _ = with_one()
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        bank.adamw(**wrong)


def test_an_adapter_that_is_replaced_by_one_of_its_name_during_a_step_stays(monkeypatch):
    net, bank, optimizer = with_one()
    start = bank_model.state(net, 2)
    found, threads = optimizer._gradients, []

    def meanwhile():
        gradients = found()
        threads.append(threading.Thread(target=lambda: (bank.evict("a"), bank.add("a", start))))
        threads[0].start()
        threads[0].join(0.3)
        return gradients

    monkeypatch.setattr(optimizer, "_gradients", meanwhile)
    one_step(net, bank, optimizer)
    threads[0].join(10)
    assert all(torch.equal(t, start[k]) for k, t in bank.state("a").items())


def test_replaced_numbers_begin_with_new_moments_and_keep_their_rate():
    net = bank_model.model("qr")
    bank = qk.AdapterBank(net, 1)
    bank.add("a", bank_model.state(net, 1))
    optimizer = bank.adamw(**RATES)
    optimizer.set_lr("a", 0.5)
    x, labels = data(1, 1)
    step(net, bank, optimizer, ["a"], x * float("nan"), labels)
    with bank.use(["a"]) as batch:
        batch.mean(net(x).sum(1)).backward()
    bank.replace("a", bank_model.state(net, 2))
    optimizer.step()  # the gradient of numbers that are gone
    assert torch.equal(bank.state("a")["first.lam"], bank_model.state(net, 2)["first.lam"])
    before = bank.state("a")["first.lam"]
    step(net, bank, optimizer, ["a"], x, labels)
    moved = (bank.state("a")["first.lam"] - before).abs().max().item()
    assert moved == pytest.approx(0.5, rel=0.2)
