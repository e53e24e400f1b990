"""The pages of features: which argue for an answer, and what steering by them does."""

from __future__ import annotations

import pytest

from hooked_llava.errors import InputError
from hooked_llava.sae.autoencoder import SAEConfig, SparseAutoencoder
from hooked_llava.viz.pages.features import (
    ATTRIBUTION_STEPS,
    STEERING_STEPS,
    answers_by_strength,
    attribution_page,
    steering_page,
)
from tests.viz.browser import Page, check_self_contained


@pytest.fixture(scope="module")
def sae(model) -> SparseAutoencoder:
    return SparseAutoencoder(SAEConfig(d_in=model.cfg.d_model, d_sae=24, k=4, hook="hook_embed")).reset(seed=0)


def test_attributions_are_shown_by_feature_by_patch_and_by_token(model, inputs, sae):
    steps: list[str] = []
    page = attribution_page(model, sae, inputs, max_new_tokens=1, n_features=2, n_entries=3, on_step=steps.append)
    check_self_contained(page.html)
    assert steps == list(ATTRIBUTION_STEPS)
    assert Page(page.html).sections == ["features", "where", "entries"]
    assert set(page.results) == {"attribution", "pooled"}
    first = page.results["attribution"].isel(entry=0)
    assert f"{float(first.attribution):+.3f}" in page.html
    assert page.html.count("<tr>") == 1 + 2 + 1 + 3
    assert "2 forward and 1 backward passes" in page.html.split("<footer>")[1]  # one forward pass found the answer


def test_without_an_image_nothing_is_drawn(model, text_inputs, sae):
    page = attribution_page(model, sae, text_inputs, max_new_tokens=1)
    assert Page(page.html).sections == ["features", "entries"]


def test_steering_is_shown_by_strength_beside_its_controls(model, inputs, sae):
    steps: list[str] = []
    page = steering_page(model, inputs, {3: 50.0}, [0, 1], sae=sae, max_new_tokens=1, on_step=steps.append)
    check_self_contained(page.html)
    assert steps == list(STEERING_STEPS)
    assert Page(page.html).sections == ["answers", "dose"]
    sweep = page.results["sweep"]
    assert set(answers_by_strength(sweep)) == {0.0, 1.0}
    for way in sweep.steered_by.values.tolist():
        assert way.replace("_", " ") in page.html
    assert f"({float(sweep.log_probability.sel(steered_by='steered', strength=1.0)):.2f})" in page.html
    with pytest.raises(InputError, match=r"feature=24"):
        steering_page(model, inputs, {24: 1.0}, [0], sae=sae)
