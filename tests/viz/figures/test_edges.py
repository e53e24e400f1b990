"""Every edge has one cell, senders and receivers in the order in which the model computes them."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hooked_llava.analysis import edge_attribution, path_patching
from hooked_llava.errors import InputError
from hooked_llava.results.arrays import recovered
from hooked_llava.viz import edge_map, plot_patching


def metric(logits):
    return logits[..., 7] - logits[..., 9]


@pytest.fixture(scope="module")
def edges(model, inputs):
    other = np.random.default_rng(1).integers(0, 256, (100, 200, 3)).astype(np.uint8)
    return edge_attribution(model, inputs, model.prepare("What color is the star?", other), metric=metric)


def drawn(figure) -> np.ndarray:
    return np.asarray(figure.axes[0].collections[0].get_array())


def labels(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_all_senders_by_all_receivers(edges):
    figure = plot_patching(edges)
    share = recovered(edges)
    rows = [share.embed.values]
    for layer in edges.layer.values:
        rows += [*share.heads.sel(layer=layer).values.T, share.mlps.sel(layer=layer).values]
    np.testing.assert_allclose(drawn(figure), np.stack(rows))
    axes = figure.axes[0]
    assert labels(axes.yaxis) == ["embed", "L0", "L1", "L2"]
    assert labels(axes.xaxis) == ["L0", "L1", "L2", "logits"]
    assert figure.axes[1].get_ylabel() == "share recovered"


def test_some_senders_and_as_they_are(edges):
    heads = plot_patching(edges["heads"])
    expected = edges.heads.values.reshape(len(edges.receiver), -1).T
    np.testing.assert_allclose(drawn(heads), expected)
    assert heads.axes[1].get_ylabel() == "change of the metric"
    few = edge_map(edges[["embed", "mlps"]], title="Mine")
    assert drawn(few).shape == (1 + edges.sizes["layer"], edges.sizes["receiver"])
    assert few.axes[0].get_title(loc="left") == "Mine"


def test_paths_to_many_receivers_are_one_map(model, inputs):
    other = np.random.default_rng(1).integers(0, 256, (100, 200, 3)).astype(np.uint8)
    receivers = [(kind, layer, head) for layer in (1, 2) for kind in "qk" for head in range(4)]
    paths = path_patching(
        model, inputs, model.prepare("What color is the star?", other), receivers=receivers, metric=metric
    )
    figure = plot_patching(paths)
    np.testing.assert_allclose(drawn(figure), recovered(paths).values.reshape(16, -1).T)
    assert labels(figure.axes[0].xaxis) == ["L1", "L2"]


def test_other_axes_are_refused(edges):
    pairs = edges.expand_dims(pair=2)
    with pytest.raises(InputError, match="heads.*layer, head"):
        edge_map(pairs)
    with pytest.raises(InputError, match="axes layer, head; expected"):
        edge_map(xr.DataArray(np.zeros((2, 3)), dims=("layer", "head")))
