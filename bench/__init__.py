"""Benchmarks against naive code, PEFT, LyCORIS and LAPACK: ``python -m bench --help``."""
