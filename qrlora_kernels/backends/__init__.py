"""Who computes an operation: thin, interchangeable modules, and one chooser between them.

Every backend module offers some of ``{qr_linear, lora_xs_linear, kron_linear}_{fwd, bwd}`` on
checked 2-D operands, with the signatures of ``reference.py``, plus
``supports(problem) -> (ok, reason)``.
"""

from .chooser import BACKENDS, choose, last_choice, report, use_backend
from .problem import Choice, Problem

__all__ = ["BACKENDS", "Choice", "Problem", "choose", "last_choice", "report", "use_backend"]
