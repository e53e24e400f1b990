"""In which precision numbers are added up."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def at_least_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The numbers in float32, or as they are where they are finer."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
