"""Rotary position embedding (Su et al. 2021), in the half-split layout of Llama."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_llava.architecture.sizes import RotaryConfig
from hooked_llava.machine.devices import to_device

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of each position's angles, both [batch pos 1 d_head]."""


class RotaryEmbedding(nn.Module):
    """Turns position numbers into the rotation of queries and keys.

    The frequencies are kept as numbers, not as a buffer, so that `model.to(torch.bfloat16)` cannot round them.
    """

    def __init__(self, cfg: RotaryConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._frequencies: dict[torch.device, Tensor] = {}

    def forward(self, position_ids: Int[Tensor, "batch pos"], dtype: torch.dtype) -> Rotation:
        """Cosine and sine for each position, computed in float32 and then rounded to dtype."""
        device = position_ids.device
        if device not in self._frequencies:
            self._frequencies[device] = to_device(self.cfg.frequencies, device, torch.float32)
        angles = position_ids[..., None].float() * self._frequencies[device]  # (batch, pos, d_head / 2)
        angles = torch.cat([angles, angles], dim=-1)[:, :, None]  # (batch, pos, 1, d_head)
        scaling = self.cfg.attention_scaling
        return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def rotate(x: Float[Tensor, "batch pos head d_head"], rotation: Rotation) -> Float[Tensor, "batch pos head d_head"]:
    """Turn each pair of dimensions (j, j + n / 2) of the first n by its position's angle; n is d_head, or less in Phi."""
    cos, sin = rotation
    if (n := cos.shape[-1]) < x.shape[-1]:
        return torch.cat([rotate(x[..., :n], rotation), x[..., n:]], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
