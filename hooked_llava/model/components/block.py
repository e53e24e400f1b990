"""One transformer block, two additions to the residual stream; and the blocks of a tower, run in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_llava.architecture.sizes import TowerConfig
from hooked_llava.model.components.attention import Attention, AttentionContext
from hooked_llava.model.components.hook_point import HookPoint
from hooked_llava.model.components.mlp import MLP
from hooked_llava.model.components.norm import make_norm


class _Block(nn.Module):
    """What both kinds of blocks are made of."""

    hook_out_is_single_residual_stream = True  # for TransformerLens's logit lens

    def __init__(self, cfg: TowerConfig, layer: int) -> None:
        super().__init__()
        self.ln1 = make_norm(cfg)
        self.attn = Attention(cfg, layer)
        if not cfg.parallel_attn_mlp:  # here, since hashes of the weights go by the order of the parameters
            self.ln2 = make_norm(cfg)
        self.mlp = MLP(cfg)
        self.hook_resid_pre = HookPoint()
        self.hook_attn_out = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    @property
    def device(self) -> torch.device:
        """Where the block runs: all of its weights lie there."""
        return self.ln1.weight.device


class Block(_Block):
    """Attention and MLP, each reading a normalized copy of the residual stream and adding to it."""

    def __init__(self, cfg: TowerConfig, layer: int) -> None:
        super().__init__(cfg, layer)
        self.hook_resid_mid = HookPoint()
        self.hook_mlp_in = HookPoint()

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], context: AttentionContext
    ) -> Float[Tensor, "batch query d_model"]:
        """The residual stream after the block, at the positions that `context` wants."""
        resid_pre = self.hook_resid_pre(resid)
        attn_out = self.hook_attn_out(self.attn(self.ln1(resid_pre), context, pre_norm=(resid_pre, self.ln1)))
        resid_mid = self.hook_resid_mid(context.read(resid_pre) + attn_out)
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid_mid))))
        return self.hook_resid_post(resid_mid + mlp_out)


class ParallelBlock(_Block):
    """Attention and MLP side by side: both read the same normalized copy of the residual stream, and both add to it (Phi)."""

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], context: AttentionContext
    ) -> Float[Tensor, "batch query d_model"]:
        """The residual stream after the block, at the positions that `context` wants."""
        resid_pre = self.hook_resid_pre(resid)
        normalized = self.ln1(resid_pre)  # (batch, pos, d_model)
        attn_out = self.hook_attn_out(self.attn(normalized, context, pre_norm=(resid_pre, self.ln1)))
        mlp_out = self.hook_mlp_out(self.mlp(context.read(normalized)))
        return self.hook_resid_post(context.read(resid_pre) + attn_out + mlp_out)


def make_block(cfg: TowerConfig, layer: int) -> Block | ParallelBlock:
    """The block of a tower's config."""
    return (ParallelBlock if cfg.parallel_attn_mlp else Block)(cfg, layer)


class Blocks(nn.ModuleList):
    """The blocks of a tower. Whatever goes through several of them goes through `states` or `run`."""

    if TYPE_CHECKING:  # for readers of types: a ModuleList says of its modules only that they are modules

        def __iter__(self) -> Iterator[Block | ParallelBlock]: ...

        def __getitem__(self, idx: int) -> Block | ParallelBlock: ...

    def states(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        context: AttentionContext,
        *,
        layers: range | None = None,
        queries: Sequence[int] | None = None,
    ) -> Iterator[Float[Tensor, "batch any_pos d_model"]]:
        """The residual stream that leaves each block of `layers` (all by default), one after the other.

        `resid` enters the first of them. With `queries`, only these positions leave the last one. Where blocks lie on
        several devices, what enters each of them is moved to its own.
        """
        layers = range(len(self)) if layers is None else layers
        for layer in layers:
            device = self[layer].device
            if resid.device != device:
                resid = resid.to(device)
            if context.device not in (device, None):
                context = context.to(device)
            if queries is not None and layer == layers[-1]:
                context = context.at(queries, resid.shape[1], device)
            resid = self[layer](resid, context)
            yield resid

    def run(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        context: AttentionContext,
        *,
        layers: range | None = None,
        queries: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch any_pos d_model"]:
        """The residual stream that leaves the last block of `layers`, at all positions or at `queries`."""
        layers = range(len(self)) if layers is None else layers
        if not layers:
            return resid if queries is None else resid[:, list(queries)]
        for state in self.states(resid, context, layers=layers, queries=queries):
            resid = state
        return resid
