"""The reference keeps the contract that it is the fallback of, in every gate, form and dtype."""

from __future__ import annotations

from backend_contract import Contract

from qrlora_kernels.backends import reference


class TestReference(Contract):
    backend = reference
    large = ()  # its large products are the library's
