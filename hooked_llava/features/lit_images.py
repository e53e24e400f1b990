"""Images of which only a region is left bright, as a larger model is shown where a feature is active."""

from __future__ import annotations

from typing import SupportsFloat

import numpy as np
from jaxtyping import Bool
from PIL import Image

from hooked_llava.checks import finite_number
from hooked_llava.errors import InputError
from hooked_llava.options.explainers import DIMMED


def lit_image(
    image: Image.Image, region: Bool[np.ndarray, "height width"], *, dimmed: SupportsFloat = DIMMED
) -> Image.Image:
    """The image with everything outside a region blended to black (Zhang et al. 2411.14982, appendix; 1 is black).

    Raises `InputError` for a region of another size than the image, and for `dimmed` outside 0 to 1.

    >>> import numpy as np
    >>> region = np.zeros((2, 2), dtype=bool)
    >>> region[0, 0] = True
    >>> np.asarray(lit_image(Image.new("RGB", (2, 2), (255, 255, 255)), region))[..., 0].tolist()
    [[255, 31], [31, 31]]
    """
    pixels = np.asarray(image.convert("RGB"))
    if region.shape != pixels.shape[:2]:
        height, width = region.shape
        raise InputError(
            f"The region has {width} x {height} pixels and the image {image.width} x {image.height} (width x height); "
            "give one value for each pixel of the image."
        )
    kept = 1 - finite_number(dimmed, "dimmed", least=0.0)
    if kept < 0:
        raise InputError(f"dimmed={dimmed}; expected 0 to 1.")
    return Image.fromarray(np.where(region[..., None], pixels, np.rint(pixels * kept)).astype(np.uint8))
