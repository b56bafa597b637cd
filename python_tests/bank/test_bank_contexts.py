"""Who is asked for the rows of a batch: tasks, generators, threads of autograd, changed layers."""

from __future__ import annotations

import asyncio
import threading
from functools import reduce

import bank_model
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import qrlora_kernels as qk


def filled(head: bool = False, kind: str = "qr", dtype: torch.dtype = torch.float64):
    net = bank_model.model(kind, head, dtype)
    bank = qk.AdapterBank(net, 8)
    states = {f"user {i}": bank_model.state(net, i) for i in range(3)}
    for name, state in states.items():
        bank.add(name, state)
    return net, bank, states


def alone(state, x: Tensor, head: bool = False) -> Tensor:
    return bank_model.put(bank_model.model("qr", head), state)(x)


# --- contexts in other orders


def test_tasks_of_an_event_loop_have_their_own_rows():
    net, bank, states = filled()
    x = bank_model.batch(1)

    async def answer(name: str, before: float, inside: float) -> bool:
        await asyncio.sleep(before)
        with bank.use([name]):
            await asyncio.sleep(inside)
            return torch.allclose(net(x), alone(states[name], x))

    async def all_of_them() -> list[bool]:
        return await asyncio.gather(
            answer("user 0", 0, 0.05), answer("user 1", 0.02, 0.1), answer("user 2", 0.03, 0.01)
        )

    assert asyncio.run(all_of_them()) == [True] * 3
    assert torch.equal(net(x), bank_model.model()(x))


def test_generators_that_end_in_another_order_leave_the_others_alone():
    net, bank, states = filled()
    x = bank_model.batch(1)

    def serve(name: str):
        with bank.use([name]):
            yield None
            yield net(x)

    first, second = serve("user 0"), serve("user 1")
    next(first), next(second)
    first.close()
    torch.testing.assert_close(next(second), alone(states["user 1"], x))
    second.close()
    with bank.use(["user 2"]):  # layers ask again
        torch.testing.assert_close(net(x), alone(states["user 2"], x))
    assert torch.equal(net(x), bank_model.model()(x))


def test_a_context_that_ends_in_another_thread_is_over_in_its_own():
    net, bank, _ = filled()
    x, found = bank_model.batch(1), []
    left = bank.use(["user 0"])
    entered, ended = threading.Event(), threading.Event()

    def enter() -> None:
        left.__enter__()
        entered.set()
        ended.wait(10)
        found.append(net(x))

    thread = threading.Thread(target=enter)
    thread.start()
    entered.wait(10)
    left.__exit__(None, None, None)
    with bank.use(["user 1"]):  # so that layers ask
        ended.set()
        thread.join()
    assert torch.equal(found[0], bank_model.model()(x))


def test_threads_of_autograd_do_not_guess_the_rows():
    """Checkpoints in checkpoints: beyond 60 backwards in one another PyTorch takes a thread."""
    net, bank, _ = filled()
    x = bank_model.batch(2).requires_grad_()

    def deeper(inner, _):
        return lambda t: checkpoint(inner, t, use_reentrant=True)

    with bank.use(["user 0", "user 1"]) as batch:
        batch.mean(reduce(deeper, range(5), net)(x).sum(1)).backward()
        assert batch.numbers.grad.any()
        loss = batch.mean(reduce(deeper, range(70), net)(x).sum(1))
        with pytest.raises(ValueError, match="checkpointed"):
            loss.backward()


def test_compiled_code_does_not_depend_on_how_many_ask():
    net, bank, states = filled(head=True)
    x, graphs = bank_model.batch(1), []

    def count(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=count)

    def at(depth: int) -> Tensor:
        with bank.use(["user 0"]):
            return at(depth - 1) if depth > 1 else compiled(x)

    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=False):
        compiled(x)
        at(1)
        before = len(graphs)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for depth in (2, 3, 4):
                torch.testing.assert_close(at(depth), alone(states["user 0"], x, head=True))
    assert len(graphs) == before
    torch._dynamo.reset()


# --- heads


