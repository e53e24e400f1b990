"""Multi-head attention of both towers, grouped-query attention included.

While scores, pattern and per-head results have no hook functions, attention is one fused call; what is hooked is computed
explicitly. The softmax runs in float32 either way.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from fancy_einsum import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooked_llava.architecture.sizes import TowerConfig
from hooked_llava.machine.devices import to_device
from hooked_llava.model.components.hook_point import HookPoint
from hooked_llava.model.components.kv_cache import KVCache
from hooked_llava.model.components.norm import LayerNorm, RMSNorm
from hooked_llava.model.components.prefix_attention import (
    SharedPrefix,
    attend_with_prefix,
    average_with_prefix,
    scores_with_prefix,
)
from hooked_llava.model.components.quantized import bias_or_zeros
from hooked_llava.model.components.rotary import Rotation, rotate

PreNorm = tuple[Float[Tensor, "batch pos d_model"], RMSNorm | LayerNorm]
"""The residual stream before the norm, and the norm: what `hook_q_input` and its kin are made from."""


@dataclass(frozen=True)
class AttentionContext:
    """What attention needs besides the residual stream; one object serves all layers of a forward pass.

    Attributes:
        causal (bool): Whether every query sees exactly the keys up to its own position, so that no mask is needed; then
            `allowed` is None.
        allowed (Bool[Tensor, "batch 1 query key"] | None): Which keys each query may see. None where `causal` says it,
            and where every query sees every key (the vision tower, or decoding one token).
        never_fully_masked (bool): Whether it is known that every query sees some key, since nothing is padded.
        rotation (Rotation | None): Rotary cosine and sine of the positions, or None.
        kv_cache (KVCache | None): Earlier keys and values, when decoding.
        prefix (SharedPrefix | None): Keys and values of earlier positions, shared by many rows of the batch.
        queries (Int[Tensor, " query"] | None): Indices of the positions whose output is wanted; the others give keys
            and values only. None: all.
        windowed (AttentionContext | None): What layers with a sliding window need instead; None where the window holds
            all keys.
        device (torch.device | None): Where its tensors lie; None where it has none.
    """

    causal: bool = False
    allowed: Bool[Tensor, "batch 1 query key"] | None = None
    never_fully_masked: bool = False
    rotation: Rotation | None = None
    kv_cache: KVCache | None = None
    prefix: SharedPrefix | None = None
    queries: Int[Tensor, " query"] | None = None
    windowed: AttentionContext | None = None
    device: torch.device | None = None

    def to(self, device: torch.device) -> AttentionContext:
        """The same for a block on another device; its tensors are sent there once."""
        if device not in self._elsewhere:
            rotation = self.rotation and (self.rotation[0].to(device), self.rotation[1].to(device))
            self._elsewhere[device] = replace(
                self,
                device=device,
                allowed=None if self.allowed is None else self.allowed.to(device),
                rotation=rotation,
                prefix=self.prefix and self.prefix.to(device),
                queries=None if self.queries is None else self.queries.to(device),
                windowed=self.windowed and self.windowed.to(device),
            )
        return self._elsewhere[device]

    @functools.cached_property
    def _elsewhere(self) -> dict[torch.device, AttentionContext]:
        return {}

    def read(self, x: Float[Tensor, "batch pos *rest"]) -> Float[Tensor, "batch query *rest"]:
        """x at the positions whose output is wanted, `queries`; x itself where all are."""
        return x if self.queries is None else x.index_select(1, self.queries)

    def at(self, queries: Sequence[int], n_positions: int, device: torch.device) -> AttentionContext:
        """The same for a block of which only the output at `queries` is wanted, of `n_positions` positions that enter it."""
        index = to_device(list(queries), device)
        allowed, causal = self.allowed, False
        if allowed is not None:
            allowed = allowed.index_select(2, index)
        elif self.causal and list(queries) != [n_positions - 1]:  # the last position sees every key
            allowed = (torch.arange(n_positions, device=device) <= index[:, None])[None, None]
        windowed = None if self.windowed is None else self.windowed.at(queries, n_positions, device)
        prefix = None if self.prefix is None else self.prefix.at(index)
        return replace(self, queries=index, allowed=allowed, causal=causal, windowed=windowed, prefix=prefix)

    def with_window(self, window: int | None, past: int, n_positions: int, device: torch.device) -> AttentionContext:
        """The same, and what layers with a window need: their queries see only the last `window` keys, their own included.

        The `n_positions` queries follow `past` positions in the cache, or those of the prefix.
        """
        before = past if self.prefix is None else self.prefix.stop
        if window is None or before + n_positions <= window:
            return self
        query, key = (
            torch.arange(before, before + n_positions, device=device),
            torch.arange(before + n_positions, device=device),
        )
        seen = ((key <= query[:, None]) & (key > query[:, None] - window))[None, None]  # (1, 1, query, key)
        prefix = self.prefix
        if prefix is not None:
            of_prefix, seen = seen.tensor_split([before], dim=-1)
            allowed = of_prefix if prefix.allowed is None else prefix.allowed & of_prefix
            prefix = replace(prefix, allowed=allowed)
        allowed = seen if self.allowed is None else self.allowed & seen
        return replace(self, windowed=replace(self, allowed=allowed, causal=False, prefix=prefix))

    def allowed_after_prefix(self, n: int, device: torch.device) -> Bool[Tensor, "batch 1 query key"] | None:
        """Which of n keys after a prefix each query may see; None where every query sees all."""
        if self.allowed is not None or not self.causal or n == 1:
            return self.allowed
        return torch.ones(n, n, dtype=torch.bool, device=device).tril()[None, None]

    @functools.cached_property
    def fully_masked(self) -> Bool[Tensor, "batch 1 query 1"] | None:
        """Queries that may see no key at all (padding on the left); their pattern and z are 0. None if there are none."""
        if self.allowed is None or self.never_fully_masked:
            return None
        return ~self.allowed.any(-1, keepdim=True)

    @functools.cached_property
    def allowed_in_softmax(self) -> Bool[Tensor, "batch 1 query key"] | None:
        """`allowed`, but fully masked queries see everything: a row of -inf has no softmax, so what they saw is cleared after."""
        return self.allowed if self.fully_masked is None or self.allowed is None else self.allowed | self.fully_masked

    def mask_scores(self, scores: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
        """Set the scores of blocked edges to minus infinity, in place."""
        if self.allowed is not None:
            return scores.masked_fill_(~self.allowed, float("-inf"))
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            return scores.masked_fill_(later, float("-inf"))
        return scores


def softmax_or_zero(scores: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
    """Softmax over the keys in float32; a query with no allowed key gets 0 everywhere, without NaN in gradients."""
    dtype = torch.promote_types(scores.dtype, torch.float32)
    fully_masked = scores.amax(-1, keepdim=True) == float("-inf")
    if scores.requires_grad:
        return scores.masked_fill(fully_masked, 0.0).softmax(-1, dtype=dtype).masked_fill(fully_masked, 0.0)
    return scores.softmax(-1, dtype=dtype).masked_fill_(fully_masked, 0.0)


def _only_read(changed: Tensor, given: Tensor) -> bool:
    """Whether a hook point's functions left their tensor as it is, and no gradient is asked for along it."""
    return changed is given and not given.requires_grad


