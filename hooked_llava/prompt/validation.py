"""Every check on token ids, masks and pixels, made before anything is computed, each with its own message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.architecture.layouts import layout_without_original
from hooked_llava.architecture.processor_axes import processor_axes
from hooked_llava.errors import ConfigError, InputError, did_you_mean

KEYS = ("input_ids", "attention_mask", "pixel_values", "position_ids")
# Some tokenizers and processors add these on request; the model has no use for them.
_IGNORED_KEYS = ("token_type_ids", "mm_token_type_ids")


def check_keys(value: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that the model takes; raises `InputError` for unknown ones and if there are no token ids."""
    for key in value:
        if key not in (*KEYS, *_IGNORED_KEYS):
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
            f"{name} is a {type(value).__name__} that is no tensor ({error}); expected rows of equal length. "
            'Call the processor with return_tensors="pt" and padding=True.'
        ) from error


def check_token_ids(ids: Tensor, config: LLaVAConfig) -> Int[Tensor, "batch pos"]:
    """Token ids as int64 [batch, position]; raises `InputError` for their type, shape and range."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"input_ids are {_dtype(ids)}; expected integers (token ids).")
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
    if mask.ndim == 1:
        mask = mask[None]
    if mask.shape != ids.shape:
        raise InputError(
            f"attention_mask has shape {list(mask.shape)} and input_ids {list(ids.shape)}; expected the same."
        )
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
    ids: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"], config: LLaVAConfig
) -> list[tuple[int, ...]]:
    """For every row the first position of each of its images.

    Raises `InputError` where image tokens do not come in whole images, and where they are masked as padding.
    """
    is_image = (ids == config.image_token_id).cpu()
    if bool((is_image & ~mask.cpu()).any()):
        row = int((is_image & ~mask.cpu()).any(1).nonzero()[0])
        raise InputError(f"Prompt {row} has image tokens that attention_mask marks as padding; expected them unmasked.")
    return [_image_starts(row, is_image[row].nonzero()[:, 0].tolist(), config) for row in range(len(ids))]


def _image_starts(row: int, positions: list[int], config: LLaVAConfig) -> tuple[int, ...]:
    size, starts = layout_without_original(config.vision).n_features, []
    while positions:
        start = positions[0]
        run = next((i for i, position in enumerate(positions) if position != start + i), len(positions))
        if run % size:
            whole, left = divmod(run, size)
            raise InputError(
                f"Prompt {row} has {run} <image> tokens in a row from position {start}, which is {whole} "
                f"image{'' if whole == 1 else 's'} and {left} tokens; expected {size} per image. A processor writes as "
                f"many if you set {processor_settings(config)}; do not cut prompts short."
            )
        starts += range(start, start + run, size)
        positions = positions[run:]
    return tuple(starts)


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


def check_pixels(pixels: Tensor, config: LLaVAConfig) -> Float[Tensor, "image channel height width"]:
    """Raises `InputError` for pixel values of another type or shape than the vision tower takes, or not finite."""
    vision = config.vision
    expected = [vision.n_channels, vision.image_size, vision.image_size]
    if not pixels.is_floating_point():
        raise InputError(
            f"pixel_values are {_dtype(pixels)}; expected floats, normalised by the image processor. "
            "For raw images use prepare(question, images=...)."
        )
    if pixels.ndim != 4 or list(pixels.shape[1:]) != expected:
        raise InputError(
            f"pixel_values have shape {list(pixels.shape)}; expected [image, {', '.join(map(str, expected))}] "
            "(image, channel, height, width), as this checkpoint's image processor makes them."
        )
    finite = pixels.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        raise InputError(f"pixel_values of image {int((~finite).nonzero()[0])} are not all finite (NaN or infinity).")
    return pixels


def check_processor_fits(processor: Any, config: LLaVAConfig) -> None:
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
            f"input_ids show {_images(n_shown)} but no pixel_values are given: image tokens without images would "
            "run as text. Give pixel_values, or use prepare(question, images=...)."
        )
    if n_given is not None and n_given != n_shown:
        raise InputError(
            f"input_ids show {_images(n_shown)} (per prompt: {n_per_row}) and pixel_values hold {n_given}; expected "
            "as many. Give one image per <image>, in order."
        )


def check_position_ids(positions: Tensor | None, ids: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"] | None:
    """Position ids as int64; raises `InputError` for their type, shape and sign."""
    if positions is None:
        return None
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise InputError(f"position_ids are {_dtype(positions)}; expected integers.")
    if positions.ndim == 1:
        positions = positions[None]
    if positions.shape != ids.shape:
        raise InputError(
            f"position_ids have shape {list(positions.shape)} and input_ids {list(ids.shape)}; expected the same."
        )
    if int(positions.min()) < 0:
        raise InputError(f"position_ids go down to {int(positions.min())}; expected 0 and above.")
    return positions.to(torch.int64)


def check_layouts(layouts: Iterable[ImageLayout], config: LLaVAConfig) -> None:
    """Raises `InputError` for inputs prepared for a model with other images."""
    expected = layout_without_original(config.vision).n_features
    if other := [layout.n_features for layout in layouts if layout.n_features != expected]:
        raise InputError(
            f"These inputs were prepared for a model with {other[0]} positions per image; this one has "
            f"{expected}. Call prepare(...) of the model that runs them."
        )


def _images(n: int) -> str:
    return f"{n} image{'' if n == 1 else 's'}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
