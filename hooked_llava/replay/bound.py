"""An intervention bound to a model and a batch of prompts, and how it changes one row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_llava.architecture.hooks import Hook
from hooked_llava.errors import InputError
from hooked_llava.machine.devices import to_device
from hooked_llava.model.components.hook_point import HookPoint, with_hook
from hooked_llava.prompt.where import Where
from hooked_llava.replay.intervention import Intervention

POSITION_AXES = ("pos", "query", "patch", "feature")


@dataclass(frozen=True, eq=False)
class BoundIntervention:
    """An intervention bound to a model and a batch of prompts: its hook, positions per prompt, indices.

    Attributes:
        intervention (Intervention): The intervention as the user gave it.
        hook (Hook): The hook that it names.
        positions (tuple[tuple[int, ...], ...]): For each prompt, absolute sequence positions (language); for each
            image, positions of the hook (image side).
        sources (tuple[tuple[int, ...], ...]): For each prompt, the keys of an edge (`block`, `reweight`); empty
            without one.
        heads (tuple[int, ...] | None): Head indices; None: all.
        neurons (tuple[int, ...] | None): Neuron indices; None: all.
        features (tuple[int, ...] | None): Feature indices of an autoencoder; None: all.
        point (HookPoint): The model's hook point.
    """

    intervention: Intervention
    hook: Hook
    positions: tuple[tuple[int, ...], ...]
    sources: tuple[tuple[int, ...], ...]
    heads: tuple[int, ...] | None
    neurons: tuple[int, ...] | None
    features: tuple[int, ...] | None
    point: HookPoint

    @property
    def target(self) -> Where:
        """Where the change is, as the user named it: the target of an edge, else the positions."""
        return self.intervention.positions if self.intervention.edge is None else self.intervention.edge[1]

    def along(self, axis: str) -> tuple[int, ...] | None:
        """The heads, neurons or features that are chosen along an axis of the hook; None where all are."""
        chosen = {"head": self.heads, "kv_head": self.heads, "d_mlp": self.neurons, "d_sae": self.features}
        return chosen.get(axis)

    def added_everywhere(self, n_prompts: int, n: int) -> Tensor | None:
        """The one vector that it adds at all of n positions of every prompt, if that is all it does."""
        add, chosen = self.intervention.operand, (self.heads, self.neurons, self.features)
        if add is None or self.intervention.action != "add" or add.ndim > 1 or chosen != (None, None, None):
            return None
        everywhere = not self.hook.on_image_side and self.positions == (tuple(range(n)),) * n_prompts
        return add if everywhere else None

    def first(self, prompt: int) -> int | None:
        """First position that is changed in a prompt; None if none is."""
        if self.intervention.edge is not None and not self.sources[prompt]:
            return None
        return min(self.positions[prompt], default=None)

    def apply(self, row: Tensor, where: dict[int, int] | int, owner: int) -> None:
        """Change one row (one run of one prompt, or of one tile or image, without its batch axis) in place.

        `where` turns absolute positions into indices of the row's position axis: an offset to subtract, or a table in
        which positions that the row does not hold are missing. `owner` is the row's prompt; on the image side, its
        image.
        """
        # (which of the intervention's positions, where it lies in the row)
        held = [(i, _index(p, where)) for i, p in enumerate(self.positions[owner])]
        held = [(i, index) for i, index in held if index is not None]
        if not held:
            return
        here = to_device([index for _, index in held], row.device)
        if self.intervention.edge is not None:
            index = self._grid(row, here, to_device(self.sources[owner], row.device))
            # A weight times f, divided by the sum of its row, is the softmax of scores with log f added; log 0 blocks.
            factor = float(self.intervention.factor or 0.0)
            row[index] = row[index] + (math.log(factor) if factor else -math.inf)
            return
        index = self._grid(row, here, None)
        cut = row[index]
        row[index] = self._changed(cut, [i for i, _ in held], len(self.positions[owner]))

    def _grid(self, row: Tensor, here: Int[Tensor, " position"], keys: Tensor | None) -> tuple[Any, ...]:
        """Index of the row's chosen positions, heads, neurons and keys, as `numpy.ix_` gives it; other axes whole."""
        chosen: list[Tensor | None] = []
        for axis in self.hook.axes[1:]:
            if axis in POSITION_AXES:
                chosen.append(here)
            elif (own := self.along(axis)) is not None:
                chosen.append(to_device(own, row.device))
            else:
                chosen.append(keys if axis == "key" else None)
        n_chosen = sum(c is not None for c in chosen)
        grid: list[Any] = []
        for c in chosen:  # chosen axes are neighbors, so the cut keeps the order of the axes
            seen = sum(isinstance(g, Tensor) for g in grid)
            grid.append(slice(None) if c is None else c.reshape(-1, *[1] * (n_chosen - 1 - seen)))
        return tuple(grid)

    def _changed(self, cut: Tensor, ordinals: list[int], n_positions: int) -> Tensor:
        """What the action makes of the cut, the row at its positions; these are `ordinals` of all `n_positions`."""
        change = self.intervention
        if change.zero:
            return torch.zeros_like(cut)
        if change.scale is not None:
            return cut * cast("float", change.scale)
        if change.temperature is not None:
            return cut / float(change.temperature)
        if change.position_mean:
            return cut.mean(self._position_axis, keepdim=True).expand_as(cut)
        if change.fn is not None:
            return _checked_result(with_hook(change.fn)(cut, self.point), cut, self.hook.name)
        assert change.operand is not None
        fitted = self._fit(to_device(change.operand, cut.device, cut.dtype), cut, ordinals, n_positions)
        return fitted if change.value is not None else cut + fitted

    @property
    def _position_axis(self) -> int:
        axis = self.hook.position_axis
        assert axis is not None
        return axis - 1  # the row has no batch axis

    def _fit(self, operand: Tensor, cut: Tensor, ordinals: list[int], n_positions: int) -> Tensor:
        """The operand spread over the cut, less the positions that this row does not hold."""
        shape = list(cut.shape)
        shape[self._position_axis] = n_positions
        full = spread(operand, shape, self._position_axis)
        if len(ordinals) == n_positions:
            return full
        return full.index_select(self._position_axis, to_device(ordinals, full.device))


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


def _checked_result(result: object, cut: Tensor, name: str) -> Tensor:
    if not isinstance(result, Tensor) or result.shape != cut.shape or result.dtype != cut.dtype:
        is_tensor = isinstance(result, Tensor)
        given = f"{tuple(result.shape)} of {result.dtype}" if is_tensor else type(result).__name__
        raise InputError(
            f"fn on {name} returned {given}; expected a tensor like the cut, {tuple(cut.shape)} of {cut.dtype}."
        )
    return result
