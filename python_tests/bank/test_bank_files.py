"""Files of a bank: single adapters as save_adapter writes them, and many in one."""

from __future__ import annotations

import threading

import bank_model
import pytest
import torch

import qrlora_kernels as qk
from qrlora_kernels.bank import packed

KINDS = sorted(bank_model.KINDS)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_is_that_of_a_plain_model(kind, head, tmp_path):
    net = bank_model.model(kind, head)
    state = bank_model.state(net, 7)
    bank = qk.AdapterBank(net, 2)
    bank.add("a", state)
    bank.save("a", tmp_path / "a.safetensors")
    torch.manual_seed(0)
    plain = qk.load_adapter(bank_model.Net().double(), tmp_path / "a.safetensors")
    for key, tensor in state.items():
        assert torch.equal(plain.get_parameter(key), tensor)
    # The model's own numbers were not touched, nor written.
    assert not torch.equal(net.get_parameter(next(iter(state))), next(iter(state.values())))


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_plain_models_load(kind, tmp_path):
    states = []
    for seed in (1, 2):
        net = bank_model.model(kind, head=True)
        states.append(bank_model.state(net, seed))
        qk.save_adapter(bank_model.put(net, states[-1]), tmp_path / f"user{seed}.safetensors")
    start = bank_model.model(kind, head=True)
    qk.load_adapter(start, tmp_path / "user1.safetensors")
    bank = qk.AdapterBank(start, 4)
    assert bank.load([tmp_path / "user1.safetensors"]) == ["user1"]
    assert bank.load({"b": tmp_path / "user2.safetensors"}) == ["b"]
    for name, state in zip(["user1", "b"], states, strict=True):
        found = bank.state(name)
        assert all(torch.equal(found[key], state[key]) for key in state)


def test_a_smaller_rank_is_filled_up(tmp_path):
    torch.manual_seed(0)
    small = qk.adapt(bank_model.Net().double(), ["first", "second"], "qr", rank=3)
    state = bank_model.state(small, 1)
    qk.save_adapter(bank_model.put(small, state), tmp_path / "small.safetensors")
    net = bank_model.model("qr")
    bank = qk.AdapterBank(net, 2)
    bank.load(tmp_path / "small.safetensors")
    x = bank_model.batch(1)
    with torch.no_grad(), bank.use(["small"]):
        torch.testing.assert_close(net(x), small(x))


@pytest.mark.parametrize("kind", KINDS)
def test_many_in_one_file(kind, tmp_path):
    net = bank_model.model(kind, head=True)
    bank = qk.AdapterBank(net, 20)
    for i in range(20):
        bank.add(f"Ü {i}", bank_model.state(net, i))
    bank.pack(tmp_path / "all.safetensors")
    other = qk.AdapterBank(net, 40)
    assert other.load(tmp_path / "all.safetensors") == bank.names()
    assert all(
        torch.equal(t, other.state(name)[key])
        for name in bank.names()
        for key, t in bank.state(name).items()
    )
    bank.pack(tmp_path / "some.safetensors", ["Ü 3"])
    assert qk.AdapterBank(net, 1).load(tmp_path / "some.safetensors") == ["Ü 3"]


def _another(what):
    torch.manual_seed(1 if what == "base" else 0)
    net = bank_model.Net().double()
    options = {"rank": 6} | {"scaling": {"scaling": 2.0}, "rank": {"rank": 5}}.get(what, {})
    layers = ["first"] if what == "layers" else ["first", "second"]
    if what == "kind":
        return qk.adapt(net, layers, "lora_xs", rank=6)
    return qk.adapt(net, layers, "qr", **options)


@pytest.mark.parametrize("what", ["base", "scaling", "rank", "layers", "kind"])
def test_another_start_is_refused(what, tmp_path):
    bank = qk.AdapterBank(bank_model.model("qr"), 4)
    other = _another(what)
    theirs = qk.AdapterBank(other, 1)
    theirs.add("a")
    theirs.pack(tmp_path / "packed.safetensors")
    with pytest.raises(ValueError, match="start"):
        bank.load(tmp_path / "packed.safetensors")
    if what != "rank":  # a smaller one is filled up
        qk.save_adapter(other, tmp_path / "one.safetensors")
        with pytest.raises(ValueError, match=r"one\.safetensors"):
            bank.load(tmp_path / "one.safetensors")
    assert len(bank) == 0


