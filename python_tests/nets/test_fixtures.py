"""What an earlier release wrote is loaded and gives the same model.

The files in ``fixtures/`` were written once (``write_fixtures.py``) and stay. Outputs are compared
as numbers, with a bound: another processor has other bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
import write_fixtures
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from write_fixtures import ADAPTED, ADAPTERS, CHIP, DTYPES, FACTORS, HEAD, net

import qrlora_kernels as qk
from qrlora_kernels.backends import BACKENDS, Choice, Problem
from qrlora_kernels.dispatch import chooser, tuning

FIXTURES = Path(__file__).with_name("fixtures")
REBUILT = ("q", "r", "diagonal")
each = pytest.mark.parametrize(("adapter", "dtype"), list(product(ADAPTERS, DTYPES)))


def tensors(name: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / f"{name}.safetensors")


def base(dtype: str) -> tuple[nn.Sequential, Tensor]:
    """The model before it was adapted, and the fixed input."""
    state = tensors(f"{dtype}-base")
    x = state.pop("x")
    model = net(DTYPES[dtype])
    model.load_state_dict(state)
    return model, x


def bound(dtype: str, want: Tensor) -> float:
    """Three layers of bf16 round six times at most; in fp32 the sums' roundings count too."""
    return {"bf16": 2**-6, "fp32": 1e-5}[dtype] * float(want.abs().max())


def check_outputs(model: nn.Module, x: Tensor, adapter: str, dtype: str) -> None:
    want = tensors(f"{dtype}-outputs")[adapter]
    with torch.no_grad():
        error = float((model(x).float() - want).abs().max())
    limit = bound(dtype, want)
    assert error <= limit, f"outputs are off by {error:.1e}, allowed {limit:.1e}"


def check_state(model: nn.Module, adapter: str, dtype: str, rebuilt: bool) -> None:
    """Bit for bit, save factors that were rebuilt here."""
    want, have = tensors(f"{adapter}-{dtype}-state"), model.state_dict()
    assert set(want) == set(have)
    for key, tensor in want.items():
        assert have[key].dtype == tensor.dtype
        if rebuilt and key.rpartition(".")[2] in REBUILT:
            room = 2 * torch.finfo(DTYPES[dtype]).eps * float(tensor.abs().max())
            assert (have[key].double() - tensor.double()).abs().max() <= room, key
        else:
            assert torch.equal(have[key], tensor), key


@pytest.mark.parametrize("factors", FACTORS)
@each
def test_adapter_files(adapter: str, dtype: str, factors: str) -> None:
    model, x = base(dtype)
    qk.load_adapter(model, FIXTURES / f"{adapter}-{dtype}-{factors}.safetensors")
    assert sorted(qk.adapted_layers(model)) == list(ADAPTED)
    trained = [f"{HEAD}.weight", f"{HEAD}.bias"]
    for name, layer in qk.adapted_layers(model).items():
        trained += [f"{name}.{own}" for own in layer.trainables]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(trained)
    check_state(model, adapter, dtype, rebuilt=adapter == "qr" and factors == "auto")
    check_outputs(model, x, adapter, dtype)


def test_strict_asks_for_a_file_that_knows_the_whole_base() -> None:
    model, _ = base("fp32")
    with pytest.raises(ValueError, match="strict needs a file that knows the whole base"):
        qk.load_adapter(model, FIXTURES / "qr-fp32-auto.safetensors", strict=True)
    assert not qk.adapted_layers(model)


@each
def test_state_dicts(adapter: str, dtype: str) -> None:
    """Into a model that was adapted alike; merged layers are unmerged by it."""
    for merged in (False, True):
        model, x = base(dtype)
        options = {"trainable": [HEAD], "head_dtype": model[-1].weight.dtype, "progress": False}
        qk.adapt(model, ADAPTED, adapter, **options, **ADAPTERS[adapter])
        if merged:
            qk.merge(model)
        model.load_state_dict(tensors(f"{adapter}-{dtype}-state"))
        assert not any(layer.merged for layer in qk.adapted_layers(model).values())
        check_state(model, adapter, dtype, rebuilt=False)
        check_outputs(model, x, adapter, dtype)


