"""The projector: two linear maps with an activation between."""

from __future__ import annotations

import pytest
import torch

from tests.pairs import off, pair


@pytest.mark.parametrize("geometry", ["plain", "several_layers", "biases", "activations"])
def test_it_is_hugging_faces(geometry: str) -> None:
    models = pair(geometry)
    features = torch.randn(2, 4, models.ours.config.projector.d_in)
    with torch.no_grad():
        expected = models.hf.model.multi_modal_projector(features)
    assert off(models.ours.projector(features), expected) < 1e-6


def test_without_biases_nothing_comes_of_nothing() -> None:
    projector = pair("biases").ours.projector
    assert projector.linear_in.bias is None
    assert projector(torch.zeros(1, 4, projector.cfg.d_in)).eq(0).all()
