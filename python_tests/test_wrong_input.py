"""What is passed by mistake to the functions on whole models is named before anything happens."""

import functools

import pytest
import torch
from torch import nn

import qrlora_kernels as qk

ADAPTERS = {"qr": {"rank": 2}, "lora_xs": {"rank": 2}, "ohora": {"rank": 2}}
adapt = functools.partial(qk.adapt, rank=2, progress=False)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.fixture
def adapted():
    return adapt(net(), ["0"])


TAKES_A_MODEL = {
    "adapt": lambda model: qk.adapt(model, ["0"]),
    "save_adapter": lambda model: qk.save_adapter(model, "never"),
    "load_adapter": lambda model: qk.load_adapter(model, "never"),
    "merge": qk.merge,
    "unmerge": qk.unmerge,
    "unload": qk.unload,
    "summary": qk.summary,
    "refresh": qk.refresh,
    "scale": lambda model: qk.scale(model, 0.5),
    "disabled": lambda model: qk.disabled(model).__enter__(),
    "tune": qk.tune,
    "adapted_layers": qk.adapted_layers,
    "count_parameters": qk.count_parameters,
}


@pytest.mark.parametrize("wrong", [None, "a.safetensors", [nn.Linear(2, 2)]], ids=repr)
@pytest.mark.parametrize("function", TAKES_A_MODEL)
def test_what_is_no_model(function, wrong):
    kind = type(wrong).__name__
    with pytest.raises(TypeError, match=rf"^model must be an nn\.Module, got {kind}$"):
        TAKES_A_MODEL[function](wrong)


FLAGS = {
    "merge": lambda model, path, wrong: qk.unload(model, merge=wrong),
    "strict": lambda model, path, wrong: qk.load_adapter(model, path, strict=wrong),
    "distributed": lambda model, path, wrong: qk.adapt(model, ["2"], distributed=wrong),
    "show": lambda model, path, wrong: qk.summary(model, show=wrong),
}
PROGRESS = {
    "adapt": lambda model, path, wrong: qk.adapt(model, ["2"], progress=wrong),
    "save_adapter": lambda model, path, wrong: qk.save_adapter(model, path, progress=wrong),
    "load_adapter": lambda model, path, wrong: qk.load_adapter(model, path, progress=wrong),
    "refresh": lambda model, path, wrong: qk.refresh(model, progress=wrong),
}
SWITCHES = list(FLAGS.items())
SWITCHES += [("progress", call) for call in PROGRESS.values()]


@pytest.mark.parametrize(("argument", "call"), SWITCHES, ids=[*FLAGS, *PROGRESS])
def test_a_word_is_no_bool(argument, call, adapted, tmp_path):
    """``unload(model, merge="no")`` merged."""
    path = tmp_path / "a.safetensors"
    qk.save_adapter(adapted, path)
    with pytest.raises(TypeError, match=f"^{argument} must be a bool, got str"):
        call(adapted, path, "no")
    assert list(qk.adapted_layers(adapted)) == ["0"]


PATHS = {
    "save_adapter": ("path", lambda model, wrong: qk.save_adapter(model, wrong)),
    "load_adapter": ("path", lambda model, wrong: qk.load_adapter(model, wrong)),
    "tune": ("path", lambda model, wrong: qk.tune(model, path=wrong)),
    "adapt": ("cache", lambda model, wrong: adapt(model, ["2"], cache=wrong)),
}


@pytest.mark.parametrize("function", PATHS)
def test_what_is_no_path(function, adapted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argument, call = PATHS[function]
    with pytest.raises(TypeError, match=f"^{argument} must be a string or a path, got int 3$"):
        call(adapted, 3)
    with pytest.raises(ValueError, match=f"^{argument} must name a file or a folder, got ''$"):
        call(adapted, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argument", ["trainable", "skip"])
@pytest.mark.parametrize(
    "wrong", [None, 3, nn.Linear(2, 2)], ids=lambda wrong: type(wrong).__name__
)
def test_what_is_no_name(argument, wrong):
    kind = type(wrong).__name__
    with pytest.raises(TypeError, match=f"^{argument} must be a name or an iterable.*got {kind}$"):
        adapt(net(), ["0"], **{argument: wrong})


def test_a_slip_of_the_pen_in_skip_is_no_consent():
    model = net()
    with pytest.raises(ValueError, match="skip names '00', but the model has no such module"):
        adapt(model, "all-linear", skip=["00"])
    assert not qk.adapted_layers(model)


def test_skip_that_leaves_nothing_is_told_from_no_match():
    with pytest.raises(ValueError, match="skip must leave a layer to adapt"):
        adapt(net(), ["0"], skip=["0"])


def test_an_adapter_that_is_no_string():
    with pytest.raises(ValueError, match=r"^adapter must be one of .*got \['qr'\]$"):
        qk.adapt(net(), ["0"], adapter=["qr"])


@pytest.mark.parametrize(
    ("wrong", "error"), [("many", TypeError), (0, ValueError), (-1, ValueError)]
)
def test_a_number_of_tokens(wrong, error, adapted):
    with pytest.raises(error, match=r"^tokens must be"):
        qk.summary(adapted, tokens=wrong)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_strength_of_zero_at_the_start_never_trains(adapter):
    zero = {"scaling": 0.0} if adapter == "qr" else {"alpha": 0.0}
    model = net()
    with pytest.raises(ValueError, match="scaling or alpha must not be 0 at the start"):
        qk.adapt(model, ["0"], adapter, progress=False, **ADAPTERS[adapter], **zero)
    assert type(model[0]) is nn.Linear


def test_one_rank_is_no_range():
    with pytest.warns(UserWarning, match=r"keeps \d+ directions of each layer"):
        qk.adapt(net(), ["0"], tau=0.1, progress=False)
