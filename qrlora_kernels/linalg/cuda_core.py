"""Calls of the compiled CUDA core: matrices of one shape as one batch, each where it is."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..native import CORE, pointers, runs_on
from .jobs import CORE_DTYPES, Factors, Job, Pivots, Report, after

# Matrices and tiles of 128 columns index grid dimensions that end at 65535.
_MOST_MATRICES = 4096
_MOST_COLUMNS = 65535 * 128
# Pivots that a search with a rule makes room for at first.
_FIRST_LIMIT = 512
DEVICE_TYPE = "cuda"


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


def search(jobs: Sequence[Job], tau: float | None, report: Report) -> list[Pivots | None]:
    """Pivots of each CUDA matrix, fewer where the magnitude rule of ``tau`` stops earlier.

    None for one with NaN, Inf or overflow.
    """
    if tau is None:
        return _search(jobs, 0.0, report)
    # The rule stops most searches early; those that it does not start again with more memory.
    first = [job._replace(limit=min(job.limit, _FIRST_LIMIT)) for job in jobs]
    found = _search(first, tau, report)
    again = [
        i
        for i, (job, pivots) in enumerate(zip(jobs, found, strict=True))
        if pivots is not None and len(pivots.columns) == first[i].limit < job.limit
    ]
    more = _search([jobs[i] for i in again], tau, after(len(jobs) - len(again), report))
    for i, pivots in zip(again, more, strict=True):
        found[i] = pivots
    return found


def _search(jobs: Sequence[Job], tau: float, report: Report) -> list[Pivots | None]:
    found: dict[int, Pivots | None] = {}
    for batch in _batches(jobs, factors=False):
        bounds = batch.empty(batch.count, batch.columns, dtype=torch.float64)
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
    return [found[i] for i in range(len(jobs))]


def factors(jobs: Sequence[Job], pivots: Sequence[Tensor], report: Report) -> list[Factors]:
    """q, r and the fp64 diagonal of each CUDA matrix from its pivots, as many as its limit.

    The pivots are taken in runs that end where a column has shrunk to a hundredth; each run is made
    orthonormal by a Cholesky factorisation of its Gram matrix, twice.
    """
    made: dict[int, Factors] = {}
    for batch in _batches(jobs, factors=True):
        dtype, rows, columns = batch.jobs[0].dtype, batch.rows, batch.columns
        q = [batch.empty(rows, job.limit, dtype=dtype) for job in batch.jobs]
        r = [batch.empty(job.limit, columns, dtype=dtype) for job in batch.jobs]
        for row, member in enumerate(batch.members):
            batch.pivots[row, : jobs[member].limit] = pivots[member]
        batch.norms.zero_()  # stays 0 from a pivot on that depends on those before it
        batch.open(0.0, 0)
        batch.run(len(made), report)
        addresses = batch.addresses(q), batch.addresses(r)
        batch.core.store_factors(CORE_DTYPES[dtype], *(batch.address(t) for t in addresses))
        for row, member in enumerate(batch.members):
            made[member] = (q[row], r[row], batch.norms[row, : jobs[member].limit].clone())
        report(len(made))
    return [made[i] for i in range(len(jobs))]


@dataclass
class _Batch:
    """Matrices of one shape, stride, dtype and device, and what the core keeps of them."""

    jobs: list[Job]
    members: list[int]  # their places in the caller's list
    factors: bool
    core: Any = None

    def __post_init__(self) -> None:
        assert CORE is not None
        self.count, self.capacity = len(self.jobs), max(job.limit for job in self.jobs)
        self.rows, self.columns = self.jobs[0].weight.shape
        self.device = self.jobs[0].weight.device
        self.states = torch.zeros(self.count, CORE.cuda_pivot_state_words, dtype=torch.int64)
        self.states[:, 3] = torch.tensor([job.limit for job in self.jobs])
        self.states = self.states.to(self.device)
        self.pivots = self.empty(self.count, self.capacity, dtype=torch.int64)
        self.norms = self.empty(self.count, self.capacity, dtype=torch.float64)

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
        self.core = _core(self.jobs[0].weight, self.count, self.capacity, tau, self.factors)
        self.workspace = self.empty(self.core.workspace_bytes(), dtype=torch.uint8)
        self.matrices = self.addresses([job.weight for job in self.jobs])
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
        for _ in range((self.capacity + self.columns) * (self.columns // 128 + 3)):
            left = self.core.round()
            if left == 0:
                return
            report(before + self.count - left)
        raise RuntimeError(f"the CUDA core does not end on {self.count} matrices")


def _batches(jobs: Sequence[Job], *, factors: bool) -> Iterator[_Batch]:
    """Batches of matrices that differ in nothing but their values, as many as memory allows."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, (_, weight, _, dtype) in enumerate(jobs):
        key = (
            weight.device,
            weight.dtype,
            weight.shape,
            weight.stride(),
            dtype if factors else None,
        )
        groups[key].append(i)
    for members in groups.values():
        first, capacity = jobs[members[0]].weight, max(jobs[i].limit for i in members)
        one = _core(first, 1, capacity, 0.0, factors).workspace_bytes()
        most = max(1, min(_free_bytes(first.device) // 4 // one, _MOST_MATRICES))
        for start in range(0, len(members), most):
            part = members[start : start + most]
            yield _Batch([jobs[i] for i in part], part, factors)


def _core(weight: Tensor, count: int, capacity: int, tau: float, factors: bool) -> Any:
    assert CORE is not None
    on_gpu = weight.device.type == "cuda"
    return CORE.CudaPivots(
        dtype=CORE_DTYPES[weight.dtype],
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
