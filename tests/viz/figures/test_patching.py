"""The figure that fits the axes of a result, and the shares it shows."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hooked_llava.analysis import activation_patching, attribution_patching, logit_lens, path_patching
from hooked_llava.errors import InputError
from hooked_llava.results.arrays import recovered
from hooked_llava.viz import by_patch, plot_patching


def metric(logits):
    return logits[..., 7] - logits[..., 9]


@pytest.fixture(scope="module")
def pair(model, inputs):
    """Clean and corrupted: the same question about two images."""
    other = np.random.default_rng(1).integers(0, 256, (100, 200, 3)).astype(np.uint8)
    return inputs, model.prepare("What color is the star?", other)


@pytest.fixture(scope="module")
def estimate(model, pair):
    return attribution_patching(model, *pair, hooks=["resid_pre", "attn_out", "z"], metric=metric)


def drawn(figure, panel: int = 0) -> np.ndarray:
    return figure.axes[panel].collections[0].get_array()


def test_the_stream_by_layer_and_token_is_drawn_in_shares(model, pair):
    result = activation_patching(model, *pair, positions=["image", "question", "last"], metric=metric)
    figure = plot_patching(result, pair[0])
    np.testing.assert_allclose(drawn(figure), recovered(result), rtol=1e-6)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["image", "question", "last"]
    assert figure.axes[0].get_title(loc="left") == "resid_pre, clean into the corrupted run"
    assert figure.axes[1].get_ylabel() == "share recovered"
    np.testing.assert_allclose(drawn(plot_patching(result, share=False, title="Mine")), result)


def test_noise_is_white_where_nothing_is_lost(model, pair):
    result = activation_patching(model, *pair, positions="last", metric=metric, direction="noise")
    low, high = plot_patching(result).axes[0].collections[0].get_clim()
    assert low + high == pytest.approx(2.0)
    assert "corrupted into the clean run" in plot_patching(result).axes[0].get_title(loc="left")


def test_heads_are_cells(model, pair):
    result = activation_patching(model, *pair, hook="z", positions="last", metric=metric)
    figure = plot_patching(result, pair[0])
    np.testing.assert_allclose(drawn(figure), recovered(result).isel(position=0))
    assert figure.axes[0].get_xlabel() == "head"
    keys = activation_patching(model, *pair, hook="k", positions="last", layers=[1], metric=metric)
    assert plot_patching(keys).axes[0].get_xlabel() == "key-value head"


def test_patches_lie_on_the_image(model, pair):
    result = activation_patching(model, *pair, hook="hook_image_embed", metric=metric)
    figure = plot_patching(result, pair[0])
    np.testing.assert_allclose(drawn(figure).reshape(-1), recovered(result), rtol=1e-6)
    tower = activation_patching(model, *pair, hook="vision.resid_pre", positions=[3, 4], metric=metric)
    figure = plot_patching(tower, pair[0])
    assert [axes.get_title() for axes in figure.axes[: tower.sizes["layer"]]] == ["layer 0", "layer 1"]
    found = np.asarray(drawn(figure, 1)).reshape(-1)
    np.testing.assert_allclose(found[[3, 4]], recovered(tower).isel(layer=1), rtol=1e-6)
    assert np.isnan(found[[0, 15]]).all()


def test_the_positions_of_the_image_unfold(model, pair):
    """The stream entering layer 0 is what the merge puts there, so both ways to draw it agree."""
    result = activation_patching(model, *pair, metric=metric)
    figure = plot_patching(result, pair[0], unfold=True)
    embed = recovered(activation_patching(model, *pair, hook="hook_image_embed", metric=metric))
    np.testing.assert_allclose(np.asarray(drawn(figure)).reshape(-1), embed, rtol=1e-4, atol=1e-5)
    assert figure.axes[0].get_title() == "layer 0"
    flat = plot_patching(result, pair[0])
    np.testing.assert_allclose(drawn(flat), recovered(result), rtol=1e-6)


def test_estimates_are_panels_on_one_scale(estimate, pair):
    figure = plot_patching(estimate[["resid_pre", "attn_out"]], pair[0])
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["resid_pre", "attn_out"]
    share = recovered(estimate)["attn_out"]
    last = pair[0].token_map["last"][0]
    np.testing.assert_allclose(drawn(figure, 1)[:, -1], share.sel(position=last), rtol=1e-6)
    one = recovered(estimate)["z"].sel(position=[last])
    np.testing.assert_allclose(drawn(plot_patching(one)), one.isel(position=0))


def test_paths_have_a_panel_or_row_for_each_receiver(model, pair):
    heads = path_patching(model, *pair, receivers=["logits", ("q", 2, 1)], metric=metric)
    figure = plot_patching(heads)
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["to logits", "to L2H1 q"]
    np.testing.assert_allclose(drawn(figure), recovered(heads).isel(receiver=0))
    mlps = path_patching(model, *pair, receivers=["logits", ("mlp", 2)], senders="mlps", metric=metric)
    axes = plot_patching(mlps).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["logits", "L2 mlp"]
    assert axes.get_title(loc="left") == "Mlps, clean into the corrupted run"


def test_the_lens_is_drawn_as_it_is(model, pair):
    read = logit_lens(model, pair[0], positions="question", answers=["red"])
    figure = plot_patching(read["answer_probability"], pair[0])
    np.testing.assert_allclose(drawn(figure), read["answer_probability"].isel(answer=0))
    assert figure.axes[0].get_title(loc="left") == "Answer probability"


def test_one_number_for_each_layer_is_a_row(model, pair):
    result = activation_patching(model, *pair, positions="all", metric=metric)
    np.testing.assert_allclose(drawn(plot_patching(result)), [[1.0] * model.cfg.n_layers], atol=1e-4)


def test_what_fits_no_figure_says_what_to_do(estimate, pair, model):
    with pytest.raises(InputError, match=r"\(resid_pre.*layer, position.*layer, position"):
        plot_patching(estimate, pair[0])
    with pytest.raises(InputError, match="layer, position, head.*layer, head"):
        plot_patching(recovered(estimate)["z"], pair[0])
    with pytest.raises(InputError, match="by patch.*image.*inputs"):
        plot_patching(recovered(estimate)["attn_out"], unfold=True)
    with pytest.raises(InputError, match="are 13.*expected 1 to 12"):
        plot_patching({str(i): estimate["attn_out"] for i in range(13)})
    together = activation_patching(model, *pair, positions=["image", "last"], metric=metric)
    with pytest.raises(InputError, match="positions.*patches.*image 0"):
        plot_patching(together, pair[0], unfold=True)
    with pytest.raises(InputError, match="by patch, or by position.*inputs; .*axes"):
        by_patch(xr.DataArray([1.0], dims="layer"))


def test_chosen_patches_lie_where_they_were_on_the_image_alone(model, pair, wide_image):
    """The grid comes from the result, not from which of its patches are drawn."""
    result = activation_patching(model, *pair, hook="hook_image_embed", positions=[5, 6], metric=metric)
    grid = by_patch(recovered(result), wide_image)
    assert grid.shape == (4, 4)
    np.testing.assert_allclose(grid.values.reshape(-1)[[5, 6]], recovered(result))
    assert np.isnan(grid.values).sum() == 14
    with pytest.raises(InputError, match="patch_grid.*give the inputs"):
        by_patch(result.drop_attrs())