def test_all_are_there_and_say_who_wrote_them() -> None:
    assert sorted(path.name for path in FIXTURES.iterdir()) == write_fixtures.names()
    for path in FIXTURES.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert {"qrlora_kernels", "torch"} <= set(file.metadata())


def test_pivots_are_far_from_ties() -> None:
    """So the same columns are found on every processor: the next best is a fifth smaller."""
    for dtype in DTYPES:
        for layer in ADAPTED:
            state = tensors(f"qr-{dtype}-state")
            rest = state[f"{layer}.weight"].double()
            for pivot in state[f"{layer}.pivots"]:
                norms = rest.norm(dim=0)
                best, second = norms.sort(descending=True).values[:2]
                assert norms[pivot] == best
                assert second < 0.8 * best
                direction = rest[:, pivot] / best
                rest = rest - torch.outer(direction, direction @ rest)


# --- tuning files


@pytest.fixture
def known_chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fixture, as if it had been measured on this machine, is what the environment names."""
    text = (FIXTURES / "tuning.json").read_text(encoding="utf-8")
    assert CHIP in text
    path = tmp_path / "tuning.json"
    path.write_text(text.replace(CHIP, tuning.here(torch.device("cpu"))), encoding="utf-8")
    tuning.clear()
    chooser.forget()
    monkeypatch.setenv("QRLORA_TUNING", str(path))
    yield
    tuning.clear()
    chooser.forget()


@pytest.mark.usefixtures("known_chip")
@pytest.mark.parametrize(
    ("op", "r"), [("qr_linear", 4), ("lora_xs_linear", 4), ("kron_linear", 4), ("linear_add", 48)]
)
def test_a_tuning_file_decides(op: str, r: int) -> None:
    for tokens, near in ((16, True), (8, True), (32, True), (64, False)):
        problem = Problem(op, torch.device("cpu"), torch.float32, tokens, 48, 80, r)
        choice = qk.backends.choose(problem)
        assert (choice.name == "reference") == near
        if near:
            here = tuning.here(problem.device)
            reason = (
                f"measured on this {here} with 16 tokens, forward and backward together: 0.50 of "
                "composed's time"
            )
            assert choice == Choice("reference", "plain", reason)
            if op != "linear_add":
                assert qk.backends.choose(problem._replace(step="bwd")) == choice


@pytest.mark.usefixtures("known_chip")
def test_a_winner_that_is_not_known_is_passed_over() -> None:
    problem = Problem("qr_linear", torch.device("cpu"), torch.float32, 16, 48, 80, 8)
    assert qk.backends.choose(problem).name in set(BACKENDS) - {"reference"}


# --- planted faults


@each
def test_a_trained_number_that_is_lost_is_seen(adapter: str, dtype: str) -> None:
    model, x = base(dtype)
    qk.load_adapter(model, FIXTURES / f"{adapter}-{dtype}-stored.safetensors")
    layer = qk.adapted_layers(model)[ADAPTED[0]]
    with torch.no_grad():
        getattr(layer, layer.trainables[0]).view(-1)[0] += 1
    with pytest.raises(AssertionError, match="outputs are off"):
        check_outputs(model, x, adapter, dtype)
    with pytest.raises(AssertionError, match=layer.trainables[0]):
        check_state(model, adapter, dtype, rebuilt=True)


@each
def test_an_update_that_is_left_out_is_seen(adapter: str, dtype: str) -> None:
    """The bound is far below what the adapters change."""
    model, x = base(dtype)
    qk.load_adapter(model, FIXTURES / f"{adapter}-{dtype}-stored.safetensors")
    qk.unload(model, merge=False)
    want = tensors(f"{dtype}-outputs")[adapter]
    with torch.no_grad():
        off = (model(x).float() - want).abs().max()
    assert off > 10 * bound(dtype, want)


def test_another_base_is_refused() -> None:
    model, _ = base("fp32")
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"0\.weight is not the weight"):
        qk.load_adapter(model, FIXTURES / "qr-fp32-auto.safetensors")


def test_the_script_writes_what_the_tests_read(tmp_path: Path) -> None:
    """Today's files have the same names and the same keys as the committed ones."""
    write_fixtures.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == write_fixtures.names()
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as new, safe_open(FIXTURES / path.name, "pt") as old:
            assert set(new.keys()) == set(old.keys())
