"""Results survive their file, and a file that is not theirs is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import save_file

from hooked_llava.errors import CheckpointError, InputError
from hooked_llava.results.arrays import load, recovered, save, stack
from tests.pairs import as_users_run


def dataset() -> xr.Dataset:
    return xr.Dataset(
        {
            "score": (("layer", "position"), np.arange(6, dtype=np.float32).reshape(2, 3), {"unit": "nats"}),
            "token": (("layer", "position"), np.array([["a", "é", ""], ["red", "blue", "</s>"]])),
            "hit": ("layer", np.array([True, False])),
            "total": ((), np.float64(1.5)),
        },
        coords={"layer": [0, 2], "position": [4, 5, 9], "label": ("position", ["x", "y", "z"])},
        attrs={
            "model": "m",
            "clean": 0.25,
            "runs": 3,
            "nothing": None,
            "list": [1.0, 2.0],
            "nested": {"a": [True, "b"]},
        },
    )


@pytest.mark.parametrize("name", [None, "map"])
def test_arrays_come_back_as_they_were(tmp_path: Path, name: str | None) -> None:
    result = dataset().score.rename(name).assign_attrs(model="m", prompts=["a", "b"])
    save(result, tmp_path / "result.safetensors")
    found = load(tmp_path / "result.safetensors")
    assert found.identical(result.drop_attrs(deep=False).assign_attrs(result.attrs))
    assert found.dtype == np.float32
    assert found.name == name
    assert [p.name for p in tmp_path.iterdir()] == ["result.safetensors"]


def test_datasets_come_back_as_they_were(tmp_path: Path) -> None:
    save(dataset(), tmp_path / "result.safetensors")
    assert load(str(tmp_path / "result.safetensors")).identical(dataset())


@pytest.mark.parametrize(
    ("name", "attrs", "today"),
    [
        ("answer_probability", {}, "resid"),
        (None, {"analysis": "attention_knockout"}, "resid"),
        (None, {"analysis": "my_analysis"}, "stream"),
    ],
)
def test_names_that_version_0_1_wrote_are_read_as_todays(
    tmp_path: Path, name: str | None, attrs: dict[str, str], today: str
) -> None:
    coords = {"stream": [0, 1], "layer_name": ("stream", ["0", "final"])}
    old = xr.DataArray([0.5, 1.0], coords, "stream", name=name, attrs=attrs)
    save(old, tmp_path / "result.safetensors")
    expected = old if today == "stream" else old.rename(stream=today)
    xr.testing.assert_identical(load(tmp_path / "result.safetensors"), expected)


def test_variables_that_version_0_1_wrote_are_read_as_todays(tmp_path: Path) -> None:
    data = {"rank": ("layer", [1, 2]), "message_rank": ("head", [3.0]), "message_logit_difference": ("head", [0.5])}
    save(xr.Dataset(data, attrs={"analysis": "information_storage"}), tmp_path / "result.safetensors")
    found = load(tmp_path / "result.safetensors")
    assert sorted(found.data_vars) == ["head_output_logit_difference", "head_output_rank", "rank"]
    assert found["head_output_rank"].values.tolist() == [3.0]


def test_numpy_attributes_become_plain(tmp_path: Path) -> None:
    result = xr.DataArray(np.float32(2), attrs={"n": np.int64(3), "where": (1, 2), "all": np.arange(2)})
    save(result, tmp_path / "r")
    assert load(tmp_path / "r").attrs == {"n": 3, "where": [1, 2], "all": [0, 1]}
    assert load(tmp_path / "r").shape == ()


def test_what_a_file_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with pytest.raises(InputError, match="'day' holds datetime64"):
        save(
            xr.DataArray([1.0], coords={"day": ("x", np.array(["2024-01-01"], dtype="datetime64[ns]"))}, dims="x"), path
        )
    with pytest.raises(InputError, match="method.*builtin_function"):
        save(xr.DataArray([1.0], attrs={"method": {"fn": len}}), path)
    with pytest.raises(InputError, match="not all words"):
        save(xr.DataArray(np.array([1, "a"], dtype=object)), path)
    with as_users_run(), pytest.raises(InputError, match="result.*dict.*DataArray"):
        save({"a": 1}, path)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_file_can_be_read_by_others_and_needs_a_folder(tmp_path: Path) -> None:
    save(dataset(), tmp_path / "result")
    (tmp_path / "usual").touch()
    assert (tmp_path / "result").stat().st_mode == (tmp_path / "usual").stat().st_mode
    with pytest.raises(InputError, match="no folder '.*nowhere'"):
        save(dataset(), tmp_path / "nowhere" / "result")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="readable safetensors file"):
        load(tmp_path / "missing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CheckpointError, match="readable safetensors file"):
        load(tmp_path / "text")
    save_file({"x": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="expected 'hooked_llava.result.v1'"):
        load(tmp_path / "other")


def test_stacking_says_where_positions_differ() -> None:
    first = dataset()[["score"]].assign_attrs(n_forward=2, seconds=0.5)
    second = first.assign_coords(position=[1, 2, 3], label=("position", ["u", "v", "w"])).assign_attrs(clean=0.5)
    joined = stack([first, second], "pair")
    assert joined.score.dims == ("pair", "layer", "position")
    assert joined.absolute_position.values.tolist() == [[4, 5, 9], [1, 2, 3]]
    assert joined.position.values.tolist() == [0, 1, 2]
    assert joined.label.values.tolist() == [["x", "y", "z"], ["u", "v", "w"]]
    assert joined.attrs["clean"] == [0.25, 0.5]
    assert (joined.attrs["n_forward"], joined.attrs["seconds"], joined.attrs["model"]) == (4, 1.0, "m")
    same = stack([first, first], "prompt")
    assert same.position.values.tolist() == [4, 5, 9]
    assert same.label.dims == ("position",)
    with pytest.raises(InputError, match="different sizes"):
        stack([first, first.isel(position=[0])], "pair")


def patched(values, direction: str, clean, corrupted, **attrs) -> xr.DataArray:
    dims = ("pair", "layer")[-np.ndim(values) :]
    attrs = {"clean": clean, "corrupted": corrupted, "direction": direction, **attrs}
    return xr.DataArray(values, dims=dims, name="metric", attrs=attrs)


@pytest.mark.parametrize(("direction", "neutral"), [("denoise", 0.0), ("noise", 1.0)])
def test_the_share_is_1_as_clean_and_0_as_corrupted_whichever_way_was_patched(direction: str, neutral: float) -> None:
    share = recovered(patched([-3.0, 5.0, 1.0, 9.0, np.nan], direction, 5.0, -3.0, hook="z"))
    np.testing.assert_allclose(share, [0.0, 1.0, 0.5, 1.5, np.nan])
    assert (share.name, share.attrs["units"], share.attrs["neutral"]) == ("recovered", "share recovered", neutral)
    assert (share.attrs["clean"], share.attrs["hook"]) == (5.0, "z")


def test_shares_of_pairs_each_have_their_own_ends() -> None:
    share = recovered(patched([[0.0, 2.0], [-1.0, 9.0]], "denoise", [2.0, 9.0], [0.0, -1.0]))
    np.testing.assert_allclose(share, [[0.0, 1.0], [0.0, 1.0]])
    assert share.dims == ("pair", "layer")


def test_estimated_changes_begin_at_the_run_that_is_patched() -> None:
    for direction, expected in (("denoise", [0.0, 0.5, -0.25]), ("noise", [1.0, 1.5, 0.75])):
        parts = {hook: ("layer", np.array([0.0, 2.0, -1.0])) for hook in ("z", "mlp_out")}
        estimate = xr.Dataset(parts, attrs={"clean": 5.0, "corrupted": 1.0, "direction": direction, "steps": 0})
        share = recovered(estimate)
        for hook in parts:
            np.testing.assert_allclose(share[hook], expected)
            assert share[hook].attrs["units"] == share.attrs["units"] == "share recovered"
            assert share[hook].attrs["neutral"] == float(direction == "noise")


def test_a_share_of_a_share_is_itself() -> None:
    share = recovered(patched([1.0, 2.0], "noise", 5.0, -3.0))
    assert recovered(share) is share


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"recovered\(estimate\)\['z'\].*recovered\(estimate\['z'\]\)"):
        recovered(xr.DataArray([1.0], dims="layer", name="z"))
    with pytest.raises(InputError, match=r"metric.*run \(\[1.0, 2.0\]"):
        recovered(patched([[1.0], [2.0]], "denoise", [1.0, 2.0], [0.0, 2.0]))
