"""A witness that a model's weights are what they were, which outlives the process: for files that are read again."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

_PIECE = 2**22  # numbers at once, so that little memory is taken
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """A digest of every parameter's name, shape, type and content, the same in every process and on every device.

    The numbers' bits are added up as integers, each times an odd number of its own: unlike a sum of floats that does not
    depend on the order in which threads add, and weights that change places do not cancel.

    >>> first, second = (torch.nn.Linear(3, 2) for _ in range(2))
    >>> weights_digest(first) == weights_digest(first) != weights_digest(second)
    True
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        bits = parameter.detach().reshape(-1).view(_BITS[parameter.element_size()])
        for piece in bits.split(_PIECE):
            odd = torch.arange(1, 2 * len(piece), 2, device=piece.device)
            digest.update(int((piece.long() * odd).sum()).to_bytes(8, "little", signed=True))
    return digest.hexdigest()[:16]
