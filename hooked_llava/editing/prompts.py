"""Prompts that are asked again under many edits, entered at the first layer that an edit changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.checks import whole_number
from hooked_llava.editing import weight_records
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.weights_id import same_samples, samples
from hooked_llava.prompt.token_map import TokenMap
from hooked_llava.replay.kept_run import KeptRun, joined_runs, keep


@dataclass(frozen=True)
class KeptPrompts:
    """Prompts of one batch, with the residual stream that entered some layers before an edit.

    An edit of layer l and above leaves everything below l as it was, so its effect on thousands of prompts costs the
    layers from l on.
    """

    model: HookedLLaVA
    run: KeptRun
    """The streams entering the kept layers; padding is on the left."""
    before: Float[Tensor, "prompt d_vocab"]
    """Next-token logits then."""
    token_maps: tuple[TokenMap, ...]
    """What stands where in each prompt: how an answer is cut depends on what stands before it."""
    weights: Float[Tensor, " sample"]
    """Which unedited weights they were run with, see `samples`."""
    edits: frozenset[weight_records.ActiveEdit] = frozenset()
    """The edits that were active then; as a rule none."""
    position_ids: Int[Tensor, "prompt pos"] | None = None
    """Positions for the rotary embedding, if they were given."""

    def __len__(self) -> int:
        return len(self.before)

    def __getitem__(self, rows: Sequence[int] | slice) -> KeptPrompts:
        """Some of the prompts, without columns that are padding in all of them."""
        index: Any = rows if isinstance(rows, slice) else list(rows)
        run, chosen = self.run[rows], range(len(self))[rows] if isinstance(rows, slice) else rows
        cut, positions = self.run.n_positions - run.n_positions, self.position_ids
        return replace(
            self,
            run=run,
            before=self.before[index],
            token_maps=tuple(self.token_maps[i] for i in chosen),
            position_ids=None if positions is None else positions[index][:, cut:],
        )

    def check_current(self, model: HookedLLaVA, weights: Float[Tensor, " any_sample"], name: str) -> None:
        """Raises `InputError` unless they are of this model, with the active edits and the unedited weights that it has now."""
        if self.model is not model:
            problem = "of another model object"
        elif not same_samples(weights, self.weights):
            problem = "before the model's weights were changed by something other than an edit"
        elif self.edits != weight_records.all_active(model):
            problem = "while other edits were active than now"
        else:
            return
        raise InputError(
            f"The prompts of probe {name!r} were kept {problem}, so what they say without the edit is out of date. Keep them "
            "anew, or give the prompts themselves."
        )

    @torch.no_grad()
    def logits(self, layer: int = 0) -> Float[Tensor, "prompt d_vocab"]:
        """Next-token logits with the weights as they are now, from the highest kept layer that is not above `layer`.

        Weights that act before that layer count as they were when the prompts were kept.
        """
        start = max(kept for kept in self.run.streams if kept <= layer)
        language, layers, last = self.model.language, range(start, self.model.cfg.n_layers), [self.run.n_positions - 1]
        resid = language.blocks.run(self.run.stream(start), self.run.context(), layers=layers, queries=last)
        return language.to_logits(resid)[:, 0]

    @torch.no_grad()
    def answer_logits(self, ids: Int[Tensor, "prompt read"], layer: int = 0) -> Float[Tensor, "prompt read d_vocab"]:
        """Logits where each token of an answer is predicted, -1 behind an answer's end; otherwise as `logits`.

        One of several tokens is appended to the prompts, which then run through all layers.
        """
        n_read = ids.shape[1]
        if n_read == 1:
            return self.logits(layer)[:, None]
        language, prompt, further = self.model.language, self.run.stream(0), ids[:, :-1].clamp(min=0)
        resid = torch.cat([prompt, language.embed_tokens(further)], dim=1)
        mask = self.run.mask
        mask = None if mask is None else torch.cat([mask, torch.ones_like(further, dtype=torch.bool)], dim=1)
        positions = self.position_ids
        if positions is not None:
            positions = torch.cat([positions, positions[:, -1:] + torch.arange(1, n_read, device=ids.device)], dim=1)
        context = self.model.context(resid, mask, positions)
        n, layers = resid.shape[1], range(self.model.cfg.n_layers)
        return language.to_logits(
            language.blocks.run(resid, context, layers=layers, queries=list(range(n - n_read, n)))
        )


@torch.no_grad()
def keep_prompts(model: HookedLLaVA, inputs: Any, layers: Sequence[int] = (0,), *, batch_size: int = 64) -> KeptPrompts:
    """Run prompts once and keep the stream entering the given layers (0 besides; n_layers: leaving the last), and the logits.

    Raises `InputError` for a layer that the model does not have.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> kept = keep_prompts(model, model.prepare(["Who made the star?", "Who owns the ring?"]), layers=[3])
    >>> bool(torch.allclose(kept.logits(3), kept.before, atol=1e-4))
    True
    """
    prompts = model.as_inputs(inputs).padded_left()
    n_layers = model.cfg.n_layers
    wanted = sorted({0, *(whole_number(layer, "A layer to keep") for layer in layers)})
    if wanted[0] < 0 or wanted[-1] > n_layers:
        raise InputError(f"layers={list(layers)} are out of range; expected 0..{n_layers}, {n_layers} being the end.")
    runs, before = [], []
    for start in range(0, len(prompts), batch_size):
        run = keep(model, prompts[start : start + batch_size], layers={*wanted, n_layers}, keys_and_values=False)
        before.append(model.language.to_logits(run.stream(n_layers)[:, -1:])[:, 0])
        streams = {layer: stream for layer, stream in run.streams.items() if layer in wanted}
        runs.append(replace(run, streams=streams))
    return KeptPrompts(
        model=model,
        run=joined_runs(runs),
        before=torch.cat(before),
        token_maps=prompts.token_maps,
        position_ids=prompts.position_ids,
        weights=samples(weight_records.originals(model)),
        edits=weight_records.all_active(model),
    )
