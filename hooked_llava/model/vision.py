"""The vision tower: pixels -> patch features (CLIP, Radford et al. 2021; SigLIP, Zhai et al. 2023)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_llava.architecture.sizes import VisionConfig
from hooked_llava.model.components.attention import AttentionContext
from hooked_llava.model.components.block import Blocks, make_block
from hooked_llava.model.components.hook_point import HookPoint, start_graph
from hooked_llava.model.components.norm import make_norm


class VisionTower(nn.Module):
    """Patches, perhaps after a class token, through blocks, up to the highest layer that the projector reads.

    Its batch axis holds tiles: in LLaVA-1.5 one for each image, in LLaVA-NeXT and LLaVA-OneVision perhaps several.

    Blocks above that layer, the post norm and a pooling head are part of the checkpoint, so they are kept and saved; they
    are not run.
    """

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.class_embed = nn.Parameter(torch.empty(cfg.d_model)) if cfg.class_token else None
        self.patch_embed = nn.Conv2d(cfg.n_channels, cfg.d_model, cfg.patch_size, cfg.patch_size, bias=cfg.patch_bias)
        self.pos_embed = nn.Embedding(cfg.n_positions, cfg.d_model)
        self.ln_pre = make_norm(cfg) if cfg.pre_norm else nn.Identity()
        self.blocks = Blocks(make_block(cfg, layer) for layer in range(cfg.n_layers))
        self.ln_post = make_norm(cfg)
        self.head = PoolingHead(cfg) if cfg.pooling_head else None
        self.hook_patch_embed = HookPoint()
        self.hook_pos_embed = HookPoint()
        self.hook_embed = HookPoint()
        self.hook_out = HookPoint()

    def forward(self, pixels: Float[Tensor, "tile channel height width"]) -> Float[Tensor, "tile feature d_features"]:
        """Features as the projector reads them: chosen layers side by side, class token dropped or kept."""
        return self.features(self.states([self.embed(pixels)]))

    def states(self, entering: list[Float[Tensor, "tile pos d_model"]]) -> list[Float[Tensor, "tile pos d_model"]]:
        """The residual stream entering every block that is run, and leaving the last; `entering` are those known already."""
        layers = range(len(entering) - 1, self.cfg.n_layers_run)
        return [*entering, *self.blocks.states(entering[-1], AttentionContext(), layers=layers)]

    def features(self, states: list[Float[Tensor, "tile pos d_model"]]) -> Float[Tensor, "tile feature d_features"]:
        """The feature layers side by side, given the residual stream entering every block and leaving the last."""
        read = [states[layer].to(states[-1].device) for layer in self.cfg.feature_layers]
        features = torch.cat(read, dim=-1)  # (tile, pos, d_features)
        return self.hook_out(features[:, 1:] if self.cfg.drop_class_token else features)

    def embed(self, pixels: Float[Tensor, "tile channel height width"]) -> Float[Tensor, "tile pos d_model"]:
        """What enters block 0: patches, after the class token if there is one, plus learned positions; perhaps normalized."""
        patches = self.patch_embed(pixels.to(self.patch_embed.weight)).flatten(2).transpose(1, 2)
        patches = self.hook_patch_embed(start_graph(patches))  # (tile, patch, d_model)
        n_tiles = patches.shape[0]
        positions = self.pos_embed.weight.expand(n_tiles, -1, -1)
        if self.hook_pos_embed.hooked:
            positions = positions.clone()  # what a hook keeps must not be the weights themselves
        positions = self.hook_pos_embed(start_graph(positions))  # (tile, pos, d_model)
        if self.class_embed is not None:
            patches = torch.cat([self.class_embed.expand(n_tiles, 1, -1), patches], dim=1)  # (tile, pos, d_model)
        return self.hook_embed(self.ln_pre(patches + positions))


class PoolingHead(nn.Module):
    """SigLIP's attention pooling over all patches. LLaVA does not use it; its weights are kept, to be saved again."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, cfg.d_model))
        self.attention = nn.MultiheadAttention(cfg.d_model, cfg.n_heads, batch_first=True)
        self.norm = make_norm(cfg)
        self.up, self.down = nn.Linear(cfg.d_model, cfg.d_mlp), nn.Linear(cfg.d_mlp, cfg.d_model)
