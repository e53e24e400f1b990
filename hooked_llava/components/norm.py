"""RMSNorm and LayerNorm, with the scale and the normalized stream as hooks."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hooked_llava.components.hook_point import HookPoint
from hooked_llava.config import TowerConfig


class _Norm(nn.Module, ABC):
    """What both norms share: a weight, two hooks, and one fused kernel when nobody listens."""

    bias: Tensor | None

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d_model), requires_grad=False)
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    @property
    def w(self) -> Float[Tensor, " d_model"]:
        """The weight under TransformerLens's name."""
        return self.weight

    @abstractmethod
    def fused(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The norm in one kernel, past the hooks."""

    @abstractmethod
    def centred(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What is divided by the scale."""

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Normalize the last axis; the statistics are taken in float32 at least."""
        if not (self.hook_scale.listening or self.hook_normalized.listening):
            return self.fused(x)
        wide = self.centred(x if x.dtype == torch.float64 else x.float())
        scale = self.hook_scale((wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())  # (batch, pos, 1)
        normalized = self.hook_normalized((wide / scale).to(x.dtype))  # (batch, pos, d_model)
        out = normalized * self.weight
        return out if self.bias is None else out + self.bias


class RMSNorm(_Norm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019)."""

    bias = None

    def fused(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The norm in one kernel, past the hooks."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def centred(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """x itself: RMSNorm does not subtract the mean."""
        return x


class LayerNorm(_Norm):
    """(x - mean) / sqrt(var + eps) * weight + bias (Ba et al. 2016)."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__(d_model, eps)
        self.bias = nn.Parameter(torch.empty(d_model), requires_grad=False)

    @property
    def b(self) -> Float[Tensor, " d_model"]:
        """The bias under TransformerLens's name."""
        assert self.bias is not None
        return self.bias

    def fused(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The norm in one kernel, past the hooks."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def centred(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """x less its mean."""
        return x - x.mean(-1, keepdim=True)


def make_norm(cfg: TowerConfig) -> RMSNorm | LayerNorm:
    """The norm that a tower's config asks for."""
    return (RMSNorm if cfg.normalization_type == "RMS" else LayerNorm)(cfg.d_model, cfg.eps)
