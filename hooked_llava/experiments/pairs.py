"""Pairs of prompts that differ in one thing, and ready-made ways to corrupt one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from hooked_llava.architecture.boxes import BoxLike, checked_box
from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.architecture.layouts import layout_of, same_positions
from hooked_llava.errors import InputError
from hooked_llava.machine.devices import to_device
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.requirements import check_supported, supported_inputs
from hooked_llava.prompt.images import load_image
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.pixels import process_images
from hooked_llava.prompt.requirements import an_image
from hooked_llava.prompt.where import Where, resolve_positions
from hooked_llava.readout.metrics import Metric
from hooked_llava.replay.intervention import Intervention
from hooked_llava.replay.reference_mean import reference_means
from hooked_llava.results.image_axes import ImageAxes

_NOISE = 3.0  # Meng et al. 2022 (arXiv 2202.05262) corrupt with three times the spread of the token embeddings
_SHOWN = 12  # questions of a pool that an error lists


def check_pair(clean: Inputs, corrupted: Inputs) -> None:
    """Raise `InputError` unless both are one prompt, of equal length, with images and text in the same places."""
    if len(clean) != 1 or len(corrupted) != 1:
        raise InputError(f"Patching takes one clean and one corrupted prompt, got {len(clean)} and {len(corrupted)}.")
    if clean.shape != corrupted.shape or dict(clean.token_map.spans) != dict(corrupted.token_map.spans):
        sizes, others = (list(map(len, inputs.token_map.image_ranges)) for inputs in (clean, corrupted))
        cure = f" Their images take {sizes} and {others} positions: give as many, of the same sizes."
        raise InputError(
            "The clean and the corrupted prompt do not match position by position, so an activation of one has no place "
            f"in the other. Word them alike.{cure if sizes != others else ''}\n\nclean:\n{clean}\n\ncorrupted:\n{corrupted}"
        )


def changed_patches(first: Inputs, second: Inputs) -> Bool[np.ndarray, "image ..."]:
    """Which patches of two prompts' images differ in a pixel, as the model receives them.

    [image, patch_row, patch_col]; for images of several grids [image, feature], where newlines never differ. Raises
    `InputError` without an image.
    """
    axes = ImageAxes.of(first)
    assert first.pixel_values is not None
    assert second.pixel_values is not None
    differs = (first.pixel_values != second.pixel_values).any(1)  # (tile, height, width)
    grid = first.layouts[0].grids[0]
    rows, columns, image = grid.rows.patches_per_tile, grid.columns.patches_per_tile, grid.columns.image
    size = differs.shape[-1] // columns if image is None else image.patch_size
    blocks = differs[:, : rows * size, : columns * size].reshape(-1, rows, size, columns, size)
    shares = axes.of_patches(blocks.any(4).any(2).float())
    return (shares > 0).reshape(-1, *axes.shape).cpu().numpy()


def prompt_pairs(
    model: HookedLLaVA, clean: Any, corrupted: Any, metric: Metric | Sequence[Metric] | None = None
) -> tuple[list[tuple[Inputs, Inputs, Metric | None]], bool]:
    """The pairs with each one's metric, all checked, and whether several were asked for.

    Each side is one prompt, a batch, or a list of either; `metric` is one for all pairs, or a list with one for each.
    Raises `InputError` for sides of different lengths and for prompts that do not match.
    """
    sides = [_prompts(model, side) for side in (clean, corrupted)]
    if len(sides[0]) != len(sides[1]):
        raise InputError(
            f"There are {len(sides[0])} clean and {len(sides[1])} corrupted prompts; expected equally many."
        )
    metrics = list(metric) if isinstance(metric, list | tuple) else [metric] * len(sides[0])
    if len(metrics) != len(sides[0]):
        raise InputError(
            f"There are {len(metrics)} metrics for {len(sides[0])} pairs; give one for all, or one for each."
        )
    for pair in zip(*sides, strict=True):
        check_pair(*pair)
    several = len(sides[0]) > 1 or isinstance(clean, (list, tuple))
    return list(zip(*sides, metrics, strict=True)), several


def _prompts(model: HookedLLaVA, side: Any) -> list[Inputs]:
    listed = isinstance(side, (list, tuple)) and not all(isinstance(entry, str) for entry in side)
    return [prompt for entry in (side if listed else [side]) for prompt in model.as_inputs(entry)]


def other_image(model: HookedLLaVA, inputs: Inputs, pool: Inputs | Sequence[Any], *, seed: int = 0) -> Inputs:
    """The same prompts about other images, drawn from a pool.

    Args:
        model: the model, whose processor prepares the images.
        inputs: the clean prompts.
        pool: images (anything `prepare` takes as one), or inputs whose images are taken.
        seed: of the draw.

    Raises `InputError` if the inputs have no image, or the pool none that differs from the one it would replace.

    >>> import numpy as np
    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> black, white = (np.full((64, 64, 3), level, dtype=np.uint8) for level in (0, 255))
    >>> inputs = model.prepare("What color is the star?", images=black)
    >>> bool((other_image(model, inputs, [black, white]).pixel_values > inputs.pixel_values).all())
    True
    """
    own = _images(inputs, "other_image")
    originals = (
        () if isinstance(pool, Inputs) else [load_image(one, f"Image {i} of the pool") for i, one in enumerate(pool)]
    )
    if not isinstance(pool, Inputs):
        check_supported("other_image(pool=images)", model, inputs)
    pools = {
        n: _images(pool, "pool=") if isinstance(pool, Inputs) else _processed(model, originals, n)
        for n in _counts(inputs)
    }
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for i, (image, n) in enumerate(zip(own, _counts(inputs), strict=True)):
        order = [pools[n][j] for j in torch.randperm(len(pools[n]), generator=generator).tolist()]
        fitting = [other for other in order if same_positions(other.layout, image.layout)]
        others = [other for other in fitting if not torch.equal(other.tiles.to(image.tiles), image.tiles)]
        if not others:
            unfit = (
                f" ({len(order) - len(fitting)} have other positions in the prompt)"
                if len(fitting) < len(order)
                else ""
            )
            raise InputError(
                f"The pool of {len(order)} images holds none that differs from image {i}{unfit}; add another."
            )
        chosen.append(others[0])
    return _with_images(inputs, chosen)


def blank_image(model: HookedLLaVA, inputs: Inputs) -> Inputs:
    """The same prompts, each image in one color: its own mean pixel; raises `InputError` without an image.

    >>> import numpy as np
    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    >>> blank = blank_image(model, model.prepare("What color is the star?", images=noise))
    >>> float(blank.pixel_values.std((2, 3)).max()) < 1e-5
    True
    """
    blank = []
    for image in _images(inputs, "blank_image"):
        mean = image.tiles[:1].mean(dim=(2, 3), keepdim=True)  # the first tile shows the whole image
        original = None if image.original is None else _blank(image.original)
        blank.append(replace(image, tiles=mean.expand_as(image.tiles).contiguous(), original=original))
    return _with_images(inputs, blank)


def without_object(model: HookedLLaVA, inputs: Inputs, box: BoxLike, *, image: int = 0) -> Inputs:
    """The same prompt, and what lies under a box of an image painted over with the mean color of the rest.

    Args:
        model: the model, whose processor prepares the image again.
        inputs: one prompt, made by `model.prepare`.
        box: (x0, y0, x1, y1) in pixels of the original image, rounded to whole ones; x1 and y1 are exclusive.
        image: which image of the prompt.

    The image keeps its size, and no pixel outside the box changes. Raises `InputError` for several prompts, unknown
    originals, a box outside the image or as large as it, and where the model would see no difference.

    >>> import numpy as np
    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    >>> without = without_object(model, model.prepare("What color is the star?", images=noise), (8, 8, 24, 24))
    >>> differs = (np.asarray(without.images[0]) != noise).any(-1)
    >>> int(differs.sum()), bool(differs[8:24, 8:24].all())
    (256, True)
    """
    check_supported("without_object", model, inputs)
    original = _original(inputs, image)
    x0, y0, x1, y1 = _whole_pixels(box, original)
    values = np.array(original)
    rest = np.ones(values.shape[:2], dtype=bool)
    rest[y0:y1, x0:x1] = False
    if not rest.any():
        raise InputError(f"The box {(x0, y0, x1, y1)} is the whole image, so nothing is left; use blank_image.")
    values[y0:y1, x0:x1] = values[rest].mean(0).round()
    return _repainted(model, inputs, image, values)


def swapped_objects(model: HookedLLaVA, inputs: Inputs, box: BoxLike, other: BoxLike, *, image: int = 0) -> Inputs:
    """The same prompt, the pixels under two boxes of an image exchanged: each object where the other was.

    Arguments as for `without_object`; the boxes are of one size and do not overlap, `InputError` otherwise. What lies
    around an object within its box moves along.

    >>> import numpy as np
    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    >>> clean = model.prepare("What color is the star?", images=noise)
    >>> swapped = np.asarray(swapped_objects(model, clean, (0, 0, 16, 16), (40, 40, 56, 56)).images[0])
    >>> bool((swapped[:16, :16] == noise[40:56, 40:56]).all()), bool((swapped[40:56, 40:56] == noise[:16, :16]).all())
    (True, True)
    """
    check_supported("swapped_objects", model, inputs)
    original = _original(inputs, image)
    first, second = (_whole_pixels(given, original) for given in (box, other))
    (x0, y0, x1, y1), (u0, v0, u1, v1) = first, second
    if (x1 - x0, y1 - y0) != (u1 - u0, v1 - v0):
        raise InputError(
            f"The boxes are {x1 - x0} x {y1 - y0} and {u1 - u0} x {v1 - v0} pixels; expected one size for both, so that "
            "they can change places. Widen the smaller one."
        )
    if x0 < u1 and u0 < x1 and y0 < v1 and v0 < y1:
        raise InputError(f"The boxes {first} and {second} overlap, so they cannot change places; give others.")
    values = np.array(original)
    here, there = values[y0:y1, x0:x1].copy(), values[v0:v1, u0:u1].copy()
    values[y0:y1, x0:x1], values[v0:v1, u0:u1] = there, here
    return _repainted(model, inputs, image, values)


def other_question(
    model: HookedLLaVA, inputs: Inputs, questions: Sequence[str], *, seed: int = 0, **options: Any
) -> Inputs:
    """The same images under another question, drawn from those that fit position by position.

    Args:
        model: the model.
        inputs: the clean prompt, made by `model.prepare`.
        questions: the pool.
        seed: of the draw.
        options: for `model.prepare`, as the clean prompt was made.

    Raises `InputError` for several prompts, images known only as pixels, or if no question of the pool fits.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> clean = model.prepare("Who made the star?")
    >>> other_question(model, clean, ["Who made the star?", "Who made the ring?"]).prompts[0].count("ring")
    1
    """
    check_supported("other_question", model, inputs)
    images = None if inputs.images is None else list(inputs.images)
    lengths: dict[str, int] = {}
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed))
    for question in (questions[int(i)] for i in order):
        other = model.prepare(question, images=images, **options)
        lengths[question] = other.shape[1]
        same_places = other.shape == inputs.shape and other.token_map.spans == inputs.token_map.spans
        if same_places and not torch.equal(other.input_ids, inputs.input_ids):
            return other
    listed = "".join(f"\n  {lengths[question]} tokens: {question}" for question in questions[:_SHOWN])
    more = f"\n  and {len(questions) - _SHOWN} more" if len(questions) > _SHOWN else ""
    raise InputError(
        f"None of the {len(questions)} questions has another wording with its words in the same places as the clean "
        f"prompt of {inputs.shape[1]} tokens. Give questions of as many tokens.{listed}{more}\n\nclean:\n{inputs}"
    )


def gaussian_noise(
    model: HookedLLaVA, inputs: Any, positions: Where, *, std: float | None = None, seed: int = 0
) -> Intervention:
    """Gaussian noise on what enters the language tower at some positions, as an intervention for any run.

    Put it first in each run of a Replay of the clean prompt, and what is restored after it (Meng et al. 2022).

    Args:
        model: the model.
        inputs: one prompt; anything `model.as_inputs` takes.
        positions: span, position or positions that are corrupted; None for all.
        std: spread of the noise; by default three times that of the token embeddings.
        seed: of the noise.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> gaussian_noise(model, model.prepare("Who made the star?"), "last", std=0.5)
    Intervention('hook_embed', positions=[...], add=tensor[1, 128])
    """
    prompt = supported_inputs("gaussian_noise", model, inputs)
    where = list(prompt.token_map.real) if positions is None else resolve_positions(positions, prompt)[0].tolist()
    spread = _NOISE * float(model.W_E.float().std()) if std is None else std
    noise = torch.randn(len(where), model.cfg.d_model, generator=torch.Generator().manual_seed(seed)) * spread
    return Intervention("hook_embed", positions=where, add=to_device(noise, model.cfg.device, model.cfg.dtype))


def mean_embedding(model: HookedLLaVA, positions: Where, *, reference: Any = None) -> Intervention:
    """The mean embedding at some positions, as an intervention for any run.

    Args:
        model: the model.
        positions: span, position or positions that are replaced; None for all.
        reference: prompts, or anything else that `mean_of=` of an intervention takes, over whose same positions the mean is
            taken; without it over the replaced positions themselves, of which there must be several.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> mean_embedding(model, "image")
    Intervention('hook_embed', positions='image', position_mean=True)
    """
    if reference is None:
        return Intervention("hook_embed", positions=positions, position_mean=True)
    value = reference_means(model, reference, [("hook_embed", positions)])[0][0]  # (d_model)
    return Intervention("hook_embed", positions=positions, value=value.to(model.cfg.dtype))


@dataclass(frozen=True, eq=False)
class _Image:
    """One image as the model receives it.

    Attributes:
        tiles (Float[Tensor, "tile channel height width"]): Its pixels.
        layout (ImageLayout): How it becomes positions.
        original (Image.Image | None): The image itself, if it is known.
    """

    tiles: Float[Tensor, "tile channel height width"]
    layout: ImageLayout
    original: Image.Image | None


def _images(inputs: Inputs, what: str) -> list[_Image]:
    """The images of all prompts; raises `InputError` if there is none, of what should have one."""
    if missing := an_image(inputs.n_images):
        raise InputError(f"{what} {missing}")
    assert inputs.pixel_values is not None
    originals = inputs.images or (None,) * inputs.n_images
    tiles = [inputs.pixel_values[rows.start : rows.stop] for rows in inputs.tiles]
    return [_Image(*one) for one in zip(tiles, inputs.layouts, originals, strict=True)]


def _counts(inputs: Inputs) -> list[int]:
    """For each image how many its prompt has."""
    return [n for n in inputs.images_per_prompt for _ in range(n)]


def _processed(model: HookedLLaVA, images: Sequence[Image.Image], n_images: int) -> list[_Image]:
    """Images as the model would receive each in a prompt of so many."""
    assert model.processor is not None  # images were refused without one
    processor, found = model.processor.image_processor, []
    for image in images:
        made = process_images([[image] * n_images], processor, model.config)
        size = {"height": image.height, "width": image.width}
        layout = layout_of(model.config, processor, **size, several_images=n_images > 1)
        found.append(_Image(made["pixel_values"][:1].flatten(0, -4)[: layout.n_tiles], layout, image))
    return found


def _original(inputs: Inputs, image: int) -> Image.Image:
    """One image of one prompt, as it was given."""
    assert inputs.images  # asked for before
    if not 0 <= image < len(inputs.images):
        raise InputError(f"image={image}, and the prompt has {len(inputs.images)} images, counted from 0.")
    return inputs.images[image]


def _whole_pixels(box: BoxLike, image: Image.Image) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = (round(edge) for edge in checked_box(box))
    if not (0 <= x0 < x1 <= image.width and 0 <= y0 < y1 <= image.height):
        raise InputError(
            f"The box {(x0, y0, x1, y1)} does not lie in the image of {image.width} x {image.height} pixels, or "
            "holds none of them; boxes are (x0, y0, x1, y1) in whole pixels of the original."
        )
    return x0, y0, x1, y1


def _repainted(model: HookedLLaVA, inputs: Inputs, image: int, values: np.ndarray) -> Inputs:
    """The prompt with one of its images painted anew; the others keep their pixels."""
    images = _images(inputs, "a painted image")
    (painted,) = _processed(model, [Image.fromarray(values)], len(images))
    if torch.equal(painted.tiles.to(images[image].tiles), images[image].tiles):
        raise InputError(
            "The model would see the same image as before: the boxes look alike, or lie where the processor crops. Give "
            "others."
        )
    return _with_images(inputs, [*images[:image], painted, *images[image + 1 :]])


def _blank(image: Image.Image) -> Image.Image:
    return image.resize((1, 1), Image.Resampling.BOX).resize(image.size)


def _with_images(inputs: Inputs, images: Sequence[_Image]) -> Inputs:
    """The inputs with other images in the places of theirs, and token maps that know how these came to their patches."""
    assert inputs.pixel_values is not None
    originals = [image.original for image in images if image.original is not None]
    coming = iter(images)
    layouts = [tuple(image.layout for image in islice(coming, n)) for n in inputs.images_per_prompt]
    return replace(
        inputs,
        pixel_values=torch.cat([image.tiles.to(inputs.pixel_values) for image in images]),
        images=tuple(originals) if len(originals) == len(images) else None,
        token_maps=tuple(replace(m, layouts=own) for m, own in zip(inputs.token_maps, layouts, strict=True)),
    )
