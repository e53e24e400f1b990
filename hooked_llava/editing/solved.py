"""Requests with their keys and value differences found: what is left is the closed form, which costs next to nothing.

`multedit` and `rome` go through here. By itself it serves comparisons: many requests are searched for in one batch, and
edits of single requests, with other weights of size or other keys, are made from the one result.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_llava.checks import one_of
from hooked_llava.editing.change import Change
from hooked_llava.editing.closed_form import closed_form
from hooked_llava.editing.contexts import Contexts, after_contexts, chosen_contexts, essence_of
from hooked_llava.editing.covariance import KeyCovariance
from hooked_llava.editing.edit import Edit
from hooked_llava.editing.landing import check_landed
from hooked_llava.editing.layer_choice import Layer, choose_place
from hooked_llava.editing.request import (
    EditRequest,
    Prepared,
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

Keys = Literal["mean", "each", "plain"]
"""Which keys of a request with several prompts get its difference, see `multedit`."""


@dataclass(frozen=True)
class LayerKeys:
    """Keys of requests in one layer.

    Attributes:
        keys (Float[Tensor, "row d_mlp"]): The key of every prompt.
        owner (Int[Tensor, " row"]): Which request each key belongs to.
        plain (Bool[Tensor, " row"]): Whether it is the key of one of the request's own prompts, not of one after a context.
    """

    keys: Float[Tensor, "row d_mlp"]
    owner: Int[Tensor, " row"]
    plain: Bool[Tensor, " row"]

    def update(
        self,
        delta: Float[Tensor, "request d_model"],
        chosen: Sequence[int],
        *,
        lam: float,
        keys: Keys,
        covariance: KeyCovariance | None = None,
        kept: Float[Tensor, "kept d_mlp"] | None = None,
    ) -> Change:
        """The change of W_out that gives the chosen requests' keys their differences."""
        key, owner = self._of(chosen, keys)
        corrected = None
        if covariance is not None or keys == "plain":
            along = key if keys != "plain" else self._of(chosen, "mean")[0]
            along = along if kept is None else torch.cat([along, kept])
            corrected = along if covariance is None else covariance.correct(along)
        return closed_form(key, owner, delta[chosen], lam=lam, kept=kept, corrected=corrected)

    def _of(self, chosen: Sequence[int], keys: Keys) -> tuple[Tensor, Tensor]:
        """Keys of the chosen requests, and which of them each belongs to, counted from 0."""
        counted = self.plain if keys == "plain" else torch.ones_like(self.plain)
        own = [((self.owner == i) & counted).nonzero()[:, 0] for i in chosen]
        if keys != "each":
            means = torch.stack([self.keys[rows].double().mean(0) for rows in own])
            return means, torch.arange(len(chosen), device=means.device)
        counts = torch.tensor([len(rows) for rows in own], device=self.keys.device)
        return self.keys[torch.cat(own)], torch.arange(len(chosen), device=counts.device).repeat_interleave(counts)


@dataclass(frozen=True)
class Solved:
    """Keys and value differences of requests at one layer.

    Attributes:
        model (HookedLLaVA): The model that the edit is computed for.
        layer (int): The layer whose MLP output weights change.
        position (str): Where the key and the value are read, such as "constraint".
        asked (tuple[dict[str, Any], ...]): The requests in plain words, with how far the search got.
        keys (LayerKeys): The keys of the requests' prompts.
        delta (Float[Tensor, "request d_model"]): The value difference of each request.
        search (ValueSearch): How the value was searched.
        contexts (tuple[str, ...]): What was put before the questions.
        seconds (float): What finding them took.
    """

    model: HookedLLaVA
    layer: int
    position: str
    asked: tuple[dict[str, Any], ...]
    keys: LayerKeys
    delta: Float[Tensor, "request d_model"]
    search: ValueSearch
    contexts: tuple[str, ...] = ()
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
        check_keys(keys)
        began, lam = time.perf_counter(), float(lam)
        chosen = list(range(len(self.delta))) if only is None else list(only)
        kept = None if keep is None else keys_of(self.model, keep, self.layer, self.position)
        change = self.keys.update(self.delta, chosen, lam=lam, keys=keys, covariance=covariance, kept=kept)
        method = {
            "name": name,
            "layer": self.layer,
            "position": self.position,
            "lam": lam,
            "keys": keys,
            **self.search.words(),
            **({"contexts": list(self.contexts)} if self.contexts else {}),
            "n_kept_keys": 0 if kept is None else len(kept),
            "seconds": round(self.seconds + time.perf_counter() - began, 4),
        }
        edit = Edit(self.model, {w_out(self.layer): change}, tuple(self.asked[i] for i in chosen), method)
        edit.check_precision()
        return edit


