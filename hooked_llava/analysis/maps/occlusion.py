"""What the answer loses when a patch is taken away: in the image, or after the vision tower, through Replay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.analysis.maps.gradients import Ids, Read
from hooked_llava.architecture.layout import ALL, ImageLayout
from hooked_llava.architecture.shown_pixels import shown_pixels
from hooked_llava.checks import whole_number
from hooked_llava.errors import InputError
from hooked_llava.machine.devices import to_device
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.readout.answer import answer_log_probability
from hooked_llava.replay.intervention import Intervention
from hooked_llava.replay.replay import Replay
from hooked_llava.results.image_axes import ImageAxes

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA

Where = Literal["image", "tokens"]


def blank(
    model: HookedLLaVA,
    inputs: Inputs,
    features: Sequence[int] | Int[np.ndarray, " chosen"],
    *,
    image: int = 0,
    where: Where = "image",
    grid: str = ALL,
    fill: Tensor | None = None,
) -> list[Intervention]:
    """The interventions that take some features of one prompt's image away.

    "image": the part of the original that they show becomes the color that the processor subtracts, a middle grey, which
    is 0 in `pixel_values`; in the tiles of every grid, or of one `grid`. "tokens": their image embeddings become
    `fill` [d_model] (Neo et al. 2024 take a data set's mean).
    """
    if where == "image":
        return _grey(model, inputs, features, image, grid)
    if where != "tokens":
        raise InputError(f"where={where!r}; expected 'image' or 'tokens'.")
    if fill is None:
        raise InputError("Ablating image tokens needs fill=, the vector that takes their place.")
    start = inputs.token_map.image_starts[image]
    return (
        [Intervention("hook_embed", positions=[start + int(i) for i in features], value=fill)] if len(features) else []
    )


@torch.no_grad()
def _grey(
    model: HookedLLaVA, inputs: Inputs, features: Sequence[int] | Int[np.ndarray, " chosen"], image: int, grid: str
) -> list[Intervention]:
    """What the vision tower's convolution makes of the patches that are grey, all or in part, for each tile that has such."""
    assert inputs.pixel_values is not None
    size, (rows, columns) = model.config.vision.patch_size, model.config.vision.patch_grid
    tiles = inputs.pixel_values[inputs.tiles[image].start : inputs.tiles[image].stop]
    layout, tile_size = inputs.layouts[image], (tiles.shape[-2], tiles.shape[-1])
    gone = shown_pixels(layout, features, tile_size=tile_size, patch_size=size, grid=grid)
    gone = gone[:, : rows * size, : columns * size].reshape(-1, rows, size, columns, size).swapaxes(2, 3)
    convolve = model.vision.patch_embed
    grey: dict[str, Any] = {"zero": True} if convolve.bias is None else {"value": convolve.bias}
    found = []
    for tile, own in enumerate(gone):  # (row, column, size, size)
        at: dict[str, Any] = {"hook": "vision.hook_patch_embed", "image": image, "tile": tile}
        whole = own.all((-1, -2))
        if whole.any():
            found.append(Intervention(**at, positions=np.flatnonzero(whole).tolist(), **grey))
        partly = own.any((-1, -2)) & ~whole
        if partly.any():
            row, column = (to_device(torch.from_numpy(index), tiles.device) for index in np.nonzero(partly))
            patches = tiles[tile].unfold(1, size, size).unfold(2, size, size)[:, row, column].transpose(0, 1)
            patches = patches.masked_fill(to_device(torch.from_numpy(own[partly]), tiles.device)[:, None], 0)
            value = convolve(patches.to(convolve.weight)).flatten(1)  # (patch, d_model)
            found.append(Intervention(**at, positions=np.flatnonzero(partly).tolist(), value=value))
    return found


def mean_embedding(model: HookedLLaVA, inputs: Inputs, image: int = 0) -> Float[Tensor, " d_model"]:
    """The mean of one image's image embeddings, those of newlines and the class token included."""
    with torch.no_grad():
        return model.embed(inputs)[0, inputs.token_map.image(image).tensor(inputs.device)].mean(0)


def occlusion(
    model: HookedLLaVA,
    inputs: Inputs,
    read: Read,
    ids: Ids,
    *,
    where: Where = "image",
    window: int = 1,
    grid: str = ALL,
    fill: Tensor | None = None,
    batch_size: int | None = None,
) -> tuple[Float[Tensor, "image place"], Int[Tensor, "prompt read variant"], float]:
    """log P(answer) less what it is without each patch of one prompt (Zeiler & Fergus 2014).

    Also the answer's tokens, and what it cost in forward passes, as `forwards_of` counts them.

    With `window` > 1 squares of so many patches of one grid are taken away, and a patch gets the mean over the squares that
    hold it. Newlines, where images have such places, are taken away one by one, and only as tokens.
    """
    axes, layouts = ImageAxes.of(inputs), inputs.layouts
    most = min((min(one.shape) for layout in layouts for one in layout.grids if min(one.shape)), default=1)
    side = f"1 to {most} patches, the side of the square that is taken away"
    whole_number(window, "window", least=1, most=most, expected=side)
    replay = Replay(model, inputs)
    of_image = [list(_squares(layout, window)) for layout in layouts]
    runs = []
    for image, layout in enumerate(layouts):
        if where == "tokens" and axes.grid is None:
            of_image[image].extend(layout.newline_features()[:, None])
        mean = fill if fill is not None or where == "image" else mean_embedding(model, inputs, image)
        how = {"image": image, "where": where, "grid": grid, "fill": mean}
        runs += [blank(model, inputs, features, **how) for features in of_image[image]]
    positions = read[0].tolist()
    ids = replay.logits(positions).argmax(-1)[None, :, None] if ids is None else ids
    answer = ids[0]

    def metric(logits: Tensor) -> Tensor:
        return answer_log_probability(logits, answer)

    lost = metric(replay.logits(positions)) - replay.run(runs, metric, positions=positions, batch_size=batch_size)
    each = lost.float().split([len(own) for own in of_image])
    means = [
        _means(own, values, layout.n_features) for own, values, layout in zip(of_image, each, layouts, strict=True)
    ]
    return axes.at_images(means), ids, forwards_of(replay)


def _squares(layout: ImageLayout, window: int) -> Iterator[Int[np.ndarray, " _"]]:
    """The features of every square of so many cells, grid by grid."""
    for name in layout.names:
        cells = layout.cell_features(name)
        for row in range(len(cells) - window + 1):
            for column in range(cells.shape[1] - window + 1):
                yield cells[row : row + window, column : column + window].ravel()


def _means(
    of: Sequence[Int[np.ndarray, " _"]], values: Float[Tensor, " run"], n_features: int
) -> Float[Tensor, " feature"]:
    """For each feature the mean of the runs without it; NaN where there is none."""
    total, times = torch.zeros(n_features, dtype=values.dtype), torch.zeros(n_features, dtype=values.dtype)
    for features, value in zip(of, values.cpu(), strict=True):
        total[torch.from_numpy(features)] += value
        times[torch.from_numpy(features)] += 1
    return to_device(total / times, values.device)


def forwards_of(replay: Replay) -> float:
    """What a kept run of one prompt and its runs cost in forward passes through the blocks of both towers."""
    language = replay.work.n_layers * replay.work.n_positions
    return 1 + replay.work.token_layers / (language + replay.image_side.cost_of_all)
