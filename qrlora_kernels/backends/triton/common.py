"""What the Triton kernels share: tile access, the dot, and the host side of a launch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...native import pointers
from .tables import Chip

# The interpreter keeps bf16 as raw uint16 bits, so a dot on them is garbage, and it truncates when
# it narrows to bf16. Under it, and only then, dots widen first and outputs are narrowed by torch.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def load_tile(
    src,
    row,
    col,
    rows,
    cols,
    stride_row,
    stride_col,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
    TMA: tl.constexpr,
):
    """Tile [BLOCK_ROW, BLOCK_COL] at (row, col), zero outside; src: descriptor or pointer."""
    if TMA:
        tile = src.load([row, col])
    else:
        r = row + tl.arange(0, BLOCK_ROW)
        c = col + tl.arange(0, BLOCK_COL)
        # int64 before the product: a tensor may hold more than 2**31 elements.
        offsets = r.to(tl.int64)[:, None] * stride_row + c.to(tl.int64)[None, :] * stride_col
        tile = tl.load(src + offsets, mask=(r < rows)[:, None] & (c < cols)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(
    dst,
    tile,
    row,
    col,
    rows,
    cols,
    stride_row,
    stride_col,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
    TMA: tl.constexpr,
):
    """Write a tile at (row, col), cut at the edges; dst: descriptor or pointer."""
    if TMA:
        dst.store([row, col], tile.to(dst.dtype))
    else:
        r = row + tl.arange(0, BLOCK_ROW)
        c = col + tl.arange(0, BLOCK_COL)
        offsets = r.to(tl.int64)[:, None] * stride_row + c.to(tl.int64)[None, :] * stride_col
        mask = (r < rows)[:, None] & (c < cols)[None, :]
        tl.store(dst + offsets, tile.to(dst.dtype.element_ty), mask=mask)


@triton.jit
def load_reduced(
    src,
    out,
    red,
    outs,
    reds,
    stride_out,
    stride_red,
    BLOCK_OUT: tl.constexpr,
    BLOCK_RED: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Right operand [BLOCK_RED, BLOCK_OUT] of a dot, whichever of its two dimensions is a row."""
    if OUT_ROWS:
        tile = load_tile(
            src, out, red, outs, reds, stride_out, stride_red, BLOCK_OUT, BLOCK_RED, TMA
        ).T
    else:
        tile = load_tile(
            src, red, out, reds, outs, stride_red, stride_out, BLOCK_RED, BLOCK_OUT, TMA
        )
    return tile


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(tile, DTYPE: tl.constexpr):
    """The tile as a dot's operand of DTYPE; the interpreter would truncate instead of rounding."""
    if INTERPRETED:
        return tile.to(tl.float32)
    else:
        return tile.to(DTYPE)


@cache
def _cuda_chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    return Chip(
        capability=properties.major * 10 + properties.minor,
        multiprocessors=properties.multi_processor_count,
        # The type stubs do not know it.
        shared=getattr(properties, "shared_memory_per_block_optin"),  # noqa: B009
    )


def chip_of(device: torch.device) -> Chip:
    """The chip that ``device`` is; under the interpreter a small one without TMA."""
    if device.type == "cuda":
        return _cuda_chip(torch.cuda.current_device() if device.index is None else device.index)
    return Chip(capability=80, multiprocessors=4, shared=99 * 1024)


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **meta: Any) -> None:
    """Run ``kernel`` on ``device`` and its current stream, on a one-dimensional grid.

    One dimension, because y and z end at 65535 programs. Triton launches on the current device,
    which need not be the tensors'. A grid of none, which CUDA refuses, is no work.
    """
    if programs == 0:
        return
    guard: AbstractContextManager[Any] = (
        torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    )
    with guard:
        kernel[(programs,)](*args, enable_fp_fusion=True, **meta)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a kernel's output; ``.to(dtype)`` after the launch is free on a GPU."""
    if INTERPRETED.value and dtype == torch.bfloat16:
        dtype = torch.float32
    return torch.empty(shape, dtype=dtype, device=device)


def empty_rows(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised [rows, cols] whose rows start on 16 bytes, as a tensor descriptor needs."""
    return empty((rows, -(-cols // 16) * 16), dtype, device)[:, :cols]


def tl_dtype(dtype: torch.dtype) -> tl.dtype:
    """The Triton name of a supported element type."""
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[
        dtype
    ]


def precision_of(dtype: torch.dtype) -> str:
    """float32 stays float32 as in torch.matmul's default; TF32 would lose 13 bits unasked."""
    return "ieee" if dtype == torch.float32 else "tf32"


def tma_ready(chip: Chip, *tensors: Tensor) -> bool:
    """Whether each 2-D tensor suits a tensor descriptor: half precision (descriptors feed tensor
    cores), unit columns, rows on 16 bytes."""
    return chip.has_tma and all(
        t.numel() > 0
        and t.element_size() == 2
        and t.stride(1) == 1
        and t.stride(0) >= t.shape[1]
        and t.stride(0) * t.element_size() % 16 == 0
        and pointers.is_aligned(t, 16)
        for t in tensors
    )


def tile_source(tensor: Tensor, block: tuple[int, ...], tma: bool) -> Any:
    """What ``load_tile`` reads from: a descriptor over ``tensor``, or the tensor's pointer."""
    return TensorDescriptor.from_tensor(tensor, list(block)) if tma else tensor


def rows_are_out(operand: Tensor) -> bool:
    """Whether a logical [out, reduction] operand has its reduction contiguous in memory."""
    return operand.stride(1) == 1 or operand.stride(0) != 1
