"""Numbers that choose positions, layers, heads or patches: whole ones, checked the same everywhere."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from hooked_llava.errors import InputError

_BOOLEAN = (torch.bool, np.dtype(bool))


def whole_numbers(given: Any, what: str, expected: str = "whole numbers") -> list[int]:
    """One whole number or several, of any kind; nothing is rounded, and a mask is not counted as zeros and ones.

    Raises `InputError` for anything else.

    >>> whole_numbers(torch.tensor([3, 5]), "positions"), whole_numbers(np.int64(2), "heads")
    ([3, 5], [2])
    """
    several = not isinstance(given, str) and isinstance(given, Iterable) and getattr(given, "ndim", 1) > 0
    listed = list(given) if several else [given]
    try:
        if any(isinstance(entry, bool) or getattr(entry, "dtype", None) in _BOOLEAN for entry in listed):
            raise TypeError
        return [operator.index(entry) for entry in listed]
    except TypeError:
        raise InputError(
            f"{what}={given!r}; expected {expected}. A mask is turned into numbers by mask.nonzero()[:, 0]."
        ) from None


def chosen(given: Any, n: int, what: str) -> list[int]:
    """Indices below n of what is given, one number or several (any integers; from the end where negative).

    Raises `InputError` for other things than whole numbers, for those out of range, and for none at all.

    >>> chosen([0, -1], 4, "layers"), chosen(2, 4, "heads")
    ([0, 3], [2])
    """
    numbers = whole_numbers(given, what, f"whole numbers in {-n}..{n - 1}")
    if not numbers:
        raise InputError(f"{given!r} chooses none of the {what}; give at least one of 0..{n - 1}.")
    if outside := [i for i in numbers if not -n <= i < n]:
        raise InputError(f"{outside} are out of range for the {what}; expected {-n}..{n - 1}.")
    return [i % n for i in numbers]
