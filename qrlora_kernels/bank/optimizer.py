"""AdamW of every adapter in a bank for itself, in one pass over those of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..adapters import State
from ..adapters.options import plain_value
from .slots import Slot

if TYPE_CHECKING:
    from .bank import AdapterBank

Rate = float | Callable[[int], float]


class Found(NamedTuple):
    """The numbers [A, P] of a batch that have a gradient, and whose they are."""

    numbers: Tensor
    names: list[str]
    slots: list[Slot | None]


class BankAdamW:
    """``torch.optim.AdamW`` of each adapter alone: own moments, step count and learning rate.

    An adapter that no row of the batches since :meth:`zero_grad` named does not move, nor decay.
    """

    def __init__(
        self,
        bank: AdapterBank,
        lr: Rate = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        distributed: bool = True,
    ) -> None:
        """
        Parameters
        ----------
        bank : AdapterBank
            Of the batches whose gradients are used.
        lr : float or callable
            A callable gives the rate for an adapter's step count before the step, as a scheduler
            would. :meth:`set_lr` sets that of one adapter.
        betas, eps, weight_decay
            As of ``torch.optim.AdamW``.
        distributed : bool
            Where ``torch.distributed`` has several ranks, their gradients are summed: every rank
            must call :meth:`step`, with the same adapters in its bank.
        """
        self.bank, self.lr = bank, _checked_rate("lr", lr)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas must be two numbers, got {betas!r}")
        self.betas = (_share("betas[0]", betas[0]), _share("betas[1]", betas[1]))
        self.eps = _not_negative("eps", eps)
        self.weight_decay = _not_negative("weight_decay", weight_decay)
        self.distributed = plain_value("distributed", "bool", distributed)
        self._own_lr: dict[int, tuple[int, Rate]] = {}  # by row, with Slot.came
        rows = bank.table.rows
        with torch.inference_mode(False):
            # [2, capacity + 1, P], and Slot.given of the adapter whose state it is.
            self._moments = rows.new_zeros((2, *rows.shape))
            self._steps = torch.zeros(len(rows), dtype=torch.int64)
            self._given = torch.zeros(len(rows), dtype=torch.int64)
        self._found: list[Found] = []
        with bank.table.lock:
            bank._optimizers.add(self)

    # --- rates

    def set_lr(self, name: str, lr: Rate) -> None:
        """The learning rate of one adapter, as ``lr`` is that of the others."""
        slot = self.bank.table.slot(name)
        self._own_lr[slot.row] = slot.came, _checked_rate("lr", lr)

    # --- steps

    def zero_grad(self) -> None:
        """Forget the gradients that were found; other optimizers of the bank lose them too."""
        with self.bank.table.lock:
            for found in self._found:  # a graph that was retained would add to them
                found.numbers.grad = None
            self._found.clear()

    @torch.no_grad()
    def step(self) -> None:
        """Move every adapter that has a gradient, by its rows since :meth:`zero_grad`."""
        with self.bank.table.lock:
            found = self._gradients()
            slots = {name: self.bank.table.slot(name) for name in found}
        if self.distributed and dist.is_available() and dist.is_initialized():
            found = _over_ranks(found, self.bank)
        with self.bank.table.lock:
            here = [name for name in found if name in self.bank]
            if still := [n for n in here if n not in slots or self.bank.table.holds(n, slots[n])]:
                self._move(still, torch.stack([found[name] for name in still]))

    def _gradients(self) -> dict[str, Tensor]:
        """[P] of each adapter that has one and is still the one that it was."""
        found: dict[str, Tensor] = {}
        for numbers, names, slots in self._found:
            gradient = numbers.grad
            for at, (name, slot) in enumerate(zip(names, slots, strict=True)):
                if gradient is not None and self.bank.table.holds(name, slot):
                    found[name] = found[name] + gradient[at] if name in found else gradient[at]
        return found

    def _move(self, names: list[str], gradient: Tensor) -> None:
        """The rows of ``names`` by ``gradient`` [A, P], with the arithmetic of PyTorch's AdamW."""
        table, (beta1, beta2) = self.bank.table.rows, self.betas
        at = self._rows(names)
        device_at = at.to(table.device)
        steps = self._steps[at] + 1
        rates = [self._rate(n, s) for n, s in zip(names, (steps - 1).tolist(), strict=True)]
        lr = torch.tensor(rates, dtype=torch.float64)
        rows, mean, square = table[device_at], *self._moments[:, device_at]
        rows.mul_(_column(1 - lr * self.weight_decay, rows))
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = _column(lr / (1 - beta1 ** steps.double()), rows)
        root = _column((1 - beta2 ** steps.double()).sqrt(), rows)
        rows.add_(-size * mean / (square.sqrt() / root).add_(self.eps))
        table[device_at] = rows
        self._moments[0, device_at], self._moments[1, device_at] = mean, square
        self._steps[at] = steps
        self.bank.table.unsaved.update(names)

    def _rows(self, names: list[str]) -> Tensor:
        """Where ``names`` are in the table; state that another adapter left there is dropped."""
        slots = [self.bank.table.slot(name) for name in names]
        at = torch.tensor([slot.row for slot in slots])
        given = torch.tensor([slot.given for slot in slots])
        new = at[self._given[at] != given]
        if len(new):
            self._moments[:, new.to(self._moments.device)] = 0.0
            self._steps[new] = 0
            self._given[at] = given
        return at

    def _rate(self, name: str, steps: int) -> float:
        slot = self.bank.table.slot(name)
        came, own = self._own_lr.get(slot.row, (0, self.lr))
        lr = own if came == slot.came else self.lr
        return float(lr(steps)) if callable(lr) else lr

    # --- one adapter's state

    def state_dict(self, name: str) -> State:
        """The step count [] and the moments of one adapter, by full names: copies.

        With ``bank.state(name)`` it is all that training goes on from.
        """
        with self.bank.table.lock:
            at = int(self._rows([name]))
            mean, square = self._moments[:, at].clone()
            found = {"step": self._steps[at].clone()}
        for key, moment in (("exp_avg", mean), ("exp_avg_sq", square)):
            found |= {
                f"{key}.{n}": t for n, t in self.bank.layout.state(moment, moment.dtype).items()
            }
        return found

    def load_state_dict(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Take what :meth:`state_dict` gave."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a dict of tensors, got {type(state).__name__}")
        step = state.get("step")
        if not isinstance(step, Tensor) or step.numel() != 1 or not 0 <= step.item() < 2**63:
            raise ValueError(f"state must hold the number of steps as 'step', got {step!r}")
        moments = [
            self.bank.layout.row(
                {k.removeprefix(f"{key}."): t for k, t in state.items() if k.startswith(f"{key}.")}
            )
            for key in ("exp_avg", "exp_avg_sq")
        ]
        with self.bank.table.lock:
            at = int(self._rows([name]))
            self._moments[:, at] = torch.stack(moments).to(self._moments.device)
            self._steps[at] = int(step)

    # --- from the bank

    def _note(self, found: Found) -> None:
        """Keep the numbers of a batch that have a gradient."""
        if not any(found.numbers is have.numbers for have in self._found):
            self._found.append(found)


def _column(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers.to(like.device, like.dtype).unsqueeze(1)


def _over_ranks(found: dict[str, Tensor], bank: AdapterBank) -> dict[str, Tensor]:
    """The sums over all ranks, of every adapter that has a gradient on one of them."""
    named: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(named, list(found))
    every = sorted({name for names in named for name in names})
    total = bank.table.rows.new_zeros(len(every), bank.numbers)
    for at, name in enumerate(every):
        if name in found:
            total[at] = found[name]
    dist.all_reduce(total)
    return dict(zip(every, total, strict=True))


def _checked_rate(argument: str, lr: Rate) -> Rate:
    return lr if callable(lr) else _not_negative(argument, lr)


def _not_negative(argument: str, value: float) -> float:
    found = plain_value(argument, "float", value)
    if found < 0.0:
        raise ValueError(f"{argument} must not be negative, got {found}")
    return found


def _share(argument: str, value: float) -> float:
    share = plain_value(argument, "float", value)
    if not 0.0 <= share < 1.0:
        raise ValueError(f"{argument} must be from 0 to below 1, got {share}")
    return share
