"""Which activation carries the difference between two prompts?

Activation patching (Vig et al. 2020, Meng et al. 2022): two prompts of the same shape differ in one thing, a clean and
a corrupted one. "denoise" runs the corrupted prompt and puts one clean activation in (is it sufficient to restore the
answer?); "noise" runs the clean prompt and puts one corrupted activation in (is it necessary?). Every cell of the map
is one such run; Replay does them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from hooked_llava.architecture.hooks import Hook
from hooked_llava.checks import as_indices
from hooked_llava.errors import InputError
from hooked_llava.experiments.baselines import check_metrics, metric_with_baselines, source_and_base
from hooked_llava.experiments.pairs import prompt_pairs
from hooked_llava.machine.devices import to_device
from hooked_llava.options.directions import Direction, check_direction
from hooked_llava.prompt.requirements import images_alike
from hooked_llava.prompt.where import PositionsLike, resolve_positions
from hooked_llava.readout.metrics import Metric
from hooked_llava.readout.resid import logits_and_activations
from hooked_llava.replay.intervention import Intervention
from hooked_llava.replay.replay import Replay
from hooked_llava.results.arrays import check_sizes, stack, to_numpy
from hooked_llava.results.image_axes import ImageAxes, patches_of_cells
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs

Each = Literal["each", "all"] | str | int | Sequence[int | str]
"""Each in turn, all together, or a choice of which each is taken in turn."""


class _Together(NamedTuple):
    """The positions of a span, patched at once."""

    name: str
    positions: tuple[int, ...]


_Axes = dict[str, list[Any]]
"""For each axis the choices taken in turn; [None] where all are taken together or the hook lacks the axis."""


def activation_patching(
    model: HookedLLaVA,
    clean: Any,
    corrupted: Any,
    *,
    hook: str | tuple[Any, ...] = "resid_pre",
    layers: int | Sequence[int] | None = None,
    positions: Each = "each",
    heads: Each = "each",
    metric: Metric | Sequence[Metric] | None = None,
    direction: Direction = "denoise",
    logit_positions: PositionsLike = "last",
    batch_size: int | None = None,
) -> xr.DataArray:
    """The metric with one activation taken from the other prompt, by layer, position and head as the hook has them.

    Args:
        model: the model.
        clean: one prompt, anything `model.as_inputs` takes; or a batch or list of them.
        corrupted: as many others, each of the same length as its partner, with images and spans in the same places.
        hook: short name ("resid_pre", "z", "pattern", "hook_image_embed", "vision.resid_pre", ...), every layer of it; or
            one hook by any of its names, such as ("z", 3).
        layers: layer or layers to patch, all by default.
        positions: "each" position in turn, "all" of them together, or a span or list of positions, each in turn; the
            name of a span within a list means its positions together: ["image", "question", "last"] are three cells.
            On image hooks these are patches, of images of several grids features, and newlines have no activation that
            differs ("all" takes the class token along).
        heads: "each" head in turn, "all" together, or a list, each in turn.
        metric: function of logits [..., d_vocab], or a list with one for each pair; by default the logit difference of
            the two prompts' own answers.
        direction: "denoise" puts clean activations into the corrupted run, "noise" the reverse.
        logit_positions: where the metric reads logits, if not at the last position (see `metrics.teacher_forced`).
        batch_size: rows at once; chosen from the free memory by default.

    Returns an array with those of the axes layer, position (or image and patch, of images of several grids image and
    feature; see `results.image_axes`) and head (kv_head) that were taken in turn, for several pairs after an axis pair; its
    attributes hold the metric of the unpatched runs as `clean` and `corrupted`. Raises `InputError` where the prompts do
    not match, the pairs do not stack, both prompts give the same answer and no metric is given, the metric gives more than
    one number, or a layer, position or head is out of range.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.readout.metrics import Answer, probability
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> star, ring = model.prepare("Who made the star?"), model.prepare("Who made the ring?")
    >>> red = probability(Answer.of(model, "Red"))
    >>> activation_patching(model, star, ring, positions="last", metric=red).dims
    ('layer', 'position')
    """
    check_direction(direction)
    pairs, several = prompt_pairs(model, clean, corrupted, metric)
    check_metrics(model, pairs, logit_positions)
    _check_images(model, [one for one, *_ in pairs], hook)
    named = [_names(model, one, hook, layers) for one, *_ in pairs]
    plans = [(names, _axes(model, names, one, positions, heads)) for names, (one, *_) in zip(named, pairs, strict=True)]
    check_sizes([{axis: len(choices) for axis, choices in axes.items()} for _, axes in plans])
    options: dict[str, Any] = {"direction": direction, "logit_positions": logit_positions, "batch_size": batch_size}
    options["asked"] = {"layers": layers, "positions": positions, "heads": heads}
    results = [_one_pair(model, *pair, hook, *plan, **options) for pair, plan in zip(pairs, plans, strict=True)]
    return stack(results, "pair") if several else results[0]


def _one_pair(
    model: HookedLLaVA,
    clean: Inputs,
    corrupted: Inputs,
    metric: Metric | None,
    hook: str | tuple[Any, ...],
    names: list[str],
    axes: _Axes,
    *,
    direction: Direction,
    logit_positions: PositionsLike,
    batch_size: int | None,
    asked: dict[str, Any],
) -> xr.DataArray:
    source, base = source_and_base(clean, corrupted, direction)
    how = {"hook": hook, "direction": direction, "read": logit_positions, **asked}
    with provenance("activation_patching", model, clean, corrupted=corrupted, n_forward=2, **how) as made:
        replay = Replay(model, base)
        logits, cache = logits_and_activations(model, source, resolve_positions(logit_positions, source), names)
        there_logits = replay.shaped(logits[None], logit_positions)[0]
        metric, baselines = metric_with_baselines(
            model, metric, there_logits, replay.logits(logit_positions), direction
        )
        cells = list(product(names, *axes.values()))
        where = _Places(base, model.hooks_table[names[0]])
        runs = [
            _interventions(model, cache[name], name, dict(zip(axes, cell, strict=True)), where) for name, *cell in cells
        ]
        there = [i for i, run in enumerate(runs) if run]
        found = replay.run([runs[i] for i in there], metric, logit_positions, batch_size)
        values = found.new_full((len(cells),), torch.nan).index_copy(0, to_device(there, found.device), found)
        attrs = made.attrs(**baselines, runs=len(there), work=replay.work.forwards)
        return _labelled(model, values, names, axes, base).assign_attrs(attrs)


def _check_images(model: HookedLLaVA, prompts: Sequence[Inputs], hook: str | tuple[Any, ...]) -> None:
    """Hooks of the image side need images, equally many in every prompt."""
    found = [model.hooks_table[name] for name in model.hooks_table.resolve(hook)]
    if any(one.on_image_side for one in found) and (missing := images_alike([one.n_images for one in prompts])):
        raise InputError(f"activation_patching(hook={hook!r}) {missing}")


def _names(
    model: HookedLLaVA, prompt: Inputs, hook: str | tuple[Any, ...], layers: int | Sequence[int] | None
) -> list[str]:
    """Full names of one hook in the chosen layers."""
    names = model.hooks_table.resolve(hook, with_image=prompt.pixel_values is not None)
    kinds = {model.hooks_table[name].spec.name for name in names}
    if len(kinds) != 1:
        raise InputError(f"hook={hook!r} means several hooks ({', '.join(sorted(kinds))}); patch one at a time.")
    if layers is None:
        return names
    n_layers = model.hooks_table.tower(model.hooks_table[names[0]]).n_layers_run
    if not isinstance(hook, str):
        raise InputError(f"hook={hook!r} names its layer, so layers={layers!r} has no place; leave one of them out.")
    pairs = [(hook, layer) for layer in as_indices(layers, n_layers, f"layers of {hook}")]
    return [name for pair in pairs for name in model.hooks_table.resolve(pair)]


def _axes(model: HookedLLaVA, names: list[str], prompt: Inputs, positions: Each, heads: Each) -> _Axes:
    hook = model.hooks_table[names[0]]
    axes: _Axes = {}
    if hook.on_image_side:
        axes["image"] = list(range(prompt.n_images))
        places = ImageAxes.of(prompt)
        axis = "patch" if places.grid else "feature"
        axes[axis] = _numbers(
            positions, places.n_places, f"positions ({'patches' if places.grid else 'features'}) of {names[0]}"
        )
    elif isinstance(positions, str) and positions == "each":
        axes["position"] = list(prompt.token_map.real)
    else:
        together = isinstance(positions, str) and positions == "all"
        axes["position"] = [None] if together else _places(positions, prompt)
    n_heads = _n_heads(model, hook)
    if not n_heads and not (isinstance(heads, str) and heads in ("each", "all")):
        raise InputError(f"heads={heads!r}, but {names[0]} has no heads; leave heads= out.")
    kind = "kv_head" if "kv_head" in hook.axes else "head"
    axes[kind] = _numbers(heads, n_heads, f"heads of {names[0]}") if n_heads else [None]
    return axes


def _places(positions: Each, prompt: Inputs) -> list[Any]:
    """Positions, and spans that stand in a list as one."""
    if isinstance(positions, str) or not isinstance(positions, Sequence):
        return resolve_positions(positions, prompt)[0].tolist()
    if not any(isinstance(entry, str) for entry in positions):
        return resolve_positions([entry for entry in positions if not isinstance(entry, str)], prompt)[0].tolist()
    found = [(entry, resolve_positions(entry, prompt)[0].tolist()) for entry in positions]
    return [_Together(entry, tuple(where)) if isinstance(entry, str) else where[0] for entry, where in found]


def _n_heads(model: HookedLLaVA, hook: Hook) -> int:
    tower = model.hooks_table.tower(hook)
    return tower.n_heads if "head" in hook.axes else tower.n_key_value_heads if "kv_head" in hook.axes else 0


def _numbers(given: Each, n: int, what: str) -> list[int | None]:
    if isinstance(given, str):
        if given == "each":
            return list(range(n))
        if given == "all":
            return [None]
        raise InputError(f"{given!r} is no choice of {what}; expected 'each', 'all' or numbers.")
    return list(as_indices(given, n, what))


class _Places:
    """Where the cells of a map lie in the patched prompt."""

    def __init__(self, base: Inputs, hook: Hook) -> None:
        self.base, self.real = base, list(base.token_map.real)
        self.axes = ImageAxes.of(base) if hook.on_image_side else None
        self.cells = [layout.object_features().tolist() for layout in base.layouts]
        self.patches = [patches_of_cells(layout) for layout in base.layouts] if hook.by_tile else []

    def of_image(self, hook: Hook, image: int, place: int | None) -> list[tuple[int | None, list[int] | None]]:
        """(tile, patches) of a place of an image, or of all of it; for hooks without tiles (None, [its cell]).

        Nothing for a newline, and where a shorter image has no such place.
        """
        layout = self.base.layouts[image]
        if place is None:
            return [(tile, None) for tile in range(layout.n_tiles)] if hook.by_tile else [(None, None)]
        assert self.axes is not None
        feature, cells = int(self.axes.features(layout)[place]), self.cells[image]
        if feature not in cells:
            return []
        return list(self.patches[image][feature].items()) if hook.by_tile else [(None, [cells.index(feature)])]


def _interventions(
    model: HookedLLaVA, activation: Tensor, name: str, at: dict[str, Any], places: _Places
) -> list[Intervention]:
    """The source run's activation, cut to one cell of the map, put into its place; none where it has no place."""
    hook, image = model.hooks_table[name], at.get("image")
    head = at.get("head", at.get("kv_head"))
    heads = None if head is None else [head]
    axis = (hook.position_axis or 1) - 1

    def cut(value: Tensor, rows: Sequence[int] | None) -> Tensor:
        if rows is not None:
            value = value.index_select(axis, to_device(rows, value.device))
        if head is None:
            return value
        head_axis = next(i for i, axis_name in enumerate(hook.axes) if axis_name in ("head", "kv_head"))
        return value.narrow(head_axis - 1, head, 1)

    if image is None:
        place = at["position"]
        where = places.real if place is None else list(place.positions) if isinstance(place, _Together) else [place]
        return [Intervention(name, positions=where, heads=heads, value=cut(activation[0], where))]
    found, layout = [], places.base.layouts[image]
    for tile, patches in places.of_image(hook, image, at.get("patch", at.get("feature"))):
        if hook.by_tile:
            row = places.base.tiles[image].start + (tile or 0)
            along: Sequence[int] = model.config.vision.patches_along(hook.axes[hook.position_axis or 1])
        else:
            row, along = image, places.cells[image]
        if patches is not None:
            rows: Sequence[int] | None = [along[p] for p in patches]
        else:
            rows = None if hook.by_tile else range(layout.n_features)
        value = cut(activation[row], rows)
        found.append(Intervention(name, positions=patches, heads=heads, image=image, tile=tile, value=value))
    return found


