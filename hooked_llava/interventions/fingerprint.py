"""A cheap witness that a model's weights are what they were."""

from __future__ import annotations

import torch
from torch import nn

_SAMPLES = 32


@torch.no_grad()
def fingerprint(model: nn.Module) -> tuple[tuple[int, int, tuple[float, ...]], ...]:
    """For every parameter its storage, its count of in-place writes, and some of its entries.

    The count misses writes through `.data`, the entries miss writes that leave them alone; together they notice any
    edit made in the usual ways, and any that changes a matrix as a whole.
    """
    marks = []
    for parameter in model.parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES]
        marks.append((parameter.data_ptr(), parameter._version, sample.float().cpu()))
    return tuple((pointer, version, tuple(sample.tolist())) for pointer, version, sample in marks)
