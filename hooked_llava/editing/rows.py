"""Prompts of many requests as one batch with their targets appended, run once, and re-run from a layer on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_llava.editing.request import Prepared
from hooked_llava.model.cache_hooks import caching_hook
from hooked_llava.model.language import count_positions
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.readout.answer import NOTHING, answer_log_probability, append_tokens
from hooked_llava.replay.kept_run import KeptRun, keep


@dataclass(frozen=True)
class Rows:
    """Prompts with their targets, one row each, and the run that is kept of them.

    Attributes:
        kept (KeptRun): The kept run of the prompts.
        request (Int[Tensor, " row"]): Which request each row belongs to.
        edited (Int[Tensor, " row"]): The position that is edited.
        read (Int[Tensor, " read"]): Positions that predict the targets' tokens, the same in every row.
        target (Int[Tensor, "row read"]): The token wanted there.
        counts (Float[Tensor, "row read"]): 1 where the row has a target token, 0 after its target's end.
        plain (Bool[Tensor, " row"]): True for the requests' own prompts, False for these after a context.
    """

    kept: KeptRun
    request: Int[Tensor, " row"]
    edited: Int[Tensor, " row"]
    read: Int[Tensor, " read"]
    target: Int[Tensor, "row read"]
    counts: Float[Tensor, "row read"]
    plain: Bool[Tensor, " row"]

    @property
    def ids(self) -> Int[Tensor, "row read 1"]:
        """The targets' tokens, -1 after a target's end."""
        return torch.where(self.counts.bool(), self.target, NOTHING)[..., None]

    @cached_property
    def n_requests(self) -> int:
        """How many requests there are."""
        return int(self.request.max()) + 1

    def mean(self, values: Float[Tensor, "row ..."]) -> Float[Tensor, "request ..."]:
        """Averages over the rows of each request."""
        return mean_by_request(values, self.request, self.n_requests)

    def plain_mean(self, values: Float[Tensor, "row ..."]) -> Float[Tensor, "request ..."]:
        """Averages over each request's own prompts, contexts left out."""
        return mean_by_request(values[self.plain], self.request[self.plain], self.n_requests)

    def without_contexts(self) -> Rows:
        """The requests' own prompts, to be run from position 0."""
        if bool(self.plain.all()):
            return self
        own = self.plain.nonzero()[:, 0]
        kept = self.kept[own.tolist()]
        dropped = self.kept.n_positions - kept.n_positions
        return Rows(
            kept,
            self.request[own],
            self.edited[own] - dropped,
            self.read - dropped,
            self.target[own],
            self.counts[own],
            self.plain[own],
        )

    def lowest(self, values: Float[Tensor, " row"]) -> Float[Tensor, " request"]:
        """The lowest value among the rows of each request."""
        return values.new_full((self.n_requests,), math.inf).scatter_reduce(0, self.request, values, "amin")

    @cached_property
    def start(self) -> int:
        """The first position that is edited or read."""
        return int(min(self.edited.min(), self.read.min()))

    def entering(self, layer: int) -> Float[Tensor, "row suffix d_model"]:
        """The kept residual stream entering a layer, from the first position on that an edit reaches."""
        return self.kept.entering(layer, self.start)

    def logits(
        self, resid: Float[Tensor, "row suffix d_model"], layer: int, queries: Sequence[int] | None = None
    ) -> Float[Tensor, "row any_read d_vocab"]:
        """Logits where the targets are read (or at `queries` of the suffix), from the residual stream entering a layer.

        Gradients pass.
        """
        queries = (self.read - self.start).tolist() if queries is None else queries
        return self.kept.logits(layer, resid, start=self.start, queries=queries)

    def logits_with(self, weights: Mapping[str, Tensor], first: int) -> Float[Tensor, "row read d_vocab"]:
        """Logits where the targets are read, with other weights (by parameter name) from block `first` on; gradients pass.

        All positions are run, since weights act on all.
        """
        return self.kept.logits(first, queries=self.read.tolist(), weights=weights)

    def log_probability(self, logits: Float[Tensor, "row read d_vocab"]) -> Float[Tensor, " row"]:
        """log P(target) in nats."""
        return answer_log_probability(logits, self.ids)

    @torch.no_grad()
    def keys_and_values(self, layer: int) -> tuple[Float[Tensor, "row d_mlp"], Float[Tensor, "row d_model"]]:
        """What the edited position's neurons are, and what the MLP adds there: `mlp.hook_post` and `hook_mlp_out`."""
        model, seen = self.kept.model, dict[str, Tensor]()
        names = [model.hooks_table.name(site, layer) for site in ("mlp.post", "mlp_out")]
        with model.hooks([(names, caching_hook(seen, model))]):
            self.kept.rerun(range(layer, layer + 1), start=self.start)
        rows = torch.arange(len(self.edited), device=self.edited.device)
        key, value = (seen[name][rows, self.edited - self.start] for name in names)
        return key, value


