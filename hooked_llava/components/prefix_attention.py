"""Attention of many rows to a prefix they share, without a copy of the prefix for each row.

The queries of all rows of a prompt meet the prefix's keys in one matrix product, and their own suffix in another; both
parts share one softmax: with maxima m and sums s of exponentials over each part, z = (e^{m1-m} z1 + e^{m2-m} z2) /
(e^{m1-m} s1 + e^{m2-m} s2). Exact, not an approximation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the positions before those in the batch, kept from an earlier run.

    The batch's rows are grouped by prompt, equally many for each.
    """

    k: Float[Tensor, "prompt kv_head key d_head"]
    """Keys, rotated."""
    v: Float[Tensor, "prompt kv_head key d_head"]
    """Values."""
    allowed: Bool[Tensor, "prompt 1 1 key"] | None = None
    """False at padding; None where there is none."""

    def for_each_row(self, n_rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask as views with one entry for each row, for where scores are wanted explicitly."""
        each = n_rows // len(self.k)

        def spread(x: Tensor) -> Tensor:
            return x[:, None].expand(-1, each, *x.shape[1:]).flatten(0, 1)

        return spread(self.k), spread(self.v), None if self.allowed is None else spread(self.allowed)


def attend_with_prefix(
    q: Float[Tensor, "row head query d_head"],
    k: Float[Tensor, "row kv_head key d_head"],
    v: Float[Tensor, "row kv_head key d_head"],
    prefix: Prefix,
    allowed: Bool[Tensor, "any_row 1 query key"] | None,
    scale: float,
) -> Float[Tensor, "row head query d_head"]:
    """Values of prefix and suffix averaged by one softmax over both; without gradients (works in place).

    `allowed` says which keys of the suffix each query may see (the prefix lies before all of them).
    """
    n_prompts, n_kv_heads = prefix.k.shape[:2]
    groups, n_queries = q.shape[1] // n_kv_heads, q.shape[2]
    q = q * scale

    own = rearrange(q, "r (k g) n d -> r k (g n) d", g=groups)
    within = own @ k.mT  # (row, kv_head, group * query, key)
    if allowed is not None:
        within = within.unflatten(2, (groups, n_queries)).masked_fill(~allowed[:, :, None], float("-inf")).flatten(2, 3)
    z_within, max_within, sum_within = _part(within, v)

    shared = rearrange(q, "(b r) (k g) n d -> b k (r g n) d", b=n_prompts, g=groups)
    before = shared @ prefix.k.mT  # (prompt, kv_head, row * group * query, key)
    if prefix.allowed is not None:
        before = before.masked_fill(~prefix.allowed, float("-inf"))
    parts = _part(before, prefix.v)
    sizes = {"g": groups, "n": n_queries}
    z_before, max_before, sum_before = (rearrange(x, "b k (r g n) d -> (b r) k (g n) d", **sizes) for x in parts)

    largest = torch.maximum(max_within, max_before)
    weight_within, weight_before = (max_within - largest).exp(), (max_before - largest).exp()
    total = sum_within * weight_within + sum_before * weight_before
    z = (z_within * weight_within + z_before * weight_before) / total.clamp(min=torch.finfo(total.dtype).tiny)
    return rearrange(z, "r k (g n) d -> r (k g) n d", g=groups).to(v.dtype)


def _part(
    scores: Float[Tensor, "*batch query key"], v: Float[Tensor, "*batch key d_head"]
) -> tuple[Float[Tensor, "*batch query d_head"], Float[Tensor, "*batch query 1"], Float[Tensor, "*batch query 1"]]:
    """Unnormalized average of the values, the largest score, and the sum of exponentials; the softmax in float32."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    largest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)  # finite where all is blocked
    weights = (scores - largest).exp_()
    return (weights.to(v.dtype) @ v).to(scores.dtype), largest, weights.sum(-1, keepdim=True)
