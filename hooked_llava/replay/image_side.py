"""Re-entering the vision tower and the projector.

Attention among patches runs in both directions, so a change at layer l reaches all patches of its image from there
on; what lies below l is taken from one kept pass through the tower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.replay.bound import BoundIntervention
from hooked_llava.replay.row_edits import RowEdit, edited, image_rows

Run = Sequence[BoundIntervention]


class ImageSide:
    """From pixels to image embeddings: one pass through the vision tower, kept once something is changed there."""

    def __init__(self, model: HookedLLaVA, inputs: Inputs) -> None:
        self.model = model
        self.inputs = inputs
        pixels = inputs.pixel_values
        self._pixels = None if pixels is None else pixels.clone()  # the caller may write to theirs later

    @cached_property
    def states(self) -> list[Float[Tensor, "tile pos d_model"]]:
        """The vision tower's residual stream entering every block that is run, and leaving the last."""
        assert self._pixels is not None
        return self.model.vision.states([self.model.vision.embed(self._pixels)])

    @torch.no_grad()
    def rerun(self, runs: Sequence[Run]) -> Float[Tensor, "run image feature d_model"]:
        """Image embeddings of every image under each run's changes; runs that enter at the same place go together."""
        _ = self.states  # kept before anything is attached
        by_block: dict[int, list[int]] = defaultdict(list)
        for i, run in enumerate(runs):
            by_block[self._first_block(run)].append(i)
        rows: list[Tensor | None] = [None] * len(runs)
        for block, members in by_block.items():
            for i, embedding in zip(members, self._from(block, [runs[i] for i in members]), strict=True):
                rows[i] = embedding
        return torch.stack([row for row in rows if row is not None])

    def rows_through_blocks(self, runs: Sequence[Run]) -> int:
        """How many times a tile goes through a block in `rerun`, counted without running it."""
        n_layers = self.model.config.vision.n_layers_run
        return self._n_tiles * sum(n_layers - max(self._first_block(run), 0) for run in runs)

    @cached_property
    def block_cost(self) -> float:
        """What one tile costs in one block, as a number of positions in a block of the language tower.

        Counted in multiplications by weights.
        """
        vision, language = self.model.vision.blocks, self.model.language.blocks
        sizes = [sum(p.numel() for p in blocks[0].parameters() if p.ndim == 2) for blocks in (vision, language)]
        return self.model.config.vision.n_positions * sizes[0] / sizes[1]

    @property
    def cost_of_all(self) -> float:
        """What all tiles cost in all blocks that are run, in the unit of `block_cost`."""
        return self._n_tiles * self.model.config.vision.n_layers_run * self.block_cost

    def _first_block(self, run: Run) -> int:
        return min(_first_block(r, self.model.config.vision.n_layers_run) for r in run)

    @property
    def _n_tiles(self) -> int:
        return 0 if self._pixels is None else len(self._pixels)

    def _from(self, block: int, runs: list[Run]) -> Float[Tensor, "run image feature d_model"]:
        """Image embeddings of runs that enter at one block (numbered as by `_first_block`), in one pass."""
        vision, n_runs = self.model.vision, len(runs)
        with edited(self.model, self._edits(runs)):
            kept = [state.repeat(n_runs, 1, 1) for state in self.states[: max(block, 0) + 1]]  # (run * tile, ...)
            if block < 0:
                assert self._pixels is not None
                kept = [vision.embed(self._pixels.repeat(n_runs, 1, 1, 1))]
            features = vision.features(vision.states(kept))
            embedding = self.model.hook_image_embed(self.model.project(features, self.inputs))
        return embedding.unflatten(0, (n_runs, self.inputs.n_images))

    def _edits(self, runs: list[Run]) -> list[RowEdit]:
        edits = []
        for i, run in enumerate(runs):
            for bound in run:
                n_rows = self._n_tiles if bound.hook.by_tile else self.inputs.n_images
                rows = image_rows(self.inputs, bound.hook, bound.intervention.image, bound.intervention.tile)
                edits += [RowEdit(i * n_rows + row, image, bound, 0) for row, image in rows]
        return edits


def _first_block(bound: BoundIntervention, n_layers_run: int) -> int:
    """Block of the vision tower at which a change enters: -1 for the embedding, n_layers_run for what comes after."""
    hook = bound.hook
    if hook.layer is not None:
        return hook.layer
    return n_layers_run if hook.tower != "vision" or hook.site == "hook_out" else -1
