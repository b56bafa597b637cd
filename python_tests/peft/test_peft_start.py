"""The one start of all layers: shared by the ranks, kept in a cache, shown as a bar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import PeftModel, get_peft_model
from peft_models import CONFIGS, adapted, bert, config, layers, predictions, refusal, tokens
from torch import Tensor

from qrlora_kernels.linalg import cache

SHARED = [("qr_tau", {}), ("lora_xs", {"init_std": 0.1}), ("ohora", {})]


def _start(adapter: str, **options: Any) -> dict[str, Tensor]:
    """Everything that a fresh adapter holds."""
    model = get_peft_model(bert(), config(adapter, **options))
    found = {}
    for name, layer in layers(model).items():
        state = layer.factors("default") | layer.trainables("default")
        found |= {f"{name}.{key}": tensor.detach().clone() for key, tensor in state.items()}
    return found


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = []
    for adapter, options in SHARED:
        torch.manual_seed(rank)  # what a rank draws by itself differs
        found.append(_start(adapter, **options))
    differ = refusal(lambda: adapted("qr", r=3 + rank))
    alone = _start("qr", distributed=False)
    loaded = PeftModel.from_pretrained(bert(), f"{folder}/saved")
    trained = _trained_together(rank)
    torch.save((found, differ, alone, predictions(loaded), trained), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _trained_together(rank: int) -> Tensor:
    """What a model predicts after two steps on rows of its own."""
    model = get_peft_model(bert(), config("lora_xs")).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    together = torch.nn.parallel.DistributedDataParallel(model)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        rows = tokens()[2 * rank : 2 * rank + 2]
        together(input_ids=rows, labels=torch.tensor([0, 2])).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return predictions(model)


@pytest.mark.slow
def test_two_ranks_share_the_start_and_load_the_same(tmp_path: Path) -> None:
    model = adapted("qr")
    model.save_pretrained(tmp_path / "saved")
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    left, right = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for here, there, (adapter, options) in zip(left[0], right[0], SHARED, strict=True):
        assert here.keys() == there.keys()
        assert [name for name in here if not torch.equal(here[name], there[name])] == []
        if "init_std" not in options:
            own = _start(adapter)
            assert [name for name in own if not torch.equal(own[name], here[name])] == []
    assert torch.equal(left[4], right[4])
    assert not torch.allclose(left[4], predictions(bert()))
    for _, differ, alone, loaded, _ in (left, right):
        assert "must be the same on all ranks" in differ
        assert [n for n, t in _start("qr").items() if not torch.equal(t, alone[n])] == []
        assert torch.equal(loaded, predictions(model))


@pytest.mark.parametrize("adapter", CONFIGS)
def test_a_second_start_reads_the_cache(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _start(adapter, cache=str(tmp_path))
    assert list(tmp_path.iterdir())
    computed = []
    some = cache.start_some
    monkeypatch.setattr(
        cache,
        "start_some",
        lambda start, named, chosen, *rest: (
            computed.extend(chosen) or some(start, named, chosen, *rest)
        ),
    )
    second = _start(adapter, cache=str(tmp_path))
    assert computed == []
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    _start(adapter, cache=str(tmp_path / "other"))
    assert len(computed) == 4


@pytest.mark.parametrize("adapter", CONFIGS)
def test_progress_shows_a_bar(adapter: str, capsys: pytest.CaptureFixture[str]) -> None:
    _start(adapter)
    assert "100%" not in capsys.readouterr().err
    _start(adapter, progress=True)
    assert "100%" in capsys.readouterr().err


def test_layers_of_one_rank_start_as_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way an adapter comes in."""
    batches = []
    kind = CONFIGS["qr"][0].adapter
    start = kind.start
    monkeypatch.setattr(
        kind, "start", lambda weights, *rest: batches.append(len(weights)) or start(weights, *rest)
    )
    model = get_peft_model(bert(), config("qr"))
    model.add_adapter("second", config("qr", r=6))
    assert batches == [4, 4]
    get_peft_model(bert(), config("qr", rank_pattern={"query": 2}))
    assert batches == [4, 4, 2, 2]
