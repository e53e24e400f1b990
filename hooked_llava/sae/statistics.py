"""What activations are like on average: their mean, and how long they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class ActivationStatistics:
    """Sums over activations, from which their mean and mean squared norm follow.

    >>> statistics = ActivationStatistics.empty(2)
    >>> statistics.add(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
    >>> statistics.mean.tolist(), statistics.mean_squared_norm, round(statistics.scale, 3)
    ([2.0, 2.0], 13.0, 0.392)

    Attributes:
        n (int): How many activations were added.
        total (Float[Tensor, " d_in"]): Their sum, in float64.
        squares (Float[Tensor, ""]): The sum of their squared norms, in float64.
    """

    n: int
    total: Float[Tensor, " d_in"]
    squares: Float[Tensor, ""]

    @classmethod
    def empty(cls, d_in: int, device: torch.device | str = "cpu") -> ActivationStatistics:
        """Of no activations."""
        zeros = torch.zeros(d_in, dtype=torch.float64, device=device)
        return cls(0, zeros, zeros.new_zeros(()))

    def add(self, acts: Float[Tensor, "batch d_in"]) -> None:
        """Count some activations; nothing waits for an accelerator."""
        acts = acts.float()
        self.n += len(acts)
        self.total += acts.sum(0)
        self.squares += acts.pow(2).sum()

    @property
    def mean(self) -> Float[Tensor, " d_in"]:
        """Their mean, in float32."""
        return (self.total / max(self.n, 1)).float()

    @property
    def mean_squared_norm(self) -> float:
        """The mean of their squared norms."""
        return float(self.squares) / max(self.n, 1)

    @property
    def scale(self) -> float:
        """What activations are multiplied by to have sqrt(d_in) as the root of their mean squared norm."""
        return (len(self.total) / max(self.mean_squared_norm, 1e-30)) ** 0.5
