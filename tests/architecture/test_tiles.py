"""Numbers of positions, their order and their weights against transformers' own packing."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, unpad_image
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from hooked_llava.architecture import ImageLayout, llava_next_layout, llava_onevision_layout
from hooked_llava.architecture.tiles import best_resolution, pooled_grid, scaled_size, unpadding
from hooked_llava.errors import ConfigError, InputError
from tests.architecture.processors import (
    MAX_TILES,
    PATCH,
    REMAINDER_TILE,
    TILE,
    make_layout,
    next_processor,
    pinpoints,
    process,
)

SIZE = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
PINS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
MANY_PINS = [[h * 384, w * 384] for h in range(1, 7) for w in range(1, 7)]
NEWLINE = -7.0


@given(size=SIZE)
@settings(max_examples=300)
def test_canvas_scale_and_unpadding_are_transformers_own(size: tuple[int, int]) -> None:
    for pins, patches in ((PINS, 24), (MANY_PINS, 27)):
        canvas = best_resolution(size, pins)
        assert canvas == select_best_resolution(size, pins)
        image = np.broadcast_to(np.zeros(1), (3, *size))
        assert scaled_size(size, canvas) == get_patch_output_size(image, canvas, ChannelDimension.FIRST)
        tile = pins[0][0]
        grid = canvas[0] // tile * patches, canvas[1] // tile * patches
        rows, columns = unpadding(size, grid)
        index = torch.arange(grid[0] * grid[1]).reshape(1, *grid)
        kept = unpad_image(index, size)[0]
        assert torch.equal(kept, index[0, rows : grid[0] - rows, columns : grid[1] - columns])


def packed(
    layout: ImageLayout, size: tuple[int, int], tile: int, *, max_tiles: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers packs of vision features that are drawn at random, and these: [feature], [tile, row, col]."""
    n = tile // PATCH
    vision = torch.rand(layout.n_tiles, n * n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=tile, patch_size=PATCH), image_grid_pinpoints=pinpoints(tile)
    )
    more: dict[str, Any] = {"image_newline": torch.full((1,), NEWLINE)}
    if max_tiles is None:
        packer, more["vision_feature_select_strategy"] = LlavaNextModel, "default"
    else:
        packer, more["vision_aspect_ratio"] = LlavaOnevisionModel, f"anyres_max_{max_tiles}"
    features, _ = packer.pack_image_features(SimpleNamespace(config=config), [vision], [size], **more)
    return features[0][:, 0], vision.reshape(-1, n, n)


def by_layout(layout: ImageLayout, vision: torch.Tensor) -> np.ndarray:
    features = np.full(layout.n_features, np.nan)
    features[layout.newline_features()] = NEWLINE
    for grid in layout.grids:
        patches, weights = grid.patches()
        features[layout.cell_features(grid.name)] = (vision.numpy()[tuple(np.moveaxis(patches, -1, 0))] * weights).sum(
            -1
        )
    return features


SHAPES = st.tuples(st.integers(15, 500), st.integers(15, 500))


@pytest.mark.parametrize("tile", [TILE, REMAINDER_TILE])
@given(size=SHAPES)
@settings(max_examples=60)
def test_every_feature_is_made_of_the_patches_that_the_layout_says(tile: int, size: tuple[int, int]) -> None:
    layout = make_layout("next", *size, tile)
    theirs, vision = packed(layout, size, tile, max_tiles=None)
    np.testing.assert_allclose(by_layout(layout, vision), theirs.numpy(), atol=1e-12)


@pytest.mark.parametrize("max_tiles", [1, 2, 3, 9])
@pytest.mark.parametrize("tile", [TILE, REMAINDER_TILE])
@given(size=SHAPES)
@settings(max_examples=30)
def test_pooled_features_are_weighted_as_the_layout_says(tile: int, max_tiles: int, size: tuple[int, int]) -> None:
    sizes = {"tile_size": tile, "patch_size": PATCH, "pinpoints": pinpoints(tile), "max_tiles": max_tiles}
    rows, columns = make_layout("next", *size, tile).grid("fine").shape
    ratio = math.sqrt(rows * columns / max_tiles) / (tile // PATCH)
    if ratio > 1.1 and ratio > min(rows, columns):  # nothing would be left
        with pytest.raises(InputError, match=f"thin.*{rows} x {columns} .*patches"):
            llava_onevision_layout(size, **sizes)
        with pytest.raises(RuntimeError):  # torch's, of an output size of 0
            packed(make_layout("next", *size, tile), size, tile, max_tiles=max_tiles)
        return
    layout = llava_onevision_layout(size, **sizes)
    theirs, vision = packed(layout, size, tile, max_tiles=max_tiles)
    np.testing.assert_allclose(by_layout(layout, vision), theirs.numpy(), atol=1e-7)


def test_several_images_have_base_grids_and_a_newline_at_the_end() -> None:
    layout = make_layout("several", 60, 150)
    theirs, vision = packed(layout, (60, 150), TILE, max_tiles=MAX_TILES)
    np.testing.assert_allclose(by_layout(layout, vision), theirs.numpy())
    assert layout.newline_features().tolist() == [16]


TEXT = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH,
}


