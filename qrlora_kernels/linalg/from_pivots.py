"""From pivots to factors, where the search for the pivots has not made them already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpu_core, cuda_core
from .jobs import Factors, Job, Report, after
from .products import project, work_dtype


def from_pivots(jobs: Sequence[Job], pivots: Sequence[Tensor], report: Report) -> list[Factors]:
    """(q, r, diagonal) of each matrix, a function of the matrix and the pivots alone.

    On the CPU the pivots are searched again, because a search with their number as its limit makes
    the very factors that the first one did or would have made; pivots that it does not confirm are
    taken as they are.
    """
    jobs = [job._replace(limit=len(own)) for job, own in zip(jobs, pivots, strict=True)]
    on_gpu = [i for i, job in enumerate(jobs) if cuda_core.handles(job.weight)[0]]
    results = cuda_core.factors([jobs[i] for i in on_gpu], [pivots[i] for i in on_gpu], report)
    made = dict(zip(on_gpu, results, strict=True))
    native = [i for i, job in enumerate(jobs) if i not in made and cpu_core.handles(job.weight)]
    found = cpu_core.search([jobs[i] for i in native], after(len(made), report))
    for i, (again, factors) in zip(native, found, strict=True):
        if again is not None and factors and torch.equal(again.columns, pivots[i]):
            made[i] = factors
    for i, job in enumerate(jobs):
        if i not in made:
            made[i] = by_householder(job.weight, pivots[i], job.dtype)
            report(len(made))
    return [made[i] for i in range(len(jobs))]


def by_householder(weight: Tensor, pivots: Tensor, dtype: torch.dtype) -> Factors:
    """Factors in ``dtype`` by torch operations, where no native core has them.

    Householder QR in fp64 of the pivot columns, signs chosen so that the diagonal is positive,
    then one pass Qᵀ W (fp64 for an fp64 weight, fp32 otherwise). The block at the pivots is the
    exact triangle: r[j, pivots[i]] is 0 for j > i and the diagonal for j = i.
    """
    q, triangle = torch.linalg.qr(weight[:, pivots].double())
    sign = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(q)
    q *= sign
    triangle *= sign[:, None]
    r = project(q.to(work_dtype(weight)), weight).to(dtype)
    r[:, pivots] = triangle.to(dtype)
    return q.to(dtype).contiguous(), r, triangle.diagonal().clone()
