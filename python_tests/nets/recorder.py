"""Who computed a step: backends' steps, native calls, Triton launches and library products.

What a call *says* about who runs it is ``backends.last_choice``. What *ran* is recorded here, by
wrapping the module attributes through which steps and native calls are reached, and by PyTorch's
profiler, which sees every library product, whoever asks for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor
from torch.autograd import profiler

from qrlora_kernels import native
from qrlora_kernels.backends import BACKENDS
from qrlora_kernels.dispatch import chooser

LIBRARY = "library products"
# What has to run, and nothing else, for a choice to be true. The reference and the composition of
# library products are recorded as a whole: the products within them are theirs.
MEANT = {
    ("amx", "native"): {"native core"},
    ("cpu", "native"): {"native core"},
    ("cpu", "panels"): {"native core"},
    ("cpu", "native base"): {"native core"},
    ("cpu", "addmm base"): {"native core", LIBRARY},
    ("cpu", "onednn base"): {"native core", LIBRARY},
    ("cpu", "fp32 base"): {"native core", LIBRARY},
    ("cuda", "decode"): {"cuda_decode"},
    ("triton", "two-phase"): {"Triton launch"},
    ("triton", "addmm base"): {"Triton launch", LIBRARY},
    ("composed", "addmm"): {"composed"},
    ("composed", "effective weight"): {"composed"},
    ("composed", "effective weight, kept"): {"composed"},
    ("composed", "onednn"): {"composed"},
    ("composed", "fp32"): {"composed"},
    ("reference", "plain"): {"reference"},
}
PRODUCTS = {
    "aten::_addmm_activation",
    "aten::addbmm",
    "aten::addmm",
    "aten::addmm_",
    "aten::addmv",
    "aten::baddbmm",
    "aten::bmm",
    "aten::mkldnn_linear",
    "aten::mm",
    "aten::mv",
    "mkldnn::_linear_pointwise",
}

# Names of today's package.
STEPS = tuple(
    f"{op}_{step}" for op in ("low_rank", "kron", "linear_add") for step in ("fwd", "bwd")
)
ON_TENSORS = tuple(
    f"{kind}_{step}_call" for kind in ("low_rank", "kron") for step in ("forward", "backward")
)
ON_ADDRESSES = (*(name.removesuffix("_call") for name in ON_TENSORS), "linear_add")


class Recorder:
    """Tells, of a block under :meth:`watching`, everything that computed something in it."""

    def __init__(self) -> None:
        self.ran: set[str] = set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[set[str]]:
        """The set is complete when the block ends."""
        self.ran = set()
        with profiler.profile() as profile:
            yield self.ran
        if any(e.name in PRODUCTS and not _is_of_a_step(e) for e in profile.function_events):
            self.ran.add(LIBRARY)

    def spied(self, function: Callable[..., Any], who: str) -> Callable[..., Any]:
        def spy(*operands: Any, **options: Any) -> Any:
            self.ran.add(who)
            with profiler.record_function(f"step of {who}"):
                return function(*operands, **options)

        return spy

    def spied_answer(self, function: Callable[..., Any], who: str) -> Callable[..., Any]:
        """Of a call that answers None, NotImplemented or a list where it leaves the work to
        others."""

        def spy(*operands: Any) -> Any:
            answer = function(*operands)
            if isinstance(answer, (Tensor, tuple)):
                self.ran.add(who)
            return answer

        return spy


def _is_of_a_step(event: Any) -> bool:
    while (event := event.cpu_parent) is not None:
        if event.name in ("step of composed", "step of reference"):
            return True
    return False


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """A recorder on everything that is there; all is as before when the block ends."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        for module, name, who in _steps():
            patch.setattr(module, name, recorder.spied(getattr(module, name), who))
        core = native.CORE
        for name in (*ON_ADDRESSES, "cuda_decode"):
            if hasattr(core, name):
                who = name if name == "cuda_decode" else "native core"
                patch.setattr(core, name, recorder.spied(getattr(core, name), who))
        for name in ON_TENSORS:
            if hasattr(core, name):
                spy = recorder.spied_answer(getattr(core, name), "native core")
                patch.setattr(core, name, spy)
        with contextlib.suppress(ImportError):
            from qrlora_kernels.backends.triton import common

            patch.setattr(common, "launch", recorder.spied(common.launch, "Triton launch"))
        yield recorder


def _steps() -> list[tuple[Any, str, str]]:
    """(module, name, whose it is) of the steps of library products and of the reference.

    A backend may hand out another's step as its own.
    """
    owners = {
        getattr(chooser.load(who), name): who
        for who in ("composed", "reference")
        for name in STEPS
        if hasattr(chooser.load(who), name)
    }
    modules = [chooser.load(name) for name in BACKENDS]
    steps = [(m, name, owners.get(getattr(m, name, None))) for m in modules for name in STEPS]
    return [(module, name, who) for module, name, who in steps if who is not None]
