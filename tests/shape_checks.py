"""Annotated shapes and types are checked in the first calls of every function.

jaxtyping checks each call of each function; on the small tensors of the tests that takes longer than the computing. So a
function with shapes is checked in its first calls of every test, and any other, whose types pyright sees too, in its
first calls of every file of tests. A function inside a function is wrapped anew whenever the outer one is called: the
first of them in every file are.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import cache, partial, wraps
from inspect import getattr_static
from typing import Any

import jaxtyping
from beartype import beartype

CALLS = 3

_jaxtyped = jaxtyping.jaxtyped
_calls: dict[str, Counter[Any]] = {"test": Counter(), "file": Counter()}
_unchecked: dict[str, list[Any]] = {"test": [], "file": []}


def install() -> None:
    """Wrap what jaxtyping's import hook decorates every function with."""
    jaxtyping.jaxtyped = partial(partial, _first_made)  # the hook gives the type checker first, and then the function


def first_calls(signature: Any) -> Any:
    """The type checker that pyproject.toml gives to jaxtyping: beartype, for the first calls of a function."""
    if isinstance(signature, type):
        return beartype(signature)
    period = "test" if "jaxtyping" in str(signature.__annotations__) else "file"
    calls = _calls[period]
    check = cache(lambda: beartype(signature))  # made at the first call: an import brings many functions, a file few

    @wraps(signature)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[signature] += 1
        if calls[signature] == CALLS:
            _leave_unchecked(signature.__module__, signature.__qualname__, period)
        return check()(*args, **kwargs)

    return counted


def check_again(period: str) -> None:
    """Check again from the next call on: every function with shapes as a new test begins, the others with a new file."""
    _calls[period].clear()
    while _unchecked[period]:
        del _unchecked[period].pop().__no_type_check__


def _first_made(function: Any, *, typechecker: Any) -> Any:
    """`jaxtyped`, but for functions inside functions of which enough were made."""
    code = getattr(function, "__code__", None)
    if code is not None and "<locals>" in function.__qualname__:
        _calls["file"][code] += 1
        if _calls["file"][code] > CALLS:
            return function
    return _jaxtyped(function, typechecker=typechecker)


def _leave_unchecked(module: str, name: str, period: str) -> None:
    """Set the mark of `typing.no_type_check` on a function, which jaxtyping asks for at every call."""
    function: Any = sys.modules[module]
    for part in name.split("."):
        function = getattr_static(function, part, None)  # None for functions inside functions, which stay checked
    for wrapper in ("__func__", "fget", "func"):
        function = getattr(function, wrapper, function)
    if isinstance(function, Callable) and "__no_type_check__" not in vars(function):
        function.__no_type_check__ = True
        _unchecked[period].append(function)
