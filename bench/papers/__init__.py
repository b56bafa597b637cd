"""The tables and figures of the three papers, in kind, on a small model: ``make papers``."""
