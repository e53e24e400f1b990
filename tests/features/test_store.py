"""A feature store answers as dense activations would, whatever the images' layouts, and however it was interrupted."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.datasets.forwards import ModelSource
from hooked_llava.datasets.rows import StudyRow
from hooked_llava.errors import CheckpointError, InputError, SpanError
from hooked_llava.features.ranking import Pooling
from hooked_llava.features.shards import ENTRIES
from hooked_llava.features.store import FeatureStore
from hooked_llava.sae.autoencoder import SAEConfig, SparseAutoencoder
from hooked_llava.sae.files import load_sae
from hooked_llava.storage import read_tensors
from hooked_llava.toy.scenes import draw_scene
from tests.features.made import Given, filled, picture, same_ranking, write
from tests.layouts import by_hand, made
from tests.oracles.plain_features import active_by_hand, pixel_mask_by_hand, top_by_hand
from tests.pairs import as_users_run
from tests.tiled import TALL, WIDE, drawn, with_processor

POOLINGS: tuple[Pooling, Pooling] = ("mean", "max")
GRIDS = ("all", "base", "fine")
SPANS = st.sampled_from(["image", "newlines|last", "text", "all"])
SMALL = st.tuples(
    st.sampled_from(["next", "onevision", "several", "llava", "by hand"]), st.integers(8, 30), st.integers(8, 30)
)
PROMPTS = st.lists(st.lists(SMALL, max_size=2), min_size=1, max_size=4)


def drawn_given(prompts: Any, n_features: int, tokens: str, seed: int) -> Given:
    layouts: list[list[ImageLayout]] = [[made((*one, 56)) for one in images] for images in prompts]
    if "newlines" in tokens:
        layouts = [[layout for layout in own if len(layout.newline_features())] for own in layouts]
    if tokens != "all":  # spans of images are there only where images are
        layouts = [own or [by_hand()] for own in layouts]
    n_images = sum(map(len, layouts))
    contents = np.random.default_rng(seed).integers(0, 3, n_images).tolist()
    return Given(layouts, contents, n_features, tokens, seed)


@settings(max_examples=30)
@given(
    PROMPTS, st.integers(1, 6), st.sampled_from(["image", "all"]), st.integers(0, 99), st.sampled_from([1, 60, 10**6])
)
def test_every_question_is_answered_as_from_dense_activations(prompts, n_features, tokens, seed, shard_size):
    source = drawn_given(prompts, n_features, tokens, seed)
    images, dense = source.plain(), source.dense()
    with TemporaryDirectory() as folder:
        store = filled(source, Path(folder), shard_size)
        assert (store.n_images, store.n_features, store.n_tokens) == (len(images), n_features, len(dense))
        assert store.n_entries == np.count_nonzero(dense)
        np.testing.assert_allclose(store.frequency, (dense > 0).mean(0))
        np.testing.assert_array_equal(store.largest, dense.max(0))
        np.testing.assert_allclose(store.mean, dense.sum(0) / np.maximum((dense > 0).sum(0), 1))
        for feature in range(n_features):
            counts, edges = store.histogram(feature, bins=3)
            active = dense[:, feature][dense[:, feature] > 0]
            assert counts.tolist() == np.histogram(active, edges)[0].tolist()
            assert counts.sum() == len(active)
            assert sorted(store.placed(feature).values.tolist()) == sorted(active.tolist())
            for by, grid, distinct in zip(POOLINGS * 3, GRIDS * 2, (True, False) * 3, strict=True):
                if any(image.positions(grid) for image in images):
                    top = store.top_images(feature, 3, by=by, grid=grid, distinct=distinct)
                    same_ranking(top, top_by_hand(images, feature, 3, by, grid, distinct=distinct))
            for number, image in enumerate(images):
                np.testing.assert_array_equal(store.activations(feature, number), image.acts[:, feature])
        for number, image in enumerate(images):
            for by in POOLINGS:
                same_ranking(store.of_image(number, 4, by=by), active_by_hand(image, image.positions("all"), 4, by))


@settings(max_examples=15)
@given(PROMPTS, SPANS, st.integers(0, 99))
def test_of_a_part_of_the_tokens_the_rest_is_not_known(prompts, tokens, seed):
    source = drawn_given(prompts, 3, tokens, seed)
    images = [image for image in source.plain() if not np.isnan(image.acts).all()]
    with TemporaryDirectory() as folder:
        store = filled(source, Path(folder))
        assert store.n_images == len(images)
        placed = store.placed(1)
        assert len(placed.values) == np.count_nonzero(source.dense()[:, 1])
        for value, number, (row, image, _, _, position, _) in zip(*placed, strict=True):
            at = position + source.maps[row].real.start
            assert source.acts[row][at, 1] == value
            assert (number < 0) == (image < 0)
            assert number < 0 or store.record(number).row == row
        for number, image in enumerate(images):
            np.testing.assert_array_equal(store.activations(1, number), image.acts[:, 1])
            same_ranking(store.of_image(number), active_by_hand(image, image.positions("all"), 10, "mean"))


@settings(max_examples=20)
@given(SMALL, st.integers(0, 99))
def test_masks_and_regions_go_by_the_layout(one, seed):
    layout = made((*one, 60))
    source = Given([[layout]], [0], 2, seed=seed)
    assert layout.original_size is not None
    image, (height, width) = source.plain()[0], layout.original_size
    with TemporaryDirectory() as folder:
        store = filled(source, Path(folder))
        together = np.zeros((height, width), dtype=bool)
        for name in layout.names:
            lit = image.acts[layout.cell_features(name), 1] > 1
            np.testing.assert_array_equal(store.cell_mask(1, 0, 1.0)[name], lit)
            found = store.mask(1, 0, 1.0, grid=name)
            together |= found
            if not layout.grid(name).pooled:
                boxes = layout.grid(name).boxes.reshape(-1, 4).tolist()
                expected = pixel_mask_by_hand(boxes, lit.ravel().tolist(), height, width)
                np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(store.mask(1, 0, 1.0), together)
        box = (0, 0, width, height / 2)
        try:
            cells = layout.box_to_features(box).features.tolist()
        except SpanError:
            with pytest.raises(SpanError):
                store.in_region(0, box)
            return
        for by in POOLINGS:
            expected = active_by_hand(image, cells, 10, by)
            same_ranking(store.in_region(0, box, by=by), expected)
        half = np.zeros((height, width), dtype=bool)
        half[: height // 2] = True
        if half.any() and height % 2 == 0:
            same_ranking(store.in_region(0, half), active_by_hand(image, cells, 10, "mean"))


def test_a_build_that_was_interrupted_goes_on_after_its_last_shard(tmp_path):
    def of(stop: int | None) -> Given:
        return Given([[by_hand()] for _ in range(9)], [*range(9)], 4, seed=3, stop_before=stop)

    with pytest.raises(KeyboardInterrupt):
        write(of(7), tmp_path / "parts")
    began = FeatureStore.open(tmp_path / "parts")
    assert not began.complete
    assert 0 < began.n_images < 7
    assert began.top_images(2)
    parts, whole = filled(of(None), tmp_path / "parts"), filled(of(None), tmp_path / "whole")
    assert parts.complete
    assert [store.record(i) for store in (parts,) for i in range(9)] == [whole.record(i) for i in range(9)]
    for feature in range(4):
        np.testing.assert_array_equal(parts.placed(feature).values, whole.placed(feature).values)
        assert parts.top_images(feature) == whole.top_images(feature)
    np.testing.assert_array_equal(parts.mean, whole.mean)


def test_a_build_that_was_killed_goes_on(tmp_path):
    def dies(row: int) -> Any:
        if row == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(row)

    killed = Given([[by_hand()] for _ in range(9)], [*range(9)], 4, seed=3)
    run = killed._chunk
    killed._chunk = dies  # type: ignore[method-assign]
    child = os.fork()
    if not child:
        write(killed, tmp_path / "parts")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    source = Given([[by_hand()] for _ in range(9)], [*range(9)], 4, seed=3)
    rows: list[int] = []
    run = source._chunk
    source._chunk = lambda row: rows.append(row) or run(row)  # type: ignore[method-assign]
    store = filled(source, tmp_path / "parts")
    assert store.complete
    assert 1 < len(rows) < 9
    assert store.n_entries == np.count_nonzero(source.dense())


def test_memory_is_bounded_by_the_shard(tmp_path):
    source = Given([[by_hand()] for _ in range(12)], [0] * 12, 4)
    store = filled(source, tmp_path, shard_size=50)
    sizes = [shard["n_entries"] for shard in json.loads((tmp_path / "index.json").read_text())["shards"]]
    most = max(np.count_nonzero(np.maximum(acts, 0)) for acts in source.acts)
    assert len(sizes) > 2
    assert max(sizes) < 50 + most
    assert sum(sizes) == store.n_entries
    blocks = list(store.blocks(30))
    assert [feature for block, _ in blocks for feature in block] == [*range(4)]
    assert sum(len(entries.values) for _, parts in blocks for entries in parts) == store.n_entries


def test_a_question_about_one_feature_reads_that_feature_alone(tmp_path, monkeypatch):
    store = filled(Given([[by_hand()] for _ in range(6)], [*range(6)], 4), tmp_path)
    read: list[int] = []
    from hooked_llava.storage import TensorFile

    part = TensorFile.part

    def counted(self: TensorFile, name: str, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        found = part(self, name, start, stop)
        if name == "values":
            read.append(len(found))
        return found

    monkeypatch.setattr(TensorFile, "part", counted)
    store.top_images(2)
    assert sum(read) == np.count_nonzero(store.placed(2).values)
    stored = read_tensors(tmp_path / "entries-00000.safetensors", [ENTRIES], writer="")[0]
    assert stored["starts"].tolist() == sorted(stored["starts"].tolist())


# ---------------------------------------------------------------------- with a model


def pairs(n: int = 3) -> list[tuple[Image.Image, str]]:
    shapes = ("star", "ring", "square")
    return [
        (draw_scene([(shapes[i % 3], "red", (4 * i, 8))], seed=i), f"Where is the {shapes[i % 3]}?") for i in range(n)
    ]


def test_what_a_model_computes_is_what_is_stored(tiny_shapes, tmp_path):
    sae = load_sae("tiny-shapes")
    data = [*pairs(), pairs()[0]]
    store = FeatureStore.build(tiny_shapes, sae, data, tmp_path, batch_size=2, progress=False)
    assert (store.hook, store.tokens, store.complete) == (sae.cfg.hook, "image", True)
    for number, (image, question) in enumerate(data):
        inputs = tiny_shapes.prepare(question, images=image)
        _, cache = tiny_shapes.run_with_cache(inputs, names_filter=sae.cfg.hook)
        dense = sae.dense(sae.encode(cache[sae.cfg.hook][0, list(inputs.token_map["image"])])).numpy()
        for feature in np.argsort(-dense.sum(0))[:3].tolist():
            np.testing.assert_allclose(store.activations(feature, number), dense[:, feature], atol=1e-4)
        assert store.image(number).tobytes() == image.tobytes()
        assert store.layout(number) == inputs.token_map.layout()
        assert store.prompt(number) == question
    best = store.of_image(0)[0].feature
    distinct, all_images = (store.top_images(best, distinct=one) for one in (True, False))
    assert {0, 3} <= {top.image for top in all_images}
    assert len({top.image for top in distinct} & {0, 3}) == 1
    assert len(list((tmp_path / "images").iterdir())) == 3


def test_images_in_files_stay_there(tiny_shapes, tmp_path):
    sae, path = load_sae("tiny-shapes"), tmp_path / "star.png"
    pairs()[0][0].save(path)
    rows = [StudyRow(id="1", question="Who made the star?", answer="Red", image="star")]
    given: list[tuple[Any, dict[str, Any]]] = [
        (tmp_path, {"prompt": "What?"}),
        ([(str(path), "What?")], {}),
        (rows, {"images": tmp_path}),
    ]
    for number, (data, options) in enumerate(given):
        store = FeatureStore.build(tiny_shapes, sae, data, tmp_path / f"store{number}", progress=False, **options)
        assert store.record(0).file == str(path.resolve())
        assert not (store.folder / "images").exists()
    assert store.prompt(0) == "Who made the star?"
    pairs()[1][0].save(path)
    with pytest.raises(InputError, match=r"Image 0.*star\.png.*another"):
        store.image(0)


def test_images_of_several_grids(tmp_path):
    model = with_processor("next")
    sae = SparseAutoencoder(SAEConfig(d_in=model.cfg.d_model, d_sae=24, k=4, hook="blocks.0.hook_resid_post")).reset(0)
    images = [drawn(WIDE, seed=1)[0], drawn(TALL, seed=2)[0]]
    data = [(image, "What color is the star?") for image in images]
    store = FeatureStore.build(model, sae, data, tmp_path, progress=False, any_model=True)
    for number, image in enumerate(images):
        best = store.of_image(number, 1, grid="fine")[0].feature
        assert store.mask(best, number, grid="fine").shape == image.size[::-1]
        assert store.layout(number).n_features == len(store.activations(best, number))


def test_an_iterator_is_read_on_where_the_build_was_stopped(tiny_shapes, tmp_path, monkeypatch):
    sae = load_sae("tiny-shapes")
    options: dict[str, Any] = {"batch_size": 1, "shard_size": 1, "prefetch": 0, "progress": False}
    whole = FeatureStore.build(tiny_shapes, sae, iter(pairs()), tmp_path / "whole", **options)
    run, calls = ModelSource._forward, []

    def stops(self: ModelSource, prepared: Any) -> Any:
        calls.append(prepared)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, prepared)

    monkeypatch.setattr(ModelSource, "_forward", stops)
    with pytest.raises(KeyboardInterrupt):
        FeatureStore.build(tiny_shapes, sae, iter(pairs()), tmp_path / "parts", **options)
    store = FeatureStore.build(tiny_shapes, sae, iter(pairs()), tmp_path / "parts", **options)
    assert len(calls) == 4
    assert [store.record(i) for i in range(3)] == [whole.record(i) for i in range(3)]
    np.testing.assert_array_equal(store.mean, whole.mean)


def test_other_features_are_refused(tiny_shapes, tmp_path):
    sae = load_sae("tiny-shapes")
    FeatureStore.build(tiny_shapes, sae, pairs(1), tmp_path, progress=False)
    with pytest.raises(InputError, match=r"tokens.*'image'.*'text'"):
        FeatureStore.build(tiny_shapes, sae, pairs(1), tmp_path, tokens="text", progress=False)
    with pytest.raises(InputError, match=r"n_rows.*1.*2"):
        FeatureStore.build(tiny_shapes, sae, pairs(2), tmp_path, progress=False)
    other = SparseAutoencoder(sae.cfg).reset(1)
    with pytest.raises(InputError, match="sae"):
        FeatureStore.build(tiny_shapes, other, pairs(1), tmp_path, progress=False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hook": ("resid_post", 2)}, "resid_post.*trained on.*resid_pre"),
        ({"tokens": "nowhere"}, "nowhere"),
        ({"batch_size": 0}, "batch_size=0.*1"),
        ({"shard_size": 0}, "shard_size=0.*1"),
        ({"data": []}, "no prompts"),
        ({"data": 3}, "int"),
        ({"data": [(None, "Who made the star?")]}, "image"),
        ({"folder": Path(__file__)}, r"test_store\.py.*file"),
    ],
)
def test_bad_arguments(tiny_shapes, tmp_path, wrong, message):
    given = {"data": pairs(1), "folder": tmp_path / "store", "progress": False, **wrong}
    with as_users_run(), pytest.raises((InputError, SpanError), match=message):
        FeatureStore.build(tiny_shapes, load_sae("tiny-shapes"), given.pop("data"), given.pop("folder"), **given)
    assert not (tmp_path / "store" / "index.json").exists()


def test_hooks_of_images_have_the_positions_of_the_prompt_or_are_refused(tiny_shapes, tmp_path):
    at = {
        name: SparseAutoencoder(SAEConfig(d_in=128, d_sae=9, k=2)).reset(0)
        for name in ("hook_image_embed", "hook_embed")
    }
    image, embed = (
        FeatureStore.build(tiny_shapes, sae, pairs(2), tmp_path / name, name, progress=False)
        for name, sae in at.items()
    )
    for feature in range(9):
        np.testing.assert_allclose(image.activations(feature, 1), embed.activations(feature, 1), atol=1e-4)
    vision = "vision.blocks.0.hook_resid_post"
    sae = SparseAutoencoder(SAEConfig(d_in=tiny_shapes.config.vision.d_model, d_sae=9, k=2)).reset(0)
    with pytest.raises(InputError, match="vision.blocks.0.*hook_image_embed"):
        FeatureStore.build(tiny_shapes, sae, pairs(2), tmp_path / "vision", vision, progress=False)


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda s: s.top_images(4), InputError, r"feature=4.*0\.\.3"),
        (lambda s: s.top_images(0, by="sum"), InputError, r"by='sum'.*mean.*max"),
        (lambda s: s.top_images(0, n=0), InputError, "n=0.*1"),
        (lambda s: s.top_images(0, grid="medium"), SpanError, "medium.*base, fine"),
        (lambda s: s.mask(0, 7), InputError, r"image=7.*0"),
        (lambda s: s.of_image(0, grid="medium"), SpanError, "medium.*base, fine"),
        (lambda s: s.in_region(0, (5, 5, 1, 1)), SpanError, "box"),
        (lambda s: s.in_region(0, np.zeros((3, 3), bool)), SpanError, "3 x 3.*16 x 24"),
    ],
)
def test_bad_questions(tmp_path, ask, error, message):
    store = filled(Given([[by_hand()]], [0], 4), tmp_path)
    with as_users_run(), pytest.raises(error, match=message):
        ask(store)


def test_a_folder_without_a_store(tmp_path):
    with pytest.raises(CheckpointError, match=r"index\.json"):
        FeatureStore.open(tmp_path)
    store = filled(Given([[by_hand()]], [3], 4), tmp_path)
    assert store.image(0).tobytes() == picture(3).tobytes()
    (tmp_path / "entries-00000.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="entries-00000"):
        FeatureStore.open(tmp_path).top_images(0)
