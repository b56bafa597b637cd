"""Who computes a step: thin, interchangeable modules that do as ``dispatch`` tells them.

Every backend module offers some of ``{low_rank, kron, linear_add}_{fwd, bwd}(operands, recipe)`` on
checked records of operands, and ``supports(problem)``, which lists its recipes, best first, or says
why there is none. The names here are those of the one chooser.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..dispatch.chooser import BACKENDS, choose, last_choice, report, use_backend
    from ..dispatch.problem import Choice, Problem

__all__ = ["BACKENDS", "Choice", "Problem", "choose", "last_choice", "report", "use_backend"]


def __getattr__(name: str) -> Any:
    """The public names, which live in ``dispatch``: what is above may not be imported first."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ..dispatch import chooser, problem

    return getattr(problem if name in ("Choice", "Problem") else chooser, name)
