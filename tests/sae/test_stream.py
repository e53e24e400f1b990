"""Every activation of a stream is the model's own at its place and comes once an epoch; a stream can be resumed."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image

from hooked_llava.architecture.grid import Cell
from hooked_llava.datasets.forwards import ModelSource
from hooked_llava.datasets.places import PLACE_COLUMNS
from hooked_llava.datasets.rows import StudyRow
from hooked_llava.errors import InputError, SpanError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.sae.shards import ShardCache
from hooked_llava.sae.stream import ActivationBatch, ActivationStream, activation_stream
from hooked_llava.toy.scenes import draw_scene
from tests.tiled import SQUARE, TALL, WIDE, drawn, with_processor

HOOK = "blocks.1.hook_resid_post"
QUESTIONS = ("What color is the star?", "Who made the ring?", "Is there a red circle?", "Where is the star?")


def scene(seed: int) -> Image.Image:
    return draw_scene([("star", "red", (0, 0)), ("ring", "blue", (32, 32))], seed=seed)


def pairs(n: int = 5) -> list[tuple[Any, str]]:
    """Questions of different lengths, the second without an image."""
    return [(None if i == 1 else scene(i), QUESTIONS[i % len(QUESTIONS)]) for i in range(n)]


def stream_of(model: HookedLLaVA, data: Any = None, **options: Any) -> ActivationStream:
    settings = {"tokens": "all", "batch_size": 50, "buffer": 120, "prompts_per_forward": 2, "progress": False}
    return activation_stream(model, options.pop("hooks", HOOK), pairs() if data is None else data, **settings | options)


def joined(batches: list[ActivationBatch]) -> ActivationBatch:
    acts, places = zip(*((batch.acts, batch.places) for batch in batches), strict=True)
    return ActivationBatch(torch.cat(acts), torch.cat(places))


def same(first: list[ActivationBatch], second: list[ActivationBatch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.acts, b.acts) and torch.equal(a.places, b.places) for a, b in zip(first, second, strict=True)
    )


def test_rows_of_a_table_bring_their_spans_into_the_stream(tiny_shapes):
    rows = [
        StudyRow(id=shape, question=f"Is the {shape} red or blue?", answer="red", false_option="blue", objects=(shape,))
        for shape in ("star", "ring")
    ]
    found = joined(list(stream_of(tiny_shapes, rows, tokens="object_word|false_option").with_places()))
    words = [tiny_shapes.tokenizer.decode([token]).strip() for token in found.place("token").tolist()]
    assert sorted(words) == ["blue", "blue", "ring", "star"]
    asked = stream_of(tiny_shapes, rows, tokens="object_word", prompt="Is there a circle?")
    with pytest.raises(SpanError, match="object_word"):  # the rows' words are not in another question
        next(asked)


@pytest.mark.parametrize("tokens", ["all", "image", "question|last"])
def test_every_activation_is_the_models_own_at_its_place_and_comes_once(tiny_shapes, tokens):
    data = [pair for i, pair in enumerate(pairs()) if tokens != "image" or i != 1]
    found = joined(list(stream_of(tiny_shapes, data, tokens=tokens).with_places()))
    n_expected = 0
    for row, (image, question) in enumerate(data):
        inputs = tiny_shapes.prepare(question, image)
        _, cache = tiny_shapes.run_with_cache(inputs, names_filter=HOOK)
        positions = inputs.token_map.span(tokens).tolist() if tokens != "all" else range(inputs.shape[1])
        at = found.place("row") == row
        assert sorted(found.place("position")[at].tolist()) == list(positions)
        where = found.place("position")[at].long()
        torch.testing.assert_close(found.acts[at], cache[HOOK][0, where], atol=2e-5, rtol=1e-4)
        assert found.place("token")[at].tolist() == inputs.input_ids[0, where].tolist()
        n_expected += len(positions)
    assert len(found.acts) == n_expected


@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_places_name_image_tile_and_cell_in_images_of_several_grids(kind):
    model = with_processor(kind)
    images = [drawn(WIDE, seed=1), drawn(SQUARE, TALL, seed=2)]
    data = [(own, "What color is the star?") for own in images]
    found = joined(list(stream_of(model, data, tokens="image").with_places()))
    for row, own in enumerate(images):
        token_map = model.prepare("What color is the star?", own).token_map
        assert int((found.place("row") == row).sum()) == len(token_map["image"])
    for row, image, tile, cell, position, _ in found.places[::7].tolist():
        token_map = model.prepare("What color is the star?", images[row]).token_map
        if cell < 0:
            assert tile < 0
            assert position in token_map["newlines"]
            continue
        assert token_map.cell_at(position) == (image, token_map.layout(image).cell_at(cell))
        grid_name, i, j = Cell(*token_map.layout(image).cell_at(cell))
        patches, weights = token_map.layout(image).grid(grid_name).patches()
        assert tile == patches[i, j, weights[i, j].argmax(), 0]


ON_TILES = (
    "vision.blocks.0.hook_resid_post",
    "vision.hook_patch_embed",
    "vision.blocks.0.attn.hook_z",
    "projector.hook_out",
)


@pytest.mark.parametrize("tokens", ["image", "all"])
@pytest.mark.parametrize("name", [*ON_TILES, "hook_image_embed"])
@pytest.mark.parametrize("kind", ["tiny-shapes", "next", "onevision"])
def test_activations_of_the_image_side_are_the_models_own_at_their_tiles_and_cells(kind, name, tokens, tiny_shapes):
    model = tiny_shapes if kind == "tiny-shapes" else with_processor(kind)
    images = [scene(0), [scene(1), scene(2)]] if kind == "tiny-shapes" else [drawn(WIDE, seed=1), drawn(SQUARE, TALL)]
    data = [(own, "What color is the star?") for own in images]
    ran: list[str] = []
    with model.hooks([("blocks.0.hook_resid_pre", lambda tensor, hook: ran.append(hook.name))]):
        found = joined(list(stream_of(model, data, hooks=name, tokens=tokens).with_places()))
    assert not ran  # nothing of the language tower
    for row, own in enumerate(images):
        inputs = model.prepare("What color is the star?", own)
        expected = model.run_with_cache(inputs, names_filter=name)[1][name].flatten(2)
        first = [tiles.start for tiles in inputs.tiles]
        here = found.places[:, 0] == row
        if name == "hook_image_embed":
            assert sorted(found.place("position")[here].tolist()) == inputs.token_map["image"].tolist()
        else:
            class_tokens = len(expected) * (expected.shape[1] - model.config.vision.n_patches)
            assert int(here.sum()) == expected.shape[:2].numel() - (tokens == "image") * class_tokens
        for place, vector in zip(found.places[here].tolist(), found.acts[here], strict=True):
            _, image, tile, cell, position, token = place
            if name == "hook_image_embed":
                at = (image, position - inputs.token_map.image_ranges[image].start)
                assert token == inputs.input_ids[0, position]
            else:
                at = (first[image] + tile, position)
                assert token == -1
                if cell >= 0:
                    grid_name, i, j = Cell(*inputs.layouts[image].cell_at(cell))
                    patches, weights = inputs.layouts[image].grid(grid_name).patches()
                    patch = position - (expected.shape[1] - model.config.vision.n_patches)
                    taps = zip(patches[i, j].tolist(), weights[i, j], strict=True)
                    seen = [tuple(tap) for tap, weight in taps if weight > 0]
                    side = model.config.vision.n_patches**0.5
                    assert (tile, *divmod(patch, int(side))) in seen
            torch.testing.assert_close(vector, expected[at], atol=2e-5, rtol=1e-4)
        cells = {(image, cell) for _, image, _, cell, _, _ in found.places[here].tolist() if cell >= 0}
        if kind != "onevision":  # every cell shows one patch
            assert len(cells) == sum(len(layout.object_features()) for layout in inputs.layouts)


def test_the_forward_pass_stops_at_the_highest_hook_and_several_hooks_are_taken_together(tiny_shapes):
    ran: list[str] = []
    names = ["blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"]
    with tiny_shapes.hooks([("blocks.*.hook_resid_post", lambda tensor, hook: ran.append(hook.name))]):
        batch = next(stream_of(tiny_shapes, hooks=[names[1], ("mlp_out", 0)]).with_places())
    assert set(ran) == {"blocks.0.hook_resid_post", "blocks.1.hook_resid_post"}
    assert list(batch.acts) == names
    for name in names:
        alone = next(stream_of(tiny_shapes, hooks=name).with_places())
        assert torch.equal(alone.acts, batch.acts[name])
        assert torch.equal(alone.places, batch.places)
        assert batch.acts[name].shape == (50, 128)


def test_the_seed_decides_the_order_and_every_epoch_has_its_own(tiny_shapes):
    first, again = (list(stream_of(tiny_shapes, epochs=2).with_places()) for _ in range(2))
    assert same(first, again)
    other = list(stream_of(tiny_shapes, epochs=2, seed=1).with_places())
    assert not same(first, other)
    places = [tuple(place) for place in joined(first).places.tolist()]
    assert len(places) == 2 * len(set(places))
    half = len(places) // 2
    assert places[:half] != places[half:]
    in_turn = sorted(places, key=lambda place: (place[0], place[4]))
    assert places != in_turn


@pytest.mark.parametrize("one_by_one", [False, True], ids=["table", "iterator"])
def test_a_resumed_stream_goes_on_with_the_same_batches(tiny_shapes, one_by_one):
    def make(seed: int = 0) -> ActivationStream:
        data = (pair for pair in pairs()) if one_by_one else pairs()
        return stream_of(tiny_shapes, data, epochs=1 if one_by_one else 2, seed=seed)

    whole = list(make().with_places())
    stopped = make()
    began = list(islice(stopped.with_places(), 3))
    state = stopped.state_dict()
    next(stopped)  # what happens later does not change a state
    went_on = make()
    went_on.load_state_dict(state)
    assert same(whole, began + list(went_on.with_places()))
    reference = make()
    list(reference)
    assert torch.equal(went_on.statistics.total, reference.statistics.total)
    with pytest.raises(InputError, match=r"seed=0.*4"):
        make(seed=4).load_state_dict(state)


def test_a_cache_on_disk_gives_the_same_batches_without_running_the_model(tiny_shapes, tmp_path, monkeypatch):
    options = {"cache_dir": tmp_path / "acts", "epochs": 2}
    first = list(stream_of(tiny_shapes, **options).with_places())
    uncached = joined(list(stream_of(tiny_shapes).with_places()))
    assert sorted(joined(first).places.tolist()) == sorted(2 * uncached.places.tolist())
    monkeypatch.setattr(ModelSource, "_forward", None)
    assert same(first, list(stream_of(tiny_shapes, **options).with_places()))
    stopped = stream_of(tiny_shapes, **options)
    began = list(islice(stopped.with_places(), 5))
    went_on = stream_of(tiny_shapes, **options)
    went_on.load_state_dict(stopped.state_dict())
    assert same(first, began + list(went_on.with_places()))
    with pytest.raises(InputError, match=r"cache_dir.*tokens.*'all'.*'text'"):
        stream_of(tiny_shapes, tokens="text", **options)
    with pytest.raises(InputError, match=r"cache_dir.*first_prompt"):
        stream_of(tiny_shapes, pairs()[::-1], **options)


def test_a_cache_of_several_hooks_is_read_hook_by_hook(tiny_shapes, tmp_path, monkeypatch):
    options = {"cache_dir": tmp_path / "acts"}
    both = list(stream_of(tiny_shapes, hooks=[HOOK, "blocks.0.hook_mlp_out"], **options).with_places())
    monkeypatch.setattr(ModelSource, "_forward", None)
    alone = list(stream_of(tiny_shapes, **options).with_places())
    assert all(torch.equal(a.acts, b.acts[HOOK]) for a, b in zip(alone, both, strict=True))
    with pytest.raises(InputError, match=r"cache_dir.*hooks.*hook_attn_out"):
        stream_of(tiny_shapes, hooks="blocks.0.hook_attn_out", **options)


def test_a_cache_that_was_interrupted_goes_on_after_its_last_shard(tiny_shapes, tmp_path):
    def filled(name: str, stop_after: int | None) -> tuple[ShardCache, int]:
        stream = stream_of(tiny_shapes, prompts_per_forward=1, prefetch=0)
        cache, drawn_chunks = ShardCache(tmp_path / name, {"hooks": [HOOK]}, shard_size=100), 0

        def chunks(after):
            nonlocal drawn_chunks
            for chunk in stream._source(after, shuffled=False):
                if drawn_chunks == stop_after:
                    raise KeyboardInterrupt
                drawn_chunks += 1
                yield chunk

        try:
            cache.fill(chunks, progress=False)
        except KeyboardInterrupt:
            assert not ShardCache(tmp_path / name, {"hooks": [HOOK]}).complete
        return cache, drawn_chunks

    whole, _ = filled("whole", None)
    filled("parts", 4)
    parts, n_run = filled("parts", None)
    assert parts.complete
    assert n_run < 5
    assert parts.shards == whole.shards
    assert len(whole.shards) > 1
    for one, other in zip(whole.shards, parts.shards, strict=True):
        assert all(torch.equal(x, parts._read(other)[name]) for name, x in whole._read(one).items())


def test_memory_is_bounded_and_data_are_read_only_as_far_as_needed(tiny_shapes):
    read: list[int] = []

    class Rows:
        def __len__(self) -> int:
            return 1000

        def __getitem__(self, row: int) -> tuple[Any, str]:
            read.append(row)
            return None, QUESTIONS[row % 4]

    stream = stream_of(tiny_shapes, Rows(), buffer=64, batch_size=16, prompts_per_forward=1, prefetch=2)
    for _ in range(10):
        next(stream)
        assert stream._buffer.size <= 64
        assert {len(x) for x in stream._buffer._held.values()} == {64}
    stream.close()
    shortest = min(len(tiny_shapes.prepare(question).input_ids[0]) for question in QUESTIONS)
    assert len(read) <= (64 + 10 * 16) // shortest + 2 + 2
    assert len(set(read)) == len(read)


def test_the_parts_of_several_processes_are_the_whole(tiny_shapes):
    rows = [set(joined(list(stream_of(tiny_shapes, part=(i, 2)).with_places())).place("row").tolist()) for i in (0, 1)]
    assert rows[0] | rows[1] == set(range(5))
    assert not rows[0] & rows[1]


def test_statistics_are_those_of_all_activations(tiny_shapes):
    stream = stream_of(tiny_shapes)
    acts = joined(list(stream.with_places())).acts.double()
    torch.testing.assert_close(stream.statistics.mean, acts.mean(0).float())
    assert stream.statistics.mean_squared_norm == pytest.approx(float(acts.pow(2).sum(1).mean()), rel=1e-5)
    scaled = acts * stream.statistics.scale
    assert float(scaled.pow(2).sum(1).mean()) == pytest.approx(stream.d_in, rel=1e-5)


def test_data_of_every_kind_say_the_same(tiny_shapes, tmp_path):
    data = [(scene(i), QUESTIONS[0]) for i in range(3)]
    expected = [*stream_of(tiny_shapes, data).with_places()]
    for i, (image, _) in enumerate(data):
        image.save(tmp_path / f"{i}.png")
    files = [f"{i}.png" for i in range(3)]
    table = pd.DataFrame({"picture": files, "asked": QUESTIONS[0]})
    inputs = [tiny_shapes.prepare(question, image) for image, question in data]
    kinds: dict[str, ActivationStream] = {
        "folder": stream_of(tiny_shapes, tmp_path, prompt=QUESTIONS[0]),
        "table": stream_of(tiny_shapes, table, columns=("picture", "asked"), images=tmp_path),
        "dicts": stream_of(tiny_shapes, [{"image": image, "question": question} for image, question in data]),
        "rows": stream_of(
            tiny_shapes,
            [StudyRow(id=file, question=QUESTIONS[0], answer="", image=file) for file in files],
            images=tmp_path,
        ),
        "Inputs": stream_of(tiny_shapes, inputs),
    }
    for kind, stream in kinds.items():
        found = [*stream.with_places()]
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.places, other.places), kind
            torch.testing.assert_close(one.acts, other.acts, atol=2e-5, rtol=1e-4)


def test_a_data_set_of_hugging_face_is_read(tiny_shapes):
    datasets = pytest.importorskip("datasets", reason="pip install -e '.[sae]'")
    data = datasets.Dataset.from_dict({"question": [QUESTIONS[1], QUESTIONS[3]]})
    for given in (data, data.to_iterable_dataset()):
        found = joined(list(stream_of(tiny_shapes, given).with_places()))
        assert set(found.place("row").tolist()) == {0, 1}


def test_what_does_not_fit_is_refused(tiny_shapes):
    with pytest.raises(InputError, match=r"hook_pattern.*resid_post"):
        stream_of(tiny_shapes, hooks=("pattern", 1))
    with pytest.raises(InputError, match=r"tokens='last'.*hook_image_embed.*'image'"):
        stream_of(tiny_shapes, hooks="hook_image_embed", tokens="last")
    with pytest.raises(InputError, match=r"hook_image_embed.*resid_post.*own"):
        stream_of(tiny_shapes, hooks=["hook_image_embed", HOOK])
    with pytest.raises(InputError, match=r"Rows \[[\d, ]+\].*hook_image_embed.*none"):
        list(stream_of(tiny_shapes, hooks="hook_image_embed"))
    with pytest.raises(InputError, match=r"epochs=2.*iterator"):
        stream_of(tiny_shapes, iter(pairs()), epochs=2)
    with pytest.raises(InputError, match=r"batch_size=0.*at least 1"):
        stream_of(tiny_shapes, batch_size=0)
    with pytest.raises(InputError, match=r"buffer=20.*batch_size=50"):
        stream_of(tiny_shapes, buffer=20)
    with pytest.raises(InputError, match=r"data.*no prompts"):
        stream_of(tiny_shapes, [])
    with pytest.raises(InputError, match=r"Entry 0.*'asked'.*'question'"):
        next(stream_of(tiny_shapes, [{"asked": "What?"}]))
    with pytest.raises(InputError, match=r"Entry 0.*int"):
        next(stream_of(tiny_shapes, [3]))
    with pytest.raises(InputError, match=r"prompt="):
        stream_of(tiny_shapes, "/tmp")
    broken = [*pairs(3), ("/not/there.png", "What color is the star?")]
    with pytest.raises(InputError, match=r"Rows \[3\].*/not/there.png"):
        list(stream_of(tiny_shapes, broken, prompts_per_forward=1))
    with pytest.raises(SpanError, match=r"Rows.*1.*image"):
        list(stream_of(tiny_shapes, tokens="image"))
    assert PLACE_COLUMNS[0] == "row"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"part": (2, 2)}, r"part\[0\].*2"),
        ({"part": 3}, "part=3"),
        ({"hooks": None}, "hook=None"),
        ({"seed": "first"}, "seed.*first"),
    ],
)
def test_settings_that_do_not_fit_are_named(tiny_shapes, wrong, says):
    with pytest.raises(InputError, match=says):
        stream_of(tiny_shapes, **wrong)


def test_a_column_of_images_that_was_named_must_be_there(tiny_shapes):
    data = [{"picture": scene(0), "question": QUESTIONS[0]}]
    with pytest.raises(InputError, match=r"'picture'.*'img'"):
        next(stream_of(tiny_shapes, data, columns=("img", "question")))
    text_only = [{"question": QUESTIONS[0]}]
    assert len(next(stream_of(tiny_shapes, text_only)))


def test_a_column_of_places_that_is_not_there_is_named(tiny_shapes):
    batch = next(stream_of(tiny_shapes).with_places())
    with pytest.raises(InputError, match=r"column='tokens'.*token"):
        batch.place("tokens")