def test_nothing_is_loaded_where_one_file_is_wrong(tmp_path):
    net = bank_model.model("qr")
    qk.save_adapter(net, tmp_path / "good.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no file")
    bank = qk.AdapterBank(net, 4)
    for paths in (
        [tmp_path / "good.safetensors", tmp_path / "bad.safetensors"],
        [tmp_path / "good.safetensors"] * 2,
    ):
        with pytest.raises(ValueError, match=r"bad\.safetensors|twice"):
            bank.load(paths)
    with pytest.raises(FileNotFoundError):
        bank.load([tmp_path / "good.safetensors", tmp_path / "none.safetensors"])
    assert len(bank) == 0


def test_a_damaged_packed_file_is_refused(tmp_path):
    net = bank_model.model("qr")
    bank = qk.AdapterBank(net, 4)
    bank.add("a", bank_model.state(net, 1))
    bank.pack(tmp_path / "all")
    data = bytearray((tmp_path / "all").read_bytes())
    data[-9] ^= 1
    (tmp_path / "all").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        bank.load(tmp_path / "all")


def test_a_packed_file_is_no_adapter_of_a_model(tmp_path):
    net = bank_model.model("qr")
    bank = qk.AdapterBank(net, 1)
    bank.add("a")
    bank.pack(tmp_path / "all")
    with pytest.raises(ValueError, match="save_adapter"):
        qk.load_adapter(net, tmp_path / "all")


def test_packed_names_are_a_list_without_repeats(tmp_path):
    net = bank_model.model("qr")
    bank = qk.AdapterBank(net, 2)
    bank.add("a")
    bank.add("b")
    for wrong in ("ab", 3, ["a", 3]):
        with pytest.raises(TypeError, match="names"):
            bank.pack(tmp_path / "all", wrong)
    with pytest.raises(ValueError, match="'a' twice"):
        bank.pack(tmp_path / "all", ["a", "b", "a"])
    assert not (tmp_path / "all").exists()


def test_names_that_no_dict_takes_are_refused_by_name():
    net = bank_model.model("qr")
    bank = qk.AdapterBank(net, 1)
    for call in (bank.evict, bank.state, bank.adamw().state_dict):
        with pytest.raises(ValueError, match="name must be"):
            call(["a"])


def test_a_name_that_comes_from_two_threads_is_there_once(monkeypatch):
    net = bank_model.model("qr")
    bank = qk.AdapterBank(net, 2)
    begin, told = bank.layout.begin, threading.Barrier(2, timeout=10)

    def together():
        told.wait()
        return begin()

    monkeypatch.setattr(bank.layout, "begin", together)
    refused = []

    def add():
        try:
            bank.add("a")
        except ValueError as error:
            refused.append(error)

    threads = [threading.Thread(target=add) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 1
    monkeypatch.undo()
    bank.add("b")
    assert bank.table.slot("b").row == 2  # no row is lost


def test_an_add_over_a_full_bank_does_not_walk_over_all(tmp_path):
    net = bank_model.model("qr")
    bank = qk.AdapterBank(net, 50, when_full="evict")
    for i in range(50):
        bank.add(f"{i}")
    asked = []

    class Counted(set):
        def __contains__(self, name):
            asked.append(name)
            return False

    bank.table.unsaved = Counted()
    bank.add("new")
    assert asked == ["0"]


def test_a_packed_file_of_a_newer_format_is_refused(tmp_path, monkeypatch):
    bank = qk.AdapterBank(bank_model.model("qr"), 1)
    bank.add("a")
    monkeypatch.setattr(packed, "FORMAT_VERSION", 99)
    bank.pack(tmp_path / "all")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="99"):
        qk.AdapterBank(bank.model, 1).load(tmp_path / "all")
