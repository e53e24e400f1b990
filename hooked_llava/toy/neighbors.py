"""What lies to the left of an object, read out of the language model while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hooked_llava.toy.objects import COLOR_NAMES, SHAPES, SceneObject


@dataclass(frozen=True)
class Neighbor:
    """An object and the one to its left.

    Attributes:
        feature (int): The feature of the image that shows the middle of the object.
        left (SceneObject | None): The object to its left, if there is one.
    """

    feature: int
    left: SceneObject | None


class NeighborHeads(nn.Module):
    """Two linear read-outs of the residual stream after `LAYERS` blocks, where the middle of an object is shown.

    They say the color and the shape of what lies to its left, or that nothing does. Without them the model does not find
    out that neighbors matter: it has to look back by a fixed number of positions before any answer gets better.
    """

    LAYERS = 2

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.color = nn.Linear(width, len(COLOR_NAMES) + 1)
            self.shape = nn.Linear(width, len(SHAPES) + 1)

    def forward(self, resid: Tensor, neighbors: Sequence[Sequence[Neighbor]]) -> Tensor:
        """The loss of both, given the images' resid [image, feature, d_model]; 0 where there is no object to ask about."""
        found = [(i, n) for i, its in enumerate(neighbors) for n in its]
        read = resid[[i for i, _ in found], [n.feature for _, n in found]]
        colors = [len(COLOR_NAMES) if n.left is None else COLOR_NAMES.index(n.left.color) for _, n in found]
        shapes = [len(SHAPES) if n.left is None else SHAPES.index(n.left.shape) for _, n in found]
        color, shape = torch.tensor(colors, dtype=torch.long), torch.tensor(shapes, dtype=torch.long)
        losses = [cross_entropy(h(read), t, reduction="sum") for h, t in ((self.color, color), (self.shape, shape))]
        return (losses[0] + losses[1]) / max(1, len(found))
