"""The images of each prompt: opened, and through an image processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.errors import InputError
from hooked_llava.prompt.images import ImageLike, ImagesLike, load_image


def open_images(images: ImagesLike | None, n_prompts: int, *, single: bool) -> list[list[Image.Image]]:
    """For every prompt its images, opened; raises `InputError` for another number of entries than prompts.

    >>> [len(own) for own in open_images([Image.new("RGB", (8, 8)), None], 2, single=False)]
    [1, 0]
    """
    if images is None:
        return [[] for _ in range(n_prompts)]
    listed = isinstance(images, (list, tuple))
    if single:
        nested = [images if listed else [images]]
    elif not listed or len(images) != n_prompts:
        given = f"{len(images)} entries" if listed else "one image"
        raise InputError(
            f"{n_prompts} prompts and {given} in images; expected a list with one entry per prompt: "
            "an image, a list of images, or None."
        )
    else:
        nested = [_entries(entry) for entry in images]
    return [
        [load_image(image, f"Image {i} of prompt {row}") for i, image in enumerate(entries)]
        for row, entries in enumerate(nested)
    ]


def _entries(entry: ImageLike | Sequence[ImageLike] | None) -> Sequence[Any]:
    if entry is None:
        return []
    return entry if isinstance(entry, (list, tuple)) else [entry]


def process_images(
    images: Sequence[Sequence[Image.Image]], image_processor: Any, config: LLaVAConfig
) -> dict[str, Tensor]:
    """What the image processor makes of each prompt's images; nothing where there are none.

    pixel_values, and where images are cut into tiles image_sizes and batch_num_images.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> made = process_images([[Image.new("RGB", (64, 64))], []], model.processor.image_processor, model.config)
    >>> made["pixel_values"].shape
    torch.Size([1, 3, 64, 64])
    """
    nested = [list(own) for own in images if own]
    if not nested:
        return {}
    # OneVision's processor must know which images are of one prompt; others take images only.
    by_prompt = config.tiling is not None and config.tiling.max_tiles is not None
    given: list[Any] = nested if by_prompt else [image for own in nested for image in own]
    return dict(image_processor(images=given, return_tensors="pt"))
