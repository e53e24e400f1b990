"""Whatever a person has as a picture becomes an RGB picture of 8 bits per channel, or a clear error."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from hooked_llava.errors import InputError

Picture: TypeAlias = str | Path | Image.Image | np.ndarray | Tensor
"""A path, a PIL picture, an array [height, width, 3] or a tensor [3, height, width]."""
_EXPECTED = (
    "a path, a PIL picture, a numpy array [height, width, 3] (uint8, or floats from 0 to 1) "
    "or a torch tensor [3, height, width]"
)


def load_picture(picture: object, name: str = "The picture") -> Image.Image:
    """One picture, opened where it is a path, as RGB; any mode is converted, transparency is dropped.

    Arrays are [height, width], [height, width, channel] and tensors [channel, height, width] with 1, 3 or 4 channels:
    uint8, bool, or floats from 0 to 1 (rounded to 8 bits, which is what the processor would see of a file).
    `name` is how errors call it. Raises `InputError` for a missing or unreadable file and for any other value.

    >>> load_picture(np.zeros((30, 50, 3), dtype=np.uint8)).size
    (50, 30)
    """
    if isinstance(picture, (str, Path)):
        return _open(Path(picture), name)
    if isinstance(picture, Image.Image):
        return _to_rgb(picture, name)
    if isinstance(picture, Tensor):
        return _to_rgb(Image.fromarray(_pixels(_channels_last(picture, name), name)), name)
    if isinstance(picture, np.ndarray):
        return _to_rgb(Image.fromarray(_pixels(picture, name)), name)
    raise InputError(f"{name} is a {type(picture).__name__}; expected {_EXPECTED}.")


def _open(path: Path, name: str) -> Image.Image:
    if not path.is_file():
        raise InputError(f"{name} is the path {str(path)!r}, where there is no file; check the path.")
    try:
        with Image.open(path) as picture:
            return _to_rgb(picture, name)
    except UnidentifiedImageError as error:
        raise InputError(
            f"{name} is the file {str(path)!r}, which is not a picture that PIL can read; "
            "expected a PNG, JPEG or similar file."
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{name} is the file {str(path)!r}, which is damaged or cut short ({error}); get the file anew."
        ) from error


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    if 0 in picture.size:
        raise InputError(f"{name} has no pixels ({picture.width} x {picture.height}); give one with an area.")
    # A palette with transparency warns unless it goes through RGBA.
    if picture.mode in ("P", "PA") and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def _channels_last(picture: Tensor, name: str) -> np.ndarray:
    if picture.ndim not in (2, 3):
        raise InputError(f"{name} is a tensor of shape {tuple(picture.shape)}; expected [3, height, width].")
    array = picture.detach().cpu()
    if array.is_floating_point():
        array = array.float()  # numpy knows no bfloat16
    return np.moveaxis(array.numpy(), 0, -1) if array.ndim == 3 else array.numpy()


def _pixels(array: np.ndarray, name: str) -> np.ndarray:
    """uint8 [height, width] or [height, width, 3 or 4] as PIL takes it."""
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)) or 0 in array.shape:
        raise InputError(
            f"{name} is an array of {' x '.join(map(str, array.shape))}; expected [height, width, 3] "
            "(a torch tensor: [3, height, width]), one picture at a time."
        )
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(
            f"{name} has values of type {array.dtype}; expected uint8 (0 to 255) or floats from 0 to 1. "
            "Convert it, for example with .astype('uint8')."
        )
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        raise InputError(
            f"{name} has float values from {array.min():g} to {array.max():g}; expected 0 to 1. "
            "Give the picture itself (not normalised pixel values), or uint8 from 0 to 255."
        )
    return np.round(array * 255).astype(np.uint8)
