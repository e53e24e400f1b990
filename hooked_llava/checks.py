"""Checks of arguments: whole and finite numbers within bounds, indices, and names out of a list; the same everywhere."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, SupportsIndex, TypeAlias, TypeGuard, TypeVar, cast

from hooked_llava.errors import HookedLLaVAError, InputError, did_you_mean

T = TypeVar("T")
Indices: TypeAlias = SupportsIndex | Iterable[SupportsIndex]
"""One index or several, of any integers: Python's, NumPy's or torch's."""

_FEW = 3
"""So many names are all shown in a message, in quotes; of more the closest is suggested."""


def is_whole_number(value: object) -> TypeGuard[SupportsIndex]:
    """Whether it is one of Python's, NumPy's or torch's integers; booleans are none.

    >>> is_whole_number(3), is_whole_number(3.0), is_whole_number(True)
    (True, False, False)
    """
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return False
    try:
        operator.index(cast("SupportsIndex", value))
    except TypeError:
        return False
    return True


def whole_number(
    value: Any,
    what: str,
    *,
    least: int | None = None,
    most: int | None = None,
    of: str = "",
    expected: str | None = None,
) -> int:
    """Python's integer for one of any kind, within the bounds; raises `InputError` for anything else.

    An error says `of` after the value, and `expected` in place of the bounds.

    >>> import numpy as np
    >>> whole_number(np.int64(3), "k", least=1)
    3
    """
    if is_whole_number(value):
        number = operator.index(value)
        if (least is None or number >= least) and (most is None or number <= most):
            return number
    elif least is most is expected is None:
        raise InputError(f"{what} is {value!r}; expected a whole number.")
    expected = expected or (f"at least {least}" if most is None else f"{least} to {most}")
    raise InputError(f"{what}={value!r}{of}; expected {expected}.")


def whole_numbers(given: Any, what: str, expected: str = "whole numbers") -> list[int]:
    """One whole number or several, of any kind; nothing is rounded, and a mask is not counted as zeros and ones.

    Raises `InputError` for anything else.

    >>> import torch
    >>> whole_numbers(torch.tensor([3, 5]), "positions"), whole_numbers(2, "heads")
    ([3, 5], [2])
    """
    several = not isinstance(given, str) and isinstance(given, Iterable) and getattr(given, "ndim", 1) > 0
    listed: list[Any] = list(given) if several else [given]
    if not all(map(is_whole_number, listed)):
        raise InputError(
            f"{what}={given!r}; expected {expected}. A mask is turned into numbers by mask.nonzero()[:, 0]."
        )
    return [operator.index(entry) for entry in listed]


def finite_number(
    value: Any, what: str, *, least: float = -math.inf, error: type[HookedLLaVAError] = InputError
) -> float:
    """A number as a float; raises `error` for NaN, infinite numbers, numbers below `least`, and what is no number.

    >>> finite_number(2, "strength")
    2.0
    """
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number) or number < least:
        bound = "" if least == -math.inf else f" of at least {least:g}"
        raise error(f"{what}={value!r}; expected a finite number{bound}.")
    return number


def as_index(
    value: Any,
    n: int,
    what: str,
    *,
    says: str | None = None,
    from_end: bool = True,
    error: type[HookedLLaVAError] = InputError,
) -> int:
    """One index below n, counted from 0; from the end where negative, if `from_end`.

    Raises `error` for one out of range, with the words `says` instead of its own, and `InputError` for what is no whole
    number.

    >>> as_index(-1, 4, "layer")
    3
    """
    number, least = whole_number(value, what), -n if from_end else 0
    if not least <= number < n:
        raise error(f"{says or f'{what}={value!r} is out of range'}; expected {least}..{n - 1}.")
    return number % n


def as_indices(
    given: Any,
    n: int,
    what: str,
    *,
    expected: str | None = None,
    outside: Callable[[list[int]], str] | None = None,
    empty: bool = False,
) -> list[int]:
    """Indices below n of what is given, one number or several (any integers; from the end where negative).

    Raises `InputError` for other things than whole numbers, for those out of range, and unless `empty` for none at all.
    `expected` is said in place of the range, and what `outside` makes of those out of range in place of the usual message.

    >>> as_indices([0, -1], 4, "layers"), as_indices(2, 4, "heads")
    ([0, 3], [2])
    """
    numbers = whole_numbers(given, what, expected or f"whole numbers in {-n}..{n - 1}")
    if not numbers and not empty:
        raise InputError(f"{given!r} chooses none of the {what}; give at least one of 0..{n - 1}.")
    if wrong := [i for i in numbers if not -n <= i < n]:
        usual = f"{wrong} are out of range for the {what}; expected {-n}..{n - 1}."
        raise InputError(outside(wrong) if outside else usual)
    return [i % n for i in numbers]


def one_of(
    value: T,
    names: Iterable[str],
    what: str,
    *,
    says: str | None = None,
    expected: str | None = None,
    error: type[HookedLLaVAError] = InputError,
) -> T:
    """The value, if it is one of the names; raises `error` if it is not, with the names and the closest of many.

    `says` is a first sentence in place of the argument and its value, `expected` stands for the names.

    >>> one_of("text", ["text", "tokens"], "return_type")
    'text'
    """
    known = list(names)
    if value in known:
        return value
    close = did_you_mean(str(value), known)
    if says is not None:
        raise error(f"{says}{close} Known: {', '.join(known)}.")
    if len(known) > _FEW:
        raise error(f"{what}={value!r}; expected {expected or 'one of ' + ', '.join(known)}.{close}")
    shown = " or ".join(filter(None, [", ".join(map(repr, known[:-1])), repr(known[-1])]))
    raise error(f"{what}={value!r}; expected {expected or shown}.")


def check_same_work(held: Mapping[str, Any], asked: Mapping[str, Any], place: str, what: str) -> None:
    """Raise `InputError` where a file or folder holds work that was done otherwise than it is asked for now.

    Args:
        held: how it was done, in plain values.
        asked: how it is asked for; further names that are held do not matter.
        place: the argument that names the file or folder, with its value.
        what: what it holds.

    >>> check_same_work({"seed": 0, "steps": 3}, {"seed": 0, "steps": 4}, "out='run'", "another run")
    Traceback (most recent call last):
    hooked_llava.errors.InputError: out='run' holds another run, with steps=3 (asked for: 4). Remove it, or give another place.
    """
    differ = [name for name, value in asked.items() if held.get(name) != value]
    if differ:
        shown = "; ".join(f"{name}={held.get(name)!r} (asked for: {asked[name]!r})" for name in differ)
        raise InputError(f"{place} holds {what}, with {shown}. Remove it, or give another place.")
