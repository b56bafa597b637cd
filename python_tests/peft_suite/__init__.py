"""PEFT's own generic tests, run for this package's configs: ``python -m python_tests.peft_suite``.

The tests come with the source distribution of the installed PEFT, downloaded once with pip; none of
them is copied here. A plugin of pytest replaces the rows that they are parametrised with by ours
(`rows`), random models of a few thousand parameters stand in folders called like the hub's
(`models`), and a table says what passed, what was skipped and why (`report`). Nothing is asked of
the network but the distribution.
"""
