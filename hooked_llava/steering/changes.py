"""What each mode of steering makes of vectors: functions of a hook's activation at some positions, for `Intervention(fn=)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.model.attached_sae import Autoencoder, encoded_in_parts
from hooked_llava.model.components.precision import at_least_float32
from hooked_llava.options.steering_modes import SteeringMode


@dataclass(frozen=True, eq=False)
class VectorChange:
    """A mode of steering along directions, as a function of activations [position, *width].

    Attributes:
        mode (SteeringMode): What it does.
        directions (Float[Tensor, "direction d"]): Along what.
        total (Float[Tensor, " d"]): What is added, or put in the activation's place.
        strength (float): The share that is taken away, or how far the direction is set.
    """

    mode: SteeringMode
    directions: Float[Tensor, "direction d"]
    total: Float[Tensor, " d"]
    strength: float

    def __repr__(self) -> str:
        return f"{self.mode}(strength={self.strength:g})"

    def __call__(self, cut: Float[Tensor, "position ..."]) -> Float[Tensor, "position ..."]:
        """The steered activation, in its own dtype; computed in float32 at least."""
        x, total = at_least_float32(cut.flatten(1)), at_least_float32(self.total).to(cut.device)
        if self.mode in ("add", "add_keep_norm"):
            new = x + total
            if self.mode == "add_keep_norm":
                new = new * (x.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True).clamp(min=1e-12))
        elif self.mode == "project_out":
            new = x - self.strength * self._along(x)
        elif self.mode == "clamp":
            new = x - self._along(x) + total
        else:
            new = total.expand_as(x)
        return new.to(cut.dtype).view_as(cut)

    def _along(self, x: Float[Tensor, "position d"]) -> Float[Tensor, "position d"]:
        """What of the vectors lies in the span of the directions."""
        basis = self._basis.to(x)
        return x @ basis @ basis.T

    @cached_property
    def _basis(self) -> Float[Tensor, "d direction"]:
        """Orthonormal vectors that span the directions."""
        return torch.linalg.qr(at_least_float32(self.directions).T).Q


@dataclass(frozen=True, eq=False)
class FeatureClamp:
    """Features set to values, all other features and the error kept, as a function of activations [position, *width].

    Attributes:
        sae (Autoencoder): Whose features they are.
        values (Mapping[int, float]): The value of each feature.
    """

    sae: Autoencoder
    values: Mapping[int, float]

    def __repr__(self) -> str:
        return f"clamp({dict(self.values)})"

    def __call__(self, cut: Float[Tensor, "position ..."]) -> Float[Tensor, "position ..."]:
        """The activation with what these features write changed, and nothing else."""
        x = cut.flatten(1).to(self.sae.b_dec.dtype)
        chosen, wanted, rows = self._chosen
        parts = []
        for part in encoded_in_parts(self.sae, x):
            is_chosen = part.indices[..., None] == chosen  # (position, active, chosen)
            now = (part.values[..., None] * is_chosen).sum(1)
            parts.append((wanted - now) @ rows)
        return cut + torch.cat(parts).to(cut.dtype).view_as(cut)

    @cached_property
    def _chosen(self) -> tuple[Tensor, Tensor, Tensor]:
        """The features, their values, and what they write, on the autoencoder's device: put there once."""
        rows = self.sae.W_dec.detach()
        chosen = torch.tensor(list(self.values), device=rows.device)
        wanted = torch.tensor(list(self.values.values()), device=rows.device, dtype=rows.dtype)
        return chosen, wanted, rows[chosen]
