"""Kinds of quantised weights: what each holds, and the dense weight [N, K] that it stands for."""

from __future__ import annotations

from inspect import signature
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fingerprint import digest_of, quick_digest


class Quantised:
    """One weight [N, K] in few bits, and what its layer keeps of it."""

    weight: Any
    keeps_dtype: ClassVar[bool] = False  # whether the library's product comes in the dtype of x

    def __init__(self, weight: Any, layer: nn.Module | None = None) -> None:
        self.weight, self.layer = weight, layer

    @property
    def kind(self) -> str:
        """What files and errors call it."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        shape: torch.Size = self.weight.shape
        return shape

    @property
    def dtype(self) -> torch.dtype:
        """That of the weight it stands for, which a start takes."""
        raise NotImplementedError

    def unready(self) -> str:
        """Why an adapter cannot take it over; empty if it can."""
        return ""

    def parts(self) -> dict[str, Tensor]:
        """The tensors that it consists of, by name."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight it stands for [N, K], as the library's own product takes it in ``dtype``."""
        raise NotImplementedError

    def multiplies_in(self, x: Tensor) -> torch.dtype:
        """The dtype of the library's own product with ``x``."""
        return x.dtype

    def recast(self, own: torch.dtype, dtype: torch.dtype) -> Tensor:
        """:meth:`dense` in ``own``, as autocast casts it to ``dtype`` in the library's product."""
        return self.dense(own).to(dtype)

    def fingerprint(self) -> str:
        """Hexadecimal digest of the parts, for files."""
        return digest_of(self.parts(), self._outline())

    def digest(self) -> str:
        """The same in a fraction of the time, for comparisons in one process."""
        parts = (f"{name} {quick_digest(part)}" for name, part in self.parts().items())
        return " ".join((self._outline(), *parts))

    def _outline(self) -> str:
        return f"{self.kind} {list(self.shape)}"

    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts().values())

    def in_state(self) -> dict[str, Tensor]:
        """What its layer's state dict has of it, by key."""
        raise NotImplementedError

    def is_in_state(self, tensor: Tensor, key: str) -> bool:
        """Whether ``tensor`` in a state dict has the bits that are here."""
        return quick_digest(self.in_state()[key]) == quick_digest(tensor.as_subclass(Tensor))


class FourBit(Quantised):
    """``Params4bit`` of bitsandbytes: nf4 or fp4 codes and a scale for every few of them."""

    keeps_dtype = True

    @property
    def kind(self) -> str:
        return f"{self.weight.quant_type} (bitsandbytes)"

    @property
    def shape(self) -> torch.Size:
        state = getattr(self.weight, "quant_state", None)
        return self.weight.shape if state is None else torch.Size(state.shape)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.weight.quant_state.dtype
        return dtype

    def unready(self) -> str:
        if self.weight.quant_state is None:
            return "one that is quantised when the layer is moved to its device: move it first"
        if self._repacked():
            return (
                "one that bitsandbytes has repacked for a product on the CPU, which rounds its "
                "scales for good, at a call in eval mode without gradients: load the model again "
                "and adapt it before any such call"
            )
        return ""

    def _repacked(self) -> bool:
        return bool(getattr(self.weight.quant_state, "packing_format_for_cpu", False))

    def parts(self) -> dict[str, Tensor]:
        state = getattr(self.weight, "quant_state", None)  # which a detached one has lost
        if state is None:
            return {"": self.weight.data}
        found = {"": self.weight.data, "absmax": state.absmax, "quant_map": state.code}
        if state.nested:
            of = state.state2
            found |= {"nested_absmax": of.absmax, "nested_quant_map": of.code}
            found |= {"nested_offset": state.offset}
        return found

    def _outline(self) -> str:
        state = self.weight.quant_state
        return f"{super()._outline()} in blocks of {state.blocksize}, {state.dtype}"

    def in_state(self) -> dict[str, Tensor]:
        others = self.weight.quant_state.as_dict(packed=True)
        return {"weight": self.weight.data} | {f"weight.{key}": t for key, t in others.items()}

    def dense(self, dtype: torch.dtype) -> Tensor:
        if self._repacked():
            raise ValueError(f"weight must be as it was quantised, got {self.unready()}")
        state, ops = self.weight.quant_state, torch.ops.bitsandbytes
        scales = state.absmax
        if state.nested:  # themselves quantised
            of = state.state2
            scales = ops.dequantize_blockwise(
                scales, of.absmax, of.code, of.blocksize, torch.float32
            )
            scales = scales + state.offset
        dense: Tensor = ops.dequantize_4bit(
            self.weight.data,
            scales,
            state.blocksize,
            state.quant_type,
            list(state.shape),
            torch.float32 if dtype == torch.float64 else dtype,
        )
        return dense.to(dtype)

    def multiplies_in(self, x: Tensor) -> torch.dtype:
        layer = cast(Any, self.layer)
        if not layer.compute_type_is_set:  # as its own forward does at its first call
            layer.set_compute_type(x)
            layer.compute_type_is_set = True
        return layer.compute_dtype or x.dtype


