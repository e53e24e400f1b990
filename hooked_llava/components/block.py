"""One transformer block: two additions to the residual stream."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from hooked_llava.components.attention import Attention, AttentionContext
from hooked_llava.components.hook_point import HookPoint
from hooked_llava.components.mlp import MLP
from hooked_llava.components.norm import make_norm
from hooked_llava.config import TowerConfig


class Block(nn.Module):
    """Attention and MLP, each reading a normalized copy of the residual stream and adding to it."""

    hook_out_is_single_residual_stream = True  # TransformerLens's logit lens asks

    def __init__(self, cfg: TowerConfig, layer: int) -> None:
        super().__init__()
        self.ln1 = make_norm(cfg)
        self.attn = Attention(cfg, layer)
        self.ln2 = make_norm(cfg)
        self.mlp = MLP(cfg)
        self.hook_resid_pre = HookPoint()
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.hook_mlp_in = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], context: AttentionContext
    ) -> Float[Tensor, "batch query d_model"]:
        """The residual stream after the block, at the positions that `context` wants."""
        resid_pre = self.hook_resid_pre(resid)
        attn_out = self.hook_attn_out(self.attn(self.ln1(resid_pre), context, fork=(resid_pre, self.ln1)))
        resid_mid = self.hook_resid_mid(context.read(resid_pre) + attn_out)
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid_mid))))
        return self.hook_resid_post(resid_mid + mlp_out)