def tiny(kind: str, tile: int) -> Any:
    outer = {"image_grid_pinpoints": pinpoints(tile), "image_token_id": 5}
    if kind == "next":
        vision = CLIPVisionConfig(image_size=tile, **VISION)
        config = LlavaNextConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), **outer)
        return LlavaNextForConditionalGeneration(config).eval()
    vision = SiglipVisionConfig(image_size=tile, vision_use_head=False, **VISION)
    outer["vision_aspect_ratio"] = f"anyres_max_{MAX_TILES}"
    config = LlavaOnevisionConfig(vision_config=vision, text_config=Qwen2Config(**TEXT), **outer)
    return LlavaOnevisionForConditionalGeneration(config).eval()


@pytest.mark.parametrize(("kind", "tile"), [("next", TILE), ("onevision", TILE), ("onevision", REMAINDER_TILE)])
def test_models_give_as_many_features_as_the_layout_has(kind: str, tile: int) -> None:
    model = tiny(kind, tile)
    for size in [(100, 100), (301, 40), (45, 333), (20, 30), (150, 149), (77, 200)]:
        pixels = torch.zeros(1, make_layout(kind, *size, tile).n_tiles, 3, tile, tile)
        assert pixels.shape[1] == len(process(kind, np.zeros((*size, 3), dtype=np.uint8), tile))
        with torch.no_grad():
            out = model.model.get_image_features(pixel_values=pixels, image_sizes=torch.tensor([size]))
        assert len(out.pooler_output[0]) == make_layout(kind, *size, tile).n_features


def test_sizes_are_read_by_nothing_but_arguments() -> None:
    layout = llava_onevision_layout((1000, 1500), tile_size=384, patch_size=14, pinpoints=MANY_PINS, max_tiles=9)
    # By hand: canvas 1152 x 1536 (3 x 4 tiles), 81 x 108 patches; the image is 1024 x 1536, so int(1000 * 108 / 1500) = 72
    # rows of patches are kept; sqrt(72 * 108 / (9 * 27 * 27)) = 1.089 is not above 1.1, so nothing is pooled.
    assert [grid.shape for grid in layout.grids] == [(27, 27), (73, 108)]
    assert layout.n_tiles == 13


def test_what_cannot_be_laid_out_is_refused() -> None:
    sizes = {"tile_size": TILE, "patch_size": PATCH}
    with pytest.raises(ConfigError, match="image_grid_pinpoints"):
        llava_next_layout((10, 10), pinpoints=[], **sizes)
    with pytest.raises(ConfigError, match=r"\(100, 112\).*56"):
        llava_next_layout((10, 10), pinpoints=[[100, 112]], **sizes)
    with pytest.raises(InputError, match=r"image_size=\(0, 10\)"):
        llava_next_layout((0, 10), pinpoints=PINS, **sizes)
    with pytest.raises(ConfigError, match=r"patch_size=99.*tile_size=56"):
        llava_next_layout((10, 10), pinpoints=PINS, tile_size=56, patch_size=99)
    with pytest.raises(ConfigError, match="max_tiles=0"):
        llava_onevision_layout((10, 10), pinpoints=pinpoints(TILE), max_tiles=0, **sizes)
    with pytest.raises(InputError, match="thin.*1 x 400 .*patches"):
        pooled_grid((1, 400), 4, 1)


def test_next_processor_cuts_tiles_in_the_order_of_the_layout() -> None:
    image = np.zeros((112, 112, 3), dtype=np.uint8)
    layout = make_layout("next", 112, 112)
    for row, col in [(0, 0), (3, 5), (7, 0), (6, 7)]:
        x0, y0, x1, y1 = (int(edge) for edge in layout.cell_box(row, col, "fine"))
        painted = image.copy()
        painted[y0:y1, x0:x1] = 255
        tiles = next_processor()([painted], do_normalize=False, do_rescale=False, return_tensors="np")["pixel_values"][
            0, :, 0
        ]
        ((tile, patch_row, patch_col),) = layout.grid("fine").patches()[0][row, col]
        patch = tiles[tile, patch_row * PATCH : (patch_row + 1) * PATCH, patch_col * PATCH : (patch_col + 1) * PATCH]
        assert (patch == 255).all()
        assert tiles[1:].sum() == patch.sum()
