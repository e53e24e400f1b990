"""Annotated shapes and types are checked in the first calls of every function in every test.

jaxtyping checks each call of each function; on the small tensors of the tests that takes longer than the computing. A
function that was right many times in one test is not checked again in the same test.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import wraps
from inspect import getattr_static
from typing import Any

from beartype import beartype

CALLS = 10

_calls: Counter[tuple[str, str]] = Counter()
_unchecked: list[Any] = []


def first_calls(signature: Any) -> Any:
    """The type checker that pyproject.toml gives to jaxtyping: beartype, for the first calls of a function."""
    check = beartype(signature)
    if isinstance(signature, type):
        return check
    name = (signature.__module__, signature.__qualname__)

    @wraps(check)
    def counted(*args: Any, **kwargs: Any) -> Any:
        _calls[name] += 1
        if _calls[name] == CALLS:
            _leave_unchecked(*name)
        return check(*args, **kwargs)

    return counted


def check_again() -> None:
    """Check every function again from its next call on: a new test begins."""
    _calls.clear()
    while _unchecked:
        del _unchecked.pop().__no_type_check__


def _leave_unchecked(module: str, name: str) -> None:
    """Set the mark of `typing.no_type_check` on a function, which jaxtyping asks for at every call."""
    function: Any = sys.modules[module]
    for part in name.split("."):
        function = getattr_static(function, part, None)  # None for functions inside functions, which stay checked
    for wrapper in ("__func__", "fget", "func"):
        function = getattr(function, wrapper, function)
    if isinstance(function, Callable) and "__no_type_check__" not in vars(function):
        function.__no_type_check__ = True
        _unchecked.append(function)
