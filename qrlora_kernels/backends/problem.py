"""What the chooser is asked, and what it answers."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Problem(NamedTuple):
    """What a choice may depend on; hashable, so that a choice is made once per problem.

    ``op`` is ``"qr_linear"``, ``"lora_xs_linear"``, ``"kron_linear"`` or ``"linear_add"``;
    ``device`` is the device with its index; ``m, n, k, r`` are tokens, output features, input
    features and the rank.
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    m: int
    n: int
    k: int
    r: int


class Choice(NamedTuple):
    """The backend of a call, and why it and not a preferred one."""

    name: str
    reason: str
