"""Layouts built by hand, and token maps and inputs of prompts whose images have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from hooked_llava.architecture import Grid, GridAxis, ImageAxis, ImageLayout, llava_layout
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.token_map import TokenMap
from tests.architecture.processors import REMAINDER_TILE, TILE, make_layout

IMAGE_ID = 5


def axis(
    original: int, resized: int, *, offset: int = 0, canvas: int | None = None, patch: int = 4, tiles: int = 1
) -> ImageAxis:
    canvas = resized if canvas is None else canvas
    return ImageAxis(
        original=original, padded=original, before=0, resized=resized, offset=offset, crop=canvas, canvas=canvas,
        patch_size=patch, n_tiles=tiles,
    )  # fmt: skip


def by_hand() -> ImageLayout:
    """An image of 16 x 24 (height x width): a class token, 2 x 3 cells with one newline, and a canvas of 2 x 1 tiles that
    shows columns 4 to 20, pooled from 4 x 4 to 2 x 2 patches, with a newline after each row."""
    base = Grid(name="base", rows=GridAxis.of(axis(16, 8)), columns=GridAxis.of(axis(24, 12)), newline="end")
    fine_rows = GridAxis.of(axis(16, 16, tiles=2), cells=2)
    fine_columns = GridAxis.of(axis(24, 24, canvas=24), first=1, kept=4, cells=2)
    fine = Grid(name="fine", rows=fine_rows, columns=fine_columns, newline="row", first_tile=1)
    return ImageLayout(grids=(base, fine), class_token=True)


# What is drawn are plain values, as layouts are made with their types checked, which draws random numbers of its own.
KINDS = st.sampled_from(["next", "onevision", "several", "llava", "by hand"])
DRAWN = st.tuples(KINDS, st.integers(8, 90), st.integers(8, 90), st.sampled_from([TILE, REMAINDER_TILE]))


def made(drawn: tuple[str, int, int, int]) -> ImageLayout:
    """The layout that hypothesis drew: of any family, or built by hand."""
    kind, height, width, tile = drawn
    if kind == "by hand":
        return by_hand()
    if kind == "llava":
        return llava_layout(axis(height, 16), axis(width, 24), class_token=tile == TILE)
    return make_layout(kind, height, width, tile)


def map_of(images: Sequence[ImageLayout], *, before: int = 0, after: int = 0) -> TokenMap:
    """A token, each image with two tokens behind it, and padding before and after it all."""
    ids, starts = [0] * before + [1], []
    for layout in images:
        starts.append(len(ids))
        ids += [IMAGE_ID] * layout.n_features + [7, 8]
    real = range(before, len(ids))
    return TokenMap(token_ids=(*ids, *[0] * after), real=real, image_starts=tuple(starts), layouts=tuple(images))


def inputs_of(*prompts: Sequence[ImageLayout]) -> Inputs:
    """One prompt for each, padded on the right; an image has as many pixels as a tile."""
    length = max(len(map_of(images)) for images in prompts)
    token_maps = tuple(map_of(images, after=length - len(map_of(images))) for images in prompts)
    n_tiles = sum(layout.n_tiles for images in prompts for layout in images)
    return Inputs(
        input_ids=torch.tensor([m.token_ids for m in token_maps]),
        attention_mask=torch.tensor([[p in m.real for p in range(length)] for m in token_maps]),
        pixel_values=torch.zeros(n_tiles, 3, TILE, TILE) if n_tiles else None,
        images_per_prompt=tuple(map(len, prompts)),
        token_maps=token_maps,
    )
