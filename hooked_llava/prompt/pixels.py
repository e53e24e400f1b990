"""What an image processor makes of the images of each prompt, and what it cuts away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from hooked_llava.architecture.boxes import format_box
from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.errors import ImageCropped, warn_user

_LARGE_CUT = 0.3
"""Share of an image, 0 to 1. Square crops take a quarter of a 4:3 photo, a third of a 3:2 one, and more of wider ones."""


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


def warn_of_cropped(layouts: Sequence[Sequence[ImageLayout]]) -> None:
    """Warn once, with `ImageCropped`, if the processor cuts a large part of an image away: of the one that loses most.

    `layouts` are those of each prompt's images.
    """
    known = {
        (row, i): layout for row, own in enumerate(layouts) for i, layout in enumerate(own) if layout.original_size
    }
    cuts = {place: layout.cut() for place, layout in known.items()}
    large = [place for place, cut in cuts.items() if cut >= _LARGE_CUT]
    if not large:
        return
    row, i = worst = max(large, key=cuts.__getitem__)
    height, width = known[worst].original_size or (0, 0)
    seen = format_box([round(edge) for edge in known[worst].visible_box()])
    name = "the image" if len(cuts) == 1 else f"image {i} of prompt {row}"
    others = f" So it is with {len(large)} of {len(cuts)} images." if len(large) > 1 else ""
    warn_user(
        f"The processor crops {cuts[worst]:.0%} of {name} away: of {width} x {height} pixels (width x height) the model sees "
        f"only the box {seen}.{others} If what matters lies outside, crop the image "
        "or pad it to a square before prepare.",
        ImageCropped,
    )
