"""RMSNorm and LayerNorm, with the scale and the normalized residual stream as hooks."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hooked_llava.architecture.sizes import TowerConfig
from hooked_llava.model.components.hook_point import HookPoint
from hooked_llava.model.components.precision import at_least_float32


class _Norm(nn.Module, ABC):
    """What both norms share: a weight, two hooks, and one fused kernel where neither hook is used."""

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
    def centered(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What is divided by the scale."""

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Normalize the last axis; the statistics are taken in float32 at least."""
        if not (self.hook_scale.hooked or self.hook_normalized.hooked):
            return self.fused(x)
        scale = self.hook_scale(self.scale_of(x))  # (batch, pos, 1)
        normalized = self.hook_normalized(
            (self.centered(at_least_float32(x)) / scale).to(x.dtype)
        )  # (batch, pos, d_model)
        out = normalized * self.weight
        return out if self.bias is None else out + self.bias

    def scale_of(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """The number that each vector is divided by, in float32 at least: what `hook_scale` holds."""
        return (self.centered(at_least_float32(x)).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def frozen(
        self, x: Float[Tensor, "*batch d_model"], scale: Float[Tensor, "*scale 1"], *, bias: bool = True
    ) -> Float[Tensor, "*batch d_model"]:
        """The norm with a given scale in place of the vectors' own, past the hooks.

        With its own scale a vector gets what the norm gives. With one scale for all the norm is a linear map and its bias:
        the parts of a vector, each without the bias, sum to the vector's output less the bias.
        """
        centered = self.centered(at_least_float32(x))
        out = (centered / scale.to(centered.dtype)).to(x.dtype) * self.weight.to(x)
        return out if self.bias is None or not bias else out + self.bias.to(x)

    def direction(self, reading: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The vector d for which d . x / scale is `reading` . frozen(x, scale, bias=False)."""
        return self.centered(reading * self.weight.to(reading))  # centering is a symmetric projection


class RMSNorm(_Norm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019)."""

    bias = None

    def fused(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The norm in one kernel, past the hooks."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def centered(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
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

    def centered(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """x less its mean."""
        return x - x.mean(-1, keepdim=True)


def make_norm(cfg: TowerConfig) -> RMSNorm | LayerNorm:
    """The norm of a tower's config."""
    return (RMSNorm if cfg.normalization_type == "RMS" else LayerNorm)(cfg.d_model, cfg.eps)