class EightBit(Quantised):
    """``Int8Params`` of bitsandbytes: int8 codes, and a scale for every row of W."""

    kind = "int8 (bitsandbytes)"
    dtype = torch.float32  # it does not know what it was made of

    def unready(self) -> str:
        if self.weight.has_fp16_weights:
            return "has_fp16_weights=True, which quantises anew at every call"
        if self.weight.dtype != torch.int8:
            return "one that is quantised when the layer is moved to its device: move it first"
        return ""

    def _scales(self) -> Tensor | None:
        scales: Tensor | None = getattr(self.weight, "SCB", None)
        if scales is None and self.layer is not None:  # the library's first forward moved them
            scales = cast(Any, self.layer).state.SCB
        return scales

    def parts(self) -> dict[str, Tensor]:
        scales = self._scales()
        return {"": self.weight.data} if scales is None else {"": self.weight.data, "SCB": scales}

    def in_state(self) -> dict[str, Tensor]:
        return {name or "weight": part for name, part in self.parts().items()}

    def dense(self, dtype: torch.dtype) -> Tensor:
        scales = self._scales()
        assert scales is not None
        scales = scales.to(self.weight.device)  # which a move of the model leaves where they are
        return self.weight.data.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))


class TorchAO(Quantised):
    """A weight of torchao: a tensor of its own class, which tells what it is made of."""

    @property
    def kind(self) -> str:
        held = getattr(self.weight, "target_dtype", self.parts()["qdata"].dtype)
        name = type(self.weight).__name__
        return f"{name} of {held} for {self.weight.dtype} (torchao)".replace("torch.", "")

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.weight.dtype
        return dtype

    def unready(self) -> str:
        of_x = ("act_quant_kwargs", "activation_quantization", "act_pre_scale")
        if any(getattr(self.weight, name, None) is not None for name in of_x):
            return "one whose product changes x too (dynamic quantisation, scaled activations)"
        if "qdata" not in self.parts():
            return f"a {type(self.weight).__name__}, whose parts are not known here"
        return ""

    def parts(self) -> dict[str, Tensor]:
        names, _ = self.weight.__tensor_flatten__()
        return {name: getattr(self.weight, name) for name in names}

    def in_state(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def is_in_state(self, tensor: Tensor, key: str) -> bool:
        same = type(tensor) is type(self.weight)
        return same and TorchAO(tensor).digest() == self.digest()

    def recast(self, own: torch.dtype, dtype: torch.dtype) -> Tensor:
        return self.dense(dtype)  # it is in the dtype of x at no time

    def dense(self, dtype: torch.dtype) -> Tensor:
        dense: Tensor
        kind = type(self.weight)
        if kind.dequantize is Tensor.dequantize:  # it has none: what its product does to unity
            unity = torch.eye(self.shape[1], dtype=self.dtype, device=self.weight.device)
            dense = F.linear(unity, self.weight.detach()).t().contiguous()
        elif "output_dtype" in signature(kind.dequantize).parameters:
            dense = self.weight.dequantize(torch.float32 if dtype == torch.float64 else dtype)
        else:
            dense = self.weight.dequantize()
        return dense.to(dtype)
