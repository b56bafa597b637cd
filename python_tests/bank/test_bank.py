"""AdapterBank: what goes in comes out, and every row of a batch has its own adapter."""

from __future__ import annotations

import copy
import pickle
import threading

import bank_model
import pytest
import torch

import qrlora_kernels as qk

KINDS = sorted(bank_model.KINDS)


def filled(kind: str, adapters: int = 4, head: bool = False, **options):
    net = bank_model.model(kind, head)
    bank = qk.AdapterBank(net, 8, **options)
    states = {f"user {i}": bank_model.state(net, i) for i in range(adapters)}
    for name, state in states.items():
        bank.add(name, state)
    return net, bank, states


def alone(kind: str, state, x, head: bool = False):
    net = bank_model.put(bank_model.model(kind, head), state)
    return net(x)


# --- rows


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_has_the_answer_of_its_adapter(kind, head):
    net, bank, states = filled(kind, head=head)
    x = bank_model.batch(6)
    names = ["user 2", "user 0", None, "user 2", "user 3", "__base__"]
    with torch.no_grad(), bank.use(names):
        y = net(x)
    base = qk.unload(copy.deepcopy(net), merge=False)
    for row, name in enumerate(names):
        one = x[row : row + 1]
        want = alone(kind, states[name], one, head) if name in states else base(one)
        torch.testing.assert_close(y[row : row + 1], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_outside_the_model_answers_with_its_own_adapter(kind):
    net, bank, _states = filled(kind)
    x = bank_model.batch(2)
    before = net(x)
    with bank.use(["user 1", "user 2"]):
        assert not torch.allclose(net(x), before)
    assert torch.equal(net(x), before)


def test_a_row_does_not_depend_on_who_else_is_in_the_batch():
    net, bank, _ = filled("qr")
    x = bank_model.batch(3)
    with torch.no_grad():
        with bank.use(["user 0", "user 1", "user 2"]):
            one = net(x)[0]
        with bank.use(["user 0", "user 3", None]):
            other = net(x)[0]
    assert torch.equal(one, other)


def test_tokens_may_have_further_dimensions_or_none():
    net, bank, states = filled("lora_xs")
    for x in (torch.randn(2, 16).double(), torch.randn(2, 3, 4, 16).double()):
        with torch.no_grad(), bank.use(["user 1", "user 0"]):
            y = net.first(x)
        for row, name in enumerate(["user 1", "user 0"]):
            bank_model.put(net, states[name])
            torch.testing.assert_close(y[row], net.first(x[row]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_in_every_precision(kind, dtype):
    net = bank_model.model(kind, dtype=dtype)
    bank = qk.AdapterBank(net, 2)
    states = [bank_model.state(net, seed) for seed in (1, 2)]
    bank.add("a", states[0])
    bank.add("b", states[1])
    x = bank_model.batch(2, dtype)
    with torch.no_grad(), bank.use(["b", "a"]):
        y = net(x)
    for row, state in enumerate(reversed(states)):
        want = bank_model.put(net, state)(x[row : row + 1])
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(y[row : row + 1], want, rtol=tolerance, atol=tolerance)


def test_dropout_drops_for_the_update_alone():
    torch.manual_seed(0)
    net = qk.adapt(bank_model.Net().double(), ["first"], "qr", rank=4, dropout=0.5)
    bank = qk.AdapterBank(net, 2)
    bank.add("a", {"first.lam": torch.zeros(4).double()})
    bank.add("b", {"first.lam": torch.ones(4).double()})
    x = torch.ones(2, 16).double()
    base = net.first.base_forward(x)
    with bank.use(["a", "b"]):
        first, second = net.first(x), net.first(x)
    torch.testing.assert_close(first[0], base[0])
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize("rank", [1, 3, 6, 9])
def test_a_smaller_rank_is_the_first_directions_alone(rank):
    net, bank, states = filled("qr")
    x = bank_model.batch(2)
    with torch.no_grad(), bank.use(["user 0", "user 1"], rank=rank):
        y = net(x)
    cut = {n: torch.where(torch.arange(len(t)) < rank, t, 0) for n, t in states["user 1"].items()}
    torch.testing.assert_close(y[1:], alone("qr", cut, x[1:]))


# --- names


def test_states_come_back_as_they_were():
    _, bank, states = filled("lora_xs", head=True)
    for name, state in states.items():
        found = bank.state(name)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)
    assert bank.names() == list(states)
    assert len(bank) == 4
    assert "user 1" in bank
    assert bank.nbytes == 4 * bank.numbers * 8


def test_the_start_is_that_of_the_layers():
    net = bank_model.model("qr", head=True)
    bank = qk.AdapterBank(net, 2)
    bank.add("new")
    state = bank.state("new")
    assert not state["first.lam"].any()
    assert torch.equal(state["head.weight"], net.head.weight)
    drawn = qk.AdapterBank(bank_model.model("lora_xs"), 2)
    drawn.add("a")
    drawn.add("b")
    assert not torch.equal(drawn.state("a")["first.core"], drawn.state("b")["first.core"])


def test_a_batch_under_way_finishes_with_the_old_numbers():
    net, bank, states = filled("qr")
    x = bank_model.batch(2)
    with torch.no_grad():
        with bank.use(["user 0", "user 1"]):
            before = net(x)
            bank.replace("user 0", states["user 3"])
            bank.evict("user 1")
            bank.add("user 9", states["user 2"])  # takes the row that is free
            assert torch.equal(net(x), before)
        with bank.use(["user 0", "user 9"]):
            after = net(x)
    torch.testing.assert_close(after[:1], alone("qr", states["user 3"], x[:1]))
    torch.testing.assert_close(after[1:], alone("qr", states["user 2"], x[1:]))


def test_the_one_unused_longest_goes_where_that_is_asked_for(tmp_path):
    _net, bank, _states = filled("qr", 3, when_full="evict")
    bank.table._slots.capacity = 3
    bank.pack(tmp_path / "all")  # now none of them is lost
    with bank.use(["user 0"]):
        pass
    bank.add("new")
    assert bank.names() == ["user 2", "user 0", "new"]


def test_what_is_not_saved_is_not_thrown_away(tmp_path):
    net = bank_model.model("qr")
    bank = qk.AdapterBank(net, 1, when_full="evict")
    bank.add("a", bank_model.state(net, 1))
    with pytest.raises(ValueError, match="not saved"):
        bank.add("b")
    bank.save("a", tmp_path / "a.safetensors")
    bank.add("b")
    assert bank.names() == ["b"]
    with pytest.raises(ValueError, match="capacity"):
        qk.AdapterBank(net, 1).load(
            {"a": tmp_path / "a.safetensors", "b": tmp_path / "a.safetensors"}
        )


def test_another_thread_has_its_own_rows():
    net, bank, states = filled("qr")
    x = bank_model.batch(1)
    wrong: list[str] = []
    wanted = {name: alone("qr", state, x) for name, state in states.items()}

    def serve(name: str) -> None:
        with torch.no_grad():
            for _ in range(30):
                with bank.use([name]):
                    if not torch.allclose(net(x), wanted[name]):
                        wrong.append(name)

    threads = [threading.Thread(target=serve, args=(name,)) for name in states]
    for thread in threads:
        thread.start()
    for _ in range(30):
        bank.replace("user 0", states["user 0"])
    for thread in threads:
        thread.join()
    assert not wrong
    assert net.first._asked == 0


def test_a_copy_of_the_model_is_asked_nothing():
    net, bank, _ = filled("qr", head=True)
    x = bank_model.batch(1)
    with bank.use(["user 0"]):
        copied, pickled = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
        assert not torch.allclose(net(x), copied(x))
        assert torch.equal(copied(x), pickled(x))


def test_disabled_and_strength_reach_the_rows():
    net, bank, states = filled("qr")
    x = bank_model.batch(1)
    base = qk.unload(copy.deepcopy(net), merge=False)(x)
    with torch.no_grad(), bank.use(["user 0"]):
        with qk.disabled(net):
            assert torch.equal(net(x), base)
        qk.scale(net, 0.0)
        assert torch.equal(net(x), base)
        qk.scale(net, 2.0)
        twice = {key: 2 * tensor for key, tensor in states["user 0"].items()}
        torch.testing.assert_close(net(x), alone("qr", twice, x))


# --- refusals


@pytest.mark.parametrize(
    ("names", "error", "says"),
    [
        (["nobody"], ValueError, "nobody"),
        ([], ValueError, "names"),
        ("user 0", TypeError, "names"),
        ([3], TypeError, "row 0"),
        (["user 0", "user 1"], ValueError, "2 names"),
    ],
)
def test_wrong_names_are_refused(names, error, says):
    net, bank, _ = filled("qr")
    with pytest.raises(error, match=says), bank.use(names):
        net(bank_model.batch(1))
    assert net.first._asked == 0


def _without(state, key):
    return {k: t for k, t in state.items() if k != key}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: _without(s, "first.lam"), "first.lam"),
        (lambda s: s | {"third.lam": s["first.lam"]}, "third.lam"),
        (lambda s: s | {"first.lam": s["first.lam"][:2]}, "shape"),
        (lambda s: s | {"first.lam": s["first.lam"] * float("nan")}, "finite"),
        (lambda s: s | {"first.lam": [1.0]}, "floating"),
        (lambda s: list(s), "dict"),
    ],
)
def test_a_state_of_another_model_is_refused(change, says):
    net = bank_model.model("qr")
    bank = qk.AdapterBank(net, 2)
    with pytest.raises((TypeError, ValueError), match=says):
        bank.add("a", change(bank_model.state(net, 1)))
    assert len(bank) == 0


