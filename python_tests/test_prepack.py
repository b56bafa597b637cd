"""Frozen weights kept as calls take them: the same answers, and never an old one."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels.nn import prepacked
from qrlora_kernels.nn.prepacked import PrepackedLinear

KINDS: dict[str, dict[str, Any]] = {
    "qr": {"rank": 6},
    "lora_xs": {"rank": 4, "init_std": 0.1},
    "ohora": {"rank": 4},
}
ADAPTED, PLAIN = "0", "2"


@pytest.fixture(params=[True, False], ids=["halves multiplied", "no halves"], autouse=True)
def halves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """What the processor can do; products of halves are right on all, if slow."""
    monkeypatch.setattr(prepacked, "multiplies", lambda device, dtype: request.param)
    return request.param


def model(kind: str = "qr", dtype: torch.dtype = torch.float32, **options: Any) -> nn.Sequential:
    """An adapted layer away from its start, a plain frozen one, and a head that trains."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 5)
    ).to(dtype)
    qk.adapt(net, [ADAPTED], kind, trainable=["4"], progress=False, **{**KINDS[kind], **options})
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.requires_grad and not name.startswith("4."):
                p.add_(0.1 * torch.randn_like(p))
    return net


def step(net: nn.Module, x: Tensor, autocast: bool = True) -> list[Tensor]:
    """The answer and every gradient."""
    net.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = net(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    return [y, x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]


def kept(net: nn.Module) -> dict[str, list[str]]:
    return {
        name: sorted(vars(module)["derived"].nbytes())
        for name, module in net.named_modules()
        if "derived" in vars(module)
    }


def assert_close(found: list[Tensor], want: list[Tensor], exact: list[Tensor]) -> None:
    """No further from fp64 than twice what goes without, but for an ulp of the largest number."""
    assert len(found) == len(want) == len(exact)
    for got, other, true in zip(found, want, exact, strict=True):
        assert got.dtype == other.dtype
        errors = [float((t.double() - true.double()).norm()) for t in (got, other)]
        assert errors[0] <= 2 * errors[1] + 1e-6 * float(true.double().norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [3, 200])
def test_a_step_under_autocast_is_that_of_a_model_that_casts(kind: str, tokens: int) -> None:
    net, x = model(kind), torch.randn(tokens, 48)
    exact = step(copy.deepcopy(net).double(), x.double(), autocast=False)
    want = step(net, x)
    qk.prepack(net)
    found = step(net, x)
    assert_close(found, want, exact)
    assert all(map(torch.equal, found, step(net, x))), "the same bits at every call"
    layers = kept(net)
    assert len(layers[PLAIN]) == 1
    assert len(layers[ADAPTED]) == (1 if kind == "ohora" else 3)  # the weight, and factors


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_half_precision(kind: str, halves: bool) -> None:
    net = model(kind, torch.bfloat16)
    x = torch.randn(40, 48).bfloat16()
    exact = step(copy.deepcopy(net).double(), x.double(), autocast=False)
    want = step(net, x, autocast=False)
    qk.prepack(net)
    assert_close(step(net, x, autocast=False), want, exact)
    assert bool(kept(net)[PLAIN]) == (not halves), "bf16 as it is, or in fp32"


def test_with_products_of_halves_autocast_gives_the_same_bits(halves: bool) -> None:
    net, x = model(), torch.randn(40, 48)
    want = step(net, x)
    found = step(qk.prepack(net), x)
    assert not halves or all(map(torch.equal, found, want))


def test_a_small_update_survives() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    net = qk.adapt(nn.Sequential(linear), ["0"], "qr", rank=16, progress=False)
    layer = net[0]
    layer.lam.data.copy_(torch.randn(16))
    layer.lam.data.mul_(1e-4 * linear.weight.float().norm() / layer.delta_weight().norm())
    qk.prepack(net)
    x = torch.randn(8192, 256).bfloat16()
    want = x.double() @ layer.delta_weight().double().mT
    with torch.no_grad():
        y = net(x).double()
        with qk.disabled(net):
            y -= net(x).double()
    assert float((y * want).sum() / (want * want).sum()) == pytest.approx(1, abs=0.02)


def written(net: nn.Module) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)


