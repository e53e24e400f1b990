"""The MLP of both towers: two linear maps (CLIP), or a gate besides (SwiGLU, Vicuna)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from hooked_llava.architecture.sizes import TowerConfig
from hooked_llava.model.components.hook_point import HookPoint
from hooked_llava.model.components.quantized import bias_or_zeros


def activation(name: str) -> nn.Module:
    """The activation function of a Hugging Face name.

    `transformers.activations` imports torch's compiler and its distributed package, which takes longer than torch
    itself, so it is imported when a model is built.

    >>> activation("quick_gelu")
    QuickGELUActivation()
    """
    from transformers.activations import ACT2FN

    return ACT2FN[name]


class MLP(nn.Module):
    """post = act(gate(x)) * up(x), or act(up(x)) without a gate; out = down(post)."""

    def __init__(self, cfg: TowerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.gate = nn.Linear(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias) if cfg.gated_mlp else None
        self.up = nn.Linear(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias)
        self.down = nn.Linear(cfg.d_mlp, cfg.d_model, bias=cfg.mlp_bias)
        self.act = activation(cfg.act_fn)
        self.hook_pre = HookPoint()
        if cfg.gated_mlp:
            self.hook_pre_linear = HookPoint()
        self.hook_post = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP adds to the residual stream, given the normalized residual stream."""
        if self.gate is None:
            post = self.act(self.hook_pre(self.up(x)))  # (batch, pos, d_mlp)
        else:
            post = self.act(self.hook_pre(self.gate(x))) * self.hook_pre_linear(self.up(x))  # (batch, pos, d_mlp)
        return self.down(self.hook_post(post))

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Input weights, a view (TransformerLens's orientation)."""
        return self.up.weight.T

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"] | None:
        """Gate weights, a view; None without a gate."""
        return None if self.gate is None else self.gate.weight.T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights, a view: row n is what neuron n writes."""
        return self.down.weight.T

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        """Input bias, zeros if there is none."""
        return bias_or_zeros(self.up)

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Output bias, zeros if there is none."""
        return bias_or_zeros(self.down)
