"""Every check on token ids, masks and pixels, made before anything is computed, each with its own message."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import repeat
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.architecture.layouts import FINE, layout_of, layout_without_original, same_positions
from hooked_llava.architecture.processor_axes import processor_axes
from hooked_llava.errors import ConfigError, InputError, a_type, counted, did_you_mean

KEYS = ("input_ids", "attention_mask", "pixel_values", "image_sizes", "batch_num_images", "position_ids")
# Some tokenizers and processors add these on request; the model has no use for them.
_IGNORED_KEYS = ("token_type_ids", "mm_token_type_ids")
_VIDEO_KEYS = ("pixel_values_videos", "image_sizes_videos")


def check_keys(value: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that the model takes; raises `InputError` for unknown ones and if there are no token ids."""
    for key in value:
        if key in _VIDEO_KEYS and value[key] is not None:
            raise InputError(f"{key} are given: videos are not supported. Give single frames of it as images.")
        if key not in (*KEYS, *_IGNORED_KEYS, *_VIDEO_KEYS):
            raise InputError(f"Unknown input {key!r}.{did_you_mean(key, KEYS)} Expected {', '.join(KEYS)}.")
    given = {key: value[key] for key in KEYS if value.get(key) is not None}
    if "input_ids" not in given:
        also = "pixel_values are given without input_ids" if "pixel_values" in given else "There are no input_ids"
        raise InputError(f"{also}; expected token ids [batch, position], with <image> tokens for the images.")
    return given


def as_tensor(value: Any, name: str) -> Tensor:
    """A tensor from a tensor, an array or nested lists; raises `InputError` for ragged lists."""
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(np.asarray(value))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{name} is {a_type(value)} that is no tensor ({error}); expected rows of equal length. "
            'Call the processor with return_tensors="pt" and padding=True.'
        ) from error


