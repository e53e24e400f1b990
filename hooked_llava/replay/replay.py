"""Replay: a finished run that can be entered again at any layer and position.

In LLaVA the image comes first and attention is causal, so a change at layer l and position p reaches only layers >= l
and positions >= p. Replay keeps the residual stream, keys and values of one run; a re-run

1. enters at the first layer that is changed, with the kept residual stream;
2. carries only the positions from the first changed one on, and reads earlier keys and values from the kept run;
3. stacks runs into one batch, each row with its own changes; rows join at their own layer, so that one pass over the
   layers serves them all;
4. computes, in the last layer and after it, only the positions that are read.

The result is the full run's with the same hooks, up to the rounding of another order of summation.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.architecture.hooks import NamesFilter
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.requirements import check_supported
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.prompt.where import PositionsLike
from hooked_llava.readout.metrics import Metric
from hooked_llava.replay.binding import bind
from hooked_llava.replay.branch import EMBEDDINGS, branched_run
from hooked_llava.replay.intervention import Intervention
from hooked_llava.replay.kept_run import keep
from hooked_llava.replay.layer_pass import recordable, recorded
from hooked_llava.replay.offloading import run_keeper
from hooked_llava.replay.plan import PlannedRun, plan_run
from hooked_llava.replay.reference_mean import with_means
from hooked_llava.replay.state import ReplayState, Work
from hooked_llava.replay.sweep import Sweep

Runs: TypeAlias = Sequence[Intervention | Sequence[Intervention]]
"""Runs, each one intervention or several that it applies together."""


class Replay(ReplayState):
    """One run of a batch of prompts, kept, and re-run under interventions at the cost of what they can reach.

    Args:
        model: the model; no functions may be attached to it.
        inputs: anything `model.as_inputs` takes; a batch of prompts applies every run to every prompt.
        dtype: keep the residual stream, keys and values in this dtype (half of the memory, no longer exact).
        device: keep them there, layer by layer as they are computed.
        offload_folder: keep them on disk instead, in files of this folder that go with the Replay; the system brings into memory
            what is read. Without either, `offloaded_runs` decides.

    Raises `InputError` if functions are attached to the model, and for a folder that there is not.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> replay = Replay(model, model.prepare("Who made the star?"))
    >>> replay.run([[Intervention("blocks.3.attn.hook_z", positions="last", heads=[2], zero=True)]]).shape[0]
    1
    """

    def __init__(
        self,
        model: HookedLLaVA,
        inputs: InputsLike,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise InputError(f"dtype={dtype}; a run is kept in a floating point dtype, such as torch.bfloat16.")
        self.keeper = run_keeper(device, offload_folder, dtype)
        prompts = model.as_inputs(inputs)
        check_supported("Replay", model)
        super().__init__(model, prompts, keep(model, prompts, kept=self.keeper))
        self._images_changed = False

    @staticmethod
    def forecast(model: HookedLLaVA, inputs: InputsLike, *, dtype: torch.dtype | None = None) -> int:
        """Bytes that a Replay of these inputs keeps, without running the model."""
        prompt = model.as_inputs(inputs)
        cfg = model.config.language
        per_position = (cfg.n_layers + 1) * cfg.d_model + 2 * cfg.n_layers * cfg.n_key_value_heads * cfg.d_head
        return len(prompt) * prompt.shape[1] * per_position * (dtype or model.cfg.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self.kept.nbytes

    def logits(self, positions: PositionsLike = "last") -> Float[Tensor, "*prompt_position d_vocab"]:
        """Logits of the kept run: [d_vocab] for one prompt, [prompt, d_vocab] for a batch, with a position axis unless "last"."""
        return self.shaped(self.kept_logits(positions)[None], positions)[0]

    def run(
        self,
        runs: Runs,
        metric: Metric | None = None,
        positions: PositionsLike = "last",
        batch_size: int | None = None,
        *,
        progress: bool = True,
    ) -> Float[Tensor, "run ..."]:
        """Logits under every run's interventions, or the metric of them.

        Args:
            runs: a list of runs, each an `Intervention` or a list of those that it applies together.
            metric: function of logits [..., d_vocab], see `metrics.measured`; its values are returned instead of logits.
            positions: where logits are read; "last", another span, or positions.
            batch_size: rows (runs x prompts) at once; chosen from the free memory by default.
            progress: show a progress bar on anything longer than two seconds.

        Returns [run, d_vocab] for one prompt and [run, prompt, d_vocab] for a batch, with a further axis before d_vocab
        for positions other than "last"; or the metric's values in its place. A run that changes nothing gives the kept
        logits bit for bit. Raises `HookNameError`, `SpanError` or `InputError` for runs that do not fit, before anything
        is computed, and `StaleReplayError` if the weights were changed or functions attached since.
        """
        return self.sweep(runs, metric, positions, batch_size, progress=progress).run()

    def sweep(
        self,
        runs: Runs,
        metric: Metric | None = None,
        positions: PositionsLike = "last",
        batch_size: int | None = None,
        *,
        progress: bool = True,
    ) -> Sweep:
        """The planned sweep, to be started with `.run()`; if interrupted, `.run()` again goes on where it stopped."""
        planned = self._planned(runs)
        return Sweep(self, planned, metric, positions, batch_size, progress=progress)

    def run_with_cache(
        self, runs: Runs, names_filter: NamesFilter, positions: PositionsLike = "last"
    ) -> tuple[Float[Tensor, "run ..."], list[dict[str, Tensor]]]:
        """Logits, and for each run the activations that were recomputed, by hook name.

        A tensor holds all prompts and the positions from the run's first changed one on (in the last layer those that are
        read); hooks below the layer where a run enters are not in its dict, because they are as in the kept run.
        """
        names = recordable(self, names_filter)
        planned = self._planned(runs)
        self.check_fresh()
        found = [recorded(self, run, names, positions) for run in planned]
        nothing = self.kept_logits(positions)[None][:0]
        logits = torch.cat([nothing, *(one[None] for one, _ in found)])
        return self.shaped(logits, positions), [activations for _, activations in found]

    def branch(self, changes: Intervention | Sequence[Intervention]) -> Replay:
        """A Replay of the same prompts with other embeddings, at the cost of the positions from the first change on.

        `changes` are interventions on `hook_embed` or `hook_text_embed`. The branch keeps the run under them, so that
        its own runs start from there; making it counts in this Replay's `work`. Raises `InputError` for any other hook,
        and in the branch for interventions on the image side if embeddings of an image were changed.

        >>> from hooked_llava import HookedLLaVA
        >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
        >>> replay = Replay(model, model.prepare("Who made the star?"))
        >>> ring = model.W_E[model.to_single_token("ring")]
        >>> other = replay.branch(Intervention("hook_embed", positions=replay.inputs.token_map.find("star"), value=ring))
        >>> torch.allclose(other.logits(), model(model.prepare("Who made the ring?"))[0, -1], atol=1e-3)
        True
        """
        (planned,) = self._planned([changes])
        if wrong := [r.hook.name for r in (*planned.image, *planned.language) if r.hook.name not in EMBEDDINGS]:
            raise InputError(
                f"A branch changes embeddings, {' or '.join(EMBEDDINGS)}, and {wrong[0]} was given; apply other "
                "interventions with run()."
            )
        self.check_fresh()
        other = copy.copy(self)
        other.work = Work(n_layers=self.work.n_layers, n_positions=self.work.n_positions)
        other.kept = branched_run(self, planned, self.keeper)
        maps = self.inputs.token_maps
        images = [{p for image in token_map.image_ranges for p in image} for token_map in maps]
        changed = (not images[i].isdisjoint(where) for r in planned.language for i, where in enumerate(r.positions))
        other._images_changed = self._images_changed or any(changed)  # noqa: SLF001 (of its own class)
        return other

    def _planned(self, runs: Runs) -> list[PlannedRun]:
        """The runs, all checked before a reference mean is taken for any."""
        lists = [[run] if isinstance(run, Intervention) else list(run) for run in _listed(runs)]
        planned = [self._plan(i, run) for i, run in enumerate(lists)]
        if any(iv.mean_of is not None for run in lists for iv in run):
            filled = iter(with_means(self.model, [iv for run in lists for iv in run]))
            planned = [self._plan(i, [next(filled) for _ in run]) for i, run in enumerate(lists)]
        return planned

    def _plan(self, index: int, run: Sequence[Intervention]) -> PlannedRun:
        bound = [bind(intervention, self.model, self.inputs) for intervention in run]
        planned = plan_run(index, bound, self.inputs, self.model.cfg.n_layers)
        if planned.image and self._images_changed:
            raise InputError(
                f"{planned.image[0].hook.name} fires before the image's embeddings, which this branch has replaced; give "
                "the intervention to the Replay that it was branched from."
            )
        return planned


def _listed(runs: Runs) -> Runs:
    if isinstance(runs, Intervention):
        raise InputError(
            "runs= is one Intervention; expected a list of runs, each a list of Interventions: [[...], ...]."
        )
    return runs
