"""Swap two layers of a small network for QR-LoRA, train, save, load into a fresh base, merge."""

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

import qrlora_kernels as qk


def main() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Linear(64, 1))
    x, target = torch.randn(512, 64), torch.randn(512, 1)

    model = qk.adapt(copy.deepcopy(base), ["0", "2"], adapter="qr", rank=16, progress=False)
    qk.summary(model)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    first = last = float("nan")
    for step in range(50):
        loss = (model(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        first, last = (loss.item() if step == 0 else first), loss.item()
    print(f"loss {first:.3f} -> {last:.3f}")
    if not last < first:
        raise SystemExit("training did not lower the loss")

    model.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "adapter.safetensors"
        qk.save_adapter(model, path)
        loaded = qk.load_adapter(copy.deepcopy(base), path).eval()
        print(f"adapter file: {path.stat().st_size} bytes")
        expected = model(x)
        if not torch.equal(loaded(x), expected):
            raise SystemExit("the loaded adapter does not predict the same")
        before = model[0].weight.clone()
        qk.merge(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        qk.unmerge(model)
        if not torch.equal(model[0].weight, before):
            raise SystemExit("unmerge did not give the original weight back")
    print("saved, loaded, merged and unmerged: all agree")


if __name__ == "__main__":
    main()
