"""Quantised weights that no adapter can read are refused by name, with the way out."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from quantised_models import KINDS, adapt, library, linear, move, net, quantise, x
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import qrlora_kernels as qk


def _pack(layer: nn.Module) -> None:
    """As the first call in eval mode without gradients does on a CPU with avx512_bf16."""
    pack = library("bitsandbytes").functional._convert_weight_packed_for_cpu
    layer.weight.data, layer.weight.quant_state = pack(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4_nested"])
def test_a_weight_that_was_repacked_for_the_cpu(kind):
    layer = quantise(linear(torch.bfloat16), kind)
    _pack(layer)
    with pytest.raises(ValueError, match=r"repacked .* load the model again"):
        qk.QRLinear.from_linear(layer, rank=6)


def test_a_weight_that_is_repacked_under_the_adapter():
    model = adapt(net("nf4"))
    _pack(model.first)
    with pytest.raises(ValueError, match=r"repacked .* load the model again"):
        model(x())


def test_no_call_of_an_adapted_layer_repacks():
    """Whatever the processor: in none of the ways in which the base answers alone."""
    model = move(adapt(net("nf4"))).eval()
    for layer in (model.first, model.second):
        layer.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        model(x())
        with qk.disabled(model):
            model(x())
        qk.scale(model, 0.0)
        model(x())
    assert not getattr(model.first.weight.quant_state, "packing_format_for_cpu", False)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_a_layer_before_it_is_quantised(kind):
    bnb = library("bitsandbytes").nn
    options = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
    with pytest.raises(ValueError, match=r"move it first"):
        qk.QRLinear.from_linear(getattr(bnb, kind)(64, 96, **options), rank=6)


def test_a_layer_that_quantises_at_every_call():
    layer = library("bitsandbytes").nn.Linear8bitLt(64, 96, has_fp16_weights=True)
    with pytest.raises(ValueError, match=r"has_fp16_weights"):
        qk.QRLinear.from_linear(layer, rank=6)


def test_a_layer_with_a_forward_of_its_own_over_a_quantised_one():
    class Own(library("bitsandbytes").nn.Linear4bit):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = Own(64, 96).to("cpu")
    with pytest.raises(TypeError, match=r"forward of its own"):
        qk.QRLinear.from_linear(layer, rank=6)


@pytest.mark.parametrize(
    "config", ["Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"]
)
def test_weights_whose_product_quantises_x_too(config):
    library("torchao")
    from torchao import quantization as ao

    holder = nn.Sequential(linear(torch.bfloat16))
    ao.quantize_(holder, getattr(ao, config)())
    with pytest.raises(ValueError, match=r"changes x too"):
        qk.QRLinear.from_linear(holder[0], rank=6)


def test_int4_that_needs_a_gpu_is_taken_up_to_the_call():
    """torchao's Int4Tensor tells no dense weight: it is asked for its product with unity."""
    library("torchao")
    from torchao.quantization.quantize_.workflows import Int4Tensor

    k, n, group = 64, 96, 32
    scale = torch.ones(k // group, n, dtype=torch.bfloat16)
    codes = torch.zeros(n, k // 2, dtype=torch.int8)
    layer = linear(torch.bfloat16)
    weight = Int4Tensor(codes, scale, torch.zeros_like(scale), [1, group], torch.Size([n, k]))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises((RuntimeError, AttributeError, NotImplementedError, ImportError)):
        qk.QRLinear.from_linear(layer, rank=6)
    asked = []

    def product(x, w, bias=None):
        asked.append(x)
        return x @ torch.linspace(-1, 1, n * k, dtype=x.dtype).view(n, k).t()

    from qrlora_kernels.nn import kinds, quantised

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds.F, "linear", product)
        found = quantised.quantised(layer.weight, layer).dense(torch.float32)
    assert torch.equal(asked[0], torch.eye(k, dtype=torch.bfloat16))
    want = torch.linspace(-1, 1, n * k, dtype=torch.bfloat16).view(n, k)
    assert torch.equal(found, want.float())


@pytest.mark.parametrize("kind", ["nf4", "bnb_int8", "int8"])
def test_quantised_weights_that_are_offloaded(kind):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = accelerate.cpu_offload(net(kind), torch.device("cpu"))
    with pytest.raises(TypeError, match=r"first\.weight must not be quantised and offloaded"):
        adapt(model)


@pytest.fixture
def group(tmp_path):
    """This process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "bnb_int8"])
def test_sharded_weights_that_lost_their_scales(kind, each, group):
    model = adapt(net(kind))
    if each:
        fully_shard(model.first)
    fully_shard(model)
    with pytest.raises(TypeError, match=r"weight must be the quantised one.*fully_shard"):
        model(x())


@pytest.mark.parametrize("kind", ["nf4", "bnb_int8", "int8", "float8"])
def test_in_parallel_each_process_has_the_weights(kind, group):
    """Which DistributedDataParallel cannot send where they are torchao's: nor need it."""
    model = adapt(net(kind))
    DistributedDataParallel(model, init_sync=False)(x()).sum().backward()
    assert all(layer.lam.grad is not None for layer in (model.first, model.second))


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_weight_does_not_train(kind):
    with pytest.raises(ValueError, match=r"trainable must not reach a quantised weight.*second"):
        qk.adapt(net(kind), ["first"], rank=6, trainable=["second"], progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_weights_are_refused(kind):
    model = nn.Sequential(quantise(linear(torch.bfloat16), kind), nn.Linear(64, 96))
    model[1].weight = model[0].weight
    with pytest.raises((ValueError, TypeError), match=r"share one weight|float16"):
        qk.adapt(model, ["0", "1"], rank=6, progress=False)


def test_neither_library_is_imported_by_the_package():
    code = (
        "import sys, torch, qrlora_kernels as qk\n"
        "layer = qk.QRLinear.from_linear(torch.nn.Linear(8, 8), rank=2)\n"
        "layer(torch.randn(2, 8)).sum().backward()\n"
        "qk.disabled\n"
        "sys.exit(any(n in sys.modules for n in ('bitsandbytes', 'torchao')))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
