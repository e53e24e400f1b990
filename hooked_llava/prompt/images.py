"""Whatever a person has as an image becomes what that person sees: upright RGB of 8 bits per channel, or a clear error.

This deviates on purpose from transformers' image processors, which take a file's pixels as they are stored: here a photo
is turned as its EXIF data say, whatever is transparent lies on white, and 16-bit values are scaled to 8 bits. Boxes and
maps are drawn on the image that a person sees, so that is what the model gets. What a processor has made already
(`pixel_values`) stays as it is.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from hooked_llava.errors import InputError, a_type

ImageLike: TypeAlias = str | Path | Image.Image | np.ndarray | Tensor
"""A path, a PIL image, an array [height, width, 3] or a tensor [3, height, width]."""
ImagesLike: TypeAlias = ImageLike | Sequence[ImageLike | Sequence[ImageLike] | None]
"""One image; images of the only prompt; or for each prompt its image, its images, or None."""
_EXPECTED = (
    "a path, a PIL image, a numpy array [height, width, 3] (uint8, uint16, bool, or floats from 0 to 1) "
    "or a torch tensor [3, height, width]"
)
_CHANNELS = (1, 2, 3, 4)
"""Grey, grey and alpha, RGB, RGB and alpha."""
_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""
# A grey PNG of 2 or 4 bits says in its own units which grey is transparent; PIL has stretched the greys to 8 bits.
_GREY_STEPS = {"L;2": 85, "L;4": 17}
_SHOWN = 100  # characters of a path in an error
# What PIL's readers raise for broken files.
_BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, AssertionError, struct.error, zlib.error),
    Image.DecompressionBombError,
)


def load_image(image: object, name: str = "The image") -> Image.Image:
    """One image as a person sees it: upright, transparency on white, RGB with 8 bits per channel.

    Paths and PIL images: of any mode and bit depth, turned as their EXIF orientation says (so a PIL image that was turned
    by hand must not say it any more: `ImageOps.exif_transpose` sees to that); of an animation the first frame of the file,
    or the frame at which the PIL image stands. Color profiles are not applied. PIL images of 32 bits hold 0 to 255, and
    integers above that 16 bits, floats up to 1 all of the range.

    Arrays are [height, width] or [height, width, channel], tensors [height, width] or [channel, height, width], with 1
    (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha) channels: uint8, bool, uint16 (scaled by its own range), or floats
    from 0 to 1 (rounded to 8 bits). `name` is how errors call the image. Raises `InputError` for a missing or unreadable
    file and for any other value.

    >>> load_image(np.zeros((30, 50, 3), dtype=np.uint8)).size
    (50, 30)
    >>> load_image(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0))
    (255, 255, 255)
    """
    if isinstance(image, (str, os.PathLike)):
        return _open(os.fspath(image), name)
    if isinstance(image, Image.Image):
        with _reading(f"{name} is a PIL image of mode {image.mode}", "open its file again, or give its path"):
            return _seen(image, name)
    if isinstance(image, Tensor):
        return _seen(Image.fromarray(_pixels(_channels_last(image, name), name)), name)
    if isinstance(image, np.ndarray):
        _check_shape(image.shape, image.shape[2:], name)
        return _seen(Image.fromarray(_pixels(image, name)), name)
    hint = " Open a file's content with PIL.Image.open(io.BytesIO(...))." if hasattr(image, "read") else ""
    hint = " Open bytes with PIL.Image.open(io.BytesIO(...))." if isinstance(image, (bytes, bytearray)) else hint
    raise InputError(f"{name} is {a_type(image)}; expected {_EXPECTED}.{hint}")


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


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of a PIL image as a person sees it, by its EXIF orientation; for most formats nothing is decoded.

    >>> upright_size(Image.new("RGB", (50, 30)))
    (50, 30)
    """
    width, height = image.size
    turns_itself = image.format == "TIFF"  # PIL gives a TIFF's upright size, and turns it when it decodes it
    return (height, width) if _orientation(image) in _SIDEWAYS and not turns_itself else (width, height)


def _open(path: str | bytes, name: str) -> Image.Image:
    file = os.fsdecode(path)
    shown = repr(file) if len(file) <= _SHOWN else f"{file[:_SHOWN]!r}... ({len(file)} characters)"
    if not os.path.isfile(file):  # noqa: PTH113 - Path.is_file raises for names too long
        advice = "check the path"
        if "://" in file[:_SHOWN]:
            advice = "download it, and give the file's path"
        raise InputError(f"{name} is the path {shown}, where there is no file; {advice}.")
    try:
        with (
            _reading(f"{name} is the file {shown}", "get the file anew, or save it as PNG"),
            Image.open(file) as image,
        ):
            return _seen(image, name)
    except UnidentifiedImageError as error:
        raise InputError(
            f"{name} is the file {shown}, which is not an image that PIL can read; "
            "expected a PNG, JPEG or similar file. If it is an image, save it as PNG."
        ) from error


@contextmanager
def _reading(what: str, advice: str) -> Iterator[None]:
    """Whatever PIL raises for a broken image, as an `InputError` that names it."""
    try:
        yield
    except (InputError, UnidentifiedImageError):
        raise
    except _BROKEN as error:
        why = str(error) or type(error).__name__
        raise InputError(f"{what}, which cannot be read: damaged, cut short or closed ({why}); {advice}.") from error