def set_data(net: nn.Module) -> None:
    for p in net.parameters():
        p.data = 1.5 * p.data


def loaded(net: nn.Module) -> None:
    net.load_state_dict({k: 1.5 * v if v.is_floating_point() else v
                         for k, v in net.state_dict().items()})  # fmt: skip


def cast_back(net: nn.Module) -> None:
    net.double().float()
    written(net)


def merged_back(net: nn.Module) -> None:
    qk.merge(net)
    with torch.no_grad():
        net(torch.randn(3, 48))
    qk.unmerge(net)
    written(net)


@pytest.mark.parametrize("change", [written, set_data, loaded, cast_back, merged_back])
@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_is_of_an_old_weight(kind: str, change: Callable[[nn.Module], None]) -> None:
    net, x = model(kind), torch.randn(7, 48)
    other = copy.deepcopy(net)
    step(qk.prepack(net), x)
    change(net)
    change(other)
    assert torch.equal(step(net, x)[0], step(qk.prepack(other), x)[0])


def test_a_weight_that_trains_again_goes_without() -> None:
    net, x = qk.prepack(model()), torch.randn(7, 48)
    before = len(step(net, x))
    plain = net.get_submodule(PLAIN)
    plain.weight.requires_grad_()
    assert len(step(net, x)) == before + 1
    assert plain.weight.grad is not None


def test_what_is_kept_is_in_no_state_dict_and_no_copy() -> None:
    net, x = model(), torch.randn(7, 48)
    names = list(net.state_dict())
    want = step(qk.prepack(net), x)
    assert list(net.state_dict()) == names
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        assert not any(kept(other).values())
        assert type(other[2]) is type(net[2])
        assert all(map(torch.equal, step(other, x), want))
        assert all(kept(other).values())


def test_taken_off_every_layer_is_what_it_was() -> None:
    net, x = model(), torch.randn(7, 48)
    want, kinds = step(net, x), [type(module) for module in net.modules()]
    qk.prepack(net)
    plain = net.get_submodule(PLAIN)
    assert isinstance(plain, PrepackedLinear)
    assert isinstance(plain, nn.Linear)
    assert type(net[4]) is nn.Linear, "it trains"
    qk.prepack(qk.prepack(net), on=False)
    assert [type(module) for module in net.modules()] == kinds
    assert "derived" not in vars(plain)
    assert all(map(torch.equal, step(net, x), want))


