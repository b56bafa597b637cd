"""Placeholder until the composition of library products lands."""

from .chooser import Problem


def available() -> tuple[bool, str]:
    return False, "not written yet"


def supports(problem: Problem) -> tuple[bool, str]:
    return False, "not written yet"
