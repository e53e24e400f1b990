"""Which change of an MLP's output makes the model give the wanted answer: found by gradient descent on it alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.checks import one_of
from hooked_llava.editing.contexts import ESSENCE
from hooked_llava.editing.request import search_numbers
from hooked_llava.editing.rows import Rows
from hooked_llava.errors import HookedLLaVAWarning
from hooked_llava.model.components.precision import at_least_float32


class TargetNotReached(HookedLLaVAWarning):
    """A search for values ended with a target that is still improbable: the edit will hardly do what it is for."""


KlAt = Literal["last", "edited"]


@dataclass(frozen=True)
class ValueSearch:
    """How value differences are searched for; the names are those of 2406.04236's code and of ROME's.

    Attributes:
        steps (int): Steps of Adam at most.
        lr (float): Its learning rate.
        clamp (float): Longest difference allowed, in lengths of the MLP's own output; infinity for no limit.
        weight_decay (float): Weight of |delta| / |z|^2 in the loss, z being the MLP's own output.
        stop (float | None): A request whose target has this probability in all its prompts is done.
        stop_loss (float | None): A request whose loss is below this is done.
        per_token (bool): The loss is the mean of -log P over the target's tokens, not their sum.
        kl (float): Weight of KL(with the difference || without) of what follows the essence prompt.
        kl_prompt (str): The essence prompt, with {} for the constraint.
        kl_at (KlAt): Where it is read: at the prompt's "last" position, or at the "edited" one.
    """

    steps: int = 25
    lr: float = 0.5
    clamp: float = 4.0
    weight_decay: float = 1e-3
    stop: float | None = 0.99
    stop_loss: float | None = None
    per_token: bool = False
    kl: float = 0.0
    kl_prompt: str = ESSENCE
    kl_at: KlAt = "last"

    def __post_init__(self) -> None:
        given = {name: value for name, value in asdict(self).items() if name not in ("per_token", "kl_prompt", "kl_at")}
        for name, number in search_numbers(**given, or_zero=("weight_decay", "kl")).items():
            object.__setattr__(self, name, number)
        one_of(self.kl_at, get_args(KlAt), "kl_at")

    def words(self) -> dict[str, Any]:
        """What an edit says of its search: the numbers of every search, and what is not as by default."""
        always = ("steps", "lr", "clamp", "weight_decay", "stop")
        return {
            f.name: getattr(self, f.name) for f in fields(self) if f.name in always or self._differs(f.name, f.default)
        }

    def _differs(self, name: str, default: Any) -> bool:
        return getattr(self, name) != default and (self.kl > 0 or not name.startswith("kl_"))


@dataclass(frozen=True)
class Values:
    """Value differences, and how far they got.

    Attributes:
        delta (Float[Tensor, "request d_model"]): What is added to the MLP's output at the edited position.
        probability (Float[Tensor, " request"]): P(target) under it, the geometric mean over the request's own prompts.
        steps (int): Steps that were made.
    """

    delta: Float[Tensor, "request d_model"]
    probability: Float[Tensor, " request"]
    steps: int


def optimise_values(
    rows: Rows,
    layer: int,
    value: Float[Tensor, "request d_model"],
    search: ValueSearch,
    essence: Rows | None = None,
) -> Values:
    """Differences of the MLP's output that raise log P(target), all requests at once, gradients with respect to them only.

    Layers above the edited one and positions from the edited one on are run, on the prefix of the kept run. After each
    step a difference longer than `clamp` |z| is cut to that length. `essence` are prompts whose next token is to stay.
    """
    value = at_least_float32(value)
    size, tiny = value.norm(dim=-1), torch.finfo(value.dtype).tiny
    longest = search.clamp * size
    loss_of = _Loss(rows, layer, search, search.weight_decay / size.clamp(min=tiny) ** 2, essence)
    delta = torch.zeros_like(value).requires_grad_()
    adam = torch.optim.Adam([delta], lr=search.lr)
    done = torch.zeros(len(delta), dtype=torch.bool, device=delta.device)
    made = 0
    for _ in range(search.steps):
        with torch.enable_grad():
            loss, log_p = loss_of(delta)
        done |= loss_of.is_reached(loss.detach(), log_p.detach())
        if bool(done.all()):
            break
        made += 1
        before = delta.detach().clone()
        adam.zero_grad()
        loss.sum().backward()
        adam.step()
        with torch.no_grad():
            delta[done] = before[done]
            delta *= (longest / delta.norm(dim=-1).clamp(min=tiny)).clamp(max=1.0)[:, None]
    delta = delta.detach()
    with torch.no_grad():
        reached = rows.plain_mean(rows.log_probability(_run(rows, layer, delta))).exp()
    return Values(delta, reached, made)


class _Loss:
    """The loss of every request: equation 4 of 2202.05262, with the weight decay of its code."""

    def __init__(
        self, rows: Rows, layer: int, search: ValueSearch, decay: Float[Tensor, " request"], essence: Rows | None
    ) -> None:
        self.rows, self.layer, self.search, self.decay, self.essence = rows, layer, search, decay, essence
        self.n_tokens = rows.counts.sum(-1) if search.per_token else torch.ones_like(rows.counts[:, 0])
        if essence is not None:
            with torch.no_grad():
                self.before = self._said(essence, torch.zeros(len(decay), rows.kept.model.cfg.d_model).to(decay))

    def __call__(self, delta: Float[Tensor, "request d_model"]) -> tuple[Tensor, Tensor]:
        """Loss of every request, and log P(target) of every row."""
        log_p = self.rows.log_probability(_run(self.rows, self.layer, delta))
        loss = self.decay * delta.norm(dim=-1) - self.rows.mean(log_p / self.n_tokens)
        if self.essence is not None:
            now = self._said(self.essence, delta)
            kl = (now.exp() * (now - self.before)).sum(-1)
            loss = loss + self.search.kl * self.essence.mean(kl)
        return loss, log_p

    def is_reached(self, loss: Float[Tensor, " request"], log_p: Float[Tensor, " row"]) -> Tensor:
        """Which requests are done."""
        search, done = self.search, torch.zeros_like(loss, dtype=torch.bool)
        if search.stop is not None:
            done = self.rows.lowest(log_p) >= math.log(search.stop)
        return done if search.stop_loss is None else done | (loss < search.stop_loss)

    def _said(self, essence: Rows, delta: Tensor) -> Float[Tensor, "row d_vocab"]:
        """Log-probabilities of what follows the essence prompts."""
        at = essence.edited if self.search.kl_at == "edited" else essence.read[:1].expand(len(essence.edited))
        queries = at.unique()
        logits = _run(essence, self.layer, delta, (queries - essence.start).tolist())
        own = logits[torch.arange(len(at), device=at.device), torch.searchsorted(queries, at)]
        return at_least_float32(own).log_softmax(-1)


def _run(rows: Rows, layer: int, delta: Tensor, queries: list[int] | None = None) -> Tensor:
    """Logits with the differences added after the edited layer's MLP; where the targets are read, or at `queries`."""
    resid = rows.entering(layer + 1)
    index = torch.arange(len(resid), device=resid.device), (rows.edited - rows.start).to(resid.device)
    resid = resid.index_put(index, delta[rows.request].to(resid), accumulate=True)
    return rows.logits(resid, layer + 1, queries)
