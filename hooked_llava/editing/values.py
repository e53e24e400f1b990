"""Which change of an MLP's output makes the model give the wanted answer: found by gradient descent on it alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.editing.request import search_numbers
from hooked_llava.editing.rows import Rows
from hooked_llava.errors import HookedLLaVAWarning
from hooked_llava.model.components.precision import at_least_float32


class TargetNotReached(HookedLLaVAWarning):
    """A search for values ended with a target that is still improbable: the edit will hardly do what it is for."""


@dataclass(frozen=True)
class ValueSearch:
    """How value differences are searched for; the names are those of 2406.04236's code and of ROME's.

    Attributes:
        steps (int): Steps of Adam at most.
        lr (float): Its learning rate.
        clamp (float): Longest difference allowed, in lengths of the MLP's own output; infinity for no limit.
        weight_decay (float): Weight of |delta| / |z|^2 in the loss, z being the MLP's own output.
        stop (float): A request whose target has this probability in all its prompts is done.
    """

    steps: int = 25
    lr: float = 0.5
    clamp: float = 4.0
    weight_decay: float = 1e-3
    stop: float = 0.99

    def __post_init__(self) -> None:
        for name, number in search_numbers(**asdict(self), or_zero=("weight_decay",)).items():
            object.__setattr__(self, name, number)


@dataclass(frozen=True)
class Values:
    """Value differences, and how far they got.

    Attributes:
        delta (Float[Tensor, "request d_model"]): What is added to the MLP's output at the edited position.
        probability (Float[Tensor, " request"]): P(target) under it, the geometric mean over the request's prompts.
        steps (int): Steps that were made.
    """

    delta: Float[Tensor, "request d_model"]
    probability: Float[Tensor, " request"]
    steps: int


def optimise_values(rows: Rows, layer: int, value: Float[Tensor, "request d_model"], search: ValueSearch) -> Values:
    """Differences of the MLP's output that raise log P(target), all requests at once, gradients with respect to them only.

    Layers above the edited one and positions from the edited one on are run, on the prefix of the kept run. After each
    step a difference longer than `clamp` |z| is cut to that length.
    """
    value = at_least_float32(value)
    size, tiny = value.norm(dim=-1), torch.finfo(value.dtype).tiny
    longest, decay = search.clamp * size, search.weight_decay / size.clamp(min=tiny) ** 2
    delta = torch.zeros_like(value).requires_grad_()
    adam = torch.optim.Adam([delta], lr=search.lr)
    done = torch.zeros(len(delta), dtype=torch.bool, device=delta.device)
    made = 0
    for _ in range(search.steps):
        with torch.enable_grad():
            log_p = rows.log_probability(_run(rows, layer, delta))
            loss = (decay * delta.norm(dim=-1) - rows.mean(log_p)).sum()
        done |= rows.lowest(log_p.detach()) >= math.log(search.stop)
        if bool(done.all()):
            break
        made += 1
        before = delta.detach().clone()
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            delta[done] = before[done]
            delta *= (longest / delta.norm(dim=-1).clamp(min=tiny)).clamp(max=1.0)[:, None]
    delta = delta.detach()
    with torch.no_grad():
        reached = rows.mean(rows.log_probability(_run(rows, layer, delta))).exp()
    return Values(delta, reached, made)


def _run(rows: Rows, layer: int, delta: Tensor) -> Tensor:
    """Logits with the differences added after the edited layer's MLP."""
    resid = rows.entering(layer + 1)
    index = torch.arange(len(resid), device=resid.device), (rows.edited - rows.start).to(resid.device)
    return rows.logits(resid.index_put(index, delta[rows.request].to(resid), accumulate=True), layer + 1)