class Attention(nn.Module):
    """Queries meet keys, values are averaged, heads are summed."""

    def __init__(self, cfg: TowerConfig, layer: int) -> None:
        super().__init__()
        self.cfg, self.layer = cfg, layer
        d_query, d_key_value = cfg.n_heads * cfg.d_head, cfg.n_key_value_heads * cfg.d_head
        self.query = nn.Linear(cfg.d_model, d_query, bias=cfg.qkv_bias)
        self.key = nn.Linear(cfg.d_model, d_key_value, bias=cfg.qkv_bias)
        self.value = nn.Linear(cfg.d_model, d_key_value, bias=cfg.qkv_bias)
        self.output = nn.Linear(d_query, cfg.d_model, bias=cfg.out_bias)
        self.scale = cfg.d_head**-0.5
        self.windowed = layer in cfg.windowed_layers
        self.hook_q_input, self.hook_k_input, self.hook_v_input = HookPoint(), HookPoint(), HookPoint()
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        if cfg.rotary is not None:
            self.hook_rot_q, self.hook_rot_k = HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_z, self.hook_result = HookPoint(), HookPoint()

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], context: AttentionContext, *, pre_norm: PreNorm
    ) -> Float[Tensor, "batch query d_model"]:
        """What attention adds to the residual stream, given the normalized residual stream x."""
        if self.windowed and context.windowed is not None:
            context = context.windowed
        query_source = context.read(x), (context.read(pre_norm[0]), pre_norm[1])
        q = self.hook_q(self.project(self.query, self.hook_q_input, *query_source))  # (batch, query, head, d_head)
        k = self.hook_k(self.project(self.key, self.hook_k_input, x, pre_norm))  # (batch, pos, kv_head, d_head)
        v = self.hook_v(self.project(self.value, self.hook_v_input, x, pre_norm))  # (batch, pos, kv_head, d_head)
        if context.rotation is not None:
            q = self.hook_rot_q(rotate(q, (context.read(context.rotation[0]), context.read(context.rotation[1]))))
            k = self.hook_rot_k(rotate(k, context.rotation))
        z = self.hook_z(self.attend(q, k, v, context))  # (batch, query, head, d_head)
        out = self.output(z.flatten(2))
        if not self.hook_result.hooked:
            return out
        result = einsum("b p h d, h d m -> b p h m", z, self.W_O)
        changed = self.hook_result(result)
        # What was changed is added to what the map itself gives, which may round in its own way.
        return out if _only_read(changed, result) else out + (changed - result).sum(2)

    def project(
        self, linear: nn.Linear, hook_input: HookPoint, x: Float[Tensor, "batch pos d_model"], pre_norm: PreNorm
    ) -> Float[Tensor, "batch pos any_head d_head"]:
        """Queries, keys or values of all heads; if the input is hooked, each head reads its own copy."""
        out = linear(x).unflatten(-1, (-1, self.cfg.d_head))
        if not hook_input.hooked:
            return out
        resid, norm = pre_norm
        copies = resid[:, :, None].expand(-1, -1, out.shape[2], -1)  # (batch, pos, head, d_model)
        given = copies.view_as(copies)
        changed = hook_input(given)
        if _only_read(changed, given):
            return out
        weight = linear.weight.unflatten(0, (-1, self.cfg.d_head))  # (head, d_head, d_model)
        # x may carry edits made inside the norm; the difference adds to it what was changed before the norm.
        return out + einsum("b p h m, h d m -> b p h d", norm.fused(changed) - norm.fused(copies), weight)

    def attend(
        self,
        q: Float[Tensor, "batch query head d_head"],
        k: Float[Tensor, "batch pos kv_head d_head"],
        v: Float[Tensor, "batch pos kv_head d_head"],
        context: AttentionContext,
    ) -> Float[Tensor, "batch query head d_head"]:
        """Values averaged by the pattern, in one fused call unless scores or pattern are hooked."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if context.kv_cache is not None:
            k, v = context.kv_cache.append(self.layer, k, v)
        needs_gradients = context.prefix is not None and torch.is_grad_enabled()  # `attend_with_prefix` has none
        if self.hook_attn_scores.hooked or self.hook_pattern.hooked or needs_gradients:
            return self.attend_explicitly(q, k, v, context).transpose(1, 2)
        if context.prefix is not None:
            allowed = context.allowed_after_prefix(k.shape[2], k.device)
            return attend_with_prefix(
                q, k, v, context.prefix.layer(self.layer, k.device), allowed, self.scale
            ).transpose(1, 2)
        z = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=context.allowed_in_softmax,
            is_causal=context.causal,
            scale=self.scale,
            enable_gqa=self.cfg.n_key_value_heads != self.cfg.n_heads,
        )
        return (z if context.fully_masked is None else z.masked_fill(context.fully_masked, 0.0)).transpose(1, 2)

    def softmax(
        self, scores: Float[Tensor, "batch head query key"], context: AttentionContext
    ) -> Float[Tensor, "batch head query key"]:
        """The pattern in float32. Only padding, and functions on the scores, can leave a query without a key."""
        if self.hook_attn_scores.hooked or not (context.allowed is None or context.never_fully_masked):
            return softmax_or_zero(scores)
        return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))

    def attend_explicitly(
        self,
        q: Float[Tensor, "batch head query d_head"],
        k: Float[Tensor, "batch kv_head key d_head"],
        v: Float[Tensor, "batch kv_head key d_head"],
        context: AttentionContext,
    ) -> Float[Tensor, "batch head query d_head"]:
        """The same through scores and pattern, so that both can be read and changed."""
        q = q * self.scale
        if context.prefix is not None:
            prefix, allowed = (
                context.prefix.layer(self.layer, k.device),
                context.allowed_after_prefix(k.shape[2], k.device),
            )
            scores = self.hook_attn_scores(scores_with_prefix(q, k, prefix, allowed))
            pattern = self.hook_pattern(
                self.softmax(scores, context).to(q.dtype)
            )  # (batch, head, query, prefix and key)
            return average_with_prefix(pattern, v, prefix)
        groups = self.cfg.n_heads // self.cfg.n_key_value_heads
        k, v = (t if groups == 1 else t.repeat_interleave(groups, dim=1) for t in (k, v))
        scores = self.hook_attn_scores(context.mask_scores(q @ k.mT))
        pattern = self.hook_pattern(self.softmax(scores, context).to(q.dtype))  # (batch, head, query, key)
        return pattern @ v

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """Query weights, a view (TransformerLens's orientation)."""
        return self.query.weight.unflatten(0, (-1, self.cfg.d_head)).transpose(1, 2)

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """Key weights, a view."""
        return self.key.weight.unflatten(0, (-1, self.cfg.d_head)).transpose(1, 2)

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """Value weights, a view."""
        return self.value.weight.unflatten(0, (-1, self.cfg.d_head)).transpose(1, 2)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """Output weights, a view."""
        return self.output.weight.T.unflatten(0, (-1, self.cfg.d_head))

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        """Query bias, zeros if there is none."""
        return self._head_bias(self.query)

    @property
    def b_K(self) -> Float[Tensor, "kv_head d_head"]:
        """Key bias, zeros if there is none."""
        return self._head_bias(self.key)

    @property
    def b_V(self) -> Float[Tensor, "kv_head d_head"]:
        """Value bias, zeros if there is none."""
        return self._head_bias(self.value)

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """Output bias, zeros if there is none."""
        return bias_or_zeros(self.output)

    def _head_bias(self, linear: nn.Linear) -> Float[Tensor, "any_head d_head"]:
        return bias_or_zeros(linear).unflatten(0, (-1, self.cfg.d_head))