def test_names_are_taken_once_and_must_be_there():
    _, bank, states = filled("qr")
    for call in (
        lambda: bank.add("user 0"),
        lambda: bank.add("__base__"),
        lambda: bank.replace("nobody", states["user 0"]),
        lambda: bank.evict("nobody"),
        lambda: bank.state("nobody"),
        lambda: bank.save("nobody", "nowhere"),
    ):
        with pytest.raises(ValueError, match="name"):
            call()


def test_models_that_cannot_have_a_bank():
    with pytest.raises(ValueError, match="adapt"):
        qk.AdapterBank(bank_model.Net(), 2)
    net = bank_model.model("qr")
    for capacity in (0, -1):
        with pytest.raises(ValueError, match="capacity"):
            qk.AdapterBank(net, capacity)
    with pytest.raises(ValueError, match="heads"):
        qk.AdapterBank(net, 2, heads="first_of_all")
    bank = qk.AdapterBank(net, 2)
    qk.merge(net)
    with pytest.raises(ValueError, match="merged"), bank.use([None]):
        pass
    with pytest.raises(ValueError, match="merged"):
        qk.AdapterBank(net, 2)


def test_what_trains_beside_must_be_a_linear_layer():
    net = bank_model.Net()
    net.extra = torch.nn.LayerNorm(3)
    qk.adapt(net, ["first"], "qr", rank=2, trainable=["extra"])
    with pytest.raises(ValueError, match="extra"):
        qk.AdapterBank(net, 2)


def test_a_model_that_was_adapted_anew_needs_another_bank():
    net, bank, _ = filled("qr")
    qk.unload(net, merge=False)
    qk.adapt(net, ["first", "second"], "qr", rank=3)
    with pytest.raises(ValueError, match="bank"), bank.use(["user 0"]):
        pass
