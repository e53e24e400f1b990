"""A set of positions in the prompt, kept sorted, so that "everything but the question" is a subtraction."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_llava.errors import SpanError
from hooked_llava.machine.devices import to_device


class Positions(Sequence[int]):
    """Sorted positions without repeats: a sequence (indexable, equal to a list) and a set (`|`, `&`, `-`, `^`).

    The other side of an operator may be any iterable of ints. Raises `SpanError` for what is not a non-negative int.

    >>> image, object_patches = Positions(range(2, 10)), Positions([4, 5])
    >>> image - object_patches
    Positions(2..3, 6..9)
    >>> (image - object_patches | [0])[0], len(image & [1, 2, 3]), object_patches == [4, 5]
    (0, 2, True)
    """

    __slots__ = ("_items",)

    def __init__(self, positions: Iterable[Any] = ()) -> None:
        self._items: tuple[int, ...] = tuple(sorted({_position(item) for item in positions}))

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> Positions: ...

    def __getitem__(self, index: Any) -> Any:
        return Positions(self._items[index]) if isinstance(index, slice) else self._items[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._items)

    def __contains__(self, position: object) -> bool:
        return position in self._items

    def __or__(self, other: Iterable[int]) -> Positions:
        return Positions((*self._items, *other))

    def __and__(self, other: Iterable[int]) -> Positions:
        return Positions(set(self._items).intersection(Positions(other)))

    def __sub__(self, other: Iterable[int]) -> Positions:
        return Positions(set(self._items).difference(Positions(other)))

    def __xor__(self, other: Iterable[int]) -> Positions:
        return Positions(set(self._items).symmetric_difference(Positions(other)))

    __ror__, __rand__, __rxor__ = __or__, __and__, __xor__

    def __rsub__(self, other: Iterable[int]) -> Positions:
        return Positions(other) - self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return self._items == tuple(other)

    def __hash__(self) -> int:
        return hash(self._items)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({format_runs(self)})"

    def isdisjoint(self, other: Iterable[int]) -> bool:
        """Whether no position is in both.

        >>> Positions([1, 2]).isdisjoint([3])
        True
        """
        return not self & other

    def tolist(self) -> list[int]:
        """The positions as a plain list.

        >>> Positions([3, 1]).tolist()
        [1, 3]
        """
        return list(self._items)

    def tensor(self, device: torch.device | str | None = None) -> Int[Tensor, " position"]:
        """The positions as an int64 tensor, for indexing.

        >>> Positions([3, 1]).tensor()
        tensor([1, 3])
        """
        return to_device(self._items, "cpu" if device is None else device)


class PatchPositions(Positions):
    """The positions of the patches under a box or mask, with the share of it that no patch sees.

    The share is for the reader; an operator (`|`, `-`, ...) gives plain `Positions` without it.

    >>> PatchPositions([4, 5], outside=0.25)
    PatchPositions(4..5; 25% outside)
    """

    __slots__ = ("outside",)

    def __init__(self, positions: Iterable[Any] = (), *, outside: float = 0.0) -> None:
        super().__init__(positions)
        self.outside = outside
        """Share (0 to 1) of the box's or mask's area that lies outside the image or was cut away by the crop."""

    def __repr__(self) -> str:
        share = f"; {self.outside:.0%} outside" if self.outside else ""
        return f"PatchPositions({format_runs(self)}{share})"


def format_runs(positions: Iterable[int]) -> str:
    """Positions in ascending order as text, runs of neighbors shortened.

    >>> format_runs([0, 2, 3, 4])
    '0, 2..4'
    """
    runs: list[list[int]] = []
    for position in positions:
        if runs and position == runs[-1][1] + 1:
            runs[-1][1] = position
        else:
            runs.append([position, position])
    return ", ".join(str(first) if first == last else f"{first}..{last}" for first, last in runs)


def _position(item: Any) -> int:
    try:
        position = operator.index(item)  # ints, numpy ints and one-element int tensors, never floats
    except TypeError:
        position = -1
    if isinstance(item, bool) or position < 0:
        raise SpanError(
            f"{item!r} is not a position; expected ints from 0 on. "
            "Count negative positions from the prompt's end yourself, or use token_map['last']."
        )
    return position
