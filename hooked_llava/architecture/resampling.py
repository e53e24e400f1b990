"""Which pixels of an image each pixel of its resized version is made of, as PIL computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Float, Int

from hooked_llava.checks import one_of
from hooked_llava.errors import ConfigError

Filter: TypeAlias = Literal["box", "bilinear", "bicubic", "lanczos"]
"""A resampling filter, named as in `PIL.Image.Resampling`."""
_PRECISION = 1 << 22  # PIL rounds weights for 8-bit images to multiples of its inverse
_CUBIC = -0.5


def filter_of(resample: int) -> Filter:
    """The filter of a processor's `resample`, PIL's number; raises `ConfigError` for one that is not followed here.

    >>> filter_of(3)
    'bicubic'
    """
    known: dict[int, Filter] = {1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box"}
    if resample not in known:
        names = ", ".join(f"{number} ({name})" for number, name in known.items())
        raise ConfigError(f"The image processor resizes with resample={resample}; expected one of {names}.")
    return known[resample]


def resampling_weights(
    n_in: int, n_out: int, resample: Filter = "bicubic"
) -> tuple[Int[np.ndarray, "out tap"], Float[np.ndarray, "out tap"]]:
    """For each pixel of a resized axis the pixels it is made of and their weights, which sum to 1 as far as PIL rounds.

    Taps beyond the image's border have weight 0 and stand for its first or last pixel. Raises `ConfigError` for an
    unknown filter.

    >>> pixels, weights = resampling_weights(4, 2, "box")
    >>> pixels[1, weights[1] > 0], weights[1].sum()
    (array([2, 3]), np.float64(1.0))
    """
    one_of(resample, get_args(Filter), "resample", error=ConfigError)
    kernel, support = _KERNELS[resample]
    scale = n_in / n_out
    stretch = max(scale, 1.0)  # when an image shrinks, the filter widens so that no pixel is skipped
    centers = (np.arange(n_out) + 0.5) * scale
    first = np.floor(centers - support * stretch + 0.5).astype(np.int64)
    pixels = first[:, None] + np.arange(int(np.ceil(support * stretch)) * 2 + 1)
    inside = (pixels >= 0) & (pixels < n_in) & (pixels < np.floor(centers + support * stretch + 0.5)[:, None])
    weights = np.where(inside, kernel((pixels - centers[:, None] + 0.5) / stretch), 0.0)
    weights /= weights.sum(1, keepdims=True)
    return np.clip(pixels, 0, n_in - 1), np.round(weights * _PRECISION) / _PRECISION


def _box(x: np.ndarray) -> np.ndarray:
    return ((x > -0.5) & (x <= 0.5)).astype(np.float64)


def _bilinear(x: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _bicubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = ((_CUBIC + 2.0) * x - (_CUBIC + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _CUBIC
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


_KERNELS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "box": (_box, 0.5),
    "bilinear": (_bilinear, 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}
