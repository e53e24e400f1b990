"""Bind interventions to a model and its prompts: names, spans, heads and values are checked before anything runs."""

from __future__ import annotations

from typing import SupportsIndex

from hooked_llava.architecture.hooks import Hook
from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.checks import Indices, as_index, as_indices, whole_numbers
from hooked_llava.errors import InputError
from hooked_llava.model.cache_hooks import axis_sizes
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.prompt_hooks import Phase
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.token_map import TokenMap
from hooked_llava.prompt.where import Where, positions_of
from hooked_llava.replay.bound import POSITION_AXES, BoundIntervention, spread
from hooked_llava.replay.intervention import SCORES, Intervention


def bind(intervention: Intervention, model: HookedLLaVA, inputs: Inputs) -> BoundIntervention:
    """Bind an intervention to a model and its inputs: which hook, which positions of each prompt, which heads.

    Raises `HookNameError` for an unknown hook, `SpanError` for an unknown span, and `InputError` for positions, heads,
    neurons or values that do not fit.
    """
    if not isinstance(intervention, Intervention):
        raise InputError(f"A run holds {intervention!r}; expected Interventions: Intervention(hook, ...).")
    name = model.hooks_table.one(intervention.hook, with_image=inputs.pixel_values is not None)
    hook = model.hooks_table[name]
    on_image_side = hook.on_image_side
    _check_scores(intervention, hook)
    if intervention.image is not None and not on_image_side:
        raise InputError(f"image= belongs to hooks of the image side; {name!r} has sequence positions.")
    if intervention.tile is not None and not hook.by_tile:
        raise InputError(f"tile= belongs to hooks of the vision tower and the projector; {name!r} has no tiles.")
    _check_number(intervention.image, max(inputs.images_per_prompt, default=0), "image", name)
    _check_number(intervention.tile, max(map(len, inputs.tiles), default=0), "tile", name)
    tower = model.hooks_table.tower(hook)
    n_heads = tower.n_key_value_heads if "kv_head" in hook.axes else tower.n_heads
    has_heads = bool({"head", "kv_head"} & set(hook.axes))
    of_edge = intervention.edge is not None
    source, target = intervention.edge or (None, intervention.positions)
    if on_image_side and intervention.phases == "decode":
        raise InputError(
            f"{name!r} fires when the prompt is read: phases='decode' would change nothing. Use 'prefill'."
        )
    positions = (
        tuple(patches_of(target, hook, model, layout) for layout in inputs.layouts)
        if on_image_side
        else _in_phases(_sequence(target, inputs, of_edge=of_edge), intervention.phases, inputs)
    )
    bound = BoundIntervention(
        intervention,
        hook,
        positions,
        tuple(() for _ in positions) if not of_edge else _sequence(source, inputs, of_edge=True),
        indices(intervention.heads, n_heads if has_heads else 0, "heads", name),
        indices(intervention.neurons, tower.d_mlp if "d_mlp" in hook.axes else 0, "neurons", name),
        indices(intervention.features, axis_sizes(model.hooks_table, name, inputs)["d_sae"], "features", name),
        model.hook_dict[name],
    )
    if intervention.position_mean:
        _check_several(bound)
    check_operand(bound, model, inputs)
    return bound


def _check_scores(intervention: Intervention, hook: Hook) -> None:
    """Refuse what works on attention scores at any other hook; edges are those of the language tower."""
    if intervention.edge is not None and (hook.on_image_side or hook.site != SCORES):
        raise InputError(f"{intervention.action}= works on the language tower's {SCORES}, not on {hook.name!r}.")
    if intervention.temperature is not None and hook.site != SCORES:
        raise InputError(f"temperature= works on {SCORES} of either tower, not on {hook.name!r}.")


