"""A cheap witness that a model's weights are what they were."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_SAMPLES = 32
_GOLDEN = 0.6180339887498949


@torch.no_grad()
def fingerprint(model: nn.Module) -> tuple[tuple[tuple[int, int], ...], bytes]:
    """Every parameter's storage and count of in-place writes, and some entries of each.

    The count misses writes through `.data`, the entries miss writes that leave them alone; together they notice any
    edit made in the usual ways, and any that changes a matrix as a whole.
    """
    marks, samples = [], []
    for parameter in model.parameters():
        marks.append((parameter.data_ptr(), parameter._version))
        samples.append(sample(parameter, _SAMPLES).float())
    # Fetched at once, since a device answers slowly; bit by bit, since NaN equals nothing.
    return tuple(marks), torch.cat(samples).cpu().numpy().tobytes()


def sample(weight: Float[Tensor, "..."], n: int) -> Float[Tensor, " sample"]:
    """n entries of a weight (or all, if it has fewer), from rows and columns all over it.

    >>> sample(torch.arange(64).float().view(8, 8), 4)
    tensor([ 0., 41., 18., 59.])
    """
    flat = weight.detach().reshape(-1)
    return flat[_places(flat.numel(), n, flat.device)]


@lru_cache(maxsize=256)
def _places(size: int, n: int, device: torch.device) -> Int[Tensor, " sample"]:
    """Steps of the golden ratio, by a number of entries that shares no factor with the size and so with no row's length."""
    step = max(1, round(_GOLDEN * size))
    while math.gcd(step, size) > 1:
        step += 1
    return torch.arange(min(n, size), device=device) * step % max(1, size)