def _labelled(model: HookedLLaVA, values: Tensor, names: list[str], axes: _Axes, base: Inputs) -> xr.DataArray:
    taken = {axis: choices for axis, choices in axes.items() if choices != [None]}
    if taken.get("image") == [0]:
        del taken["image"]
    layers = [model.hooks_table[name].layer for name in names]
    if layers[0] is not None:
        taken = {"layer": layers, **taken}
    numbers = to_numpy(values).reshape([len(choices) for choices in taken.values()])
    if "feature" in taken:
        return _by_feature(numbers, taken, base)
    places = taken.get("position", [])
    if "position" in taken:
        taken["position"] = [place.positions[0] if isinstance(place, _Together) else place for place in places]
    result = xr.DataArray(numbers, dims=tuple(taken), coords=dict(taken), name="metric")
    if "position" in taken:
        labels = base.token_map.labels
        named = [place.name if isinstance(place, _Together) else labels[place] for place in places]
        result = result.assign_coords(label=("position", named))
        if any(isinstance(place, _Together) for place in places):
            sizes = [len(place.positions) if isinstance(place, _Together) else 1 for place in places]
            result = result.assign_coords(n_positions=("position", sizes))
    if "patch" in taken:
        result.attrs["patch_grid"] = list(grid := ImageAxes.of(base).shape)
        rows, columns = np.unravel_index(taken["patch"], grid)
        return result.assign_coords(patch_row=("patch", rows), patch_col=("patch", columns))
    return result


def _by_feature(numbers: np.ndarray, taken: dict[str, list[Any]], base: Inputs) -> xr.DataArray:
    """The map of images of several grids, with all that is known of the features that were taken."""
    axes, chosen = ImageAxes.of(base), taken["feature"]
    others = [axis for axis in taken if axis != "feature"]
    values = np.full((*(len(taken[axis]) for axis in others), axes.n_places), np.nan, dtype=numbers.dtype)
    values[..., chosen] = np.moveaxis(numbers, list(taken).index("feature"), -1)
    result = axes.labelled(values, others, coords={axis: taken[axis] for axis in others}, name="metric")
    return result.isel(feature=chosen).transpose(*taken)