def check_keys(keys: str) -> None:
    """Raises `InputError` for another word than those of `Keys`."""
    one_of(keys, get_args(Keys), "keys")


def w_out(layer: int) -> str:
    """The parameter that is edited: a layer's W_out, [d_model, d_mlp]."""
    return f"language.blocks.{layer}.mlp.down.weight"


@torch.inference_mode(False)
def solve_edit(
    model: HookedLLaVA,
    requests: Requests,
    layer: Layer,
    position: str,
    search: ValueSearch,
    *,
    contexts: Contexts = (),
    **options: Any,
) -> Edit:
    """The edit of all requests, with what the model answers under it; options as of `Solved.edit`, raises as `multedit`."""
    check_keys(options.get("keys", "mean"))
    solved, rows = _solve(model, requests, layer, position, search, contexts)
    return check_landed(solved.edit(**options), rows)


@torch.inference_mode(False)
def solve(
    model: HookedLLaVA,
    requests: Requests,
    layer: Layer,
    position: str,
    search: ValueSearch,
    *,
    contexts: Contexts = (),
) -> Solved:
    """Keys and value differences of requests, all searched for in one batch; raises as `multedit` does."""
    return _solve(model, requests, layer, position, search, contexts)[0]


def _solve(
    model: HookedLLaVA, requests: Requests, layer: Layer, position: str, search: ValueSearch, contexts: Contexts
) -> tuple[Solved, Rows]:
    began = time.perf_counter()
    prepared, chosen = choose_place(model, listed_requests(model, requests), layer, position)
    check_reach(prepared, chosen, model.cfg.n_layers)
    searched = Searched.of(model, prepared, search, contexts)
    rows = searched.rows
    keys, outputs = rows.keys_and_values(chosen)
    values = optimise_values(rows, chosen, rows.plain_mean(outputs), search, searched.essence)
    solved = Solved(
        model=model,
        layer=chosen,
        position=prepared[0].words["position"],
        asked=searched.asked(values),
        keys=LayerKeys(keys, rows.request, rows.plain),
        delta=values.delta,
        search=search,
        contexts=searched.contexts,
        seconds=time.perf_counter() - began,
    )
    return solved, rows


@dataclass(frozen=True)
class Searched:
    """What a search for values runs.

    Attributes:
        requests (tuple[Prepared, ...]): The requests.
        contexts (tuple[str, ...]): What is put before their questions besides.
        rows (Rows): Their prompts, as they are and after the contexts.
        essence (Rows | None): Prompts whose next token is to stay.
    """

    requests: tuple[Prepared, ...]
    contexts: tuple[str, ...]
    rows: Rows
    essence: Rows | None

    @classmethod
    def of(
        cls, model: HookedLLaVA, requests: Sequence[Prepared], search: ValueSearch, contexts: Contexts = ()
    ) -> Searched:
        """All prompts, run once; raises `InputError` where contexts or essence cannot be written."""
        texts = chosen_contexts(model, contexts)
        after = [after_contexts(model, request, texts) for request in requests] if texts else []
        kept = [essence_of(model, request, search.kl_prompt) for request in requests] if search.kl else []
        essence = make_rows(model, kept) if kept else None
        return cls(tuple(requests), tuple(texts), make_rows(model, requests, after), essence)

    def asked(self, values: Values) -> tuple[dict[str, Any], ...]:
        """The requests in plain words, with how probable each target became in the search, and the difference's length."""
        lengths = values.delta.norm(dim=-1).tolist()
        return tuple(
            {**request.words, "target_probability": round(p, 6), "delta_norm": round(n, 6)}
            for request, p, n in zip(self.requests, values.probability.tolist(), lengths, strict=True)
        )


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