def check_token_ids(ids: Tensor, config: LLaVAConfig) -> Int[Tensor, "batch pos"]:
    """Token ids as int64 [batch, position]; raises `InputError` for their type, shape and range."""
    _check_integers(ids, "input_ids", "integers (token ids)")
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or 0 in ids.shape:
        raise InputError(
            f"input_ids have shape {list(ids.shape)}; expected [position] or [batch, position], not empty."
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= config.language.d_vocab:
        raise InputError(
            f"input_ids go from {low} to {high}; expected 0 to {config.language.d_vocab - 1}, the model's vocabulary. "
            "Use the tokenizer of this checkpoint."
        )
    return ids.to(torch.int64)


def check_mask(mask: Tensor | None, ids: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """The mask as bool, True for real tokens; none given means all are.

    Raises `InputError` for its type, values and shape, for rows without tokens and for holes inside a row.
    """
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.is_floating_point() or mask.is_complex():
        raise InputError(f"attention_mask is {_dtype(mask)}; expected bool, or integers 0 and 1 (1 for real tokens).")
    mask = _shaped_like(mask, "attention_mask", ids)
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError(
            f"attention_mask has values from {int(mask.min())} to {int(mask.max())}; expected 1 for real tokens and 0 "
            "for padding."
        )
    mask = mask.to(torch.bool)
    for row, real in enumerate(mask.tolist()):
        if True not in real:
            raise InputError(f"attention_mask of prompt {row} has no real token; drop the row.")
        # One change from padding to text, or one back: anything else is a hole.
        if sum(a != b for a, b in zip([False, *real], [*real, False], strict=True)) != 2:
            raise InputError(
                f"attention_mask of prompt {row} has padding between real tokens; expected padding on the left or on "
                "the right only. To cut an attention edge, use an intervention."
            )
    return mask


def check_length(mask: Bool[Tensor, "batch pos"], config: LLaVAConfig) -> None:
    """Raises `InputError` for a prompt longer than the model was made for."""
    for row, length in enumerate(mask.sum(1).tolist()):
        if length > config.language.n_ctx:
            raise InputError(
                f"Prompt {row} has {length} tokens, image tokens included; the model was made for at most "
                f"{config.language.n_ctx}. Shorten the prompt or give fewer images."
            )


def find_images(
    ids: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    config: LLaVAConfig,
    layouts: Sequence[ImageLayout] | None = None,
) -> list[tuple[int, ...]]:
    """For every row the first position of each of its images, whose layouts are given in order, or are LLaVA-1.5's.

    Raises `InputError` where image tokens do not come in whole images, and where they are masked as padding.
    """
    is_image = (ids == config.image_token_id).cpu()
    if bool((is_image & ~mask.cpu()).any()):
        row = int((is_image & ~mask.cpu()).any(1).nonzero()[0])
        raise InputError(f"Prompt {row} has image tokens that attention_mask marks as padding; expected them unmasked.")
    remaining = repeat(layout_without_original(config.vision)) if layouts is None else iter(layouts)
    return [_image_starts(row, is_image[row].nonzero()[:, 0].tolist(), remaining, config) for row in range(len(ids))]


def _image_starts(
    row: int, positions: list[int], remaining: Iterator[ImageLayout], config: LLaVAConfig
) -> tuple[int, ...]:
    starts: list[int] = []
    while positions:
        start = positions[0]
        run = next((i for i, position in enumerate(positions) if position != start + i), len(positions))
        whole, filled = 0, 0
        while filled < run:
            layout = next(remaining, None)
            if layout is None:
                raise InputError(
                    f"Prompt {row} has {run - filled} <image> tokens from position {start + filled} on for which no image is "
                    "left in pixel_values and image_sizes. Give one image per <image>, in order."
                )
            if filled + layout.n_features > run:
                raise InputError(
                    f"Prompt {row} has {run} <image> tokens in a row from position {start}, which is "
                    f"{counted(whole, 'image')} and {run - filled} tokens; expected {_expected(layout, config)}; do "
                    "not cut prompts short."
                )
            starts.append(start + filled)
            whole, filled = whole + 1, filled + layout.n_features
        positions = positions[run:]
    return tuple(starts)


def _expected(layout: ImageLayout, config: LLaVAConfig) -> str:
    if config.tiling is None:
        settings = processor_settings(config)
        return f"{layout.n_features} per image. A processor writes as many if you set {settings}"
    height, width = layout.original_size or (0, 0)
    return (
        f"{layout.n_features} for the next image, of {height} x {width} pixels (height x width, by image_sizes). Use the "
        "processor of this checkpoint"
    )


def processor_settings(config: LLaVAConfig) -> str:
    """The settings with which a LLaVA processor writes as many image tokens as the model has features, as assignments.

    Checkpoints from before the processor had them lack some.

    >>> from transformers import LlavaConfig
    >>> processor_settings(LLaVAConfig.from_hf(LlavaConfig())).split("; ")[1]
    'processor.num_additional_image_tokens = 1'
    """
    vision = config.vision
    settings = {
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": vision.n_positions - vision.n_patches,
        "vision_feature_select_strategy": "default" if vision.drop_class_token else "full",
    }
    return "; ".join(f"processor.{name} = {value!r}" for name, value in settings.items())


def check_pixels(pixels: Tensor, config: LLaVAConfig) -> Float[Tensor, "tile channel height width"]:
    """Raises `InputError` for pixel values of another type or shape than the vision tower takes, or not finite."""
    vision = config.vision
    expected = [vision.n_channels, vision.image_size, vision.image_size]
    _check_floats(pixels)
    if pixels.ndim != 4 or list(pixels.shape[1:]) != expected:
        raise InputError(
            f"pixel_values have shape {list(pixels.shape)}; expected [image, {', '.join(map(str, expected))}] "
            "(image, channel, height, width), as this checkpoint's image processor makes them."
        )
    finite = pixels.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        what = "image" if config.tiling is None else "tile"
        raise InputError(f"pixel_values of {what} {int((~finite).nonzero()[0])} are not all finite (NaN or infinity).")
    return pixels


def _check_floats(pixels: Tensor) -> None:
    if not pixels.is_floating_point():
        raise InputError(
            f"pixel_values are {_dtype(pixels)}; expected floats, normalised by the image processor. "
            "For raw images use prepare(question, images=...)."
        )


def layouts_of_sizes(given: Mapping[str, Tensor], config: LLaVAConfig) -> list[ImageLayout]:
    """The layouts of images that are cut into tiles, from image_sizes and, for OneVision, batch_num_images.

    Raises `InputError` where pixel values come without sizes, and for what are no sizes or numbers of images.
    """
    if "pixel_values" not in given:
        return []
    if "image_sizes" not in given:
        raise InputError(
            "pixel_values are given without image_sizes; expected [image, 2], the (height, width) of each original image, as "
            "this checkpoint's processor returns them: they say how its tiles become positions."
        )
    sizes = given["image_sizes"].cpu()
    _check_integers(sizes, "image_sizes")
    if sizes.ndim != 2 or sizes.shape[1] != 2 or (sizes < 1).any():
        raise InputError(
            f"image_sizes have shape {list(sizes.shape)} and go down to {sizes.min().item() if sizes.numel() else None}; "
            "expected [image, 2], the (height, width) of each original image in pixels."
        )
    several = [False] * len(sizes)
    if "batch_num_images" in given:
        _check_integers(given["batch_num_images"], "batch_num_images")
        counts = given["batch_num_images"].flatten().tolist()
        several = [n > 1 for n in counts for _ in range(n)]
        if len(several) != len(sizes):
            raise InputError(
                f"batch_num_images are {counts} and image_sizes hold {len(sizes)} images; expected as many."
            )
    both = zip(sizes.tolist(), several, strict=True)
    return [layout_of(config, None, height=h, width=w, several_images=of_several) for (h, w), of_several in both]


def check_tiles(
    pixels: Tensor, layouts: Sequence[ImageLayout], config: LLaVAConfig
) -> Float[Tensor, "tile channel height width"]:
    """The tiles of all images one after the other, without those that a processor appends to images of fewer tiles.

    Takes [image, tile, channel, height, width], or the tiles alone. Raises `InputError` as `check_pixels`, and where there are
    fewer tiles than the layouts have.
    """
    _check_floats(pixels)
    n_tiles = [layout.n_tiles for layout in layouts]
    if pixels.ndim == 5:
        if len(pixels) != len(layouts) or pixels.shape[1] < max(n_tiles, default=0):
            raise InputError(
                f"pixel_values have shape {list(pixels.shape)}; expected [image, tile, channel, height, width] with "
                f"{counted(len(layouts), 'image')} of {n_tiles} tiles, by image_sizes."
            )
        pixels = torch.cat([image[:n] for image, n in zip(pixels, n_tiles, strict=True)])
    elif len(pixels) != sum(n_tiles):
        raise InputError(
            f"pixel_values have shape {list(pixels.shape)}; expected {sum(n_tiles)} tiles, {n_tiles} of each image by "
            "image_sizes, or [image, tile, channel, height, width]."
        )
    return check_pixels(pixels, config)


def _check_integers(given: Tensor, name: str, expected: str = "integers") -> None:
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise InputError(f"{name} are {_dtype(given)}; expected {expected}.")


def _shaped_like(given: Tensor, name: str, ids: Tensor) -> Tensor:
    """A mask or position ids with the axes of the token ids; one row may come without its batch axis."""
    given = given[None] if given.ndim == 1 else given
    if given.shape != ids.shape:
        has = "have" if name.endswith("s") else "has"
        raise InputError(f"{name} {has} shape {list(given.shape)} and input_ids {list(ids.shape)}; expected the same.")
    return given


def check_processor_fits(processor: object, config: LLaVAConfig) -> None:
    """Raises `InputError` for what is no processor, and for one that makes images of another size, or writes another number
    of image tokens, than the model takes; what it does not say is not compared.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> check_processor_fits(model.processor, model.config)
    """
    vision, name = config.vision, type(processor).__name__
    if getattr(processor, "tokenizer", None) is None:
        raise InputError(f"The processor is a {name}, which has no tokenizer; expected a LlavaProcessor.")
    patch_size = getattr(processor, "patch_size", None)
    side, made = (vision.image_size, vision.image_size), None
    with suppress(ConfigError):  # a way of resizing that is not known here is told where an image is prepared
        image_processor = getattr(processor, "image_processor", None)
        if image_processor is not None:
            of_this_size = {"height": side[0], "width": side[1], "patch_size": patch_size or vision.patch_size}
            rows, columns = processor_axes(image_processor, **of_this_size)
            made = rows.canvas, columns.canvas
    if made not in (None, side):
        raise InputError(
            f"The {name} makes images of {made[0]} x {made[1]} pixels and the model takes {side[0]} x {side[1]} "
            "(vision_config.image_size). Pass the processor of this checkpoint."
        )
    pinpoints = getattr(getattr(processor, "image_processor", None), "image_grid_pinpoints", None)
    if config.tiling is not None and pinpoints is not None and {*map(tuple, pinpoints)} != {*config.tiling.pinpoints}:
        raise InputError(
            f"The {name} lays images on canvases of {pinpoints} and the model on {[*map(list, config.tiling.pinpoints)]} "
            "(image_grid_pinpoints). Pass the processor of this checkpoint."
        )
    if patch_size not in (None, vision.patch_size):
        raise InputError(
            f"The {name} has patch_size={patch_size} and the model's vision tower {vision.patch_size}. Pass the processor of "
            f"this checkpoint, or set {processor_settings(config)}."
        )
    strategy = getattr(processor, "vision_feature_select_strategy", None)
    extra = getattr(processor, "num_additional_image_tokens", None)
    if patch_size is None or strategy is None or extra is None:
        return
    written = vision.n_patches + extra - (strategy == "default")
    if written != vision.n_features:
        raise InputError(
            f"The {name} writes {written} <image> tokens for an image (num_additional_image_tokens={extra}, "
            f"vision_feature_select_strategy={strategy!r}) and the model takes {vision.n_features}. Pass the processor of this "
            f"checkpoint, or set {processor_settings(config)}."
        )


def check_images(n_per_row: list[int], n_given: int | None) -> None:
    """Raises `InputError` if the prompts show another number of images than there are pixel values for."""
    n_shown = sum(n_per_row)
    if n_given is None and n_shown:
        raise InputError(
            f"input_ids show {counted(n_shown, 'image')} but no pixel_values are given: image tokens without images would "
            "run as text. Give pixel_values, or use prepare(question, images=...)."
        )
    if n_given is not None and n_given != n_shown:
        raise InputError(
            f"input_ids show {counted(n_shown, 'image')} (per prompt: {n_per_row}) and pixel_values hold {n_given}; expected "
            "as many. Give one image per <image>, in order."
        )


def check_position_ids(positions: Tensor | None, ids: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"] | None:
    """Position ids as int64; raises `InputError` for their type, shape and sign."""
    if positions is None:
        return None
    _check_integers(positions, "position_ids")
    positions = _shaped_like(positions, "position_ids", ids)
    if int(positions.min()) < 0:
        raise InputError(f"position_ids go down to {int(positions.min())}; expected 0 and above.")
    return positions.to(torch.int64)


def check_layouts(layouts: Iterable[ImageLayout], config: LLaVAConfig) -> None:
    """Raises `InputError` for inputs prepared for a model in which images take other positions or tiles."""
    for layout in layouts:
        own = layout_without_original(config.vision)
        if config.tiling is not None and layout.original_size is not None:
            height, width = layout.original_size
            own = layout_of(config, None, height=height, width=width, several_images=FINE not in layout.names)
        if not same_positions(layout, own) or (layout.original_size is None and config.tiling is not None):
            raise InputError(
                f"These inputs were prepared for a model with {layout.n_features} positions per image; this one has "
                f"{own.n_features}. Call prepare(...) of the model that runs them."
            )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
