"""What a checkpoint is: its sizes, the names of its tensors, the names of its hooks, and where an image's positions lie.

In: a Hugging Face config and the sizes of images. Out: `LLaVAConfig`, the table of hooks, tensor names, `ImageLayout`.
Uses errors and checks, and no tensor of any model.
"""

from hooked_llava.architecture.grid import Cell, Grid, GridAxis
from hooked_llava.architecture.image_axis import ImageAxis
from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.architecture.layouts import llava_layout, llava_next_layout, llava_onevision_layout
from hooked_llava.architecture.processor_axes import processor_axes

__all__ = [
    "Cell",
    "Grid",
    "GridAxis",
    "ImageAxis",
    "ImageLayout",
    "llava_layout",
    "llava_next_layout",
    "llava_onevision_layout",
    "processor_axes",
]