def mean_by_request(
    values: Float[Tensor, "row ..."], request: Int[Tensor, " row"], n_requests: int
) -> Float[Tensor, "request ..."]:
    """Averages of the rows that belong to each request."""
    total = values.new_zeros(n_requests, *values.shape[1:]).index_add(0, request, values)
    counts = torch.bincount(request, minlength=n_requests).to(values)
    return total / counts.view(-1, *[1] * (values.ndim - 1))


def make_rows(model: HookedLLaVA, requests: Sequence[Prepared], contexts: Sequence[Prepared] = ()) -> Rows:
    """All prompts of all requests as one batch, run once; `contexts` are further prompts of each request."""
    own, requests = len(requests), [*requests, *contexts]
    longest = max(request.n_target for request in requests)
    inputs = joined(model, [request.inputs for request in requests])
    n_prompt, device = inputs.shape[1], inputs.device
    owners = [i % own for i, request in enumerate(requests) for _ in range(len(request.inputs))]
    plain = [i < own for i, request in enumerate(requests) for _ in range(len(request.inputs))]
    targets = [ids for request in requests for ids in request.targets]
    counts = [[float(t < len(ids)) for t in range(longest)] for ids in targets]
    target = torch.tensor([_filled(ids, longest) for ids in targets], device=device)
    # What fills up shorter targets comes after all that is read.
    whole = append_tokens(model, inputs, target[:, :-1]) if longest > 1 else inputs
    edited = [n_prompt + back for request in requests for back in request.from_end]
    return Rows(
        kept=keep(model, whole),
        request=torch.tensor(owners, device=device),
        edited=torch.tensor(edited, device=device),
        read=torch.arange(n_prompt - 1, n_prompt - 1 + longest, device=device),
        target=target,
        counts=torch.tensor(counts, device=device),
        plain=torch.tensor(plain, device=device),
    )


def joined(model: HookedLLaVA, batches: Sequence[Inputs]) -> Inputs:
    """Batches of prompts as one, padded on the left to the length of the longest; without texts and spans."""
    batches = [batch.padded_left() for batch in batches]
    if len(batches) == 1:
        return batches[0]
    length = max(batch.shape[1] for batch in batches)
    fields: dict[str, Any] = {
        # Token ids at padding are never read; the last token is no image token.
        "input_ids": torch.cat([_lengthened(b.input_ids, length, b.input_ids[:, -1:]) for b in batches]),
        "attention_mask": torch.cat([_lengthened(b.attention_mask, length, False) for b in batches]),
    }
    if any(batch.position_ids is not None for batch in batches):
        fields["position_ids"] = torch.cat([_lengthened(_position_ids(batch), length, 0) for batch in batches])
    images = [batch.image_fields for batch in batches if batch.n_images]
    for name in set.intersection(*map(set, images)) if images else ():
        fields[name] = torch.cat([of_batch[name] for of_batch in images])
    return model.as_inputs(fields)


def _filled(ids: tuple[int, ...], length: int) -> list[int]:
    return [*ids, *[ids[-1]] * (length - len(ids))]


def _position_ids(batch: Inputs) -> Int[Tensor, "batch pos"]:
    if batch.position_ids is not None:
        return batch.position_ids
    return count_positions(batch.shape[1], batch.attention_mask, batch.device)


def _lengthened(x: Tensor, length: int, fill: Any) -> Tensor:
    """Padded on the left."""
    missing = length - x.shape[1]
    filling = fill.expand(-1, missing) if isinstance(fill, Tensor) else x.new_full((len(x), missing), fill)
    return torch.cat([filling, x], dim=1)
