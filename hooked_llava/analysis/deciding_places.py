"""At which places does one patched activation alone decide between two answers?

Read off a map of activation patching, in shares of the two runs' difference: a place decides where patching it moves the
metric at least half of the way from one run to the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from hooked_llava.errors import InputError
from hooked_llava.results.arrays import n_tied

HALF = 0.5
"""The share from which on a place decides."""


@dataclass(frozen=True)
class DecidingPlaces:
    """Where one place alone decides more than half.

    Attributes:
        last_from (int | None): The layer from which on the last position does; None if in none.
        image_until (int | None): The last layer in which all image positions together do; None if in none, or without
            an image.
        best (xr.DataArray | None): The other token that decides most: its share as a scalar with coordinates layer,
            position and label, and the attribute `n_tied`, how many other cells decide as much. None if there is no
            other token.
    """

    last_from: int | None
    image_until: int | None
    best: xr.DataArray | None


def deciding_places(shares: xr.DataArray) -> DecidingPlaces:
    """What a map of the residual stream says, in shares as `results.recovered` gives them.

    `shares` is [layer, position] with the coordinate `label`, the last position last; image positions that were patched
    together are the label "image". Raises `InputError` for other axes.

    >>> coords = {"layer": [0, 1], "position": [5, 7], "label": ("position", ["star", "?"])}
    >>> shares = xr.DataArray([[0.9, 0.0], [0.1, 0.8]], dims=("layer", "position"), coords=coords, attrs={"neutral": 0.0})
    >>> found = deciding_places(shares)
    >>> found.last_from, found.image_until, str(found.best.label.values), found.best.attrs["n_tied"]
    (1, None, 'star', 0)
    """
    if set(shares.dims) != {"layer", "position"} or "label" not in shares.coords:
        raise InputError(
            f"deciding_places reads shares [layer, position] with labels; this map has {', '.join(map(str, shares.dims))}."
        )
    shares = shares.transpose("layer", "position")
    towards = abs(shares - shares.attrs["neutral"])  # how far each cell goes from one run to the other
    labels = towards["label"].values.tolist()
    last = towards.isel(position=-1).values >= HALF
    first = next((i for i in range(len(last)) if last[i:].all()), int(last.argmax()))
    together = labels.index("image") if "image" in labels else None
    image = [] if together is None else np.flatnonzero(towards.isel(position=together).values >= HALF)
    layers = shares["layer"].values.tolist()
    between = towards.isel(position=[i for i in range(len(labels) - 1) if i != together])
    return DecidingPlaces(
        last_from=layers[first] if last.any() else None,
        image_until=layers[image[-1]] if len(image) else None,
        best=_largest(between) if between.size else None,
    )


def _largest(towards: xr.DataArray) -> xr.DataArray:
    layer, position = divmod(int(towards.values.argmax()), towards.sizes["position"])
    return towards.isel(layer=layer, position=position).assign_attrs(n_tied=n_tied(towards.values))
