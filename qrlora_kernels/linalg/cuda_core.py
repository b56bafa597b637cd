"""Calls of the compiled CUDA core: matrices of one shape as one batch, each where it is."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..native import CORE, pointers, runs_on
from .blocked import Pivots

# As enum DType of csrc/include/qrlora/dtype.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Matrices and tiles of 128 columns index grid dimensions that end at 65535.
_MOST_MATRICES = 4096
_MOST_COLUMNS = 65535 * 128
# Pivots that a search with a rule makes room for at first.
_FIRST_LIMIT = 512
DEVICE_TYPE = "cuda"

Report = Callable[[int], None]
Factors = tuple[Tensor, Tensor, Tensor]


def available() -> tuple[bool, str]:
    """Whether there is a CUDA core, and in a few words why not; asks no device."""
    if os.environ.get("QRLORA_CUDA_PIVOTED_QR") == "0":
        return False, "QRLORA_CUDA_PIVOTED_QR=0"
    if CORE is None or not hasattr(CORE, "CudaPivots"):
        return False, "the native core has no CUDA part"
    return True, "CUDA core"


def handles(weight: Tensor, rule: str | None = None) -> tuple[bool, str]:
    """Whether the core takes the matrix and stops by ``rule``, and in a few words why not."""
    if weight.device.type != DEVICE_TYPE:
        return False, f"the matrix is on {weight.device.type}"
    if weight.shape[1] > _MOST_COLUMNS:
        return False, f"more than {_MOST_COLUMNS} columns"
    if rule not in (None, "magnitude"):
        return False, f"the {rule} rule's bracket is found by the torch operations alone"
    there, reason = available()
    if there and weight.is_cuda and not (built := runs_on(weight.device))[0]:
        return built
    return there, reason


def search(
    weights: Sequence[Tensor], limits: Sequence[int], tau: float | None, report: Report
) -> list[Pivots | None]:
    """Pivots of each CUDA matrix; None for one with NaN, Inf or overflow.

    Parameters
    ----------
    limits : sequence of int
        Most pivots of each matrix.
    tau : float or None
        The magnitude rule's, which may stop earlier.
    report : callable
        Called with the number of matrices done; an exception from it ends the search.
    """
    if tau is None:
        return _search(weights, limits, 0.0, report)
    # The rule stops most searches early; those that it does not start again with more memory.
    first = [min(limit, _FIRST_LIMIT) for limit in limits]
    found = _search(weights, first, tau, report)
    again = [
        i
        for i, pivots in enumerate(found)
        if pivots is not None and len(pivots.columns) == first[i] < limits[i]
    ]
    if again:
        before = len(weights) - len(again)
        more = _search(
            [weights[i] for i in again],
            [limits[i] for i in again],
            tau,
            lambda done: report(before + done),
        )
        for i, pivots in zip(again, more, strict=True):
            found[i] = pivots
    return found


def _search(
    weights: Sequence[Tensor], limits: Sequence[int], tau: float, report: Report
) -> list[Pivots | None]:
    found: dict[int, Pivots | None] = {}
    for batch in _batches(weights, limits, factors=False):
        columns = weights[batch.members[0]].shape[1]
        bounds = batch.empty(batch.count, columns, dtype=torch.float64)
        batch.open(tau, batch.address(bounds))
        batch.core.start()
        batch.run(len(found), report)
        batch.core.store_bounds()
        taken, deficient, infinite, _ = batch.states[:, :4].T.tolist()
        for row, member in enumerate(batch.members):
            count = taken[row]
            pivots = Pivots(
                batch.pivots[row, :count].clone(),
                batch.norms[row, :count],
                bounds[row],
                bool(deficient[row]),
            )
            found[member] = None if infinite[row] else pivots
        report(len(found))
    return [found[i] for i in range(len(weights))]


def factors(
    weights: Sequence[Tensor],
    pivots: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    report: Report,
) -> list[Factors]:
    """q [N, r], r [r, K] and the fp64 diagonal [r] of each CUDA matrix from its pivots.

    The pivots are taken in runs that end where a column has shrunk to a hundredth; each run is made
    orthonormal by a Cholesky factorisation of its Gram matrix, twice.
    """
    made: dict[int, Factors] = {}
    limits = [len(chosen) for chosen in pivots]
    for batch in _batches(weights, limits, factors=True, dtypes=dtypes):
        out_dtype = dtypes[batch.members[0]]
        shapes = [(*weights[i].shape, limits[i]) for i in batch.members]
        q = [batch.empty(rows, count, dtype=out_dtype) for rows, _, count in shapes]
        r = [batch.empty(count, columns, dtype=out_dtype) for _, columns, count in shapes]
        for row, member in enumerate(batch.members):
            batch.pivots[row, : limits[member]] = pivots[member]
        batch.norms.zero_()  # stays 0 from a pivot on that depends on those before it
        batch.open(0.0, 0)
        batch.run(len(made), report)
        addresses = batch.addresses(q), batch.addresses(r)
        batch.core.store_factors(_DTYPES[out_dtype], *(batch.address(t) for t in addresses))
        for row, member in enumerate(batch.members):
            made[member] = (q[row], r[row], batch.norms[row, : limits[member]].clone())
        report(len(made))
    return [made[i] for i in range(len(weights))]


@dataclass
class _Batch:
    """Matrices of one shape, stride, dtype and device, and what the core keeps of them."""

    weights: list[Tensor]
    members: list[int]  # their places in the caller's list
    limits: list[int]
    factors: bool
    core: Any = None

    def __post_init__(self) -> None:
        assert CORE is not None
        words = CORE.cuda_pivot_state_words
        self.states = torch.zeros(self.count, words, dtype=torch.int64)
        self.states[:, 3] = torch.tensor(self.limits)
        self.states = self.states.to(self.device)
        self.pivots = self.empty(self.count, max(self.limits), dtype=torch.int64)
        self.norms = self.empty(self.count, max(self.limits), dtype=torch.float64)

    @property
    def count(self) -> int:
        return len(self.weights)

    @property
    def device(self) -> torch.device:
        return self.weights[0].device

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def address(self, tensor: Tensor) -> int:
        return pointers.address(tensor, device=self.device)

    def addresses(self, tensors: Sequence[Tensor]) -> Tensor:
        """As an array on the device."""
        found = [self.address(tensor) for tensor in tensors]
        return torch.tensor(found, dtype=torch.int64).to(self.device)

    def open(self, tau: float, bounds: int) -> None:
        """Give the core its arrays on the current stream."""
        self.core = _core(self.weights[0], self.count, max(self.limits), tau, self.factors)
        self.workspace = self.empty(self.core.workspace_bytes(), dtype=torch.uint8)
        self.matrices = self.addresses(self.weights)
        self.core.bind(
            matrices=self.address(self.matrices),
            states=self.address(self.states),
            pivots=self.address(self.pivots),
            norms=self.address(self.norms),
            bounds=bounds,
            workspace=self.address(self.workspace),
        )

    def run(self, before: int, report: Report) -> None:
        """Rounds until no matrix is left; ``before`` matrices of the list were done earlier.

        A round takes a pivot or drops candidates, unless it is one of a refresh of all bounds.
        """
        columns = self.weights[0].shape[1]
        for _ in range((max(self.limits) + columns) * (columns // 128 + 3)):
            left = self.core.round()
            if left == 0:
                return
            report(before + self.count - left)
        raise RuntimeError(f"the CUDA core does not end on {self.count} matrices")


def _batches(
    weights: Sequence[Tensor],
    limits: Sequence[int],
    *,
    factors: bool,
    dtypes: Sequence[torch.dtype] | None = None,
) -> Iterator[_Batch]:
    """Batches of matrices that differ in nothing but their values, as many as memory allows."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, weight in enumerate(weights):
        out_dtype = None if dtypes is None else dtypes[i]
        key = (weight.device, weight.dtype, weight.shape, weight.stride(), out_dtype)
        groups[key].append(i)
    for members in groups.values():
        first, capacity = weights[members[0]], max(limits[i] for i in members)
        one = _core(first, 1, capacity, 0.0, factors).workspace_bytes()
        most = max(1, min(_free_bytes(first.device) // 4 // one, _MOST_MATRICES))
        for start in range(0, len(members), most):
            part = members[start : start + most]
            yield _Batch([weights[i] for i in part], part, [limits[i] for i in part], factors)


def _core(weight: Tensor, count: int, capacity: int, tau: float, factors: bool) -> Any:
    assert CORE is not None
    on_gpu = weight.device.type == "cuda"
    return CORE.CudaPivots(
        dtype=_DTYPES[weight.dtype],
        count=count,
        rows=weight.shape[0],
        columns=weight.shape[1],
        row_stride=weight.stride(0),
        column_stride=weight.stride(1),
        capacity=capacity,
        tau=tau,
        factors=factors,
        device=weight.device.index if on_gpu else 0,
        stream=torch.cuda.current_stream(weight.device).cuda_stream if on_gpu else 0,
    )


def _free_bytes(device: torch.device) -> int:
    """Memory that the workspace may be a part of: the driver's, and what torch keeps for reuse."""
    if device.type != "cuda":
        return 8 << 30
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + reserved
