"""Calls on tensors answer as they were told, and refuse what is not theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import GATES, Core, LowRank, by_addresses, by_tensors, low_rank
from torch import Tensor

of_each_gate = pytest.mark.parametrize("gate", GATES)


def answers(core: Core, p: LowRank) -> tuple[Any, Any]:
    """To a forward and a backward."""
    h = torch.zeros(p.x.shape[0], p.r, dtype=p.x.dtype)
    forward = core.c.low_rank_forward_call(*p.forward_operands())
    return forward, core.c.low_rank_backward_call(*p.backward_operands(h))


def tell_both(core: Core, p: LowRank, code: int) -> None:
    core.c.tell(p.forward_key(), code, ("low_rank", "fwd"), f"forward by {code}")
    core.c.tell(p.backward_key(), code, ("low_rank", "bwd"), f"backward by {code}")


def test_what_was_not_told_is_not_implemented(core):
    assert answers(core, low_rank()) == (NotImplemented, NotImplemented)
    assert core.last == {}


def test_what_is_somebody_elses_is_none_and_not_noted(core):
    tell_both(core, low_rank(), -1)
    assert answers(core, low_rank()) == (None, None)
    assert core.last == {}


def test_library_products_are_named_and_noted(core):
    p = low_rank()
    tell_both(core, p, 0)
    assert answers(core, p) == (["forward by 0", False], ["backward by 0"])
    recorded = p._replace(gate=p.gate.requires_grad_())
    assert answers(core, recorded)[0] == ["forward by 0", True]
    with torch.no_grad():
        assert answers(core, recorded)[0] == ["forward by 0", False]
    assert core.last == {
        ("low_rank", "fwd"): "forward by 0",
        ("low_rank", "bwd"): "backward by 0",
    }


@pytest.mark.parametrize("who", ["x", "bias", "gate"])
def test_h_is_handed_out_where_autograd_must_record(core, who):
    p = low_rank()
    tell_both(core, p, core.code())
    y = core.c.low_rank_forward_call(*p.forward_operands())
    recorded = p._replace(**{who: getattr(p, who).requires_grad_()})
    again, h = core.c.low_rank_forward_call(*recorded.forward_operands())
    assert torch.equal(y, again)
    assert torch.equal(h, by_addresses(core, p, core.code()).h)
    frozen = p._replace(up=p.up.requires_grad_())
    assert core.c.low_rank_forward_call(*frozen.forward_operands()) is None


@pytest.mark.parametrize(("dx", "dgate"), [(True, False), (False, True)])
@of_each_gate
def test_gradients_that_nobody_asks_for_are_not_made(core, gate, dx, dgate):
    p = low_rank(gate)
    whole = by_tensors(core, p, core.code())
    operands = p.backward_operands(whole.h, dx, dgate)
    assert core.c.low_rank_backward_call(*operands) is NotImplemented
    core.c.tell(p.backward_key(dx + 2 * dgate), core.code(), "part", "told")
    got_dx, got_dgate = core.c.low_rank_backward_call(*operands)
    assert torch.equal(got_dx, whole.dx) if dx else got_dx is None
    assert torch.equal(got_dgate, whole.dgate) if dgate else got_dgate is None


def test_a_plan_is_for_its_problem_alone(core):
    """Each part of the key tells problems apart."""
    p = low_rank()
    tell_both(core, p, core.code())
    core_gate, mixed = low_rank("core"), low_rank("mixed_vector")
    others = {
        "dtype": low_rank(dtype=torch.float32),
        "m": low_rank(m=8),
        "n": low_rank(n=25),
        "k": low_rank(k=35),
        "r": low_rank(r=4),
        "core": p._replace(gate=core_gate.gate),
        "mixed": p._replace(gate=mixed.gate, index=mixed.index),
        "mixed core": p._replace(gate=low_rank("mixed_core").gate, index=mixed.index),
        "layout": p._replace(weight=p.weight.t().contiguous().t()),
    }
    for name, other in others.items():
        assert answers(core, other) == (NotImplemented, NotImplemented), name
    no_bias = p._replace(bias=None)
    assert core.c.low_rank_forward_call(*no_bias.forward_operands()) is NotImplemented
    assert core.last == {}
    forward, backward = answers(core, p)
    assert isinstance(forward, Tensor)
    assert isinstance(backward, tuple)
    wide = low_rank(wider=3)
    assert isinstance(answers(core, wide)[0], Tensor), "how wide the factors are decides nothing"


def test_the_last_call_is_noted_last(core):
    problems = [low_rank(m=m) for m in (1, 2, 3)]
    for p in problems:
        core.c.tell(p.forward_key(), core.code(), p.x.shape[0], f"choice {p.x.shape[0]}")
    for p in (*problems, problems[0]):
        core.c.low_rank_forward_call(*p.forward_operands())
    assert list(core.last.items()) == [(2, "choice 2"), (3, "choice 3"), (1, "choice 1")]


def test_a_plan_told_anew_replaces_the_old_one(core):
    p = low_rank()
    tell_both(core, p, core.code())
    tell_both(core, p, -1)
    assert answers(core, p) == (None, None)


def test_forgetting(core):
    tell_both(core, low_rank(), core.code())
    core.c.forget_choices()
    assert answers(core, low_rank()) == (NotImplemented, NotImplemented)


def test_another_number_of_threads_drops_all_plans(core):
    p, other = low_rank(), low_rank(m=8)
    torch.set_num_threads(1)
    tell_both(core, p, core.code())
    tell_both(core, other, core.code())
    torch.set_num_threads(2)
    assert answers(core, other) == (NotImplemented, NotImplemented)
    torch.set_num_threads(1)
    assert answers(core, p) == (NotImplemented, NotImplemented)
    tell_both(core, p, core.code())
    assert isinstance(answers(core, p)[0], Tensor)


def test_at_most_4096_plans_are_kept(core):
    first, newest = low_rank(), low_rank(m=9)
    core.c.tell(first.forward_key(), core.code(), "op", "first")
    for m in range(1000, 1000 + 4096):
        core.c.tell((*first.forward_key()[:3], m, *first.forward_key()[4:]), 0, "op", "one more")
    core.c.tell(newest.forward_key(), core.code(), "op", "newest")
    assert core.c.low_rank_forward_call(*first.forward_operands()) is NotImplemented
    assert isinstance(core.c.low_rank_forward_call(*newest.forward_operands()), Tensor)


def test_operands_that_do_not_fit_are_refused(core):
    p = low_rank(wider=1)
    h = by_tensors(core, p, core.code()).h
    wrong = {
        "no down": {"down": None},
        "up narrower than down": {"up": p.up[:, :3]},
        "narrower than the gate": {"up": p.up[:, :2], "down": p.down[:2]},
        "down of another K": {"down": p.down[:, 1:]},
        "a gate with gaps": {"gate": p.gate.repeat_interleave(2)[::2]},
        "a gate of another dtype": {"gate": p.gate.float()},
        "a core that is not square": {"gate": p.gate.new_ones(2, 3)},
        "a scaling that is no number": {"scaling": True},
        "a subclass": {"weight": p.weight.as_subclass(type("Own", (Tensor,), {}))},
        "a negated view": {"down": torch.complex(p.down, p.down).conj().imag},
    }
    for name, changed in wrong.items():
        q = p._replace(**changed)
        assert core.c.low_rank_forward_call(*q.forward_operands()) is None, name
        backward = p._replace(**changed).backward_operands(h)
        assert core.c.low_rank_backward_call(*backward) is None, name
    gaps = torch.cat([h, h], 1)[:, :3]
    assert core.c.low_rank_backward_call(*p.backward_operands(gaps)) is None


def test_refusals_of_modes(core, monkeypatch):
    p = low_rank()
    tell_both(core, p, core.code())
    monkeypatch.setenv("QRLORA_BACKEND", "composed")
    assert answers(core, p) == (None, None)
    monkeypatch.setenv("QRLORA_BACKEND", "")
    with torch.autocast("cpu", torch.bfloat16):
        assert answers(core, p) == (None, None)
    assert core.last == {}
    assert isinstance(answers(core, p)[0], Tensor)
