"""What the answer loses when a patch is taken away: in the image, or after the vision tower, through Replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.analysis.maps.gradients import Ids, Read
from hooked_llava.checks import whole_number
from hooked_llava.errors import InputError
from hooked_llava.prompt.prepare import Inputs
from hooked_llava.readout.answer import answer_log_probability
from hooked_llava.replay.intervention import Intervention
from hooked_llava.replay.replay import Replay

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA

Where = Literal["image", "tokens"]


def blank(
    model: HookedLLaVA,
    inputs: Inputs,
    patches: Sequence[int],
    *,
    image: int = 0,
    where: Where = "image",
    fill: Tensor | None = None,
) -> Intervention:
    """The intervention that takes patches (counted row by row) of one prompt's image away.

    "image": the patches become the colour that the processor subtracts, a middle grey; it is 0 in what the vision
    tower receives and after its convolution, which has no bias. "tokens": their image embeddings become `fill`
    [d_model] (Neo et al. 2024 take a data set's mean).
    """
    if where == "image":
        return Intervention("vision.hook_patch_embed", positions=list(patches), image=image, zero=True)
    if where != "tokens":
        raise InputError(f"where={where!r}; expected 'image' or 'tokens'.")
    if fill is None:
        raise InputError("Ablating image tokens needs fill=, the vector that takes their place.")
    at = inputs.token_map.patches(image)
    return Intervention("hook_embed", positions=[at[i] for i in patches], value=fill)


def mean_embedding(model: HookedLLaVA, inputs: Inputs, image: int = 0) -> Float[Tensor, " d_model"]:
    """The mean of one image's image embeddings, the class token's included where it is kept."""
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
    fill: Tensor | None = None,
    batch_size: int | None = None,
) -> tuple[Float[Tensor, "image patch"], Int[Tensor, "prompt read variant"], float]:
    """log P(answer) less what it is without each patch of one prompt (Zeiler & Fergus 2014).

    Also the answer's tokens, and what it cost in forward passes, as `forwards_of` counts them.

    With `window` > 1 squares of so many patches are taken away, and a patch gets the mean over the squares that hold it.
    """
    rows, columns = inputs.patch_grid
    most = min(rows, columns)
    side = f"1 to {most} patches, the side of the square that is taken away"
    whole_number(window, "window", least=1, most=most, expected=side)
    replay = Replay(model, inputs)
    squares = [
        [(row + i) * columns + column + j for i in range(window) for j in range(window)]
        for row in range(rows - window + 1)
        for column in range(columns - window + 1)
    ]
    runs = []
    for image in range(inputs.n_images):
        mean = fill if fill is not None or where == "image" else mean_embedding(model, inputs, image)
        runs += [[blank(model, inputs, square, image=image, where=where, fill=mean)] for square in squares]
    positions = read[0].tolist()
    ids = replay.logits(positions).argmax(-1)[None, :, None] if ids is None else ids
    answer = ids[0]

    def metric(logits: Tensor) -> Tensor:
        return answer_log_probability(logits, answer)

    lost = metric(replay.logits(positions)) - replay.run(runs, metric, positions=positions, batch_size=batch_size)
    per_square = lost.float().reshape(inputs.n_images, len(squares))
    total, times = per_square.new_zeros(inputs.n_images, rows * columns), per_square.new_zeros(rows * columns)
    for i, square in enumerate(squares):
        total[:, square] += per_square[:, i : i + 1]
        times[square] += 1
    return total / times, ids, forwards_of(replay)


def forwards_of(replay: Replay) -> float:
    """What a kept run of one prompt and its runs cost in forward passes through the blocks of both towers."""
    language = replay.work.n_layers * replay.work.n_positions
    return 1 + replay.work.token_layers / (language + replay.image_side.cost_of_all)
