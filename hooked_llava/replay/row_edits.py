"""Interventions of many runs as one hook function on a batch of rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hooked_llava.model.components.hook_point import HookPoint, reads_only
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.replay.bound import BoundIntervention


@dataclass(frozen=True)
class RowEdit:
    """One intervention on one row of a batch.

    Attributes:
        row (int): Row of the batch that runs together.
        prompt (int): Prompt that the row belongs to.
        bound (BoundIntervention): The change.
        where (dict[int, int] | int): From absolute positions to the row's own: an offset, or a table of the positions
            it holds.
    """

    row: int
    prompt: int
    bound: BoundIntervention
    where: dict[int, int] | int

    def apply(self, batch: Tensor) -> None:
        """Change the row in place."""
        self.bound.apply(batch[self.row], self.where, self.prompt)


def edited_copy(batch: Tensor, edits: Iterable[RowEdit]) -> Tensor:
    """A copy of the batch with all edits made."""
    changed = batch.clone()
    for one in edits:
        one.apply(changed)
    return changed


def images_of(inputs: Inputs, which: int | None) -> list[tuple[int, int]]:
    """(prompt, index of the image in the batch) of every image, or of each prompt's image of that number."""
    found, first = [], 0
    for prompt, n in enumerate(inputs.images_per_prompt):
        found += [(prompt, first + i) for i in range(n) if which is None or i == which]
        first += n
    return found


def edit_function(edits: list[RowEdit]) -> Callable[..., Tensor]:
    """A hook function that makes all edits on a copy of the batch."""

    @reads_only  # it copies the tensor itself, so it needs no private copy
    def edit(tensor: Tensor, hook: HookPoint) -> Tensor:
        return edited_copy(tensor, edits)

    return edit


@contextmanager
def edited(
    model: HookedLLaVA, edits: Iterable[RowEdit], listeners: list[tuple[Any, Any]] | None = None
) -> Iterator[None]:
    """The edits attached to their hooks, and after them the listeners, for the time of the block."""
    by_name: dict[str, list[RowEdit]] = defaultdict(list)
    for edit in edits:
        by_name[edit.bound.hook.name].append(edit)
    hooks: list[tuple[Any, Any]] = [(name, edit_function(several)) for name, several in by_name.items()]
    with model.hooks([*hooks, *(listeners or [])]):
        yield
