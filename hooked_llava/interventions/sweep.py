"""Thousands of interventions in a few batched re-runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from hooked_llava.caching import Positions
from hooked_llava.errors import InputError
from hooked_llava.interventions.climb import Climb
from hooked_llava.interventions.plan import PlannedRun, batches

if TYPE_CHECKING:
    from hooked_llava.interventions.replay import Replay

_FREE_SHARE = 0.25  # of the free memory that one batch may take
_PATIENCE = 2.0  # seconds before a progress bar appears


class Sweep:
    """A planned list of runs; `run()` does what is left of it, so an interrupted one can be taken up again."""

    def __init__(
        self,
        replay: Replay,
        runs: list[PlannedRun],
        metric: Callable[[Tensor], Tensor] | None,
        positions: Positions,
        batch_size: int | None,
        *,
        progress: bool,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size={batch_size}; expected at least 1 row, or None to choose by free memory.")
        self.replay, self.runs, self.metric, self.positions, self.progress = replay, runs, metric, positions, progress
        self.wanted = replay.wanted(positions)
        n_prompts = len(replay.inputs)
        sizes = {run.start: self._rows_at_once(run.start) for run in runs if run.start is not None}
        per_suffix = {replay.kept.n_positions - start: max(1, rows // n_prompts) for start, rows in sizes.items()}
        at_once = per_suffix if batch_size is None else max(1, batch_size // n_prompts)
        self._batches = list(batches(runs, replay.kept.n_positions, at_once))
        self._rows: list[Tensor | None] = [None] * len(runs)

    @property
    def done(self) -> int:
        """Number of runs that are finished."""
        return sum(row is not None for row in self._rows)

    @torch.no_grad()
    def run(self) -> Tensor:
        """Do the batches that are left; returns one row for each run, in the order they were given."""
        self.replay.check_fresh()
        self._keep_unchanged()
        left = [batch for batch in self._batches if self._rows[batch[0].index] is None]
        hidden = None if self.progress else True
        with tqdm(total=sum(map(len, left)), unit="run", delay=_PATIENCE, disable=hidden, leave=False) as bar:
            for batch in left:
                logits = Climb(self.replay, batch, self.wanted).logits()
                order = sorted(batch, key=lambda run: run.index)
                for run, row in zip(order, self._finish(logits), strict=True):
                    self._rows[run.index] = row
                self.replay.work.runs += len(batch) * len(self.replay.inputs)
                bar.update(len(batch))
        return torch.stack([row for row in self._rows if row is not None]) if self._rows else self._nothing()

    def _keep_unchanged(self) -> None:
        """Runs that change nothing have the kept logits."""
        unchanged = [run for run in self.runs if not run.changes]
        if unchanged:
            row = self._finish(self.replay.kept_logits(self.positions)[None])[0]
            for run in unchanged:
                self._rows[run.index] = row

    def _finish(self, logits: Tensor) -> Tensor:
        shaped = self.replay.shaped(logits, self.positions)
        return shaped if self.metric is None else self.metric(shaped)

    def _nothing(self) -> Tensor:
        return self._finish(self.replay.kept_logits(self.positions)[None])[:0]

    def _rows_at_once(self, start: int) -> int:
        """How many rows of this length fit into a share of the free memory."""
        cfg = self.replay.model.config.language
        n_suffix, n_positions = self.replay.kept.n_positions - start, self.replay.kept.n_positions
        numbers = n_suffix * (10 * cfg.d_model + 4 * cfg.d_mlp) + 3 * cfg.n_heads * n_suffix * n_positions
        numbers += self.wanted.shape[1] * cfg.d_vocab
        return max(1, int(_FREE_SHARE * _free_memory(self.replay.kept.device) / (4 * numbers)))


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
