"""Which way activations are patched between a clean and a corrupted run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hooked_llava.checks import one_of

Direction = Literal["denoise", "noise"]
"""Clean activations into the corrupted run, or corrupted ones into the clean run."""


@dataclass(frozen=True)
class Way:
    """One direction of patching.

    Attributes:
        title (str): What goes where, as a figure's title says it.
        meaning (str): What goes where and what that asks, as the command's help says it.
    """

    title: str
    meaning: str


DIRECTIONS: dict[str, Way] = {
    "denoise": Way("clean into the corrupted run", "clean activations into the corrupted run, is a place enough?"),
    "noise": Way("corrupted into the clean run", "the reverse, is it needed?"),
}


def check_direction(direction: str) -> None:
    """Raise `InputError` for anything but "denoise" and "noise"."""
    meaning = "'denoise' (clean activations into the corrupted run) or 'noise' (the reverse)"
    one_of(direction, DIRECTIONS, "direction", expected=meaning)
