"""Requests with their keys and value differences found: what is left is the closed form, which costs next to nothing.

`multedit` and `rome` go through here. By itself it serves comparisons: many requests are searched for in one batch, and
edits of single requests, with other weights of size or other keys, are made from the one result.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.checks import one_of
from hooked_llava.editing.closed_form import closed_form
from hooked_llava.editing.covariance import KeyCovariance
from hooked_llava.editing.edit import Edit
from hooked_llava.editing.landing import check_landed
from hooked_llava.editing.layer_choice import Layer, choose_place
from hooked_llava.editing.request import (
    EditRequest,
    Requests,
    ToKeep,
    check_reach,
    listed_requests,
    position_of,
    prepare_request,
)
from hooked_llava.editing.rows import Rows, make_rows
from hooked_llava.editing.values import Values, ValueSearch, optimise_values
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.prepare import InputsLike

Keys = Literal["mean", "each"]


@dataclass(frozen=True)
class Solved:
    """Keys and value differences of requests at one layer.

    Attributes:
        model (HookedLLaVA): The model that the edit is computed for.
        layer (int): The layer whose MLP output weights change.
        position (str): Where the key and the value are read, such as "constraint".
        asked (tuple[dict[str, Any], ...]): The requests in plain words, with how far the search got.
        keys (Float[Tensor, "row d_mlp"]): The key of every prompt.
        owner (Int[Tensor, " row"]): Which request each key belongs to.
        delta (Float[Tensor, "request d_model"]): The value difference of each request.
        search (ValueSearch): How the value was searched.
        seconds (float): What finding them took.
    """

    model: HookedLLaVA
    layer: int
    position: str
    asked: tuple[dict[str, Any], ...]
    keys: Float[Tensor, "row d_mlp"]
    owner: Int[Tensor, " row"]
    delta: Float[Tensor, "request d_model"]
    search: ValueSearch
    seconds: float = field(default=0.0, compare=False)

    def edit(
        self,
        name: str = "multedit",
        *,
        only: Sequence[int] | None = None,
        lam: float = 0.01,
        keys: Keys = "mean",
        keep: ToKeep | None = None,
        covariance: KeyCovariance | None = None,
    ) -> Edit:
        """The edit of all requests together, or of some of them; other arguments as in `multedit`.

        Raises `InputError` for a singular update and a dtype too coarse to hold it. Whether it does what was asked for is
        not checked here, but by `solve_edit`.
        """
        one_of(keys, get_args(Keys), "keys")
        began, lam = time.perf_counter(), float(lam)
        chosen = list(range(len(self.delta))) if only is None else list(only)
        key, owner = self._keys(chosen, keys)
        kept = None if keep is None else keys_of(self.model, keep, self.layer, self.position)
        corrected = None
        if covariance is not None:
            corrected = covariance.correct(key if kept is None else torch.cat([key, kept]))
        change = closed_form(key, owner, self.delta[chosen], lam=lam, kept=kept, corrected=corrected)
        method = {
            "name": name,
            "layer": self.layer,
            "position": self.position,
            "lam": lam,
            "keys": keys,
            **asdict(self.search),
            "n_kept_keys": 0 if kept is None else len(kept),
            "seconds": round(self.seconds + time.perf_counter() - began, 4),
        }
        weight = f"language.blocks.{self.layer}.mlp.down.weight"
        edit = Edit(self.model, {weight: change}, tuple(self.asked[i] for i in chosen), method)
        edit.check_precision()
        return edit

    def _keys(self, chosen: list[int], keys: Keys) -> tuple[Tensor, Tensor]:
        """Keys of the chosen requests, and which of them each belongs to, counted from 0."""
        own = [(self.owner == i).nonzero()[:, 0] for i in chosen]
        if keys == "mean":
            means = torch.stack([self.keys[rows].double().mean(0) for rows in own])
            return means, torch.arange(len(chosen), device=means.device)
        counts = torch.tensor([len(rows) for rows in own], device=self.keys.device)
        return self.keys[torch.cat(own)], torch.arange(len(chosen), device=counts.device).repeat_interleave(counts)


@torch.inference_mode(False)
def solve_edit(
    model: HookedLLaVA, requests: Requests, layer: Layer, position: str, search: ValueSearch, **options: Any
) -> Edit:
    """The edit of all requests, with what the model answers under it; options as of `Solved.edit`, raises as `multedit`."""
    solved, rows = _solve(model, requests, layer, position, search)
    return check_landed(solved.edit(**options), rows)


@torch.inference_mode(False)
def solve(model: HookedLLaVA, requests: Requests, layer: Layer, position: str, search: ValueSearch) -> Solved:
    """Keys and value differences of requests, all searched for in one batch; raises as `multedit` does."""
    return _solve(model, requests, layer, position, search)[0]


def _solve(
    model: HookedLLaVA, requests: Requests, layer: Layer, position: str, search: ValueSearch
) -> tuple[Solved, Rows]:
    began = time.perf_counter()
    prepared, chosen = choose_place(model, listed_requests(model, requests), layer, position)
    check_reach(prepared, chosen, model.cfg.n_layers)
    rows = make_rows(model, prepared)
    keys, outputs = rows.keys_and_values(chosen)
    values = optimise_values(rows, chosen, rows.mean(outputs), search)
    solved = Solved(
        model=model,
        layer=chosen,
        position=prepared[0].words["position"],
        asked=tuple({**r.words, **reached} for r, reached in zip(prepared, _reached(values), strict=True)),
        keys=keys,
        owner=rows.request,
        delta=values.delta,
        search=search,
        seconds=time.perf_counter() - began,
    )
    return solved, rows


@torch.no_grad()
def keys_of(model: HookedLLaVA, keep: ToKeep, layer: int, position: str) -> Float[Tensor, "prompt d_mlp"]:
    """The keys of prompts (`mlp.hook_post` of a layer): of requests where they would be edited, else at a span's end."""
    listed = [keep] if isinstance(keep, EditRequest) else list(keep) if isinstance(keep, Sequence) else []
    requests = [one for one in listed if isinstance(one, EditRequest)]
    if requests and len(requests) == len(listed):
        rows = make_rows(model, [prepare_request(model, one, position) for one in requests])
        return rows.keys_and_values(layer)[0]
    prompts = model.as_inputs(cast("InputsLike", keep))
    if position == "constraint" and not all(position in m.named for m in prompts.token_maps):
        raise InputError(
            "position='constraint', and the prompts of keep= do not say where theirs is. Give EditRequests with constraint=, "
            "or name it: inputs.with_spans(constraint='the ring')."
        )
    name = model.hooks_table.name("mlp.post", layer)
    places = torch.tensor([position_of(m, position) for m in prompts.token_maps], device=prompts.device)
    _, cache = model.run_with_cache(prompts, names_filter=name, stop_at_layer=layer + 1)
    return cache[name][torch.arange(len(prompts), device=places.device), places]


def _reached(values: Values) -> list[dict[str, float]]:
    """For each request how probable its target became in the search, and how long the difference is."""
    lengths = values.delta.norm(dim=-1).tolist()
    return [
        {"target_probability": round(p, 6), "delta_norm": round(n, 6)}
        for p, n in zip(values.probability.tolist(), lengths, strict=True)
    ]
