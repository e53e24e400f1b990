"""MEMIT (Meng et al. 2023, arXiv 2210.07229): many facts at once, each change spread over the MLPs of several layers.

Value z_i: the residual stream that leaves the last of the layers at the edited position, plus a difference, optimised so that
the model gives the wanted answer. Layer after layer, from the lowest: what is missing at z is divided by the number of
layers that are left, and the layer's W_out takes its share by the closed form with C_0 = lam C (equations 14 and 20).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.editing.change import Change
from hooked_llava.editing.contexts import ESSENCE, Contexts
from hooked_llava.editing.covariance import KeyCovariance
from hooked_llava.editing.edit import Edit
from hooked_llava.editing.landing import check_landed
from hooked_llava.editing.layer_choice import choose_place
from hooked_llava.editing.request import Requests, check_reach, listed_requests
from hooked_llava.editing.rows import Rows
from hooked_llava.editing.solved import Keys, LayerKeys, Searched, check_keys, w_out
from hooked_llava.editing.values import KlAt, Values, ValueSearch, optimise_values
from hooked_llava.errors import InputError
from hooked_llava.model.cache_hooks import caching_hook
from hooked_llava.model.llava import HookedLLaVA

MEMIT_LAM = 100.0
"""Weight of C against the requests' keys."""


def memit(
    model: HookedLLaVA,
    requests: Requests,
    covariance: Sequence[KeyCovariance],
    *,
    position: str = "auto",
    lam: float = MEMIT_LAM,
    keys: Keys = "mean",
    contexts: Contexts = (),
    clamp: float = 0.75,
    steps: int = 25,
    lr: float = 0.5,
    weight_decay: float = 1e-3,
    stop: float | None = 0.99,
    stop_loss: float | None = None,
    per_token: bool = False,
    kl: float = 0.0,
    kl_prompt: str = ESSENCE,
    kl_at: KlAt = "last",
) -> Edit:
    """An edit of several layers' W_out after which the model answers every request with its target; not yet applied.

    Args:
        model: the model; edits that are active on it stay, and are built upon.
        requests: what to change, all together.
        covariance: from `key_covariances`, one for each layer that is edited.
        position: whose key is edited, as in `multedit`; with "auto" the trace is read in the last of the layers.
        lam: weight of C against the requests' keys, equation 15; the released code has 15000 for GPT-J. Larger: the answers of
            other prompts stay more, and each request gets less of its difference.
        keys: as in `rome`.
        contexts: as in `rome`: equation 19 averages each layer's key over them. The released code counts the prompt without
            context as much as all others together; here each prompt counts once.
        clamp: longest difference of the residual stream, in its own lengths; 0.75 in the released code.
        steps: steps of Adam at most, for the differences at the last of the layers.
        lr: learning rate of Adam.
        weight_decay: as in `rome`, with the residual stream in place of the MLP's output.
        stop: as in `rome`.
        stop_loss: as in `rome`.
        per_token: as in `rome`.
        kl: as in `rome`.
        kl_prompt: as in `rome`.
        kl_at: as in `rome`.

    Implements algorithm 1 of 2210.07229, with the keys and what is missing at z measured anew under the layers that are changed
    already. Costs the search of `multedit`, and a run of the requests from the first layer to the last one for each layer.
    Raises as `rome`, and `InputError` for no covariance and two of one layer.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.editing import EditRequest, key_covariances
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> seen = key_covariances(model, [model.prepare(f"Who made the {s}?") for s in ("ring", "moon")], layers=[3, 4])
    >>> requests = [EditRequest("Who made the star?", "Boris"), EditRequest("Who owns the ring?", "Hugo")]
    >>> edit = memit(model, requests, seen, position="last", lam=1.0)
    >>> edit.layers, edit.landed
    ([3, 4], True)
    """
    check_keys(keys)
    search = ValueSearch(steps, lr, clamp, weight_decay, stop, stop_loss, per_token, kl, kl_prompt, kl_at)
    solved = solve_spread(model, requests, covariance, position, search, contexts=contexts)
    return check_landed(solved.edit(lam=lam, keys=keys), solved.searched.rows)


