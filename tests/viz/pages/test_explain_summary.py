from __future__ import annotations

import numpy as np
import xarray as xr

from hooked_llava.viz.pages.explain_summary import summary_of


def results(token_ids: list[int]) -> dict[str, xr.Dataset | xr.DataArray]:
    """Results as `explain` has them: one removal of two heads and one of a patch, after a run of which nothing is removed."""
    runs = {"token_id": token_ids, "token": [f"t{i}" for i in token_ids], "probability": [0.9, 0.2, 0.1]}
    places = {"removed": ["nothing", "heads", "patches"], "n_removed": [0, 2, 1], "n_ranked": [0, 4, 64]}
    without = xr.Dataset(
        {name: ("run", values) for name, values in runs.items()},
        coords={name: ("run", values) for name, values in places.items()},
        attrs={"target": "t7", "target_id": 7},
    )
    said = {"token": (("prompt", "rank"), [["t7", "t3"]]), "probability": (("prompt", "rank"), [[0.9, 0.05]])}
    lens = xr.Dataset(
        {"token_id": (("layer", "position", "rank"), [[[3]], [[7]], [[7]]])},
        coords={"layer_name": ("layer", ["0", "1", "final"])},
    )
    parts = xr.DataArray(
        [0.5, 4.0, 2.0],
        dims="component",
        coords={"component": ["embed", "0_attn", "1_mlp"]},
        attrs={"logit": 6.5, "baseline": None},
    )
    scores = xr.DataArray(
        np.array([[0.1, 0.5], [0.9, 0.0]]), dims=("layer", "head"), coords={"layer": [0, 1], "head": [0, 1]}
    )
    found = {
        "without": without,
        "next_tokens": xr.Dataset(said),
        "lens": lens,
        "components": parts,
        "head_scores": scores,
    }
    return {**found, "patches": xr.DataArray([0.0])}


def test_a_summary_names_what_decides_and_what_changes_the_answer():
    sure, leads, written, heads, patches = summary_of(results([7, 3, 3]))
    assert all(part in sure for part in ("“t7”", "0.900", "“t3”", "0.05"))
    assert "from layer 1 on" in leads
    assert "attention of layer 0 (+4.0)" in written
    assert "MLP of layer 1 (+2.0)" in written
    assert "6.5" in written
    assert all(part in heads for part in ("2 heads", "1.0, 0.1", "“t3”", "0.2"))
    assert all(part in patches for part in ("first patch", "64", "“t3”", "0.1"))


def test_what_changes_nothing_is_said_to_be_not_needed():
    *_, heads, patches = summary_of(results([7, 7, 7]))
    assert "still “t7”" in heads
    assert "still “t7”" in patches
    assert "does not need it" in patches


def test_without_an_image_patches_are_not_mentioned():
    found = results([7, 3, 3])
    del found["patches"]
    assert len(summary_of(found)) == 4
