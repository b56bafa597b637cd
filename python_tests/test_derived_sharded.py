"""Of weights that ``fully_shard`` gathers nothing is kept: no write to them is counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import qrlora_kernels as qk


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store: Path = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def prepacked() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).requires_grad_(False)
    return qk.prepack(qk.adapt(net, ["1"], "qr", rank=2, progress=False))


def folded() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).requires_grad_(False)
    return qk.adapt(net, ["1"], "ohora", rank=4, fold=True, progress=False)


@pytest.mark.parametrize("each", [True, False], ids=["each layer", "as a whole"])
@pytest.mark.parametrize("make", [prepacked, folded])
def test_an_answer_is_of_the_weights_as_they_are(make: object, each: bool) -> None:
    def answer(net: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if make is prepacked else nullcontext():
            y: Tensor = net(torch.linspace(-1, 1, 48).view(3, 16))
        return y.detach()

    torch.manual_seed(0)
    sharded = make()  # type: ignore[operator]
    torch.manual_seed(0)
    plain = make()  # type: ignore[operator]
    answer(sharded)
    for layer in sharded if each else ():
        fully_shard(layer)
    fully_shard(sharded)
    answer(sharded)
    for module in (sharded, *sharded) if each else (sharded,):
        module.reshard()
    with torch.no_grad():
        for net in (sharded, plain):
            for name, parameter in net.named_parameters():
                if name.endswith("weight"):
                    parameter.mul_(2)
    torch.testing.assert_close(answer(sharded), answer(plain), rtol=2e-2, atol=2e-2)
