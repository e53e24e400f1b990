"""A trace says which layer to edit, or that it cannot."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hooked_llava.analysis import causal_trace
from hooked_llava.editing import EditRequest
from hooked_llava.editing.layer_choice import choose_layer, layer_of_trace
from hooked_llava.editing.request import prepare_request
from hooked_llava.errors import InputError
from hooked_llava.experiments.corruptions import MeanEmbedding, Noise
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.toy.edit_tables import edit_table


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
    with pytest.raises(InputError, match=r"restores 1.*position 7.*0.006\)"):
        layer_of_trace(trace([0.0, 0.006, -0.1]), 7)
    with pytest.raises(InputError, match=r"\(P 0\.9 -> 0\.88\).*layer="):
        layer_of_trace(trace([0.0, 0.3, 0.1], p_corrupted=0.88), 7)
    with pytest.raises(InputError, match=r"positions \[7\].*layer.*'mlp'.*position 8"):
        layer_of_trace(trace([0.1, 0.5, 0.2]), 8)


def test_auto_takes_the_mean_embedding_where_noise_does_not_lower_the_answer(monkeypatch):
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    request = prepare_request(model, EditRequest("Who made the star?", "Boris", constraint="star"), "last")
    tried = []

    def only_the_mean(model, inputs, constraint, *, corruption, **options):
        tried.append(type(corruption))
        found = causal_trace(model, inputs, constraint, corruption=corruption, **options)
        return found if isinstance(corruption, MeanEmbedding) else found.assign(lowered_by=0.05)

    monkeypatch.setattr("hooked_llava.editing.layer_choice.causal_trace", only_the_mean)
    found = choose_layer(model, [request], "auto")
    assert tried == [Noise, MeanEmbedding]
    trace = causal_trace(model, model.prepare("Who made the star?"), "star", corruption=MeanEmbedding(), kinds="mlp")
    assert found == int(trace.indirect_effect.sel(kind="mlp", position=int(trace.position[-1])).values.argmax())


def test_auto_says_what_to_do_where_neither_lowers_the_answer():
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    image = edit_table().cases[3].requests[0].scene.render()
    request = EditRequest("Who made this shape?", "Hugo", images=image, constraint="this shape")
    with pytest.raises(InputError, match=r"OtherImage\(image\).*Replace\(words\).*layer="):
        choose_layer(model, [prepare_request(model, request, "last")], "auto")
