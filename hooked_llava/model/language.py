"""The language tower: embeddings -> logits, entered and left at any layer (Touvron et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooked_llava.architecture.sizes import LanguageConfig
from hooked_llava.model.components.attention import AttentionContext
from hooked_llava.model.components.block import Blocks, make_block
from hooked_llava.model.components.hook_point import HookPoint, start_graph
from hooked_llava.model.components.kv_cache import KVCache
from hooked_llava.model.components.norm import make_norm
from hooked_llava.model.components.prefix_attention import SharedPrefix
from hooked_llava.model.components.rotary import RotaryEmbedding


class LanguageTower(nn.Module):
    """Token embedding, causal blocks with rotary positions, final norm, unembedding."""

    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.rotary = RotaryEmbedding(cfg.rotary) if cfg.rotary is not None else None
        self.blocks = Blocks(make_block(cfg, layer) for layer in range(cfg.n_layers))
        self.ln_final = make_norm(cfg)
        self.unembed = nn.Linear(cfg.d_model, cfg.d_vocab, bias=cfg.unembed_bias)
        if cfg.tied_embeddings:
            self.unembed.weight = self.embed.weight
        self.hook_text_embed = HookPoint()
        self.hook_embed = HookPoint()
        self.hook_logits = HookPoint()

    def embed_tokens(self, input_ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Token embeddings; image positions carry the placeholder token's until the merge."""
        return self.hook_text_embed(start_graph(self.embed(input_ids)))

    def forward(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        context: AttentionContext,
        *,
        start_at_layer: int = 0,
        stop_at_layer: int | None = None,
        queries: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch any_pos d_model"]:
        """The residual stream entering `stop_at_layer` (or leaving the last block), from that entering `start_at_layer`.

        With `queries`, only at these positions.
        """
        if start_at_layer == 0:
            resid = self.hook_embed(resid)
        layers = range(len(self.blocks))[start_at_layer:stop_at_layer]
        return self.blocks.run(resid, context, layers=layers, queries=queries)

    def to_logits(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Final norm and unembedding; the logits lie where the tokens do."""
        return self.unembedded(self.normalized(resid))

    def normalized(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Through the final norm."""
        return self.ln_final(resid.to(self.ln_final.weight.device))

    def unembedded(self, normalized: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of what the final norm gave."""
        return self.hook_logits(self.unembed(normalized.to(self.unembed.weight.device)).to(self.device))

    @property
    def device(self) -> torch.device:
        """Where tokens come in and logits come out; blocks may lie on others."""
        return self.embed.weight.device

    def device_of(self, layer: int) -> torch.device:
        """Where the residual stream that enters a layer is computed: by the block before it, or the embedding."""
        return self.blocks[layer - 1].device if layer else self.device

    def context(
        self,
        n_positions: int,
        *,
        attention_mask: Bool[Tensor, "batch key"] | None,
        position_ids: Int[Tensor, "batch pos"] | None,
        kv_cache: KVCache | None = None,
        prefix: SharedPrefix | None = None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> AttentionContext:
        """What attention needs for the next `n_positions` positions.

        `attention_mask` covers the positions in `kv_cache` too, not those of `prefix`, and is None where nothing is padded.
        Positions are counted over real tokens unless `position_ids` are given.
        """
        past = 0 if kv_cache is None else kv_cache.length
        if position_ids is None:
            position_ids = count_positions(n_positions, attention_mask, device, past)
        rotation = None if self.rotary is None else self.rotary(position_ids, dtype)
        context = AttentionContext(
            never_fully_masked=attention_mask is None,
            rotation=rotation,
            kv_cache=kv_cache,
            prefix=prefix,
            device=device,
        )
        if attention_mask is None and (past == 0 or n_positions == 1):
            context = replace(context, causal=past == 0)
            return context.with_window(self.cfg.window, past, n_positions, device)
        query = torch.arange(past, past + n_positions, device=device)
        key = torch.arange(past + n_positions, device=device)
        allowed = (key <= query[:, None])[None, None]  # (1, 1, query, key)
        if attention_mask is not None:
            allowed = allowed & attention_mask[:, None, None, :]
        return replace(context, allowed=allowed).with_window(self.cfg.window, past, n_positions, device)


def count_positions(
    n_positions: int, attention_mask: Bool[Tensor, "batch key"] | None, device: torch.device, past: int = 0
) -> Int[Tensor, "batch pos"]:
    """The number of each position, counted over real tokens; one row for all prompts where nothing is padded."""
    if attention_mask is None:
        return torch.arange(past, past + n_positions, device=device)[None]
    counted = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)  # (batch, key)
    return counted[:, past : past + n_positions]
