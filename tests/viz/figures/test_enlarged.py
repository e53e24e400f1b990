"""The paper's display, against torch's own bicubic enlargement of the normalised map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hooked_llava.errors import InputError
from hooked_llava.viz import patch_overlay
from tests.layouts import by_hand
from tests.pairs import as_users_run


def bicubic(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Normalised as in the paper's code, then enlarged."""
    lifted = (values - values.min()) / (values.max() - values.min())
    tensor = torch.tensor(lifted / lifted.sum(), dtype=torch.float32)[None, None]
    how = {"mode": "bicubic", "antialias": True, "align_corners": False}
    return torch.nn.functional.interpolate(tensor, (height, width), **how)[0, 0].numpy()


def laid_over(figure) -> np.ndarray:
    image = figure.axes[0].images[-1]
    assert (image.get_cmap().name, image.get_alpha()) == ("gray", 0.8)
    return np.ma.filled(np.ma.masked_invalid(image.get_array()).astype(float), np.nan)


def test_the_map_is_normalised_enlarged_and_laid_where_the_crop_is(inputs):
    values = np.random.default_rng(0).normal(size=(4, 4))
    shown = laid_over(patch_overlay(inputs, values, display="paper"))
    assert shown.shape == (100, 200)
    np.testing.assert_allclose(shown[:, 50:150], bicubic(values, 100, 100), atol=1e-6)
    assert np.isnan(shown[:, :50]).all()
    assert np.isnan(shown[:, 150:]).all()


def test_an_image_alone_and_a_constant_map(wide_image):
    values = np.random.default_rng(1).random((2, 4))
    figure = patch_overlay(wide_image, values, display="paper")
    np.testing.assert_allclose(laid_over(figure), bicubic(values, 100, 200), atol=1e-6)
    below = np.asarray(figure.axes[0].images[0].get_array())
    assert (below == below[..., :1]).all(), "the image is grey"
    np.testing.assert_allclose(laid_over(patch_overlay(wide_image, np.ones((2, 4)), display="paper")), 1 / 8, atol=1e-6)


def test_several_grids_are_averaged_or_drawn_alone():
    layout, image = by_hand(), Image.new("RGB", (24, 16))
    values = np.random.default_rng(0).random(layout.n_features)
    fine = laid_over(patch_overlay(image, values, layout=layout, grid="fine", display="paper"))
    base = laid_over(patch_overlay(image, values, layout=layout, grid="base", display="paper"))
    both = laid_over(patch_overlay(image, values, layout=layout, display="paper"))
    assert np.isnan(fine[:, :4]).all()
    assert np.isfinite(base).all()
    np.testing.assert_allclose(both, np.nanmean([base, fine], axis=0), atol=1e-9)


def test_what_does_not_fit_is_refused(inputs):
    with as_users_run(), pytest.raises(InputError, match="display='smooth'"):
        patch_overlay(inputs, np.ones((4, 4)), display="smooth")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="display='values'"):
        patch_overlay(inputs, np.full((4, 4), np.nan), display="paper")
    with pytest.raises(InputError, match="grid='each'"):
        patch_overlay(inputs, np.ones((4, 4)), display="paper", grid="each")
