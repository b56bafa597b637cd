"""What is exported: updates by layer, what trained beside them, and the model if there is one."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from ..adapters import AnyAdapter, Options, State
from ..model.names import modules
from .beside import Heads


@dataclass(frozen=True)
class Update:
    """The update of one layer.

    Attributes
    ----------
    adapter : type
        Of ``qrlora_kernels.adapters``.
    tensors : dict of Tensor
        What trains and the frozen factors.
    options : Options
    strength : float
        s in front of it, the run-time strength included.
    conv1d : bool
        Whether the layer's weight is stored as [K, N].
    tied : bool
        Whether the layer's weight is another module's too.
    """

    adapter: AnyAdapter
    tensors: State
    options: Options
    strength: float
    conv1d: bool
    tied: bool = False

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A [r, K], B [N, r]) with ΔW = B A; TypeError where there are none."""
        return self.adapter.lora_factors(self.tensors, self.options, self.strength)

    def delta(self) -> Tensor:
        """ΔW [N, K]."""
        return self.adapter.delta(self.tensors, self.options, self.strength)


@dataclass(frozen=True)
class Source:
    """An adapter to export.

    Attributes
    ----------
    updates : dict of Update
        By the names of the layers in the base.
    heads : dict of dict of Tensor
        By the name of the module, the tensors of what trained in full by their names in it.
    root : nn.Module or None
        The model, without wrappers; None where there is only a file.
    """

    updates: dict[str, Update]
    heads: Heads = field(default_factory=dict)
    root: nn.Module | None = None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Those of the base by name, without what lies inside an adapted layer."""
        if self.root is None:
            return {}
        return {n: m for n, m in modules(self.root).items() if not self._inside(n)}

    def _inside(self, name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:i]) in self.updates for i in range(1, len(parts)))

    @property
    def base_name(self) -> str | None:
        """Where the base came from, if the model says so."""
        return getattr(getattr(self.root, "config", None), "_name_or_path", None) or None
