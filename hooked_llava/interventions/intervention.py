"""What to change and where: plain data, checked against a model and its inputs before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_llava.caching import axis_sizes
from hooked_llava.errors import InputError
from hooked_llava.hook_names import IMAGE_SIDE, HookSpec

if TYPE_CHECKING:
    from hooked_llava.inputs import Inputs
    from hooked_llava.model import HookedLLaVA
    from hooked_llava.token_map import TokenMap

Where = str | int | Sequence[int] | None
"""A span of the token map, one index, several indices, or None for all."""

ACTIONS = ("value", "add", "scale", "zero", "mean", "block", "fn")
SCORES = "attn.hook_attn_scores"
POSITION_AXES = ("pos", "query", "patch", "feature")


@dataclass(frozen=True, eq=False, repr=False)
class Intervention:
    """One change at one hook.

    Exactly one of `value`, `add`, `scale`, `zero`, `mean`, `block` and `fn` says what to do; `InputError` otherwise.

    >>> Intervention("blocks.3.attn.hook_z", positions="last", heads=[2], zero=True)
    Intervention('blocks.3.attn.hook_z', positions='last', heads=[2], zero=True)
    """

    hook: str
    """Name of the hook, or a short name that means one hook."""
    _: KW_ONLY
    positions: Where = None
    """Sequence positions (query rows, for scores and pattern); on image hooks patch indices. None: all."""
    heads: int | Sequence[int] | None = None
    """Heads, on hooks that have them. None: all."""
    neurons: int | Sequence[int] | None = None
    """MLP neurons, on hooks that have them. None: all."""
    image: int | None = None
    """Which picture of the prompt, on image hooks. None: all."""
    value: Tensor | None = None
    """Replace by this: [d], [n_positions, ...], or the hook's own cut to positions and heads."""
    add: Tensor | None = None
    """Add this; shapes as for `value`."""
    scale: float | None = None
    """Multiply by this."""
    zero: bool = False
    """Set to zero."""
    mean: bool = False
    """Replace by the mean over the positions that are cut out."""
    block: tuple[Where, Where] | None = None
    """(source, target): target positions may not attend to source positions; on `hook_attn_scores`, before the softmax."""
    fn: Callable[[Tensor], Tensor] | None = None
    """Replace by fn(cut), where cut is the tensor at the intervention's positions and heads."""

    def __post_init__(self) -> None:
        actions = [name for name in ACTIONS if self._is_set(name)]
        if len(actions) != 1:
            raise InputError(
                f"An intervention on {self.hook!r} says {' and '.join(actions) or 'nothing'} of what to do; give exactly "
                f"one of {', '.join(ACTIONS)}."
            )
        if self.block is not None and self.positions is not None:
            raise InputError("block=(source, target) names its positions itself; leave positions= out.")

    def _is_set(self, name: str) -> bool:
        value = getattr(self, name)
        return value is not None and value is not False

    @property
    def action(self) -> str:
        """Name of the field that says what to do."""
        return next(name for name in ACTIONS if self._is_set(name))

    def __repr__(self) -> str:
        given = [f.name for f in fields(self) if f.name != "hook" and self._is_set(f.name)]
        return f"Intervention({', '.join([repr(self.hook), *(f'{n}={_show(getattr(self, n))}' for n in given)])})"

    def _key(self) -> tuple[Any, ...]:
        return tuple(_comparable(getattr(self, f.name)) for f in fields(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Intervention) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def _show(value: Any) -> str:
    return f"tensor{list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _comparable(value: Any) -> Any:
    """A hashable stand-in that is equal exactly where the field is."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), str(value.dtype), value.detach().cpu().double().numpy().tobytes())
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        return value
    return tuple(_comparable(v) for v in value)


@dataclass(frozen=True, eq=False)
class Resolved:
    """An intervention placed in a model and a batch of prompts: full hook name, positions per prompt, indices."""

    intervention: Intervention
    spec: HookSpec
    name: str
    """Full hook name."""
    layer: int
    """Block of its tower; 0 for embeddings, the number of blocks for what comes after them."""
    positions: tuple[tuple[int, ...], ...]
    """For each prompt, absolute sequence positions (language), or patch indices (image side)."""
    sources: tuple[tuple[int, ...], ...]
    """For each prompt, the blocked keys; empty unless `block`."""
    heads: tuple[int, ...] | None
    neurons: tuple[int, ...] | None

    @property
    def on_image_side(self) -> bool:
        """Whether the hook fires before the image enters the language tower."""
        return self.name.startswith(IMAGE_SIDE)

    def first(self, prompt: int) -> int | None:
        """First position that is changed in a prompt; None if none is."""
        if self.intervention.block is not None and not self.sources[prompt]:
            return None
        return min(self.positions[prompt], default=None)

    def apply(self, row: Tensor, where: dict[int, int] | int, prompt: int) -> None:
        """Change one row (one run of one prompt, without its batch axis) in place.

        `where` turns absolute positions into indices of the row's position axis: an offset to subtract, or a table in
        which positions that the row does not hold are missing.
        """
        held = [(i, _index(p, where)) for i, p in enumerate(self.positions[prompt])]
        held = [(i, index) for i, index in held if index is not None]
        if not held:
            return
        kept = torch.tensor([i for i, _ in held], device=row.device)
        rows = torch.tensor([index for _, index in held], device=row.device)
        if self.intervention.block is not None:
            index = self._grid(row, rows, torch.tensor(self.sources[prompt], device=row.device))
            row[index] = float("-inf")
            return
        index = self._grid(row, rows, None)
        cut = row[index]
        row[index] = self._changed(cut, kept, len(self.positions[prompt]))

    def _grid(self, row: Tensor, rows: Int[Tensor, " position"], keys: Tensor | None) -> tuple[Any, ...]:
        """Index of the row's chosen positions, heads, neurons and keys, as an open grid; other axes whole."""
        chosen: list[Tensor | None] = []
        for axis in self.spec.axes[1:]:
            if axis in POSITION_AXES:
                chosen.append(rows)
            elif axis in ("head", "kv_head") and self.heads is not None:
                chosen.append(torch.tensor(self.heads, device=row.device))
            elif axis == "d_mlp" and self.neurons is not None:
                chosen.append(torch.tensor(self.neurons, device=row.device))
            else:
                chosen.append(keys if axis == "key" else None)
        n_chosen = sum(c is not None for c in chosen)
        grid: list[Any] = []
        for c in chosen:  # chosen axes are neighbours, so the cut keeps the order of the axes
            seen = sum(isinstance(g, Tensor) for g in grid)
            grid.append(slice(None) if c is None else c.reshape(-1, *[1] * (n_chosen - 1 - seen)))
        return tuple(grid)

    def _changed(self, cut: Tensor, kept: Int[Tensor, " position"], n_positions: int) -> Tensor:
        change = self.intervention
        if change.zero:
            return torch.zeros_like(cut)
        if change.scale is not None:
            return cut * change.scale
        if change.mean:
            return cut.mean(self._position_axis, keepdim=True).expand_as(cut)
        if change.fn is not None:
            return _checked_result(change.fn(cut), cut, self.name)
        operand = change.value if change.value is not None else change.add
        assert operand is not None
        fitted = self._fit(operand.to(cut.device, cut.dtype), cut, kept, n_positions)
        return fitted if change.value is not None else cut + fitted

    @property
    def _position_axis(self) -> int:
        axis = self.spec.position_axis
        assert axis is not None
        return axis - 1  # the row has no batch axis

    def _fit(self, operand: Tensor, cut: Tensor, kept: Int[Tensor, " position"], n_positions: int) -> Tensor:
        """The operand spread over the cut, less the positions that this row does not hold."""
        shape = list(cut.shape)
        shape[self._position_axis] = n_positions
        full = spread(operand, shape, self._position_axis)
        return full if full is None or len(kept) == n_positions else full.index_select(self._position_axis, kept)


def spread(operand: Tensor, shape: Sequence[int], position_axis: int) -> Tensor:
    """Broadcast [d], [n_positions, ...] or the full cut to the cut's shape; raises `InputError` where it does not fit."""
    if operand.ndim and operand.ndim < len(shape) and position_axis == 0 and operand.shape[0] == shape[0] != 1:
        middle = len(shape) - operand.ndim
        if operand.ndim > 1 and tuple(operand.shape[1:]) == tuple(shape[-(operand.ndim - 1) :]):
            operand = operand.reshape(operand.shape[0], *[1] * middle, *operand.shape[1:])
    try:
        return operand.broadcast_to(tuple(shape))
    except RuntimeError:
        raise InputError(
            f"A value of shape {tuple(operand.shape)} does not fit a cut of shape {tuple(shape)}; give [d], "
            "[n_positions, ...], or the cut's own shape."
        ) from None


def _index(position: int, where: dict[int, int] | int) -> int | None:
    if isinstance(where, dict):
        return where.get(position)
    return position - where if position >= where else None


def _checked_result(result: Any, cut: Tensor, name: str) -> Tensor:
    if not isinstance(result, Tensor) or result.shape != cut.shape:
        shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise InputError(f"fn on {name} returned {shape}; expected a tensor of the cut's shape {tuple(cut.shape)}.")
    return result


def resolve(intervention: Intervention, model: HookedLLaVA, inputs: Inputs) -> Resolved:
    """Place an intervention in a model and its inputs.

    Raises `HookNameError` for an unknown hook, `SpanError` for an unknown span, and `InputError` for positions, heads,
    neurons or values that do not fit.
    """
    names = model.hooks_table.resolve(intervention.hook, with_image=inputs.pixel_values is not None)
    if len(names) != 1:
        raise InputError(
            f"{intervention.hook!r} means {len(names)} hooks; an intervention changes one. Name its layer."
        )
    name, spec = names[0], model.hooks_table[names[0]]
    on_image_side = name.startswith(IMAGE_SIDE)
    if intervention.block is not None and (on_image_side or not name.endswith(SCORES)):
        raise InputError(f"block= works on the language tower's {SCORES}, not on {name!r}.")
    if intervention.image is not None and not on_image_side:
        raise InputError(f"image= belongs to hooks of the image side; {name!r} has sequence positions.")
    tower = model.config.vision if name.startswith("vision.") else model.config.language
    n_heads = tower.n_key_value_heads if "kv_head" in spec.axes else tower.n_heads
    has_heads = bool({"head", "kv_head"} & set(spec.axes))
    source, target = intervention.block or (None, intervention.positions)
    if on_image_side:
        positions = tuple(_patches(target, spec, model) for _ in inputs.token_maps)
    else:
        positions = tuple(_sequence(target, token_map, inputs.shape[1]) for token_map in inputs.token_maps)
    resolved = Resolved(
        intervention,
        spec,
        name,
        _layer(name, model),
        positions,
        tuple(() if intervention.block is None else _sequence(source, m, inputs.shape[1]) for m in inputs.token_maps),
        _indices(intervention.heads, n_heads if has_heads else 0, "heads", name),
        _indices(intervention.neurons, tower.d_mlp if "d_mlp" in spec.axes else 0, "neurons", name),
    )
    _check_operand(resolved, model, inputs)
    return resolved


def _layer(name: str, model: HookedLLaVA) -> int:
    parts = name.removeprefix("vision.").split(".")
    if parts[0] == "blocks":
        return int(parts[1])
    after = name.startswith("ln_final") or name in ("hook_logits", "vision.hook_out")
    tower_layers = model.config.vision.n_layers_run if name.startswith("vision.") else model.config.language.n_layers
    return tower_layers if after else 0


def _sequence(where: Where, token_map: TokenMap, n_positions: int) -> tuple[int, ...]:
    if where is None:
        return tuple(int(p) for p in token_map.real)
    if isinstance(where, str):
        return tuple(int(p) for p in token_map[where])
    given = [where] if isinstance(where, int) else [int(p) for p in where]
    if outside := [p for p in given if not -n_positions <= p < n_positions]:
        raise InputError(f"Positions {outside} lie outside the prompt; expected {-n_positions}..{n_positions - 1}.")
    return tuple(p % n_positions for p in given)


def _patches(where: Where, spec: HookSpec, model: HookedLLaVA) -> tuple[int, ...]:
    """Patch indices as indices of the hook's own position axis (in the tower the class token comes first)."""
    vision = model.config.vision
    if spec.name == "vision.hook_out" or "feature" in spec.axes:
        n_all, shift = vision.n_features, 0 if vision.drop_class_token else 1
    elif "patch" in spec.axes:
        n_all, shift = vision.n_patches, 0
    else:
        n_all, shift = vision.n_positions, 1
    if where is None:
        return tuple(range(n_all))
    if isinstance(where, str):
        raise InputError(f"positions={where!r} on {spec.name}: image hooks take patch indices, not spans.")
    return tuple(i + shift for i in _indices(where, vision.n_patches, "positions", spec.name) or ())


def _indices(given: int | Sequence[int] | None, n: int, what: str, name: str) -> tuple[int, ...] | None:
    if given is None:
        return None
    if n == 0:
        raise InputError(f"{what}={given} on {name!r}, which has no {what}.")
    values = [given] if isinstance(given, int) else [int(i) for i in given]
    if outside := [i for i in values if not -n <= i < n]:
        raise InputError(f"{what}={outside} on {name!r} are out of range; expected {-n}..{n - 1}.")
    return tuple(i % n for i in values)


def _check_operand(resolved: Resolved, model: HookedLLaVA, inputs: Inputs) -> None:
    """Whether `value` or `add` fits the cut, found out before anything runs."""
    operand = resolved.intervention.value if resolved.intervention.value is not None else resolved.intervention.add
    if operand is None:
        return
    sizes = axis_sizes(model.hooks_table, resolved.name, inputs)
    for positions in resolved.positions:
        shape = [
            len(positions)
            if axis in POSITION_AXES
            else len(resolved.heads)
            if axis in ("head", "kv_head") and resolved.heads is not None
            else len(resolved.neurons)
            if axis == "d_mlp" and resolved.neurons is not None
            else sizes[axis]
            for axis in resolved.spec.axes[1:]
        ]
        spread(operand, shape, (resolved.spec.position_axis or 1) - 1)
