"""The mean of an activation over a reference: what mean ablation puts in its place, so that what all prompts share stays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, SupportsIndex, TypeAlias, cast

import torch
from torch import Tensor
from transformer_lens import ActivationCache

from hooked_llava.architecture.hooks import Hook
from hooked_llava.architecture.layouts import layout_without_original
from hooked_llava.errors import HookNameError, InputError
from hooked_llava.machine.devices import in_batches, to_device
from hooked_llava.model.components.hook_point import HookPoint, reads_only
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike, PromptsLike
from hooked_llava.prompt.where import Where, positions_of
from hooked_llava.replay.binding import bind, indices, patches_of
from hooked_llava.replay.intervention import Intervention, comparable
from hooked_llava.replay.layer_pass import recordable, recorded
from hooked_llava.replay.plan import plan_run
from hooked_llava.replay.row_edits import image_rows
from hooked_llava.replay.state import ReplayState

Reference: TypeAlias = PromptsLike | ActivationCache | Mapping[str, Tensor] | ReplayState | Tensor
"""What a mean is taken over: prompts or batches of them, a cache, a Replay; or the mean itself as a tensor."""


@dataclass(eq=False)
class Place:
    """A hook and the positions there whose activations are averaged, as an intervention names them.

    Attributes:
        hook (Hook): The hook.
        where (Where): Its positions.
        image (int or None): Which image, on image hooks.
        tile (int or None): Which tile of the image, on hooks of the vision tower and the projector.
        total (Tensor | None): Sum so far, the position axis kept with one entry.
        n (int): How many positions were added.
    """

    hook: Hook
    where: Where
    image: SupportsIndex | None = None
    tile: SupportsIndex | None = None
    total: Tensor | None = None
    n: int = 0

    def add(self, activation: Tensor, rows: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Add some positions of some rows [row, ...]."""
        axis = (self.hook.position_axis or 1) - 1
        for row, positions in rows:
            index = to_device(list(positions), activation.device)
            part = activation[row].index_select(axis, index).double().sum(axis, keepdim=True)
            if self.total is not None and self.total.shape != part.shape:
                raise InputError(
                    f"mean_of= has {self.hook.name!r} of different shapes, {tuple(self.total.shape)} and {tuple(part.shape)}; "
                    "prompts of one length are needed for a mean of scores or patterns."
                )
            self.total = part if self.total is None else self.total + part
            self.n += len(positions)

    def mean(self, dtype: torch.dtype, fewest: int = 2) -> Tensor:
        """The mean; raises `InputError` for that over fewer activations than `fewest`."""
        if self.total is None or self.n < fewest:
            raise InputError(
                f"mean_of= has {self.n} activations of {self.hook.name!r} at {self.where!r}, and the mean of one is that one "
                "itself; give several prompts or positions, or value=."
            )
        return (self.total / self.n).to(dtype)


def with_means(model: HookedLLaVA, interventions: Sequence[Intervention]) -> list[Intervention]:
    """The interventions, each `mean_of` turned into the value that it stands for.

    A reference that several name is run once for all of them. Raises as `reference_means`.
    """
    by_reference: dict[int, list[int]] = defaultdict(list)
    for i, intervention in enumerate(interventions):
        if intervention.mean_of is not None:
            by_reference[id(intervention.mean_of)].append(i)
    filled = list(interventions)
    for members in by_reference.values():
        own = [interventions[i] for i in members]
        places = [(one.hook, one.positions, one.image, one.tile) for one in own]
        for i, mean in zip(members, reference_means(model, own[0].mean_of, places), strict=True):
            filled[i] = replace(filled[i], mean_of=None, value=_cut(model, filled[i], mean))
    return filled


@torch.no_grad()
def reference_means(
    model: HookedLLaVA, reference: Reference, places: Sequence[tuple[Any, ...]], *, fewest: int = 2
) -> list[Tensor]:
    """The mean activation at each place, over all prompts of a reference and all positions that the place has in each.

    Args:
        model: the model.
        reference: prompts (anything `model.as_inputs` takes), or a list of batches of them; a cache or a dict of activations
            by hook name; a Replay; or the mean itself as a tensor.
        places: (hook, positions), perhaps with image and tile; positions mean in every prompt of the reference what they mean
            in any: a span may be of another length in each. A cache that keeps some positions only is averaged over those.
        fewest: activations that a mean must be of.

    Returns for each place a tensor like the hook's without its batch axis, with one entry on the axis of positions. Raises
    `InputError` for fewer activations, `SpanError` for spans that the reference does not have, and `HookNameError` for
    hooks that it does not hold.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> both = model.prepare(["Who made the star?", "Who made the ring?"])
    >>> reference_means(model, both, [(("z", 3), "last")])[0].shape == (1, model.cfg.n_heads, model.cfg.d_head)
    True
    """
    if isinstance(reference, Tensor):
        return [reference] * len(places)
    distinct: dict[Any, Place] = {}
    keys = []
    for hook, where, *which in places:
        name = model.hooks_table.one(hook)
        keys.append((name, comparable(where), *map(comparable, which)))
        distinct.setdefault(keys[-1], Place(model.hooks_table[name], where, *which))
    _gather(model, reference, list(distinct.values()))
    dtype = torch.promote_types(model.cfg.dtype, torch.float32)
    means = {key: place.mean(dtype, fewest) for key, place in distinct.items()}
    return [means[key] for key in keys]


