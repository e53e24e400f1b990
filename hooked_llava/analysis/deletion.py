"""Does the answer go when a map's patches go, and come when they come?

Deletion and insertion curves (Petsiuk et al., arXiv 1806.07421): patches are blanked in the image in the map's order, or
uncovered in a blank image, and the answer's probability is followed. All steps of all maps are runs of one Replay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from hooked_llava.analysis.maps.occlusion import Where, blank, forwards_of, mean_embedding
from hooked_llava.checks import one_of
from hooked_llava.errors import InputError
from hooked_llava.model.requirements import supported_inputs
from hooked_llava.readout.answer_cache import Target, read_target
from hooked_llava.replay.replay import Replay
from hooked_llava.results.arrays import to_numpy
from hooked_llava.results.image_axes import ImageAxes
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs

Direction = Literal["deletion", "insertion"]
DIRECTIONS = ("deletion", "insertion")
_SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)


def deletion_curves(
    model: HookedLLaVA,
    inputs: Any,
    maps: Mapping[str, Any],
    target: Target = None,
    *,
    directions: Direction | Sequence[Direction] = DIRECTIONS,
    shares: Sequence[float | int] = _SHARES,
    where: Where = "image",
    image: int = 0,
) -> xr.Dataset:
    """P(answer) without the first patches of each map, or with only them left, [direction, map, share].

    Args:
        model: the model.
        inputs: one prompt with an image.
        maps: by name, numbers by patch [patch_row, patch_col] or [feature], the largest the most important; NaN stays.
        target: answer that is followed; the model's own next token by default.
        directions: "deletion" (a good map lets the answer fall early), "insertion" (rise early), or both.
        shares: parts of the patches, from 0 to 1, increasing.
        where: take patches away in the "image", in every grid that shows them, or as image "tokens" after the vision tower.
        image: which image of the prompt.

    Returns `probability`, and `area` [direction, map] under each curve over the shares. Equal values are taken in the
    order of the patches. Raises `InputError` for several prompts, maps of another grid, and options that do not fit.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.toy.images import image_path
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> inputs = model.prepare("What color is the star?", images=image_path("demo"))
    >>> curves = deletion_curves(model, inputs, {"rows": np.arange(64).reshape(8, 8)}, shares=(0, 0.5, 1))
    >>> curves["probability"].dims, bool(curves["probability"].sel(direction="deletion")[0, 0] > 0.9)
    (('direction', 'map', 'share'), True)
    """
    prompt = supported_inputs("deletion_curves", model, inputs)
    ways, steps = _ways(directions, where), _steps(shares)
    if not 0 <= image < prompt.n_images or not maps:
        got = f"{len(maps)} maps, and image={image} of {prompt.n_images}"
        raise InputError(f"deletion_curves follows maps of one of the prompt's images; got {got}.")
    orders = {name: _order(prompt, image, name, values, where) for name, values in maps.items()}
    found = read_target(model, prompt, target)
    longer = found.inputs
    with provenance("deletion_curves", model, prompt, n_forward=1, where=where, image=image) as made:
        replay, positions = Replay(model, longer), found.logit_positions[0].tolist()
        found = found.with_own(model, replay.logits(positions)[None])
        fill = mean_embedding(model, longer, image) if where == "tokens" else None
        gone = [_gone(order, share, way) for way in ways for order in orders.values() for share in steps]
        different = list(dict.fromkeys(gone))  # all curves share their ends, and similar maps more
        runs = [blank(model, longer, features, image=image, where=where, fill=fill) for features in different]
        once = replay.run(runs, found.metric(0), positions=positions)
        each = to_numpy(once.exp())[[different.index(p) for p in gone]]
        values = each.reshape(len(ways), len(orders), len(steps))
        made.n_forward = forwards_of(replay)  # its runs included
        attrs = made.attrs(**found.attrs(model, "target"), runs=len(runs))
    area = np.trapezoid(values, steps, axis=-1) / (steps[-1] - steps[0])
    return xr.Dataset(
        {"probability": (("direction", "map", "share"), values), "area": (("direction", "map"), area)},
        coords={"direction": ways, "map": list(orders), "share": steps},
        attrs=attrs,
    )


def _ways(directions: Direction | Sequence[Direction], where: Where) -> list[Direction]:
    one_of(where, get_args(Where), "where")
    ways: list[Direction] = [directions] if isinstance(directions, str) else list(directions)
    if not ways or any(way not in DIRECTIONS for way in ways):
        raise InputError(
            f"directions={directions!r}; expected {' or '.join(map(repr, DIRECTIONS))}, or a list of them."
        )
    return ways


def _steps(shares: Sequence[float | int]) -> Float[np.ndarray, " share"]:
    steps = np.asarray(shares, dtype=np.float64)
    if len(steps) < 2 or (np.diff(steps) <= 0).any() or steps[0] < 0 or steps[-1] > 1:
        raise InputError(f"shares={list(shares)}; expected at least two numbers from 0 to 1 that increase.")
    return steps


def _order(prompt: Inputs, image: int, name: str, values: Any, where: Where) -> Int[np.ndarray, " feature"]:
    """The features that a map puts in order, the largest value first; newlines only where tokens are taken away."""
    axes, array = ImageAxes.of(prompt), np.asarray(getattr(values, "values", values), dtype=np.float64).squeeze()
    if array.shape != axes.shape:
        raise InputError(f"Map {name!r} has the shape {array.shape}; expected one number per patch, {axes.shape}.")
    return axes.ranked(array[None], prompt.layouts[image : image + 1], cells_only=where == "image")[:, 1]


def _gone(order: Int[np.ndarray, " feature"], share: float, way: Direction) -> tuple[int, ...]:
    """Features that are blank when so large a share of them has had its turn."""
    n = round(share * len(order))
    return tuple(sorted((order[:n] if way == "deletion" else order[n:]).tolist()))
