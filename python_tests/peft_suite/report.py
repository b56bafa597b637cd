"""What passed, what was skipped and why, by method."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping

import pytest

from .rows import Method


class Tally:
    """Counts the outcomes of pytest's tests and prints them as tables."""

    def __init__(self, method_of: Mapping[str, Method]) -> None:
        self._method_of = method_of
        self._outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self._reasons: dict[str, Counter[str]] = defaultdict(Counter)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            name = self._method_of[report.nodeid].name
            self._outcomes[name][report.outcome] += 1
            if report.skipped:
                self._reasons[_reason(report)][name] += 1

    def __str__(self) -> str:
        names = list(self._outcomes)
        width = max([len(name) for name in names] + [8])
        lines = [f"{'':{width}}  {'pass':>6}{'skip':>6}{'fail':>6}  share of skips"]
        for name, counts in self._outcomes.items():
            passed, skipped, failed = (counts[o] for o in ("passed", "skipped", "failed"))
            share = skipped / max(1, counts.total())
            lines.append(f"{name:{width}}  {passed:6}{skipped:6}{failed:6}  {share:.1%}")
        lines += ["", "skipped by PEFT's tests, and why", "".join(f"{n:>{width + 2}}" for n in names)]
        for reason, by_name in sorted(self._reasons.items(), key=lambda r: -r[1].total()):
            lines.append("".join(f"{by_name[n]:{width + 2}}" for n in names) + f"  {reason}")
        return "\n".join(lines)


def _reason(report: pytest.TestReport) -> str:
    """The reason that a test gave, without the config and the model that it names."""
    assert isinstance(report.longrepr, tuple)
    reason = report.longrepr[2].removeprefix("Skipped: ")
    reason = re.sub(r"<class '[^']*'>", "this config", reason)
    reason = re.sub(r"[\w-]+/tiny-[\w.-]+", "this model", reason)
    return re.sub(r"\b\w+config\b", "this config", reason)
