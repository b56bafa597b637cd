"""DeepSpeed's ZeRO-3 on two processes: the start gathers, training, one file of whole tensors."""

from __future__ import annotations

from pathlib import Path

import helpers
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from saved import ADAPTERS, base, refusal, x
from torch import nn

import qrlora_kernels as qk

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}
STEPS = 3


def adapted(adapter: str, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(7)
    names = ["0", "2"]
    qk.adapt(model, names, adapter, trainable=["3"], progress=False, **ADAPTERS[adapter])
    trains = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.SGD(trains, lr=0.1)


def rank_of_two(rank: int, folder: str) -> None:
    import deepspeed

    with pytest.MonkeyPatch.context() as environment:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
            environment.setenv(name, str(value))
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
        )
        deepspeed.init_distributed("gloo")
        said = {}
        for adapter in ADAPTERS:
            path = Path(folder, f"{adapter}.safetensors")
            said[adapter] = _train_and_save(deepspeed, adapter, path, rank)
        torch.save(said, Path(folder, f"{rank}.pt"))
        dist.destroy_process_group()


def _train_and_save(deepspeed, adapter: str, path: Path, rank: int) -> str:  # type: ignore[no-untyped-def]
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        model = base()
    assert model[0].weight.shape == (0,)  # spread
    _take_weights_of(deepspeed, model, base())
    model, optimizer = adapted(adapter, model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    rows = x()[:4][rank::2]
    for _ in range(STEPS):
        engine.backward(engine(rows).square().mean())
        engine.step()
    qk.save_adapter(engine.module, path)
    assert path.is_file()
    return refusal(lambda: qk.load_adapter(engine.module, path))


def _take_weights_of(deepspeed, model: nn.Module, plain: nn.Module) -> None:  # type: ignore[no-untyped-def]
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        for p, own in zip(model.parameters(), plain.parameters(), strict=True):
            p.data.copy_(own.data)


def test_it_trains_as_one_process_does_and_its_file_loads_over_the_plain_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """adapt said that the weight had no elements."""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    mp.spawn(rank_of_two, args=(str(tmp_path),), nprocs=2)
    for adapter in ADAPTERS:
        alone, optimizer = adapted(adapter, base())
        for _ in range(STEPS):
            optimizer.zero_grad()
            alone(x()[:4]).square().mean().backward()
            optimizer.step()
        path = tmp_path / f"{adapter}.safetensors"
        loaded = qk.load_adapter(base(), path, strict=True)
        torch.testing.assert_close(loaded(x()), alone(x()), rtol=1e-4, atol=1e-5)
        assert not helpers.same_bits(loaded(x()), base()(x()))
    for rank in range(2):
        said = torch.load(tmp_path / f"{rank}.pt")
        assert all("must not be sharded yet" in sentence for sentence in said.values()), said
