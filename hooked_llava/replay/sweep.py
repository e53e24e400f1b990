"""Thousands of interventions in a few batched re-runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import psutil
import torch
from torch import Tensor

from hooked_llava.checks import whole_number
from hooked_llava.machine.devices import in_batches
from hooked_llava.prompt.where import PositionsLike
from hooked_llava.readout.metrics import Metric, measured
from hooked_llava.replay.layer_pass import LayerPass, needs_full_suffix
from hooked_llava.replay.plan import PlannedRun, batches
from hooked_llava.replay.progress import progress_bar
from hooked_llava.replay.state import ReplayState, Work

_FREE_SHARE = 0.25  # of the free memory that one batch may take
_WIDEST_ON_CPU = 2**22  # numbers in one activation: a CPU computes no faster with more, they only leave its caches


class Sweep:
    """A planned list of runs; `run()` does what is left of it, so an interrupted one can be taken up again.

    Where memory runs out it goes on with half as many rows at once, and says so by a warning.
    """

    def __init__(
        self,
        state: ReplayState,
        runs: list[PlannedRun],
        metric: Metric | None,
        positions: PositionsLike,
        batch_size: int | None,
        *,
        progress: bool,
    ) -> None:
        if batch_size is not None:
            wanted = "a whole number of rows, or None to choose by free memory"
            whole_number(batch_size, "batch_size", least=1, expected=wanted)
        self.state, self.runs, self.metric, self.positions, self.progress = state, runs, metric, positions, progress
        self.wanted = state.wanted(positions)
        n_prompts = len(state.inputs)
        free = min(map(_free_memory, state.model.devices))
        starts = {run.start for run in runs if run.start is not None}
        sizes = {start: self._rows_at_once(start, free) for start in starts}
        per_suffix = {state.kept.n_positions - start: max(1, rows // n_prompts) for start, rows in sizes.items()}
        at_once = per_suffix if batch_size is None else max(1, batch_size // n_prompts)
        self._batches = list(batches(runs, state.kept.n_positions, at_once))
        self._rows: list[Tensor | None] = [None] * len(runs)

    @property
    def done(self) -> int:
        """Number of runs that are finished."""
        return sum(row is not None for row in self._rows)

    @property
    def forecast(self) -> float:
        """What all of it costs, as a number of full passes through the language tower's blocks, counted before running."""
        work = Work(n_layers=self.state.work.n_layers, n_positions=self.state.work.n_positions)
        work.token_layers = sum(LayerPass(self.state, batch, self.wanted).token_layers for batch in self._batches)
        return work.forwards

    @torch.no_grad()
    def run(self) -> Tensor:
        """Do the batches that are left; returns one row for each run, in the order they were given."""
        self.state.check_fresh()
        self._check_metric()
        self._keep_unchanged()
        left = [batch for batch in self._batches if any(self._rows[run.index] is None for run in batch)]
        with progress_bar(sum(map(len, left)), "run", shown=self.progress) as bar:
            for batch, rows in in_batches(left, self._rows_of):
                for run, row in zip(sorted(batch, key=lambda run: run.index), rows, strict=True):
                    self._rows[run.index] = row
                self.state.work.runs += len(batch) * len(self.state.inputs)
                bar.update(len(batch))
        return torch.stack(self._rows) if self._rows else self._nothing()  # type: ignore[arg-type] (none is left)

    def _rows_of(self, batch: Sequence[PlannedRun]) -> list[Tensor]:
        """What runs that go together give, in the order of their numbers; all or none of it, and of their work, counts."""
        work = self.state.work.token_layers
        try:
            logits = LayerPass(self.state, list(batch), self.wanted).logits()
            return list(self._finish(logits))
        except torch.OutOfMemoryError:
            self.state.work.token_layers = work
            raise

    def _check_metric(self) -> None:
        """Refuse a metric of the wrong shape before anything is run: it is tried on copies of the kept logits."""
        if self.metric is not None and self.runs:
            kept = self.state.kept_logits(self.positions)
            n_copies = next(n for n in (3, 4, 5) if n not in kept.shape[:2])  # no axis is mistaken for another
            self._finish(kept.expand(n_copies, *kept.shape).clone())

    def _keep_unchanged(self) -> None:
        """Runs that change nothing have the kept logits."""
        unchanged = [run for run in self.runs if not run.changes]
        if unchanged:
            row = self._finish(self.state.kept_logits(self.positions)[None])[0]
            for run in unchanged:
                self._rows[run.index] = row

    def _finish(self, logits: Tensor) -> Tensor:
        shaped = self.state.shaped(logits, self.positions)
        if self.metric is None:
            return shaped
        return measured(self.metric, shaped, 1 if len(self.state.inputs) == 1 else 2)

    def _nothing(self) -> Tensor:
        return self._finish(self.state.kept_logits(self.positions)[None])[:0]

    def _rows_at_once(self, start: int, free: int) -> int:
        """How many rows of this length fit into a share of the free memory, and on a CPU into its caches."""
        kept, cfg = self.state.kept, self.state.model.config.language
        n_suffix = kept.n_positions - start
        n_logits = max(self.wanted.shape[1], n_suffix * needs_full_suffix(self.runs, cfg.n_layers)) * cfg.d_vocab
        n_scores = cfg.n_heads * n_suffix * kept.n_positions
        numbers = n_suffix * (10 * cfg.d_model + 4 * cfg.d_mlp) + 3 * n_scores + n_logits
        rows = int(_FREE_SHARE * free / (4 * numbers))
        if self.state.model.cfg.device.type == "cpu":
            widest = max(n_suffix * cfg.d_mlp, n_logits, n_scores if self._explicit else 0)
            rows = min(rows, _WIDEST_ON_CPU // widest)
        return max(1, rows)

    @cached_property
    def _explicit(self) -> bool:
        """Whether a run reads scores or pattern, so that they are held."""
        return any("key" in r.hook.axes for run in self.runs for r in run.language)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
