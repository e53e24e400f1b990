"""Attention of many rows to a prefix they share, without a copy of the prefix for each row.

The queries of all rows of a prompt meet the prefix's keys in one matrix product, and their own suffix in another; both
parts share one softmax: with z1, z2 the averages over each part and L1, L2 the logarithms of their sums of
exponentials, z = w z1 + (1 - w) z2 where w = 1 / (1 + e^{L2 - L1}). Exact, not an approximation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_llava.model.components.kv_cache import KVCache

_FLASH_ON_CPU = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""What torch's fused attention calls on a CPU; by this name it also gives the log-sum-exp."""


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the positions before those in the batch, kept from an earlier run.

    The batch's rows are grouped by prompt, equally many for each.

    Attributes:
        k (Float[Tensor, "prompt kv_head key d_head"]): Keys, rotated.
        v (Float[Tensor, "prompt kv_head key d_head"]): Values.
        allowed (Bool[Tensor, "any_prompt 1 any_query key"] | None): Which keys the queries may see: False at padding
            and outside of a sliding window; None where all are seen.
    """

    k: Float[Tensor, "prompt kv_head key d_head"]
    v: Float[Tensor, "prompt kv_head key d_head"]
    allowed: Bool[Tensor, "any_prompt 1 any_query key"] | None = None


@dataclass(frozen=True)
class SharedPrefix:
    """The first positions of an earlier run, from which every layer reads its own `Prefix`.

    Attributes:
        kv (KVCache): Keys and values of all layers; they may lie on another device and in another dtype.
        stop (int): How many of the positions belong to the prefix.
        allowed (Bool[Tensor, "any_prompt 1 any_query key"] | None): Which keys the queries may see: False at padding
            and outside of a sliding window; None where all are seen.
        dtype (torch.dtype): The dtype in which attention runs.
    """

    kv: KVCache
    stop: int
    allowed: Bool[Tensor, "any_prompt 1 any_query key"] | None
    dtype: torch.dtype

    def to(self, device: torch.device) -> SharedPrefix:
        """The same for queries on another device; keys and values go where they are read."""
        return self if self.allowed is None else replace(self, allowed=self.allowed.to(device))

    def at(self, queries: Int[Tensor, " query"]) -> SharedPrefix:
        """The same for some of the queries."""
        if self.allowed is None or self.allowed.shape[2] == 1:
            return self
        return replace(self, allowed=self.allowed.index_select(2, queries))

    def layer(self, layer: int, device: torch.device) -> Prefix:
        """Keys and values of one layer, on the device where its attention runs."""
        k, v = (part[:, :, : self.stop].to(device, self.dtype) for part in self.kv.layer(layer))
        return Prefix(k, v, self.allowed)


def attend_with_prefix(
    q: Float[Tensor, "row head query d_head"],
    k: Float[Tensor, "row kv_head key d_head"],
    v: Float[Tensor, "row kv_head key d_head"],
    prefix: Prefix,
    allowed: Bool[Tensor, "any_row 1 query key"] | None,
    scale: float,
) -> Float[Tensor, "row head query d_head"]:
    """Values of prefix and suffix averaged by one softmax over both; without gradients.

    `allowed` says which keys of the suffix each query may see (the prefix lies before all of them).
    """
    q, k, v, prefix = _in_autocast_dtype(q, k, v, prefix)
    groups = q.shape[1] // k.shape[1]
    own_allowed = _repeated(allowed, groups)
    own, own_sum = _average(_by_row(q, groups), k, v, own_allowed, scale)
    allowed = _repeated(prefix.allowed, len(q) // len(prefix.k) * groups)
    parts = _average(_by_prompt(q, prefix, groups), prefix.k, prefix.v, allowed, scale)
    sizes = {"r": len(q) // len(prefix.k), "n": q.shape[2]}
    before, before_sum = (rearrange(x, "b k (r g n) d -> (b r) k (g n) d", g=groups, **sizes) for x in parts)
    z = torch.lerp(before, own, torch.sigmoid(own_sum - before_sum))
    return rearrange(z, "r k (g n) d -> r (k g) n d", g=groups).to(v.dtype)


def scores_with_prefix(
    q: Float[Tensor, "row head query d_head"],
    k: Float[Tensor, "row kv_head key d_head"],
    prefix: Prefix,
    allowed: Bool[Tensor, "any_row 1 query key"] | None,
) -> Float[Tensor, "row head query all_keys"]:
    """Scores of prefix and suffix side by side, blocked edges minus infinity, for where they are read or changed."""
    groups, minus_infinity = q.shape[1] // k.shape[1], float("-inf")
    own = rearrange(_by_row(q, groups) @ k.mT, "r k (g n) s -> r (k g) n s", g=groups)
    if allowed is not None:
        own.masked_fill_(~allowed, minus_infinity)
    before = _by_prompt(q, prefix, groups) @ prefix.k.mT  # (prompt, kv_head, row * group * query, key)
    if (seen := _repeated(prefix.allowed, len(q) // len(prefix.k) * groups)) is not None:
        before.masked_fill_(~seen, minus_infinity)
    before = rearrange(before, "b k (r g n) s -> (b r) (k g) n s", g=groups, n=q.shape[2])
    return torch.cat([before, own], dim=-1)


def average_with_prefix(
    pattern: Float[Tensor, "row head query all_keys"], v: Float[Tensor, "row kv_head key d_head"], prefix: Prefix
) -> Float[Tensor, "row head query d_head"]:
    """Values of prefix and suffix averaged by a pattern over both."""
    groups, n_queries = pattern.shape[1] // v.shape[1], pattern.shape[2]
    before, own = pattern.tensor_split([prefix.k.shape[2]], dim=-1)
    z_before = _by_prompt(before, prefix, groups) @ prefix.v  # (prompt, kv_head, row * group * query, d_head)
    z_own = rearrange(_by_row(own, groups) @ v, "r k (g n) d -> r (k g) n d", g=groups)
    return z_own + rearrange(z_before, "b k (r g n) d -> (b r) (k g) n d", g=groups, n=n_queries)


def _in_autocast_dtype(q: Tensor, k: Tensor, v: Tensor, prefix: Prefix) -> tuple[Tensor, Tensor, Tensor, Prefix]:
    """Everything in the dtype that autocast takes for attention, where it is on; by its inner name it does not see to it."""
    if not torch.is_autocast_enabled(q.device.type):
        return q, k, v, prefix
    dtype = torch.get_autocast_dtype(q.device.type)
    return q.to(dtype), k.to(dtype), v.to(dtype), Prefix(prefix.k.to(dtype), prefix.v.to(dtype), prefix.allowed)


def _repeated(
    allowed: Bool[Tensor, "any_batch 1 any_query key"] | None, times: int
) -> Bool[Tensor, "any_batch 1 any_group_query key"] | None:
    """What each query may see, for queries that come in so many groups."""
    return allowed if allowed is None or allowed.shape[2] == 1 else allowed.repeat(1, 1, times, 1)


def _by_row(x: Tensor, groups: int) -> Float[Tensor, "row kv_head group_query any"]:
    """The heads that share keys and values as further queries."""
    return rearrange(x, "r (k g) n s -> r k (g n) s", g=groups)


def _by_prompt(x: Tensor, prefix: Prefix, groups: int) -> Float[Tensor, "prompt kv_head row_group_query any"]:
    """The rows of a prompt as further queries, too."""
    return rearrange(x, "(b r) (k g) n s -> b k (r g n) s", b=len(prefix.k), g=groups)


def _average(
    q: Float[Tensor, "batch kv_head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    v: Float[Tensor, "batch kv_head key d_head"],
    allowed: Bool[Tensor, "any_batch 1 any_query key"] | None,
    scale: float,
) -> tuple[Float[Tensor, "batch kv_head query d_head"], Float[Tensor, "batch kv_head query 1"]]:
    """Values averaged over the allowed keys, and the logarithm of the sum of exponentials, both in float32 at least."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    on_cpu = q.device.type == "cpu"
    if _FLASH_ON_CPU is not None and on_cpu and (allowed is None or bool(allowed.any(-1).all())):
        mask = None if allowed is None else q.new_zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
        z, total = _FLASH_ON_CPU(q, k, v, attn_mask=mask, scale=scale)
        return z.to(dtype), total[..., None]
    scores = ((q * scale) @ k.mT).to(dtype)
    if allowed is not None:
        scores.masked_fill_(~allowed, float("-inf"))
    lowest, tiny = torch.finfo(dtype).min, torch.finfo(dtype).tiny
    largest = scores.amax(-1, keepdim=True).clamp(min=lowest)  # finite where all is blocked
    weights = scores.sub_(largest).exp_()
    total = weights.sum(-1, keepdim=True)
    z = (weights.to(v.dtype) @ v).to(dtype) / total.clamp(min=tiny)
    return z, (largest + total.log()).clamp(min=lowest)