def _seen(image: Image.Image, name: str) -> Image.Image:
    """The image as a person sees it; the result shares nothing with the one given, and carries no metadata."""
    if 0 in image.size:
        raise InputError(f"{name} has no pixels ({image.width} x {image.height}); give one with an area.")
    key = _transparent_key(image)  # known only as long as the file is not decoded
    image.load()
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    rgb = _on_white(image, key, name)
    rgb.info = {}
    return rgb


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none that can be read."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _BROKEN:
        return 1
    return found if found in range(1, 9) else 1


def _transparent_key(image: Image.Image) -> int | bytes | tuple[int, ...] | None:
    """Which grey, color or palette entries are transparent, in the units of the pixels as PIL decodes them."""
    key = image.info.get("transparency")
    raw = next((tile[3] for tile in getattr(image, "tile", ())), None)  # how the file stores pixels; empty once decoded
    if image.mode == "P" and isinstance(key, (int, bytes)):
        return key
    if image.mode in ("1", "L", "I;16", "I;16B", "I") and isinstance(key, int):
        return key * _GREY_STEPS.get(str(raw), 1)
    if image.mode == "RGB" and isinstance(key, tuple) and len(key) == 3:
        # Of 16 bits per channel PIL keeps the upper 8.
        return tuple(value >> 8 for value in key) if raw == "RGB;16B" or max(key) > 255 else key
    return None


def _on_white(image: Image.Image, key: int | bytes | tuple[int, ...] | None, name: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        grey = _eight_bits(values, image.mode, name)
        return Image.fromarray(grey if key is None else np.where(values == key, 255, grey).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode == "LAB":
        lab, srgb = (ImageCms.ImageCmsProfile(ImageCms.createProfile(space)) for space in ("LAB", "sRGB"))
        return ImageCms.ImageCmsTransform(lab, srgb, "LAB", "RGB").apply(image)
    if image.mode in ("La", "RGBa"):  # colors that were multiplied by alpha
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    has_palette_alpha = image.mode == "P" and image.has_transparency_data
    if key is None and image.mode not in ("LA", "PA", "RGBA") and not has_palette_alpha:
        return image.convert("RGB")
    if key is not None:
        image = image.copy()
        image.info["transparency"] = key
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _eight_bits(values: np.ndarray, mode: str, name: str) -> np.ndarray:
    """uint8 from a PIL image of 16 or 32 bits per pixel; raises `InputError` for values that no image has."""
    low, high = values.min(), values.max()
    if mode.startswith("I;16"):
        return (values >> 8).astype(np.uint8)
    if low >= 0 and high <= 1 and mode == "F":
        return np.round(values * 255).astype(np.uint8)
    if low >= 0 and high <= 255:
        return np.round(values).astype(np.uint8)
    if low >= 0 and high <= 65535 and mode == "I":
        return (values >> 8).astype(np.uint8)
    expected = "0 to 1, or 0 to 255" if mode == "F" else "0 to 255 (8 bits), or 0 to 65535 (16 bits)"
    raise InputError(
        f"{name} has mode {mode!r} and values from {low:g} to {high:g}; expected {expected}. Scale them to 0 to 255 and "
        "give uint8."
    )


def _channels_last(image: Tensor, name: str) -> np.ndarray:
    _check_shape(tuple(image.shape), tuple(image.shape[:1]) if image.ndim == 3 else (), name, "tensor")
    array = image.detach().cpu()
    if array.is_floating_point():
        array = array.float()  # numpy has no bfloat16
    return np.moveaxis(array.numpy(), 0, -1) if array.ndim == 3 else array.numpy()


def _check_shape(shape: tuple[int, ...], channels: tuple[int, ...], name: str, kind: str = "array") -> None:
    """Raises `InputError` unless the shape is that of one image with the channels where this kind has them."""
    if len(shape) in (2, 3) and 0 not in shape and channels in ((), *((n,) for n in _CHANNELS)):
        return
    expected, other = "[height, width, 3]", "[3, height, width]"
    if kind == "tensor":
        expected, other = other, expected
    ends = shape[0] if kind == "array" else shape[-1]
    hint = ""
    if len(shape) == 3 and ends in _CHANNELS and 0 not in shape:
        turned = "np.moveaxis(array, 0, -1)" if kind == "array" else "tensor.permute(2, 0, 1)"
        hint = f" If this is {other}, give {turned}."
    raise InputError(
        f"{name} is {'an' if kind == 'array' else 'a'} {kind} of {' x '.join(map(str, shape))}; expected {expected} "
        f"(or [height, width]), one image at a time.{hint}"
    )


def _pixels(array: np.ndarray, name: str) -> np.ndarray:
    """uint8 [height, width] or [height, width, 2 to 4] as PIL takes it."""
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.newbyteorder("=") == np.uint16:
        if 0 < array.max() <= 255:
            raise InputError(
                f"{name} has values of type uint16 that go up to {array.max()} only: as 16 bits (0 to 65535) that is black. "
                "If they are 0 to 255, give .astype('uint8')."
            )
        return np.ascontiguousarray(array >> 8).astype(np.uint8)
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(
            f"{name} has values of type {array.dtype}; expected uint8 (0 to 255), uint16 (0 to 65535), bool, or floats from "
            "0 to 1. Convert it, for example with .astype('uint8')."
        )
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        raise InputError(
            f"{name} has float values from {array.min():g} to {array.max():g}; expected 0 to 1. "
            "Give the image itself (not normalised pixel values), or uint8 from 0 to 255."
        )
    return np.round(array.astype(np.float64) * 255).astype(np.uint8)