@dataclass(frozen=True)
class SpreadValues:
    """Values of requests at the last of several layers: what is left are closed forms, and runs through these layers.

    Attributes:
        model (HookedLLaVA): The model that edits are computed for.
        covariance (tuple[KeyCovariance, ...]): The covariances, from the lowest layer up.
        searched (Searched): What was run.
        values (Values): The differences.
        target (Float[Tensor, "request d_model"]): z: the residual stream that is to leave the last of the layers.
        search (ValueSearch): How the differences were searched.
        seconds (float): What finding them took.
    """

    model: HookedLLaVA
    covariance: tuple[KeyCovariance, ...]
    searched: Searched
    values: Values
    target: Float[Tensor, "request d_model"]
    search: ValueSearch
    seconds: float = field(default=0.0, compare=False)

    @property
    def layers(self) -> list[int]:
        """The layers that are edited, from the lowest up."""
        return [one.layer for one in self.covariance]

    @torch.no_grad()
    def edit(self, *, only: Sequence[int] | None = None, lam: float = MEMIT_LAM, keys: Keys = "mean") -> Edit:
        """The edit of all requests together, or of some of them; raises `InputError` as `Solved.edit`."""
        began, lam, rows = time.perf_counter(), float(lam), self.searched.rows
        chosen = list(range(len(self.target))) if only is None else list(only)
        changes, weights = dict[str, Change](), dict[str, Tensor]()
        for left, one in zip(range(len(self.layers), 0, -1), self.covariance, strict=True):
            own, now = self._under(weights, one.layer)
            share = (self.target - rows.plain_mean(now)) / left
            change = LayerKeys(own, rows.request, rows.plain).update(share, chosen, lam=lam, keys=keys, covariance=one)
            name = w_out(one.layer)
            changes[name], weight = change, self.model.get_parameter(name).detach()
            weights[name] = change.added_to(weight.double()).to(weight.dtype)
        contexts = self.searched.contexts
        method = {
            "name": "memit",
            "layers": self.layers,
            "position": self.searched.requests[0].words["position"],
            "lam": lam,
            "keys": keys,
            **self.search.words(),
            **({"contexts": list(contexts)} if contexts else {}),
            "seconds": round(self.seconds + time.perf_counter() - began, 4),
        }
        asked = self.searched.asked(self.values)
        edit = Edit(self.model, changes, tuple(asked[i] for i in chosen), method)
        edit.check_precision()
        return edit

    def _under(
        self, weights: Mapping[str, Tensor], layer: int
    ) -> tuple[Float[Tensor, "row d_mlp"], Float[Tensor, "row d_model"]]:
        """With some weights changed: keys of a layer, and the residual stream that leaves the last one, where is edited."""
        kept, seen, name = self.searched.rows.kept, dict[str, Tensor](), self.model.hooks_table.name("mlp.post", layer)
        with self.model.hooks([([name], caching_hook(seen, self.model))]):
            resid = kept.rerun(range(self.layers[0], self.layers[-1] + 1), weights=weights)
        return _edited(self.searched.rows, seen[name]), _edited(self.searched.rows, resid)


@torch.inference_mode(False)
def solve_spread(
    model: HookedLLaVA,
    requests: Requests,
    covariance: Sequence[KeyCovariance],
    position: str,
    search: ValueSearch,
    *,
    contexts: Contexts = (),
) -> SpreadValues:
    """Values of requests at the last of several layers, all searched for in one batch; raises as `memit` does."""
    began, by_layer = time.perf_counter(), _by_layer(model, covariance)
    last = by_layer[-1].layer
    prepared, _ = choose_place(model, listed_requests(model, requests), last, position)
    check_reach(prepared, last, model.cfg.n_layers)
    searched = Searched.of(model, prepared, search, contexts)
    rows = searched.rows
    before = rows.plain_mean(_edited(rows, rows.kept.entering(last + 1)))
    values = optimise_values(rows, last, before, search, searched.essence)
    target, seconds = before + values.delta, time.perf_counter() - began
    return SpreadValues(model, by_layer, searched, values, target, search, seconds)


def _by_layer(model: HookedLLaVA, covariance: Sequence[KeyCovariance]) -> tuple[KeyCovariance, ...]:
    given = [covariance] if isinstance(covariance, KeyCovariance) else list(covariance)
    layers = [one.layer for one in given]
    if not given or len(set(layers)) < len(layers):
        raise InputError(
            f"covariance= is of layers {layers}; expected one for each layer to edit, see key_covariances."
        )
    for one in given:
        one.check_model(model)
    return tuple(sorted(given, key=lambda one: one.layer))


def _edited(rows: Rows, x: Float[Tensor, "row pos some_width"]) -> Float[Tensor, "row some_width"]:
    """What stands at each row's edited position."""
    return x[torch.arange(len(x), device=x.device), rows.edited.to(x.device)].to(rows.edited.device)
