"""What ``adapt`` accepts can be saved and loaded; everything else is refused when it is given."""

from __future__ import annotations

import enum
import functools
from decimal import Decimal
from fractions import Fraction

import helpers
import numpy as np
import pytest
import saved
import torch
from saved import moved, refusal, x
from torch import nn

import qrlora_kernels as qk


class Name(str, enum.Enum):
    """Strings as members, as configurations have them."""

    TOP = "top"
    IN = "in"
    QR = "qr"
    KRON = "kron"
    MAGNITUDE = "magnitude"
    SELECTED = "selected"


class Four(enum.IntEnum):
    FOUR = 4


class Plain(enum.Enum):
    FOUR = 4


NUMBERS = [
    *(0, 4, -1, 0.1, 0.5, 1.0, -0.0, 1e-320, 1e39, 1e308, 10**30, 10**400, -(10**400)),
    *(2**63, 2**64, -(2**63), -(2**63) - 1, True, False, None, 1j),
    *(float("nan"), float("inf"), -float("inf"), Fraction(1, 3), Fraction(4), Fraction(10**400)),
    *(Decimal("0.1"), Decimal("NaN"), Four.FOUR, Plain.FOUR),
    *(np.float16(0.1), np.float32(0.1), np.float64(0.1), np.longdouble(0.1), np.float32("inf")),
    *(np.int8(4), np.int64(4), np.uint64(2**64 - 1), np.bool_(True), np.complex64(1)),
    *(np.array(0.1), np.array(4), np.array([0.1]), np.array([4]), np.datetime64("2026-01-01")),
    *(torch.tensor(0.1), torch.tensor(4), torch.tensor([4]), torch.tensor(True)),
    *(torch.tensor(0.1, dtype=torch.bfloat16), torch.tensor(0.5, dtype=torch.float16)),
    *(torch.tensor(0.5, requires_grad=True), torch.tensor(0.5, device="meta"), torch.tensor(1j)),
    *("0.1", "", b"4", [4], (4,), {}, object(), torch.float32, abs),
]
STRINGS = [
    *(
        *Name,
        "both",
        "output",
        "top",
        "in",
        "qr",
        "kron",
        "magnitude",
        "selected",
        "energy",
        "svd",
        "random",
    ),
    *("lora", "materialised", np.str_("top"), np.str_("in"), np.array("top"), "nan", "\ud800"),
    *(b"top", ["top"], None, 0, True, Plain.FOUR),
]
# The options of each adapter, and what else is needed for them to matter in a small layer.
OPTIONS = {
    "qr": {
        **{name: {} for name in ("rank", "tau", "max_rank", "scaling", "dropout", "rank_rule")},
        "factors": {"rank": 4},
    },
    "lora_xs": {
        **{name: {"rank": 4} for name in ("alpha", "init_std", "dropout", "vectors", "sigma")},
        "basis": {"rank": 4},
        "seed": {"rank": 4, "basis": "random"},
        "rank": {},
    },
    "ohora": {
        **{n: {"columns": "selected"} for n in ("rank", "alpha", "dropout", "start", "product")},
        "fold": {"columns": "selected"},
        "seed": {"columns": "selected", "start": "kaiming"},
        "columns": {},
    },
}
EACH = [(adapter, name) for adapter, names in OPTIONS.items() for name in names]


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)).eval()


@pytest.mark.parametrize(("adapter", "name"), EACH)
def test_an_option_is_refused_at_once_or_comes_back_from_the_file(adapter, name, tmp_path):
    """``np.float32`` dropout and ``np.int64`` seed trained, and then were "not serializable"."""
    path, taken = tmp_path / "a.safetensors", 0
    for value in [*NUMBERS, *STRINGS]:
        model, options = base(), OPTIONS[adapter][name] | {name: value}
        adapt = functools.partial(qk.adapt, model, ["0"], adapter, progress=False, **options)
        said = refusal(adapt)
        if said:
            assert name in said, value
            assert type(model[0]) is nn.Linear
            continue
        taken += 1
        kinds = {type(one) for one in model[0].options.to_dict().values()}
        assert kinds <= {int, float, str, bool, type(None)}, (value, kinds)
        qk.save_adapter(model, path)
        fresh = qk.load_adapter(base(), path)
        assert fresh[0].options == model[0].options, value
        assert helpers.same_bits(fresh(x()), model(x())), value
        assert fresh(x()).isfinite().all(), value
    assert taken


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float32(0.25), 0.25),
        (torch.tensor(0.25, dtype=torch.bfloat16), 0.25),
        (np.array(0.25), 0.25),
        (Fraction(1, 4), 0.25),
        (0, 0.0),
    ],
)
def test_numbers_are_kept_as_what_they_hold(value, plain):
    model = qk.adapt(base(), ["0"], "qr", rank=2, dropout=value, progress=False)
    assert model[0].options.dropout == plain
    assert type(model[0].options.dropout) is float


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, 1e39, Decimal("1"), "1"])
@pytest.mark.parametrize(
    ("adapter", "name"), [("qr", "scaling"), ("lora_xs", "alpha"), ("ohora", "alpha")]
)
def test_a_strength_that_the_kernels_cannot_multiply_by_is_refused(adapter, name, value):
    """With a scaling or an alpha of NaN every output was NaN."""
    with pytest.raises((TypeError, ValueError), match=name):
        moved(adapter, **{name: value})
    layer = moved(adapter)[0]
    before = layer.options
    with pytest.raises((TypeError, ValueError), match="scaling"):
        layer.scaling = value
    assert layer.options == before


@pytest.mark.parametrize("value", [np.float16(50000), np.float32(2), torch.tensor(2.0), 3])
@pytest.mark.parametrize("adapter", ["qr", "lora_xs", "ohora"])
def test_a_scaling_set_later_is_a_plain_number_in_the_file(adapter, value, tmp_path):
    model = moved(adapter)
    model[0].scaling = value
    qk.save_adapter(model, tmp_path / "a.safetensors")
    fresh = qk.load_adapter(saved.base(), tmp_path / "a.safetensors")
    assert fresh[0].scaling == model[0].scaling == pytest.approx(float(value))
    assert helpers.same_bits(fresh(x()), model(x()))