@pytest.mark.parametrize("early", [True, False])
def test_hooks_of_a_head_see_the_answer_of_the_rows(early):
    net = bank_model.model("qr", head=True)
    if early:
        net.head.register_forward_hook(lambda _, args, y: 2 * y)
    bank = qk.AdapterBank(net, 2)
    if not early:
        net.head.register_forward_hook(lambda _, args, y: 2 * y)
    state, x = bank_model.state(net, 1), bank_model.batch(1)
    bank.add("a", state)
    with bank.use(["a"]):
        y = net(x)
    torch.testing.assert_close(y, bank_model.put(net, state)(x))


def test_a_head_may_be_called_by_keyword():
    net, bank, states = filled(head=True)
    x = bank_model.batch(1)
    with bank.use(["user 0"]):
        y = net.head(input=x)
    torch.testing.assert_close(y, bank_model.put(net, states["user 0"]).head(x))


def test_what_else_trains_is_refused_where_heads_are_named_too():
    net = bank_model.Net()
    net.extra = torch.nn.LayerNorm(3)
    qk.adapt(net, ["first"], "qr", rank=2, trainable=["extra", "head"])
    with pytest.raises(ValueError, match=r"extra"):
        qk.AdapterBank(net, 2, heads="head")
    with pytest.raises(ValueError, match=r"extra"), qk.per_example(net, heads="head"):
        pass


# --- layers that changed


def test_layers_merged_inside_refuse():
    net, bank, _ = filled()
    with bank.use(["user 0"]):
        qk.merge(net)
        with pytest.raises(ValueError, match="merged"):
            net(bank_model.batch(1))
        qk.unmerge(net)
        net(bank_model.batch(1))


def _adapt_again(net) -> None:
    qk.unload(net, merge=False)
    qk.adapt(net, ["first", "second"], "qr", rank=6)


def test_layers_adapted_anew_inside_ask_again():
    net, bank, states = filled()
    x = bank_model.batch(1)
    with bank.use(["user 0"]):
        _adapt_again(net)
    with bank.use(["user 0"]):
        torch.testing.assert_close(net(x), alone(states["user 0"], x))


def test_factors_of_another_start_need_another_bank():
    net, bank, _ = filled()
    qk.unload(net, merge=False)
    with torch.no_grad():
        net.first.weight.copy_(net.first.weight.flip(1))
    qk.adapt(net, ["first", "second"], "qr", rank=6)
    with pytest.raises(ValueError, match=r"first must have the factors"), bank.use(["user 0"]):
        pass


@pytest.mark.parametrize("kind", sorted(bank_model.KINDS))
def test_casts_to_half_precision_stay_and_others_need_another_bank(kind):
    net, bank, _ = filled(head=True, kind=kind, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        net.to(dtype)
        with bank.use(["user 0"]):
            assert net(bank_model.batch(1, dtype)).dtype == dtype
    net.double()
    with pytest.raises(ValueError, match="another bank"), bank.use(["user 0"]):
        pass


def test_nested_rows_are_refused():
    net, bank, _ = filled()
    rows = [torch.randn(0, 16).double(), torch.randn(2, 16).double()]  # as many as the names
    x = torch.nested.nested_tensor(rows, layout=torch.jagged)
    with bank.use(["user 0", "user 1"]), pytest.raises(ValueError, match="nested"):
        net.first(x)
    net.first(x)


def test_a_head_that_was_replaced_needs_another_bank():
    net, bank, _ = filled(head=True)
    net.head = torch.nn.Sequential(net.head)  # is still called
    with bank.use(["user 0"]):
        pass
    net.head = torch.nn.Linear(16, 3).double()
    with pytest.raises(ValueError, match="head must be the layer"), bank.use(["user 0"]):
        pass


def test_a_head_whose_weight_alone_is_read_is_refused():
    net = bank_model.Net()
    net.attention = torch.nn.MultiheadAttention(16, 2)
    qk.adapt(net, ["first"], "qr", rank=2)
    with pytest.raises(ValueError, match=r"attention\.out_proj"):
        qk.AdapterBank(net, 2, heads="attention.out_proj")
