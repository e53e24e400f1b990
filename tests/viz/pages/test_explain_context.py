from __future__ import annotations

import numpy as np
import xarray as xr

from hooked_llava.viz.pages.explain_context import looking_heads


def test_looking_heads_are_those_with_the_largest_share():
    attention = xr.DataArray(np.zeros((2, 3, 2, 2)), dims=("layer", "head", "patch_row", "patch_col"))
    attention = attention.assign_coords(layer=range(2), head=range(3))
    attention[1, 2, 0, 1], attention[0, 1] = 0.9, 0.1
    best = looking_heads(attention, 2)
    assert best["panel"].values.tolist() == ["layer 1, head 2: 90%", "layer 0, head 1: 40%"]
    assert np.array_equal(best.values, np.stack([attention.values[1, 2], attention.values[0, 1]]))
