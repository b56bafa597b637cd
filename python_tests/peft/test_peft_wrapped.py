"""Adapted models inside FSDP's wrapper, and beside tokens whose embeddings train."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from peft_models import CONFIGS, adapted, predictions, tokens
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of what trains, by the name without the wrapper's part."""
    found = {n.replace("_fsdp_wrapped_module.", ""): p.grad for n, p in model.named_parameters()}
    return {name: grad for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("adapter", CONFIGS)
def test_fsdp_changes_no_bit_of_the_outputs(adapter, bias):
    plain, inside = (adapted(adapter, bias=bias) for _ in range(2))
    wrapped = FullyShardedDataParallel(inside, use_orig_params=True, device_id=torch.device("cpu"))
    assert torch.equal(predictions(wrapped), predictions(plain))
    for model in (plain, wrapped):
        model(input_ids=tokens()).logits.square().sum().backward()
    want = _trained(plain)
    assert want
    got = _trained(wrapped)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("adapter", CONFIGS)
def test_merged_and_unloaded_beside_trained_tokens(adapter, safe):
    model = adapted(adapter, trainable_token_indices={"word_embeddings": [3, 5]})
    want = predictions(model)
    unloaded = model.merge_and_unload(safe_merge=safe)
    assert type(unloaded.bert.embeddings.word_embeddings) is nn.Embedding
    torch.testing.assert_close(predictions(unloaded), want)
