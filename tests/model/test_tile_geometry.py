"""Without attention in the vision tower, exactly the cells change that the layout makes of a changed patch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.architecture.layouts import layout_of
from hooked_llava.prompt.pixels import process_images
from tests.architecture.processors import PATCH, changed_patches, next_processor, onevision_processor
from tests.builders import IMAGE_TOKEN_ID
from tests.tiled import KINDS, TILES, both

SIDES = st.integers(9, 150)


def without_attention(tensor: torch.Tensor, hook: object) -> torch.Tensor:
    return torch.zeros_like(tensor)


def features_of(ours: Any, processor: Any, image: np.ndarray, several: bool) -> tuple[torch.Tensor, np.ndarray]:
    """What the merge puts at the image's positions, and its tiles [tile, height, width, channel]; through the whole model."""
    given_image = Image.fromarray(image)
    fields = process_images([[given_image] * (1 + several)], processor, ours.config)
    layout = layout_of(ours.config, None, height=len(image), width=image.shape[1], several_images=several)
    ids = torch.tensor([[7, *[IMAGE_TOKEN_ID] * layout.n_features * (1 + several), 8]])
    inputs = ours.as_inputs({"input_ids": ids, **fields})
    hooks = [("vision.blocks.*.hook_attn_out", without_attention)]
    _, cache = ours.run_with_cache(inputs, names_filter="hook_image_embed", fwd_hooks=hooks, stop_at_layer=0)
    tiles = inputs.pixel_values[: layout.n_tiles].permute(0, 2, 3, 1).numpy()
    return cache["hook_image_embed"][0, : layout.n_features], tiles


def cells_on(layout: ImageLayout, changed: np.ndarray) -> set[int]:
    """The features that are cells with a weight other than 0 on a changed patch [tile, row, col], cell by cell."""
    found = set()
    for grid in layout.grids:
        patches, weights = grid.patches()
        for row in range(grid.shape[0]):
            for col in range(grid.shape[1]):
                taps = zip(patches[row, col].tolist(), weights[row, col].tolist(), strict=True)
                if any(weight > 0 and changed[tile, r, c] for (tile, r, c), weight in taps):
                    found.add(int(layout.cell_features(grid.name)[row, col]))
    return found


@pytest.mark.parametrize("kind", [*KINDS, "several"])
@given(short=SIDES, ratio=st.floats(1, 8), wide=st.booleans(), at=st.tuples(st.floats(0, 1), st.floats(0, 1)))
@settings(max_examples=10, deadline=None)
def test_a_small_square_changes_exactly_its_cells(
    kind: str, short: int, ratio: float, wide: bool, at: tuple[float, float]
) -> None:
    several, kind = kind == "several", "onevision" if kind == "several" else kind
    ours, _ = both(kind)
    processor = (next_processor if kind == "next" else onevision_processor)(TILES[kind])
    size = (short, int(short * ratio)) if wide else (int(short * ratio), short)
    image = np.random.default_rng(short).integers(0, 255, (*size, 3), dtype=np.uint8)
    y, x = (int(share * (length - 3)) for share, length in zip(at, size, strict=True))
    other = image.copy()
    other[y : y + 3, x : x + 3] = 255 - other[y : y + 3, x : x + 3]
    before, tiles = features_of(ours, processor, image, several)
    after, changed_tiles = features_of(ours, processor, other, several)
    layout = layout_of(ours.config, None, height=size[0], width=size[1], several_images=several)
    changed = changed_patches(tiles, changed_tiles, PATCH)
    assert set((before != after).any(-1).nonzero()[:, 0].tolist()) == cells_on(layout, changed)
    named = layout.footprint((x, y, x + 3, y + 3))
    shown = {int(f) for name, cells in named.items() for f in layout.cell_features(name)[cells]}
    assert cells_on(layout, changed) <= shown
