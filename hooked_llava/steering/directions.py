"""Directions to steer along: a difference of means, and a random one of the same norm to compare with."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.errors import InputError
from hooked_llava.model.components.precision import at_least_float32
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.prepare import PromptsLike
from hooked_llava.prompt.where import Where
from hooked_llava.replay.reference_mean import reference_means


def mean_difference(
    model: HookedLLaVA,
    positive: PromptsLike,
    negative: PromptsLike | None = None,
    *,
    hook: str | tuple[str, int],
    positions: Where = None,
    negative_positions: Where = None,
) -> Float[Tensor, "..."]:
    """The mean activation at a hook over some prompts less that over others, [d_model] (or the hook's own width).

    Args:
        model: the model.
        positive: prompts, or a list of batches of them; for two images the same question about one of them.
        negative: the others; by default the same prompts, at `negative_positions`.
        hook: any name of the hook.
        positions: positions over which the mean is taken in each prompt; None: all.
        negative_positions: those of the other prompts; by default the same.

    Raises `InputError` if both sides have the same mean, such as the same prompts at the same positions; `HookNameError` and
    `SpanError` for hooks and spans that are not there.

    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> star, ring = (model.prepare(f"Who made the {shape}?") for shape in ("star", "ring"))
    >>> mean_difference(model, star, ring, hook=("resid_post", 2), positions="last").shape
    torch.Size([128])
    """
    if negative is None and negative_positions is None:
        raise InputError("negative=None; give the prompts to compare with, or negative_positions= in the same prompts.")
    other_places = positions if negative_positions is None else negative_positions
    sides = ((positive, positions), (positive if negative is None else negative, other_places))
    means = [reference_means(model, prompts, [(hook, where)], fewest=1)[0] for prompts, where in sides]
    difference = (means[0] - means[1]).squeeze(0)
    if not bool(difference.any()):
        raise InputError(
            "The means of both sides are the same, so there is no direction: give other prompts, or other positions. Before "
            "an image's positions, all images look alike."
        )
    return difference


def random_direction(direction: Float[Tensor, "..."], *, seed: int = 0) -> Float[Tensor, "..."]:
    """A random direction of the same shape and norm: a control for steering.

    >>> direction = torch.tensor([3.0, 4.0])
    >>> random_direction(direction).norm().item()
    5.0
    """
    drawn = torch.randn(direction.shape, generator=torch.Generator().manual_seed(seed)).to(direction.device)
    return (drawn * (at_least_float32(direction).norm() / drawn.norm())).to(direction.dtype)
