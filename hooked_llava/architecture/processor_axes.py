"""How a CLIP or LLaVA image processor takes one image to the canvas, read from its settings."""

from __future__ import annotations

from typing import Any

from transformers.image_transforms import get_size_with_aspect_ratio

from hooked_llava.architecture.image_axis import ImageAxis
from hooked_llava.errors import ConfigError, InputError


def processor_axes(image_processor: Any, *, height: int, width: int, patch_size: int) -> tuple[ImageAxis, ImageAxis]:
    """The vertical and the horizontal axis of an image of that size under a Hugging Face CLIP or LLaVA image processor.

    Raises `ConfigError` for a way of resizing or padding that this library does not follow, and `InputError` for an
    image so thin that resizing leaves nothing of it.

    >>> from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    >>> processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    >>> rows, columns = processor_axes(processor, height=100, width=200, patch_size=8)
    >>> columns.resized, columns.offset, columns.visible
    (128, 32, (50.0, 150.0))
    """
    before, padded = _pad_to_square(image_processor, height, width)
    resized = _resized_size(image_processor, *padded)
    if 0 in resized:
        raise InputError(
            f"An image of {width} x {height} (width x height) pixels has nothing left when the image processor "
            f"resizes it to {resized[1]} x {resized[0]}; give one that is less thin."
        )
    offset, crop = _center_crop(image_processor, *resized)
    canvas = _appended_size(image_processor, *crop)
    vertical, horizontal = (
        ImageAxis(
            original=(height, width)[axis],
            padded=padded[axis],
            before=before[axis],
            resized=resized[axis],
            offset=offset[axis],
            crop=crop[axis],
            canvas=canvas[axis],
            patch_size=patch_size,
        )
        for axis in range(2)
    )
    return vertical, horizontal


def _pad_to_square(image_processor: Any, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(top, left) padding and (height, width) after it; LLaVA's own image processor may pad before it resizes."""
    if not (getattr(image_processor, "do_pad", None) and hasattr(image_processor, "pad_to_square")):
        return (0, 0), (height, width)
    side = max(height, width)
    return ((side - height) // 2, (side - width) // 2), (side, side)


def _resized_size(image_processor: Any, height: int, width: int) -> tuple[int, int]:
    if not image_processor.do_resize:
        return height, width
    size = image_processor.size
    shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
    if shortest and longest:
        return get_size_with_aspect_ratio((height, width), shortest, longest)
    if shortest:
        # Hugging Face multiplies first and cuts the fraction off; any other order differs by a pixel now and then.
        longer = int(shortest * max(height, width) / min(height, width))
        return (longer, shortest) if width <= height else (shortest, longer)
    if size.get("height") and size.get("width"):
        return size["height"], size["width"]
    raise ConfigError(
        f"The image processor resizes to {dict(size)}; expected the keys 'shortest_edge', or 'height' and 'width'. "
        "Patch geometry is known for CLIP-style processors only."
    )


def _center_crop(image_processor: Any, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(top, left) of the crop in the resized image, and its (height, width)."""
    if not image_processor.do_center_crop:
        return (0, 0), (height, width)
    crop = image_processor.crop_size["height"], image_processor.crop_size["width"]
    # A crop larger than the image is padded: the odd pixel goes before the image with the PIL backend and
    # after it with torchvision's.
    pads_before = getattr(image_processor, "backend", "pil") == "torchvision"
    offsets = [
        -((wanted - length) // 2) if pads_before and length < wanted else (length - wanted) // 2
        for length, wanted in zip((height, width), crop, strict=True)
    ]
    return (offsets[0], offsets[1]), crop


def _appended_size(image_processor: Any, height: int, width: int) -> tuple[int, int]:
    """(height, width) after the zeros that a CLIP processor may append at the bottom and at the right."""
    pad_size = getattr(image_processor, "pad_size", None)
    if not getattr(image_processor, "do_pad", None) or hasattr(image_processor, "pad_to_square") or not pad_size:
        return height, width
    return pad_size["height"], pad_size["width"]
