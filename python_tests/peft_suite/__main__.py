"""Run the suite and print its tables; the exit status is 1 if a test fails or none was run."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

# Before a library looks: nothing is asked of the hub, and threads gain nothing on toys.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from .folder import unpack_tests
from .models import write_models
from .plugin import Suite
from .report import Tally
from .rows import METHODS, YARDSTICK

SHORT = ("custom_models", "decoder_models")
FULL = (
    *SHORT,
    "encoder_decoder_models",
    "seq_classifier",
    "feature_extraction_models",
    "token_classification_qa",
    "config",
    "other",
    "trainable_tokens",
)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m python_tests.peft_suite", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a part: two minutes on two cores")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    arguments = parser.parse_args()
    methods = METHODS if arguments.short else (*METHODS, YARDSTICK)
    suite = Suite(methods, arguments.short)
    tally = Tally(suite.method_of)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            unpack_tests(folder)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        write_models(folder)
        os.chdir(folder)
        sys.path.insert(0, name)
        files = [f"tests/test_{file}.py" for file in (SHORT if arguments.short else FULL)]
        options = ["-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "--disable-warnings"]
        status = pytest.main([*options, *arguments.pytest, *files], plugins=[suite, tally])
    print(f"\n{tally}")
    return int(status != pytest.ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
