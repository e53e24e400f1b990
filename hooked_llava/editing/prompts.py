"""Prompts that are asked again under many edits, entered at the first layer that an edit changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.checks import whole_number
from hooked_llava.editing import weight_records
from hooked_llava.editing.magnitude import generated_answers
from hooked_llava.errors import InputError
from hooked_llava.machine.devices import in_batches, to_device
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.weights_id import same_samples, samples
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.prompt.token_map import TokenMap
from hooked_llava.readout.answer import NOTHING
from hooked_llava.replay.kept_run import KeptRun, joined_runs, keep


@dataclass(frozen=True)
class KeptPrompts:
    """Prompts of one batch, with the residual stream that entered some layers before an edit.

    An edit of layer l and above leaves everything below l as it was, so its effect on thousands of prompts costs the
    layers from l on.

    Attributes:
        kept (KeptRun): What entered the kept layers; padding is on the left.
        before (Float[Tensor, "prompt d_vocab"]): Next-token logits then.
        token_maps (tuple[TokenMap, ...]): The tokens and spans of each prompt: how an answer is tokenized depends on the text
            before it.
        weights (Float[Tensor, " sample"]): Which unedited weights they were run with, see `samples`.
        edits (frozenset[weight_records.ActiveEdit]): The edits that were active then; as a rule none.
        answers (Int[Tensor, "prompt read"] | None): What was answered then, token by token, -1 after an answer's end; None
            where that was not asked for.
    """

    kept: KeptRun
    before: Float[Tensor, "prompt d_vocab"]
    token_maps: tuple[TokenMap, ...]
    weights: Float[Tensor, " sample"]
    edits: frozenset[weight_records.ActiveEdit] = frozenset()
    answers: Int[Tensor, "prompt read"] | None = None

    def __len__(self) -> int:
        return len(self.before)

    def __getitem__(self, rows: Sequence[int] | slice) -> KeptPrompts:
        """Some of the prompts, without columns that are padding in all of them."""
        index: Any = rows if isinstance(rows, slice) else list(rows)
        token_maps = self.token_maps[rows] if isinstance(rows, slice) else tuple(self.token_maps[i] for i in rows)
        answers = None if self.answers is None else self.answers[index]
        return replace(self, kept=self.kept[rows], before=self.before[index], token_maps=token_maps, answers=answers)

    def check_current(self, model: HookedLLaVA, weights: Float[Tensor, " any_sample"], name: str) -> None:
        """Raises `InputError` unless they are of this model, with the active edits and the unedited weights that it has now."""
        if self.kept.model is not model:
            problem = "of another model object"
        elif not same_samples(weights, self.weights):
            problem = "before the model's weights were changed by something other than an edit"
        elif self.edits != weight_records.all_active(model):
            problem = "while other edits were active than now"
        else:
            return
        raise InputError(
            f"The prompts of probe {name!r} were kept {problem}, so what they say without the edit is out of date. Keep them "
            "again, or give the prompts themselves."
        )

    @torch.no_grad()
    def logits(self, layer: int = 0) -> Float[Tensor, "prompt d_vocab"]:
        """Next-token logits with the weights as they are now, from the highest kept layer that is not above `layer`.

        Weights that act before that layer count as they were when the prompts were kept.
        """
        start = max(kept for kept in self.kept.resid if kept <= layer)
        return self._rerun(lambda kept, _: kept.logits(start, queries=[kept.n_positions - 1])[:, 0])

    @torch.no_grad()
    def answer_logits(self, ids: Int[Tensor, "prompt read"], layer: int = 0) -> Float[Tensor, "prompt read d_vocab"]:
        """Logits where each token of an answer is predicted, -1 after an answer's end; otherwise as `logits`.

        One of several tokens is appended to the prompts, which then run through all layers.
        """
        n_read = ids.shape[1]
        if n_read == 1:
            return self.logits(layer)[:, None]
        before = to_device(ids[:, :-1].clamp(min=0), self.before.device)

        def answered(kept: KeptRun, rows: slice) -> Tensor:
            whole = kept.appended(before[rows])
            return whole.logits(0, queries=range(whole.n_positions - n_read, whole.n_positions))

        return self._rerun(answered)

    def _rerun(self, work: Callable[[KeptRun, slice], Tensor]) -> Tensor:
        """What the work makes of all prompts; where memory runs out, of some after the others."""

        def part(rows: range) -> Tensor:
            own = slice(rows.start, rows.stop)
            return work(self.kept if len(rows) == len(self) else self.kept[own], own)

        return torch.cat([found for _, found in in_batches([range(len(self))], part)])


@torch.no_grad()
def keep_prompts(
    model: HookedLLaVA,
    inputs: InputsLike,
    layers: Sequence[int] = (0,),
    *,
    batch_size: int = 64,
    max_new_tokens: int = 0,
) -> KeptPrompts:
    """Run prompts once and keep the logits, and the residual stream entering layer 0 and the given layers.

    Entering n_layers is what leaves the last one. With `max_new_tokens` the answers are kept too, of so many tokens at most:
    `evaluate_edit` sets the target against them. Raises `InputError` for a layer that the model does not have.

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

    def kept(batch: Inputs) -> tuple[KeptRun, Tensor, Tensor | None]:
        answers = generated_answers(model, batch, max_new_tokens) if max_new_tokens else None
        run = keep(model, batch, layers={*wanted, n_layers}, keys_and_values=False)
        resid = {layer: run.resid[layer] for layer in wanted}
        return replace(run, resid=resid), run.logits(n_layers, queries=[-1])[:, 0], answers

    batches = (prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size))
    runs, before, answers = zip(*(found for _, found in in_batches(batches, kept)), strict=True)
    return KeptPrompts(
        kept=joined_runs(runs),
        before=torch.cat(before),
        token_maps=prompts.token_maps,
        weights=samples(weight_records.originals(model)),
        edits=weight_records.all_active(model),
        answers=_joined(answers),
    )


def _joined(answers: Sequence[Int[Tensor, "..."] | None]) -> Int[Tensor, "prompt read"] | None:
    """Answers of several batches in one table."""
    known = [ids for ids in answers if ids is not None]
    longest = max((ids.shape[1] for ids in known), default=0)
    filled = [F.pad(ids, (0, longest - ids.shape[1]), value=NOTHING) for ids in known]
    return torch.cat(filled) if filled else None
