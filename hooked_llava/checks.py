"""Numbers that choose positions, layers, heads or patches: whole ones, checked the same everywhere."""

from __future__ import annotations

from typing import Any

from hooked_llava.errors import InputError
from hooked_llava.prompt.validation import whole_numbers


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
