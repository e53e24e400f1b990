"""Figures, images and tokens as they can stand in an HTML file that needs nothing from outside."""

from __future__ import annotations

import base64
import io
import re
from functools import partial

from PIL import Image

from hooked_llava.prompt.token_text import visible_token
from hooked_llava.viz.style import Plot

_PNG = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=\s]+)")
_LONGEST = 480  # pixels
_SMALL = 160  # pixels
_JPEG_QUALITY = 88
_WEBP_QUALITY = 75

visible = partial(visible_token, signs=True)
"""A token as it can stand on a page: something to see for blanks and line breaks."""


def uri(drawn: Plot | Image.Image, longest: int = _LONGEST) -> str:
    """A figure (as SVG) or an image (as PNG, made smaller where it is large) as a data URI, for the `src` of an `<img>`."""
    if isinstance(drawn, Plot):
        svg = _PNG.sub(_smaller, drawn.to_svg())
        return _data("svg+xml", svg.encode("utf-8"))
    shown = drawn.copy()
    shown.thumbnail((longest, longest))
    return _data("png", _written(shown, "PNG", optimize=True))


def thumbnail(image: Image.Image, longest: int) -> str:
    """A small WebP of an image as a data URI, for pages that show hundreds."""
    shown = image.convert("RGB")
    shown.thumbnail((longest, longest))
    return _data("webp", _written(shown, "WEBP", quality=_WEBP_QUALITY))


def pixels(drawn: Plot) -> int:
    """How wide a figure was drawn, in a browser's pixels."""
    return round(96 * drawn.get_size_inches()[0])


def is_small(image: Image.Image) -> bool:
    """Whether an image has so few pixels that they are to be seen as squares."""
    return max(image.size) <= _SMALL


def _smaller(png: re.Match[str]) -> str:
    """An embedded PNG, or the same as JPEG where that is much smaller: photographs, many times on one page."""
    data = base64.b64decode(png[1])
    with Image.open(io.BytesIO(data)) as image:
        if "A" in image.mode and image.getchannel("A").getextrema() != (255, 255):
            return png[0]
        jpeg = _written(image.convert("RGB"), "JPEG", quality=_JPEG_QUALITY)
    return png[0] if 2 * len(jpeg) > len(data) else _data("jpeg", jpeg)


def _written(image: Image.Image, file_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def _data(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode("ascii")