def test_adapters_off_scaled_dropped_and_by_row() -> None:
    net, x = model(dropout=0.5), torch.randn(6, 48)
    other = copy.deepcopy(net)
    qk.prepack(net)
    for one in (net, other):
        one.train()
        torch.manual_seed(1)
        one.found = [step(one, x)[0]]  # type: ignore[assignment]
        one.eval()
        with qk.disabled(one):
            one.found.append(step(one, x)[0])  # type: ignore[union-attr]
        bank = qk.AdapterBank(one, 2)
        bank.add("a")
        with bank.use(["a", None] * 3):
            one.found.append(step(one, x)[0])  # type: ignore[union-attr]
        qk.scale(one, 0.5)
        one.found.append(step(one, x)[0])  # type: ignore[union-attr]
    for got, want in zip(net.found, other.found, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert kept(net)[ADAPTED]


def test_a_folded_start_is_for_calls_without_autocast() -> None:
    net, x = model("ohora", fold=True), torch.randn(7, 48)
    want = step(net, x, autocast=False)
    qk.prepack(net)
    assert all(map(torch.equal, step(net, x, autocast=False), want))
    step(net, x)
    names = kept(net)[ADAPTED]
    assert len(names) == 2
    assert "folded" in names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_kept_where_nothing_is_cast(dtype: torch.dtype) -> None:
    net, x = model(dtype=dtype), torch.randn(7, 48, dtype=dtype)
    want = step(net, x, autocast=False)
    assert all(map(torch.equal, step(qk.prepack(net), x, autocast=False), want))
    assert not any(kept(net).values())


def test_a_compiled_call_goes_without() -> None:
    net, x = model(), torch.randn(7, 48)
    want = step(net, x)[0]
    qk.prepack(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(compiled, x)[0], want, rtol=2e-2, atol=2e-2)
    assert not any(kept(net).values())


def test_summary_says_what_is_kept() -> None:
    net = qk.prepack(model())
    assert "copies computed" not in qk.summary(net, show=False).table()
    step(net, torch.randn(7, 48))
    found = qk.summary(net, show=False)
    sizes = [sum(vars(m)["derived"].nbytes().values()) for m in (net[0], net[2])]
    assert found.kept_bytes == sum(sizes) > found.layers[0].derived_bytes == sizes[0] > 0
    assert "copies computed from frozen tensors take" in found.table()


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ValueError, match="model must hold frozen linear layers"):
        qk.prepack(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(TypeError, match="on must be a bool, got str"):
        qk.prepack(model(), "forward")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be"):
        qk.prepack("model")  # type: ignore[arg-type]


def test_adapt_comes_first() -> None:
    net = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    qk.prepack(net)
    with pytest.raises(TypeError, match=r"prepacked layer: adapt first, or qk.prepack\(model, F"):
        qk.adapt(net, ["0"], "qr", rank=2)
    qk.adapt(qk.prepack(net, False), ["0"], "qr", rank=2, progress=False)


def test_a_wrong_input_has_the_error_that_it_has_without() -> None:
    net = qk.prepack(model(dtype=torch.bfloat16))
    for x in (torch.randn(3, 48), torch.randn(3, 47).bfloat16()):
        with pytest.raises((TypeError, ValueError)) as found:
            net(x)
        with pytest.raises(type(found.value)) as want:
            qk.prepack(net, False)(x)
        assert str(found.value) == str(want.value)
        qk.prepack(net)


@pytest.mark.parametrize("name", [ADAPTED, PLAIN])
@pytest.mark.parametrize(
    ("weight", "bias", "autocast"),
    [(torch.bfloat16, torch.float32, False), (torch.float32, torch.float64, True)],
    ids=str,
)
def test_a_bias_of_another_dtype_has_the_error_that_it_has_without(
    name: str, weight: torch.dtype, bias: torch.dtype, autocast: bool
) -> None:
    net = model(dtype=weight)
    layer = net.get_submodule(name)
    layer.bias.data = layer.bias.data.to(bias)
    x, said = torch.ones(3, layer.in_features, dtype=weight), []
    for on in (False, True):
        qk.prepack(net, on)
        cast = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        with cast, pytest.raises((TypeError, ValueError, RuntimeError)) as found:
            layer(x)
        said.append((found.type, str(found.value)))
    assert said[0] == said[1]


@pytest.mark.parametrize("wrong", [[1.0] * 48, None, 3])
def test_what_is_no_tensor_is_refused_as_without(wrong: object) -> None:
    layer = qk.prepack(model()).get_submodule(ADAPTED)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="x must be a torch"):
        layer(wrong)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.complex64])
def test_a_wrong_dtype_under_autocast_has_the_error_that_it_has_without(dtype: torch.dtype) -> None:
    net, x = model(), torch.ones(3, 48, dtype=dtype)
    for name in (ADAPTED, PLAIN):
        layer = qk.prepack(net).get_submodule(name)
        wrong = x if name == ADAPTED else torch.ones(3, 64, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            with pytest.raises((TypeError, ValueError, RuntimeError)) as found:
                layer(wrong)
            layer = qk.prepack(net, False).get_submodule(name)
            with pytest.raises(type(found.value)) as want:
                layer(wrong)
        assert str(found.value) == str(want.value)
