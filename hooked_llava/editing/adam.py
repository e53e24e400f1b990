"""Adam (Kingma & Ba 2014) on tensors that are no parameters."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class Adam:
    """Steps downhill; every number by itself, so that what is optimised together does not meet."""

    def __init__(self, like: Tensor, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.first, self.second = torch.zeros_like(like), torch.zeros_like(like)
        self.lr, self.betas, self.eps, self.n = lr, betas, eps, 0

    def step(self, x: Float[Tensor, "*shape"], gradient: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """x one step further down.

        >>> x = torch.tensor([1.0])
        >>> Adam(x, lr=0.1).step(x, torch.tensor([5.0]))
        tensor([0.9000])
        """
        self.n += 1
        a, b = self.betas
        self.first = a * self.first + (1 - a) * gradient
        self.second = b * self.second + (1 - b) * gradient**2
        first, second = self.first / (1 - a**self.n), self.second / (1 - b**self.n)
        return x - self.lr * first / (second.sqrt() + self.eps)
