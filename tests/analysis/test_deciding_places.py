from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hooked_llava.analysis import deciding_places
from hooked_llava.errors import InputError


def shares(values: list[list[float]], labels: list[str], neutral: float = 0.0) -> xr.DataArray:
    coords = {"layer": [2, 3, 5], "position": range(len(labels)), "label": ("position", labels)}
    return xr.DataArray(values, dims=("layer", "position"), coords=coords, attrs={"neutral": neutral})


def test_places_are_those_that_move_the_metric_half_way():
    found = deciding_places(shares([[1, 0.2, 0], [0.6, 0.7, 0.9], [0, 0.7, 0.6]], ["image", "star", "?"]))
    assert (found.last_from, found.image_until) == (3, 3)
    assert found.best is not None
    assert (int(found.best.layer), str(found.best.label.values), float(found.best)) == (3, "star", 0.7)
    assert found.best.attrs["n_tied"] == 1


def test_shares_are_counted_from_what_does_nothing():
    values = 1 - np.array([[1, 0.2, 0], [0.6, 0.7, 0.9], [0, 0.1, 0.2]])
    found = deciding_places(shares(values.tolist(), ["image", "star", "?"], neutral=1.0))
    assert (found.last_from, found.image_until) == (3, 3)
    assert float(found.best) == pytest.approx(0.7)


def test_nothing_may_decide():
    found = deciding_places(shares([[0.1], [0.2], [0.3]], ["?"]))
    assert (found.last_from, found.image_until, found.best) == (None, None, None)
    with pytest.raises(InputError, match="reads shares .layer, position. with labels"):
        deciding_places(xr.DataArray([0.0], dims="layer"))
