"""Starts of the adapters: pivoted QR, truncated SVD, Kronecker factors."""

from .cache import cached_start
from .distributed import StartRunner, distributed_start
from .kron import KronFactors, effective_rank, high_rank, kron_factors
from .pivoted_qr import PivotedQR, pivoted_qr, rebuild_pivoted_qr
from .profile import RankProfile, rank_profile
from .rules import (
    RANK_RULES,
    RankRule,
    abs_sum_rank,
    check_rank_options,
    energy_rank,
    magnitude_rank,
    rank_bracket,
    rank_from_diagonal,
)
from .svd import TruncatedSVD, truncated_svd

__all__ = [
    "RANK_RULES",
    "KronFactors",
    "PivotedQR",
    "RankProfile",
    "RankRule",
    "StartRunner",
    "TruncatedSVD",
    "abs_sum_rank",
    "cached_start",
    "check_rank_options",
    "distributed_start",
    "effective_rank",
    "energy_rank",
    "high_rank",
    "kron_factors",
    "magnitude_rank",
    "pivoted_qr",
    "rank_bracket",
    "rank_from_diagonal",
    "rank_profile",
    "rebuild_pivoted_qr",
    "truncated_svd",
]
