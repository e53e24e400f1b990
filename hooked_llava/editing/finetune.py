"""What an edit is compared with: gradient descent on the weights themselves, of one layer or all."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.checks import as_indices, one_of
from hooked_llava.editing.change import Change
from hooked_llava.editing.edit import Edit
from hooked_llava.editing.landing import check_landed
from hooked_llava.editing.request import Requests, listed_requests, prepare_request, search_numbers
from hooked_llava.editing.rows import Rows, make_rows
from hooked_llava.errors import InputError
from hooked_llava.model.components.precision import at_least_float32
from hooked_llava.model.llava import HookedLLaVA

Weights = Literal["W_out", "all"]
_W_OUT = "mlp.down.weight"


@torch.inference_mode(False)
def finetune(
    model: HookedLLaVA,
    requests: Requests,
    *,
    layers: int | Sequence[int] | Literal["all"],
    weights: Weights = "W_out",
    max_change: float | None = None,
    steps: int = 25,
    lr: float = 1e-3,
    stop: float = 0.99,
) -> Edit:
    """An edit made by fine-tuning weights of the language tower on the requests; not yet applied.

    Args:
        model: the model; its weights stay as they are, and edits that are active on it are built upon.
        requests: what to change.
        layers: one layer, several, or "all".
        weights: "W_out" of these layers' MLPs, or "all" their matrices.
        max_change: no number changes by more than this (Zhu et al. 2020, arXiv 2012.00363); None for no limit.
        steps: steps of Adam at most.
        lr: its learning rate.
        stop: probability of the targets at which it is done.

    The changes have full rank, so the edit is as large as the weights. Warns with `TargetNotReached` as `multedit` does. Raises
    `InputError` for a layer out of range and whatever the requests lack.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> from hooked_llava.editing import EditRequest
    >>> edit = finetune(model, EditRequest("Who made the star?", "Boris"), layers=4)
    >>> edit.layers, edit.landed
    ([4], True)
    """
    began = time.perf_counter()
    numbers = _chosen(layers, model.cfg.n_layers)
    one_of(weights, get_args(Weights), "weights")
    search = search_numbers(max_change=max_change, steps=steps, lr=lr, stop=stop)
    prepared = [prepare_request(model, request, "last") for request in listed_requests(model, requests)]
    tuned = _Tuned(make_rows(model, prepared), _names(model, numbers, weights), min(numbers))
    reached, made = tuned.descend(**search)
    method = {
        "name": "finetune",
        "layers": numbers,
        "weights": weights,
        **search,
        "steps": made,
        "seconds": round(time.perf_counter() - began, 4),
    }
    asked = tuple({**r.words, "target_probability": p} for r, p in zip(prepared, reached, strict=True))
    edit = Edit(model, {name: Change.dense(delta.detach()) for name, delta in tuned.deltas.items()}, asked, method)
    return check_landed(edit, tuned.rows)


class _Tuned:
    """Blocks run with differences added to their weights, which themselves are left alone."""

    def __init__(self, rows: Rows, names: dict[int, list[str]], first: int) -> None:
        self.rows, self.first = rows, first
        model = rows.kept.model
        whole = (f"language.blocks.{layer}.{name}" for layer, own in names.items() for name in own)
        self.weights = {name: model.get_parameter(name).detach() for name in whole}
        self.deltas = {name: torch.zeros_like(at_least_float32(w)).requires_grad_() for name, w in self.weights.items()}

    def descend(self, steps: int, lr: float, stop: float, max_change: float | None) -> tuple[list[float], int]:
        """Steps of Adam until every prompt's target has the probability `stop`; P(target) of each request, and steps made."""
        adam = torch.optim.Adam(self.deltas.values(), lr=lr)
        made = 0
        for _ in range(steps):
            with torch.enable_grad():
                log_p = self._log_probability()
                loss = -self.rows.mean(log_p).mean()
            if float(log_p.detach().min()) >= math.log(stop):
                break
            made += 1
            adam.zero_grad()
            loss.backward()
            adam.step()
            if max_change is not None:
                with torch.no_grad():
                    for delta in self.deltas.values():
                        delta.clamp_(-max_change, max_change)
        with torch.no_grad():
            reached = self.rows.mean(self._log_probability()).exp()
        return [round(p, 6) for p in reached.tolist()], made

    def _log_probability(self) -> Float[Tensor, " row"]:
        """log P(target) of every row with the differences in place."""
        changed = {name: (weight + self.deltas[name]).to(weight.dtype) for name, weight in self.weights.items()}
        return self.rows.log_probability(self.rows.logits_with(changed, self.first))


def _names(model: HookedLLaVA, layers: list[int], weights: str) -> dict[int, list[str]]:
    """For each layer the matrices that are tuned, by their names within the block."""
    if weights == "W_out":
        return {layer: [_W_OUT] for layer in layers}
    blocks = model.language.blocks
    return {layer: [name for name, p in blocks[layer].named_parameters() if p.ndim == 2] for layer in layers}


def _chosen(layers: int | Sequence[int] | Literal["all"], n_layers: int) -> list[int]:
    if isinstance(layers, str):
        if layers != "all":
            raise InputError(f"layers={layers!r}; expected a layer, a list of layers, or 'all'.")
        return list(range(n_layers))
    return sorted(set(as_indices(layers, n_layers, "layers")))
