"""What an edit adds to one weight, as low-rank factors or as a full matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.errors import InputError

_PARALLEL = 1e-6  # factors that differ by less are taken for parallel


@dataclass(frozen=True, eq=False)
class Change:
    """What is added to a weight [out, in]: left @ right, plus `full` where the change has no small rank.

    Attributes:
        left (Float[Tensor, "out rank"]): What is written: for an edited MLP the value differences, one column each.
        right (Float[Tensor, "rank in"]): What is looked for: the keys, one row each.
        full (Float[Tensor, "out in"] | None): A change of full rank, as fine-tuning makes it; None for the closed
            forms.
    """

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "rank in"]
    full: Float[Tensor, "out in"] | None = None

    def __post_init__(self) -> None:
        given = (self.left, self.right) if self.full is None else (self.left, self.right, self.full)
        if not all(bool(part.isfinite().all()) for part in given):
            raise InputError(
                "The update holds NaN or infinite numbers, so it is not applied. Ask for a smaller step or a larger lam."
            )

    @classmethod
    def dense(cls, full: Float[Tensor, "out in"]) -> Change:
        """A change of full rank."""
        n_out, n_in = full.shape
        return cls(full.new_zeros(n_out, 0), full.new_zeros(0, n_in), full)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), the weight's."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int | None:
        """Number of factors; None if part of it is a full matrix."""
        return None if self.full is not None else self.left.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return self.left.nbytes + self.right.nbytes + (0 if self.full is None else self.full.nbytes)

    def added_to(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The weight with the change, in the weight's (float32 or float64) dtype and on its device."""
        if self.left.shape[1]:
            weight = torch.addmm(weight, self.left.to(weight), self.right.to(weight))
        return weight if self.full is None else weight + self.full.to(weight)

    def matrix(self) -> Float[Tensor, "out in"]:
        """The change written out; summed up in float64, as where it is applied."""
        return self.added_to(self.left.new_zeros(self.shape, dtype=torch.float64)).to(self.left)

    def lost(self, error: Float[Tensor, "out in"]) -> float:
        """Share of the change's effect that an error in the weight undoes: at the key that suffers most, or all over if the
        change is full and that is worse.

        0: nothing; 1: as much as the change itself does. A key at which nothing is changed cannot lose.
        """
        left, right = self.left.to(error), self.right.to(error)
        length = right.norm(dim=1, keepdim=True).clamp(min=torch.finfo(error.dtype).tiny)
        keys = torch.linalg.pinv(right / length, rtol=_PARALLEL)  # (in, key): each meets its own factor only, if it can
        meant = left @ (right @ keys)
        own = left.norm(dim=0) * length[:, 0]
        missed = (error @ keys).norm(dim=0)
        if self.full is not None:
            full = self.full.to(error)
            meant, whole = meant + full @ keys, self.added_to(torch.zeros_like(error)).norm()[None]
            own, missed = own + (full @ keys).norm(dim=0), torch.cat([missed, error.norm()[None]])
            own, meant = torch.cat([own, whole]), torch.cat([meant.norm(dim=0), whole])
        else:
            meant = meant.norm(dim=0)
        changed = (meant > _PARALLEL * own) & (own > 0)
        return float((missed[changed] / meant[changed]).max()) if bool(changed.any()) else 0.0

    def __add__(self, other: Change) -> Change:
        """Both changes together."""
        if self.full is None or other.full is None:
            full = other.full if self.full is None else self.full
        else:
            full = self.full + other.full.to(self.full)
        left = torch.cat([self.left, other.left.to(self.left)], dim=1)
        return replace(self, left=left, right=torch.cat([self.right, other.right.to(self.right)]), full=full)
