"""Interventions in `fwd_hooks`, beside functions: attached to the model's hooks, and bound to the prompt of every pass.

In generation the positions that an intervention names are the prompt's: it acts in the pass over the prompt, and what
follows reads the changed keys and values. On the tokens that are generated it acts where it names no positions (None is
every position), or names the span `answer`, which is what has been generated so far; as an end of an edge `last` is where
the answer is read, so it is every new token too. The result is that of one full pass over prompt and answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from hooked_llava.errors import InputError
from hooked_llava.machine.devices import to_device
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.prompt_hooks import HookEntry, Phase, PromptHook, as_hook, continued
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.where import Where, positions_of
from hooked_llava.replay.binding import bind, check_operand
from hooked_llava.replay.bound import BoundIntervention
from hooked_llava.replay.intervention import Intervention
from hooked_llava.replay.reference_mean import with_means
from hooked_llava.replay.row_edits import RowEdit, edited_copy, image_rows


class AttachedIntervention(PromptHook):
    """An intervention as a function on the model's hook."""

    def __init__(self, intervention: Intervention, model: HookedLLaVA) -> None:
        self.intervention, self.model = intervention, model
        # What it does to new tokens of these prompts: found once, not for every token.
        self._on_new: tuple[Inputs, Callable[[Tensor], Tensor]] | None = None

    def __repr__(self) -> str:
        return repr(self.intervention)

    @property
    def phases(self) -> Phase:
        """The phases of generation in which the intervention acts."""
        return self.intervention.phases

    @classmethod
    def prepare(cls, hooks: Sequence[AttachedIntervention]) -> None:
        """Turn every reference mean into its value, before anything is attached."""
        if hooks:
            filled = with_means(hooks[0].model, [hook.intervention for hook in hooks])
            for hook, intervention in zip(hooks, filled, strict=True):
                if intervention is not hook.intervention:
                    hook.intervention, hook._on_new = intervention, None  # noqa: SLF001 (of its own class)

    def place(self, inputs: Inputs, n_new: int = 0) -> Callable[[Tensor], Tensor]:
        """The intervention bound to these prompts, as a function from the hook's activation to the changed one.

        Raises as `bind`.
        """
        if not n_new:
            return self._bound(inputs, 0)
        if self.intervention.edge is not None:  # its keys grow with what is generated
            return self._bound(inputs, n_new)
        if self._on_new is None or self._on_new[0] is not inputs:
            self._on_new = inputs, self._bound(inputs, n_new)
        return self._on_new[1]

    def _bound(self, inputs: Inputs, n_new: int) -> Callable[[Tensor], Tensor]:
        bound = bind(self.intervention, self.model, inputs)
        if n_new:
            bound = _for_new_token(bound, self.model, inputs, n_new)
        added = bound.added_everywhere(len(inputs), 1 if n_new else inputs.shape[1])
        if added is not None:  # one sum for the whole batch, without indices
            return lambda tensor: tensor + to_device(added, tensor.device, tensor.dtype)
        if bound.hook.on_image_side:
            rows = image_rows(inputs, bound.hook, self.intervention.image, self.intervention.tile)
            edits = [RowEdit(row, image, bound, 0) for row, image in rows]
        else:
            edits = [RowEdit(p, p, bound, 0) for p in range(len(inputs))]
        edits = [edit for edit in edits if bound.positions[edit.owner]]
        return lambda tensor: edited_copy(tensor, edits) if edits else tensor

    def acts_on_new_tokens(self, inputs: Inputs) -> bool:
        """Whether any prompt's new tokens are among its positions."""
        bound = bind(self.intervention, self.model, inputs)
        return not bound.hook.on_image_side and any(_names_new_tokens(bound.target, bound, inputs))


@as_hook.register
def _(entry: Intervention, model: HookedLLaVA) -> HookEntry:
    """An Intervention in `fwd_hooks`, as (full name, function)."""
    return model.hooks_table.one(entry.hook), AttachedIntervention(entry, model)


def _names_new_tokens(where: Where, bound: BoundIntervention, inputs: Inputs) -> list[bool]:
    """For each prompt, whether its positions go on into what is generated after it: all of it or nothing."""
    if bound.intervention.phases == "prefill" or (where is not None and not isinstance(where, str)):
        return [False] * len(inputs)
    found = []
    for token_map in inputs.token_maps:
        grown = continued(token_map, 2)  # the first of two predicts the second, as every new token predicts the next
        end = grown.edge_end(where) if bound.intervention.edge is not None else where
        found.append(token_map.real.stop in positions_of(end, grown, len(grown)))
    return found


def _for_new_token(bound: BoundIntervention, model: HookedLLaVA, inputs: Inputs, n_new: int) -> BoundIntervention:
    """The intervention in a pass over the newest of `n_new` generated tokens, the only position of that pass."""
    here = _names_new_tokens(bound.target, bound, inputs)
    if bound.hook.on_image_side or not any(here):
        return replace(bound, positions=tuple(() for _ in bound.positions))
    if bound.intervention.position_mean:
        raise InputError(
            f"{bound.intervention!r} takes a mean over positions, and generated tokens come one at a time. Name the "
            "prompt's positions, take hook_phase='prefill', or give mean_of= a reference."
        )
    sources = bound.sources
    if bound.intervention.edge is not None:
        new = tuple(range(inputs.shape[1], inputs.shape[1] + n_new))
        among = _names_new_tokens(bound.intervention.edge[0], bound, inputs)
        sources = tuple((*own, *new) if on else own for own, on in zip(sources, among, strict=True))
    placed = replace(bound, positions=tuple((0,) if on else () for on in here), sources=sources)
    check_operand(replace(placed, positions=((0,),)), model, inputs)
    return placed
