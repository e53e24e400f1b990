"""A trace says which layer to edit, or that it cannot."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hooked_llava.editing.layer_choice import layer_of_trace
from hooked_llava.errors import InputError


def trace(effects, *, p_corrupted: float = 0.2) -> xr.Dataset:
    values = np.asarray(effects)[None, :, None]
    return xr.Dataset(
        {"indirect_effect": (("kind", "layer", "position"), values)},
        coords={"kind": ["mlp"], "layer": [0, 1, 2], "position": [7]},
    ).assign(p_clean=0.9, p_corrupted=p_corrupted, lowered_by=(0.9 - p_corrupted) / 0.9)


def test_the_layer_that_restores_most():
    assert layer_of_trace(trace([0.1, 0.5, 0.2]), 7) == 1
    assert layer_of_trace(trace([-0.5, -0.2, 0.02]), 7) == 2


def test_a_trace_that_says_nothing_is_refused():
    with pytest.raises(InputError, match=r"no MLP restores 1 % at position 7 \(best: 0.006\)"):
        layer_of_trace(trace([0.0, 0.006, -0.1]), 7)
    with pytest.raises(InputError, match=r"hardly lowers the answer \(P 0.9 -> 0.88\)"):
        layer_of_trace(trace([0.0, 0.3, 0.1], p_corrupted=0.88), 7)
    with pytest.raises(InputError, match=r"positions \[7\]; choosing a layer needs 'mlp' at position 8"):
        layer_of_trace(trace([0.1, 0.5, 0.2]), 8)
