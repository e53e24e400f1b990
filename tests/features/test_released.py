"""Files in the released layout, written by an independent oracle, become a store, and a store becomes such files."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.architecture.layouts import llava_layout
from hooked_llava.errors import CheckpointError, InputError
from hooked_llava.features import released
from hooked_llava.features.released import parts_of, read_released, write_released
from tests.features.made import Given, filled, picture
from tests.layouts import by_hand
from tests.oracles.plain_released import read_by_hand, write_by_hand

MODULE = "model.layers.24"
LAYOUTS = [llava_layout(2, 3), llava_layout(3, 2, class_token=True), llava_layout(2, 3)]


def drawn(layouts: list[ImageLayout], n_features: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.maximum(rng.integers(-4, 4, (one.n_features, n_features)), 0).astype(float) for one in layouts]


def cached(folder: Path, *, n_features: int = 7, n_splits: int = 3, loses_last: bool = False) -> list[np.ndarray]:
    dense = drawn(LAYOUTS, n_features, seed=1)
    write_by_hand(dense, folder / MODULE, n_splits, loses_last=loses_last)
    return dense


def read(cache: Path, folder: Path, layouts: list[ImageLayout] = LAYOUTS, **options: str):
    return read_released(cache, MODULE, [picture(i) for i in range(len(layouts))], layouts, folder, **options)


@settings(max_examples=15)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.booleans(), st.sampled_from([1, 7, 2**22]))
def test_a_released_cache_becomes_a_store(n_features, n_splits, seed, loses_last, block):
    n_splits = min(n_splits, n_features)
    dense = drawn(LAYOUTS, n_features, seed)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(released, "_BLOCK", block)
        write_by_hand(dense, Path(folder) / MODULE, n_splits, loses_last=loses_last)
        store = read(Path(folder), Path(folder) / "store")
        if loses_last:
            edges = torch.linspace(0, n_features, n_splits + 1).long()[1:] - 1
            for acts in dense:
                acts[:, edges.tolist()] = 0
        assert (store.hook, store.n_features, store.n_images) == ("blocks.24.hook_resid_post", n_features, 3)
        for image, acts in enumerate(dense):
            for feature in range(n_features):
                np.testing.assert_array_equal(store.activations(feature, image), acts[:, feature])
        whole = np.concatenate(dense)
        np.testing.assert_allclose(store.frequency, (whole > 0).mean(0))
        np.testing.assert_array_equal(store.largest, whole.max(0))
        best = store.of_image(1, n=1)
        cells = dense[1][LAYOUTS[1].object_features()].mean(0)
        assert not best or best[0].score == pytest.approx(cells.max())
        assert store.image(2).tobytes() == picture(2).tobytes()
        assert [place[4] for place in store.placed(0).places] == sorted(
            1 + token for acts in dense[:1] for token in np.flatnonzero(acts[:, 0])
        ) + [1 + token for acts in dense[1:] for token in np.flatnonzero(acts[:, 0])]


@settings(max_examples=15)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.sampled_from(["image", "all"]))
def test_a_store_is_written_with_every_feature_in_its_file(n_features, n_splits, seed, tokens):
    n_splits = min(n_splits, n_features)
    layouts = [[by_hand()], [llava_layout(2, 3), llava_layout(1, 2)]]
    source = Given(layouts, [*range(3)], n_features, tokens, seed)
    expected = [image.acts for image in source.plain()]
    images = [Image.new("RGB", (24, 16)), picture(1), picture(2)]
    with TemporaryDirectory() as folder:
        store = filled(source, Path(folder) / "store")
        written = write_released(store, folder, MODULE, n_splits=n_splits)
        assert {path.name for path in written} == {path.name for path in (Path(folder) / MODULE).iterdir()}
        found = read_by_hand(Path(folder) / MODULE, n_features, n_splits, [acts.shape for acts in expected])
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
        again = read_released(folder, MODULE, images, [store.layout(i) for i in range(3)], Path(folder) / "again")
        assert again.top_images(0) == store.top_images(0)
        for image, acts in enumerate(expected):
            np.testing.assert_array_equal(again.activations(0, image), acts[:, 0])


def test_files_come_from_the_first_feature_on(tmp_path):
    cached(tmp_path, n_features=24, n_splits=3)
    assert [part.features for part in parts_of(tmp_path / MODULE)] == [range(8), range(8, 16), range(16, 24)]
    assert read(tmp_path, tmp_path / "store", hook="hook_embed").hook == "hook_embed"
    assert read(tmp_path, tmp_path / "store", hook="hook_embed").n_images == 3  # opened, not read again


def test_what_does_not_fit(tmp_path):
    cached(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere.*START_END"):
        read_released(tmp_path, "nowhere", [], [], tmp_path / "a")
    with pytest.raises(InputError, match="2 images.*3 layouts"):
        read_released(tmp_path, MODULE, [picture(0)] * 2, LAYOUTS, tmp_path / "b")
    with pytest.raises(CheckpointError, match="image 2.*2 images"):
        read(tmp_path, tmp_path / "c", LAYOUTS[:2])
    with pytest.raises(CheckpointError, match="token.*of image 0.*2 positions"):
        read(tmp_path, tmp_path / "d", [llava_layout(1, 2), *LAYOUTS[1:]])
    assert not any((tmp_path / name / "index.json").exists() for name in "abcd")
    (tmp_path / "mlp").mkdir()
    save_file({"locations": torch.tensor([[0, 0, 5]]), "activations": torch.ones(1)}, tmp_path / "mlp/0_3.safetensors")
    with pytest.raises(InputError, match="mlp.*hook="):
        read_released(tmp_path, "mlp", [picture(0)], LAYOUTS[:1], tmp_path / "e")
    with pytest.raises(CheckpointError, match="features 5 to 5.*0 to 3"):
        read_released(tmp_path, "mlp", [picture(0)], LAYOUTS[:1], tmp_path / "e", hook="hook_embed")
    store = read(tmp_path, tmp_path / "store")
    with pytest.raises(InputError, match=r"n_splits=9.*7"):
        write_released(store, tmp_path / "out", MODULE, n_splits=9)
