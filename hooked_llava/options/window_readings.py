"""Which layers a causal trace restores together: the two ways in which a window's width is counted."""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Literal

WindowReading = Literal["centered", "released"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One way to count; its name is its key in `WINDOW_READINGS`, in `window_reading=`, and on the command line.

    Attributes:
        function (str): Where the function is, as module:name. It takes the center, the width and the number of layers.
        meaning (str): What a width is, as the command's help says it.
        shown (str): How many layers that are, as a page says it, with {width} and {layers} (2 width + 1) to fill in.
    """

    function: str
    meaning: str
    shown: str

    def window(self, center: int, width: int, n_layers: int) -> range:
        """The layers of the window around a layer, by the function, which is imported now."""
        return resolve_name(self.function)(center, width, n_layers)


WINDOW_READINGS: dict[str, Reading] = {
    "centered": Reading(
        function="hooked_llava.experiments.windows:centered_window",
        meaning="as many layers as the width says",
        shown="{width} layers at a time",
    ),
    "released": Reading(
        function="hooked_llava.experiments.windows:released_window",
        meaning="2 width + 1 layers (of width 1 one), as the code of arXiv 2406.04236 counts",
        shown="{layers} layers at a time (window {width} as the released code counts)",
    ),
}
"""Both are clipped at the ends."""


def shown_window(width: int, reading: str) -> str:
    """How many layers are restored at a time, in words.

    >>> shown_window(1, "released"), shown_window(3, "centered"), shown_window(3, "released")[:8]
    ('one layer at a time', '3 layers at a time', '7 layers')
    """
    return (
        "one layer at a time"
        if width == 1
        else WINDOW_READINGS[reading].shown.format(width=width, layers=2 * width + 1)
    )