def _gather(model: HookedLLaVA, reference: Reference, places: list[Place]) -> None:
    """Sum up the activations of every place, from whatever holds them."""
    names = list(dict.fromkeys(place.hook.name for place in places))
    if isinstance(reference, ReplayState):
        held = _recorded_everywhere(reference, names)
        for place in places:
            place.add(held[place.hook.name], _rows(model, place, reference.inputs))
    elif isinstance(reference, ActivationCache) or (isinstance(reference, Mapping) and "input_ids" not in reference):
        for place in places:
            activation = _held(reference, place.hook)
            place.add(activation, _rows_of_cache(model, place, reference, activation))
    else:
        work = partial(_run, model=model, places=places, names=names)
        for _ in in_batches(_batches(model, reference), work):
            pass  # added up


def _recorded_everywhere(state: ReplayState, names: list[str]) -> dict[str, Tensor]:
    """Activations of a kept run at every position."""
    names = recordable(state, names)
    state.check_fresh()
    same = Intervention("hook_embed", positions=[0], scale=1.0)  # changes nothing, but makes a run start there
    run = plan_run(0, [bind(same, state.model, state.inputs)], state.inputs, state.model.cfg.n_layers)
    return recorded(state, run, names, list(range(state.kept.n_positions)))[1]


def _run(prompts: Inputs, model: HookedLLaVA, places: list[Place], names: list[str]) -> None:
    """Run some prompts, as far as the hooks need it, and sum up what passes by; nothing is kept."""

    @reads_only
    def add(tensor: Tensor, hook: HookPoint) -> None:
        for place in places:
            if place.hook.name == hook.name:
                place.add(tensor, _rows(model, place, prompts))

    before = [(place.total, place.n) for place in places]
    try:
        model.run_with_hooks(prompts, fwd_hooks=[(names, add)], stop_at_layer=model.hooks_table.stop_after(names))
    except torch.OutOfMemoryError:
        for place, (total, n) in zip(places, before, strict=True):
            place.total, place.n = total, n
        raise


def _batches(model: HookedLLaVA, reference: PromptsLike) -> Iterator[Inputs]:
    several = isinstance(reference, (list, tuple)) and not all(isinstance(entry, str) for entry in reference)
    for batch in reference if several else [reference]:
        yield model.as_inputs(cast("InputsLike", batch))


def _rows(model: HookedLLaVA, place: Place, inputs: Inputs) -> list[tuple[int, Sequence[int]]]:
    """For each row of the hook's activation the positions that are meant."""
    if place.hook.on_image_side:
        layouts = inputs.layouts
        rows = image_rows(inputs, place.hook, place.image, place.tile)
        return [(row, patches_of(place.where, place.hook, model, layouts[image])) for row, image in rows]
    return [(i, positions_of(place.where, m, inputs.shape[1])) for i, m in enumerate(inputs.token_maps)]


def _held(cache: ActivationCache | Mapping[str, Tensor], hook: Hook) -> Tensor:
    """An activation of a cache, with its batch axis."""
    with suppress(KeyError):
        held = cache[hook.name]
        return held if getattr(cache, "has_batch_dim", True) or hook.on_image_side else held[None]
    raise HookNameError(f"mean_of= is a cache that does not hold {hook.name!r}; name it in names_filter to cache it.")


def _rows_of_cache(
    model: HookedLLaVA, place: Place, cache: ActivationCache | Mapping[str, Tensor], activation: Tensor
) -> list[tuple[int, Sequence[int]]]:
    rows, n = range(len(activation)), activation.shape[place.hook.position_axis or 1]
    token_maps = getattr(cache, "token_maps", None)
    if place.hook.on_image_side:
        if (which := place.image if place.image is not None else place.tile) is not None:
            raise InputError(
                f"mean_of= is a cache, which does not say whose images are whose; leave image= and tile= out ({which})."
            )
        layouts = [layout for token_map in token_maps or () for layout in token_map.layouts]
        if place.hook.by_tile or (not layouts and model.config.tiling is None):
            layouts = [layout_without_original(model.config.vision)] * len(activation)
        if len(layouts) != len(activation):
            raise InputError(
                f"mean_of= is a cache that does not know which of the features of {place.hook.name!r} are an image's own and "
                "which fill up shorter images (it is a plain dict, or was read from a file); give the prompts themselves."
            )
        return [(row, patches_of(place.where, place.hook, model, layouts[row])) for row in rows]
    if getattr(cache, "some_positions", False):
        return [(row, range(n)) for row in rows]
    if token_maps is not None:
        return [(row, positions_of(place.where, token_maps[row], n)) for row in rows]
    spans = getattr(cache, "spans", {})
    if isinstance(place.where, str) and place.where not in spans:
        raise InputError(
            f"mean_of= is a cache that does not know where {place.where!r} is in its prompts (it is a plain dict, or was read "
            "from a file); give positions by number, or the prompts themselves."
        )
    where = spans[place.where] if isinstance(place.where, str) else place.where
    return [(row, positions_of(where, None, n)) for row in rows]


def _cut(model: HookedLLaVA, intervention: Intervention, mean: Tensor) -> Tensor:
    """The mean at the heads or neurons that an intervention names, if it holds all of them."""
    name = model.hooks_table.one(intervention.hook)
    spec = model.hooks_table[name]
    tower = model.hooks_table.tower(spec)
    sizes = {"head": tower.n_heads, "kv_head": tower.n_key_value_heads, "d_mlp": tower.d_mlp}
    for axis, what in (("head", "heads"), ("kv_head", "heads"), ("d_mlp", "neurons")):
        given = getattr(intervention, what)
        if axis in spec.axes and given is not None:
            at = spec.axes.index(axis) - len(spec.axes)  # from the end: a tensor may lack the axis of positions
            if "key" in spec.axes and mean.ndim == len(spec.axes) - 2:
                at += 1
            chosen = indices(given, sizes[axis], what, name) or ()
            if mean.ndim >= -at and mean.shape[at] == sizes[axis]:
                mean = mean.index_select(at, to_device(chosen, mean.device))
    return mean
