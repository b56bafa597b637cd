"""Who sees the operators of a call beside PyTorch's kernels."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def seen_through() -> bool:
    """Whether somebody does: a compiler, a trace, a transform, a mode, a forward-mode derivative.

    A kernel of ours that is called beside PyTorch's operators is none to them.
    """
    return bool(
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )
