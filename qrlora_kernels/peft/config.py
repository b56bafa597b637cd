"""Configs of the three adapters, with PEFT's names for what PEFT has a name for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Literal

from peft import PeftConfig
from peft.utils.other import get_pattern_key

from .. import adapters
from ..adapters import AnyAdapter, Options
from ..adapters.options import plain_value

FORMAT = 1  # raise it when what stands in a config comes to mean another model


class QKPeftType(str, Enum):  # not StrEnum: PEFT prints the member and looks up its value
    """The types as they stand in every ``adapter_config.json``."""

    QRLORA = "QK_QRLORA"
    LORAXS = "QK_LORAXS"
    OHORA = "QK_OHORA"


@dataclass
class AdapterConfig(PeftConfig):
    """What the three configs share.

    Parameters
    ----------
    target_modules : list of str, str, or None
        Names or suffixes of names, a regular expression for full names, or ``"all-linear"``; None:
        what PEFT adapts with LoRA in this architecture.
    exclude_modules : list of str or str, optional
    layers_to_transform : int or list of int, optional
        Indices of the layers, where ``target_modules`` is a list.
    layers_pattern : str or list of str, optional
        The name of the list of layers that the indices count, such as ``"layers"``.
    rank_pattern, alpha_pattern : dict, optional
        r and alpha of layers whose names end in the key, a regular expression.
    alpha : float, optional
        The update is multiplied by alpha / r; by 1 without it.
    dropout : float
        Probability of dropping an element of the adapter's input in training.
    modules_to_save : list of str, optional
        Modules that train in full and are saved, such as a head.
    bias : str
        ``"none"``, ``"all"``, or ``"…_only"`` for the biases of the adapted layers.
    trainable_token_indices : list of int or dict, optional
        Tokens whose embeddings train, as PEFT has it.
    init_weights : bool
        False: numbers at random in place of the start that leaves the model as it was (for tests).
    save_factors : bool
        Whether a file holds the frozen factors. By default they are computed again from the base on
        loading, and compared with a few numbers in the file. Files with factors are large, and give
        the same bits on another machine. Always on where nothing can be computed again, as with
        LoRA-XS' ``basis="gradient"``.
    cache : str, optional
        Folder of factorisations, see :func:`qrlora_kernels.adapt`. Not saved, as the next two.
    progress : bool
        Show a bar over the layers while they are factorised.
    distributed : bool
        Share the start over the ranks of ``torch.distributed``.
    file_format : int, optional
        Stands in files; a newer one than this release knows is refused.

    Raises
    ------
    TypeError, ValueError
        For an option that the adapter does not take; the message names it.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    alpha: float | None = None
    dropout: float = 0.0
    modules_to_save: list[str] | None = None
    bias: str = "none"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    init_weights: bool = True
    save_factors: bool = False
    cache: str | None = None
    progress: bool = False
    distributed: bool = True
    file_format: int | None = None

    kind: ClassVar[QKPeftType]
    adapter: ClassVar[AnyAdapter]
    own: ClassVar[tuple[str, ...]]  # fields that are options of the adapter under the same name

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.kind
        form = plain_value("file_format", "int | None", self.file_format)
        if form is not None and form < 1:
            raise ValueError(f"file_format must be a positive integer, got {form}")
        if form is not None and form > FORMAT:
            raise ValueError(
                f"this adapter has file format {form}, and this release of "
                f"qrlora_kernels reads up to {FORMAT}: install a newer release"
            )
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self._check_layers()
        if self.bias not in ("none", "all") and not str(self.bias).endswith("_only"):
            raise ValueError(f"bias must be 'none', 'all' or '…_only', got {self.bias!r}")
        for name in ("init_weights", "save_factors", "progress", "distributed"):
            setattr(self, name, plain_value(name, "bool", getattr(self, name)))
        self._check_numbers()

    def _check_numbers(self) -> None:
        """Refuse here, and not when the model is there."""
        ranks = self._by_pattern("rank_pattern")
        for name, rank in {"r": self.rank_of(""), **ranks}.items():
            if rank is not None and plain_value(name, "int", rank) < 1:
                raise ValueError(f"{name} must be a positive integer, got {rank}")
        for name, alpha in {"alpha": self.alpha, **self._by_pattern("alpha_pattern")}.items():
            if alpha is not None and plain_value(name, "float", alpha) == 0.0:
                raise ValueError(f"{name} must not be 0, which would never train")
        self.save_factors |= not self.adapter.rebuildable(self.options_of(""))

    def _by_pattern(self, name: str) -> dict[str, Any]:
        """Values of the field called ``name`` by what errors call them."""
        values = getattr(self, name)
        if not isinstance(values, dict | None):
            raise TypeError(f"{name} must be a dict by regular expressions, got {values!r}")
        try:
            for key in values or {}:
                re.compile(key)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"{name} must have regular expressions as keys, got {key!r}: {error}"
            ) from None
        return {f"{name}[{key!r}]": value for key, value in (values or {}).items()}

    def _check_layers(self) -> None:
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` cannot be used when `target_modules` is a str, got "
                        f"{self.target_modules!r}"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
            )

    def to_dict(self) -> dict[str, Any]:
        """What stands in a file: without what concerns one run, and with the format."""
        values: dict[str, Any] = super().to_dict()
        for name in ("cache", "progress", "distributed"):
            del values[name]
        return values | {"file_format": FORMAT}

    @property
    def brings_factors(self) -> bool:
        """Whether this config came from a file that holds the factors."""
        return self.save_factors and self.file_format is not None

    def rank_of(self, name: str) -> int | None:
        """r that is asked for in the layer called ``name``."""
        pattern = self.rank_pattern or {}
        return pattern.get(get_pattern_key(pattern, name), self.r)

    def alpha_of(self, name: str) -> float | None:
        pattern = self.alpha_pattern or {}
        return pattern.get(get_pattern_key(pattern, name), self.alpha)

    def options_of(self, name: str, rank: int | None = None) -> Options:
        """Options of the layer called ``name``, without alpha; ``rank`` in place of its r.

        Raises
        ------
        TypeError, ValueError
            If one is out of range.
        """
        values = {option: getattr(self, option) for option in self.own}
        asked = self.rank_of(name) if rank is None else rank
        if asked is not None:
            values |= {"rank": asked, **({"tau": None} if "tau" in values else {})}
        return self.adapter.options_type(dropout=self.dropout, **values)

    def scaling_of(self, name: str, rank: int) -> float:
        """s of an update of ``rank`` in the layer called ``name``."""
        alpha = self.alpha_of(name)
        return 1.0 if alpha is None else alpha / rank


@dataclass
class QRLoraConfig(AdapterConfig):
    """QR-LoRA (arXiv 2508.21810): W + s · Q diag(λ) R̃, of which λ [r] trains.

    Parameters
    ----------
    r : int, optional
        The same rank in every layer; None: by ``tau`` and ``rank_rule``.
    tau, rank_rule, max_rank, factors
        As :meth:`qrlora_kernels.QRLinear.from_linear` takes them. With ``factors="output"`` r is
        computed at each call that computes an update apart: of several adapters at once, or where
        somebody listens to the base.
    **
        As :class:`AdapterConfig`.
    """

    r: int | None = None
    tau: float | None = None
    rank_rule: str = adapters.QR.options_type.rank_rule
    max_rank: int | None = None
    factors: str = "both"

    kind = QKPeftType.QRLORA
    adapter = adapters.QR
    own = ("tau", "rank_rule", "max_rank", "factors")

    def __post_init__(self) -> None:
        if self.r is not None and self.tau is not None:
            raise ValueError(f"r and tau exclude each other, got r={self.r} and tau={self.tau}")
        super().__post_init__()


@dataclass
class LoraXSConfig(AdapterConfig):
    """LoRA-XS (arXiv 2405.17604): W + s · U Cᵀ Σ Vᵀ, of which C [r, r] trains.

    Parameters
    ----------
    r : int
    vectors, sigma, basis, seed
        As :meth:`qrlora_kernels.LoRAXSLinear.from_linear` takes them.
    init_std : float
        Standard deviation of C at the start. 0 by default, where the model is its base at first, as
        PEFT's users expect; the paper has 1e-5. The gradient does not depend on it.
    **
        As :class:`AdapterConfig`.
    """

    r: int = 16
    vectors: str = "top"
    sigma: str = "in"
    basis: str = "svd"
    init_std: float = 0.0
    seed: int = 0

    kind = QKPeftType.LORAXS
    adapter = adapters.LoRAXS
    own = ("vectors", "sigma", "basis", "init_std", "seed")


@dataclass
class OHoraConfig(AdapterConfig):
    """OHoRA (EMNLP 2025): W + s · (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ), of which A and B train.

    Parameters
    ----------
    r : int, optional
        None: from the shape of each layer, the largest that divides both sides.
    columns, start, product, seed
        As :meth:`qrlora_kernels.OHoRALinear.from_linear` takes them.
    **
        As :class:`AdapterConfig`.
    """

    r: int | None = None
    columns: str = "leading"
    start: str = "qr"
    product: Literal["kron", "materialised", "lora"] = "kron"
    seed: int = 0

    kind = QKPeftType.OHORA
    adapter = adapters.OHoRA
    own = ("columns", "start", "product", "seed")
