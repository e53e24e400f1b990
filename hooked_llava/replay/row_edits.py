"""Interventions of many runs as one hook function on a batch of rows."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, SupportsIndex

from torch import Tensor

from hooked_llava.architecture.hooks import Hook
from hooked_llava.model.components.hook_point import HookPoint, reads_only
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.replay.bound import BoundIntervention


@dataclass(frozen=True)
class RowEdit:
    """One intervention on one row of a batch.

    Attributes:
        row (int): Row of the batch that runs together.
        owner (int): Prompt that the row belongs to; on the image side the image, counted over all prompts.
        bound (BoundIntervention): The change.
        where (dict[int, int] | int): From absolute positions to the row's own: an offset, or a table of the positions
            it holds.
    """

    row: int
    owner: int
    bound: BoundIntervention
    where: dict[int, int] | int

    def apply(self, batch: Tensor) -> None:
        """Change the row in place."""
        self.bound.apply(batch[self.row], self.where, self.owner)


def edited_copy(batch: Tensor, edits: Iterable[RowEdit]) -> Tensor:
    """A copy of the batch with all edits made."""
    changed = batch.clone()
    for one in edits:
        one.apply(changed)
    return changed


def image_rows(
    inputs: Inputs, hook: Hook, image: SupportsIndex | None = None, tile: SupportsIndex | None = None
) -> list[tuple[int, int]]:
    """The rows of an image hook's tensor that belong to one image of each prompt and one tile of each image; None: all.

    Pairs of a row and its image, counted over all prompts.
    """
    ends = [*accumulate(inputs.images_per_prompt, initial=0)]
    named = [range(first, stop)[_only(image)] for first, stop in pairwise(ends)]
    if not hook.by_tile:
        return [(i, i) for images in named for i in images]
    return [(row, i) for images in named for i in images for row in inputs.tiles[i][_only(tile)]]


def _only(number: SupportsIndex | None) -> slice:
    if number is None:
        return slice(None)
    return slice(operator.index(number), operator.index(number) + 1)


def edit_function(edits: list[RowEdit]) -> Callable[..., Tensor]:
    """A hook function that makes all edits on a copy of the batch."""

    @reads_only  # it copies the tensor itself, so it needs no private copy
    def edit(tensor: Tensor, hook: HookPoint) -> Tensor:
        return edited_copy(tensor, edits)

    return edit


@contextmanager
def edited(
    model: HookedLLaVA, edits: Iterable[RowEdit], further_hooks: list[tuple[Any, Any]] | None = None
) -> Iterator[None]:
    """The edits attached to their hooks inside the block, and after them further entries of `fwd_hooks`."""
    by_name: dict[str, list[RowEdit]] = defaultdict(list)
    for edit in edits:
        by_name[edit.bound.hook.name].append(edit)
    hooks: list[tuple[Any, Any]] = [(name, edit_function(several)) for name, several in by_name.items()]
    with model.hooks([*hooks, *(further_hooks or [])]):
        yield