def _check_several(bound: BoundIntervention) -> None:
    """Refuse a mean over the one position that is named, which changes nothing."""
    for prompt, positions in enumerate(bound.positions):
        if len(set(positions)) == 1:
            where = "" if len(bound.positions) == 1 else f" in prompt {prompt}"
            raise InputError(
                f"position_mean=True (or mean=True) on {bound.hook.name!r} takes the mean over the positions that are named, "
                f"and positions={bound.intervention.positions!r} names only {positions[0]}{where}: nothing would change. Name "
                "several positions, or give mean_of= a reference (prompts, a cache, a Replay or a tensor)."
            )


def _sequence(where: Where, inputs: Inputs, *, of_edge: bool = False) -> tuple[tuple[int, ...], ...]:
    """The sequence positions in every prompt. In an end of an edge `last` is read as by `TokenMap.edge_end`."""

    def of_prompt(token_map: TokenMap) -> tuple[int, ...]:
        end = token_map.edge_end(where) if of_edge else where
        return tuple(positions_of(end, token_map, inputs.shape[1]))

    return tuple(inputs.each(of_prompt, inputs.token_maps))


def _in_phases(positions: tuple[tuple[int, ...], ...], phases: Phase, inputs: Inputs) -> tuple[tuple[int, ...], ...]:
    """The prompts' own positions among some ("prefill"), or those of what is appended as an answer ("decode")."""
    if phases == "both":
        return positions
    wanted = phases == "prefill"
    ends = [token_map.own.stop for token_map in inputs.token_maps]
    return tuple(tuple(p for p in row if (p < end) is wanted) for row, end in zip(positions, ends, strict=True))


def _check_number(given: SupportsIndex | None, n: int, what: str, name: str) -> None:
    """Refuse a number of an image or tile that no prompt has."""
    if given is not None:
        number = whole_numbers(given, what)[0]
        as_index(number, n, what, says=f"{what}={given} on {name!r} is out of range", from_end=False)


def patches_of(where: Where, hook: Hook, model: HookedLLaVA, layout: ImageLayout) -> tuple[int, ...]:
    """Patches of a tile, or of an image, as indices of the hook's own position axis; raises `InputError`.

    In the tower the class token comes first; among an image's features newlines come between.
    """
    if hook.by_tile:
        along = model.config.vision.patches_along(hook.axes[hook.position_axis or 1])
        patches, n_positions = along, along.stop
    else:
        patches, n_positions = layout.object_features().tolist(), layout.n_features
    if where is None:
        return tuple(range(n_positions))
    if isinstance(where, slice):
        return tuple(patches[where])
    if isinstance(where, str):
        raise InputError(f"positions={where!r} on {hook.spec.name}: image hooks take patch indices, not spans.")
    return tuple(patches[i] for i in indices(where, len(patches), "positions", hook.spec.name) or ())


def indices(given: Indices | None, n: int, what: str, name: str) -> tuple[int, ...] | None:
    """Heads, neurons, features or patches as indices below n; None for all.

    Raises `InputError` for those that the hook `name` does not have; `what` is how errors call them.
    """
    if given is None:
        return None
    if n == 0:
        raise InputError(f"{what}={given} on {name!r}, which has no {what}.")

    def outside(wrong: list[int]) -> str:
        return f"{what}={wrong} on {name!r} are out of range; expected {-n}..{n - 1}."

    return tuple(as_indices(given, n, what, expected="whole numbers", outside=outside, empty=True))


def check_operand(bound: BoundIntervention, model: HookedLLaVA, inputs: Inputs) -> None:
    """Check before anything runs that `value` or `add` fits the cut (the tensor at its positions and heads).

    Raises `InputError` where it does not.
    """
    operand = bound.intervention.operand
    if operand is None:
        return
    sizes = axis_sizes(model.hooks_table, bound.hook.name, inputs)
    for positions in bound.positions:
        shape = [
            len(positions)
            if axis in POSITION_AXES
            else len(own)
            if (own := bound.along(axis)) is not None
            else sizes[axis]
            for axis in bound.hook.axes[1:]
        ]
        spread(operand, shape, (bound.hook.position_axis or 1) - 1)
