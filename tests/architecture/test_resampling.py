from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hooked_llava.architecture.resampling import Filter, filter_of, resampling_weights
from hooked_llava.errors import ConfigError
from tests.architecture.processors import resize_rows

FILTERS = pytest.mark.parametrize("resample", ["box", "bilinear", "bicubic", "lanczos"])


@FILTERS
@given(n_in=st.integers(1, 300), n_out=st.integers(1, 300), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_the_weights_resize_as_pil_does_bit_for_bit(resample: Filter, n_in: int, n_out: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (n_in, 3), dtype=np.uint8)
    expected = Image.fromarray(image).resize((3, n_out), getattr(Image.Resampling, resample.upper()))
    np.testing.assert_array_equal(resize_rows(image, n_out, resample), np.asarray(expected))


@FILTERS
@given(n_in=st.integers(1, 400), n_out=st.integers(1, 400))
@settings(max_examples=25)
def test_weights_sum_to_one_over_pixels_of_the_image(resample: Filter, n_in: int, n_out: int) -> None:
    pixels, weights = resampling_weights(n_in, n_out, resample)
    np.testing.assert_allclose(weights.sum(1), 1, atol=weights.shape[1] / 2**23)  # as far as PIL rounds them
    assert 0 <= pixels.min() <= pixels.max() < n_in


def test_the_number_of_a_processor_names_pils_filter() -> None:
    for number in (1, 2, 3, 4):
        assert filter_of(number) == Image.Resampling(number).name.lower()
        assert filter_of(Image.Resampling(number)) == filter_of(number)
    with pytest.raises(ConfigError, match=r"resample=0.*3 \(bicubic\)"):
        filter_of(0)
