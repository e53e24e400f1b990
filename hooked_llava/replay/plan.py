"""The layers and positions that each run can reach (its cone), and which runs go together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from hooked_llava.prompt.inputs import Inputs
from hooked_llava.replay.bound import BoundIntervention
from hooked_llava.replay.row_edits import image_rows

_OVERHEAD_TOKENS = 24
"""What starting one more pass over the layers costs, in positions: neighboring starts are merged below it."""


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """A run, and the cone of what it can reach.

    Attributes:
        index (int): Its place in the list that the user gave.
        language (tuple[BoundIntervention, ...]): Interventions on language hooks.
        image (tuple[BoundIntervention, ...]): Interventions on image-side hooks.
        first_layer (int): First layer whose residual stream, keys or values are recomputed; n_layers if only what comes after
            the blocks is.
        start (int | None): First position that is recomputed, the smallest over the prompts; None if nothing is
            changed.
    """

    index: int
    language: tuple[BoundIntervention, ...]
    image: tuple[BoundIntervention, ...]
    first_layer: int
    start: int | None

    @property
    def changes(self) -> bool:
        """Whether the run can differ from the kept one."""
        return self.start is not None


def plan_run(index: int, bound: Sequence[BoundIntervention], inputs: Inputs, n_layers: int) -> PlannedRun:
    """The cone of a run's interventions together."""
    bound = [r for r in bound if not r.intervention.changes_nothing]
    image = tuple(r for r in bound if r.hook.on_image_side)
    language = tuple(r for r in bound if not r.hook.on_image_side)
    starts = [first for r in language for p in range(len(r.positions)) if (first := r.first(p)) is not None]
    starts += [first for r in image for first in first_positions(inputs, r)]
    first_layer = 0 if image else min(map(first_layer_of, language), default=n_layers)
    return PlannedRun(index, language, image, first_layer, min(starts, default=None))


def first_positions(inputs: Inputs, bound: BoundIntervention) -> list[int]:
    """First sequence position of every image that a change on the image side reaches."""
    ranges = [here for token_map in inputs.token_maps for here in token_map.image_ranges]
    rows = image_rows(inputs, bound.hook, bound.intervention.image, bound.intervention.tile)
    reached = {image for _, image in rows if bound.positions[image]}
    return [ranges[image].start for image in reached]


def first_layer_of(bound: BoundIntervention) -> int:
    """First layer that must run again under a change.

    That of the hook; but a change of a block's output is made where it enters the next block.
    """
    # Where an autoencoder follows the hook, what it sees belongs to the block.
    leaves = bound.hook.site == "hook_resid_post" and bound.point.then is None
    return max(bound.hook.stage, 0) + leaves


def batches(
    runs: Sequence[PlannedRun], n_positions: int, rows_at_once: dict[int, int] | int
) -> Iterator[list[PlannedRun]]:
    """Runs that go together: the same start (or near enough), ordered by their first layer, and not too many.

    `rows_at_once` is how many runs may go together, for any start or by the number of positions from the start on.
    """
    ordered = sorted(
        (run for run in runs if run.start is not None), key=lambda run: (-(run.start or 0), run.first_layer)
    )
    merged: list[list[PlannedRun]] = []
    for start, same in groupby(ordered, key=lambda run: run.start):
        group = list(same)
        previous = merged[-1] if merged else None
        if previous is not None and start is not None:
            saved = min(run.start for run in previous if run.start is not None) - start
            if len(previous) * saved <= _OVERHEAD_TOKENS:
                previous.extend(group)
                continue
        merged.append(group)
    for group in merged:
        group.sort(key=lambda run: run.first_layer)
        start = min(run.start for run in group if run.start is not None)
        size = rows_at_once if isinstance(rows_at_once, int) else rows_at_once[n_positions - start]
        for i in range(0, len(group), size):
            yield group[i : i + size]
