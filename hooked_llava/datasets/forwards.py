"""Activations of prompts, from forward passes that stop at the highest hook; the next prompts are prepared meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_llava.checks import whole_number
from hooked_llava.datasets.places import places_in_tiles, places_of
from hooked_llava.datasets.prefetch import prefetched
from hooked_llava.datasets.prompts import DataOptions, Progress, PromptRow, PromptSource
from hooked_llava.datasets.rows import with_row_spans
from hooked_llava.errors import InputError, SpanError
from hooked_llava.machine.devices import in_batches, to_device
from hooked_llava.model.attached_sae import vector_width
from hooked_llava.model.cache_hooks import axis_sizes
from hooked_llava.model.components.hook_point import HookPoint, reads_only
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.where import Where, positions_of

ALL = "all"
"""`tokens=` for every position that is not padding."""
PLACES = "places"
"""The name of the rows that say where activations come from; they stay on the CPU."""
Rows: TypeAlias = dict[str, Tensor]
"""Tensors with one row for each activation, by name."""


@dataclass(frozen=True)
class Chunk:
    """Activations on their way from a source, such as one forward pass.

    Attributes:
        rows (Rows): They and their places, by hook.
        after (Progress): How far the source was read with them.
        inputs (Inputs | None): The prompts that were run; None for activations from disk.
        prompts (tuple[PromptRow, ...]): The same as they stood in the data.
    """

    rows: Rows
    after: Progress
    inputs: Inputs | None = None
    prompts: tuple[PromptRow, ...] = ()


@dataclass(frozen=True)
class _Prepared:
    """Prompts that are about to be run: as they are given, inputs, which of [batch pos] are kept, where those are.

    `afters` are how far the data are read with each of them; `placed` makes one of these of prompts, inputs and `afters`.
    """

    prompts: tuple[PromptRow, ...]
    inputs: Inputs
    index: Int[Tensor, " activation"]
    places: Int[Tensor, "activation column"]
    afters: tuple[Progress, ...]
    placed: Callable[..., _Prepared]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, part: slice) -> _Prepared:
        """Some of the prompts."""
        return self.placed(self.prompts[part], self.inputs[part], self.afters[part])


class ModelSource:
    """Activations that a model computes when they are asked for.

    Args:
        model: the model.
        hooks: full names of hooks with the same positions.
        prompts: what is run.
        tokens: the span whose positions are kept, or "all"; rows of a table bring those that `prepare_rows` names.
        prompts_per_forward: how many prompts go through the model together.
        prefetch: how many batches of prompts are prepared ahead, in a thread.
        options: go to `model.prepare`.
    """

    def __init__(
        self,
        model: HookedLLaVA,
        hooks: list[str],
        prompts: PromptSource,
        tokens: str,
        prompts_per_forward: int,
        prefetch: int,
        options: Mapping[str, Any],
    ) -> None:
        self.model, self.hooks, self.prompts, self.options = model, hooks, prompts, options
        self.tokens = tokens
        self.where: Where = None if tokens == ALL else tokens
        self.prompts_per_forward = prompts_per_forward
        self.prefetch = whole_number(prefetch, "prefetch", least=0)

    def chunks(self, start: Progress, *, shuffled: bool = True) -> Generator[Chunk]:
        """The activations of all prompts from some progress on, one forward pass after the other.

        Of fewer prompts at once where memory runs out, with a warning.
        """
        batches = self._batches(start, shuffled=shuffled)
        ahead = prefetched(lambda: next(batches, None), self.prefetch)
        for prepared, rows in in_batches(ahead, self._forward):
            yield Chunk(rows, prepared.afters[-1], prepared.inputs, prepared.prompts)

    def _batches(self, start: Progress, *, shuffled: bool) -> Iterator[_Prepared]:
        waiting: list[tuple[PromptRow, Progress]] = []
        for row, now in self.prompts.rows(start, shuffled=shuffled):
            if waiting and (row.prepared is not None or len(waiting) == self.prompts_per_forward):
                yield self._prepare(waiting)
                waiting = []
            waiting.append((row, now))
            if row.prepared is not None:
                yield self._prepare(waiting)
                waiting = []
        if waiting:
            yield self._prepare(waiting)

    def _prepare(self, read: list[tuple[PromptRow, Progress]]) -> _Prepared:
        rows, afters = zip(*read, strict=True)
        try:
            return self._placed(rows, self._inputs(rows), afters)
        except (InputError, SpanError) as error:
            error.args = (f"Rows {[row.row for row in rows]} of data: {error}",)
            raise

    def _placed(self, rows: tuple[PromptRow, ...], inputs: Inputs, afters: tuple[Progress, ...]) -> _Prepared:
        index, places = self._at(inputs, [row.row for row in rows])
        return _Prepared(rows, inputs, to_device(index, inputs.device), torch.cat(places), afters, self._placed)

    def _at(self, inputs: Inputs, rows: list[int]) -> tuple[list[int], list[Int[Tensor, "activation column"]]]:
        """Which vectors of the hooks' tensors are kept, their first two axes as one; and the places of each prompt's."""
        hook, maps = self.model.hooks_table[self.hooks[0]], inputs.token_maps
        if hook.on_image_side and not all(m.layouts for m in maps):
            raise InputError(f"hooks={hook.name!r} fires at images, and a prompt has none; leave it out.")
        n = axis_sizes(self.model.hooks_table, hook.name, inputs)[hook.axes[1]]
        if hook.by_tile:
            patches = self.model.config.vision.patches_along(hook.axes[1])
            kept = [range(n) if self.where is None else patches] * sum(map(len, inputs.tiles))
            places = [places_in_tiles(m, row, kept[0], patches) for m, row in zip(maps, rows, strict=True)]
        elif hook.on_image_side:
            kept = [range(layout.n_features) for layout in inputs.layouts]
            places = [places_of(m, row, m["image"]) for m, row in zip(maps, rows, strict=True)]
        else:
            kept = inputs.each(lambda m: positions_of(self.where, m, n), maps)
            places = [places_of(m, row, at) for m, row, at in zip(maps, rows, kept, strict=True)]
        return [first * n + position for first, positions in enumerate(kept) for position in positions], places

    def _inputs(self, rows: Sequence[PromptRow]) -> Inputs:
        if rows[0].prepared is not None:
            return self.model.as_inputs(rows[0].prepared).single("An entry of data")
        images = [row.images or None for row in rows]
        inputs = self.model.prepare([row.question for row in rows], images if any(images) else None, **self.options)
        asked = [row.asked for row in rows if row.asked is not None]
        return with_row_spans(inputs, asked) if self.where is not None and len(asked) == len(rows) else inputs

    @torch.no_grad()
    def _forward(self, prepared: _Prepared) -> Rows:
        found: Rows = {}

        @reads_only
        def keep(tensor: Tensor, hook: HookPoint) -> None:
            vectors = tensor.flatten(2)  # heads side by side
            chosen = vectors.flatten(0, 1).index_select(0, prepared.index.to(vectors.device))
            found[str(hook.name)] = chosen.to(prepared.index.device)

        stop = self.model.hooks_table.stop_after(self.hooks)
        self.model.run_with_hooks(prepared.inputs, fwd_hooks=[(self.hooks, keep)], stop_at_layer=stop, return_type=None)
        return {**{name: found[name] for name in self.hooks}, PLACES: prepared.places}


def source_of(
    model: HookedLLaVA,
    hooks: Sequence[Any],
    data: Any,
    *,
    tokens: str,
    prompts_per_forward: int,
    images: str | os.PathLike[str] | None = None,
    seed: int = 0,
    epochs: int | None = 1,
    prefetch: int = 2,
    options: Mapping[str, Any] | None = None,
) -> ModelSource:
    """Activations of several hooks at once, of the prompts of some data; raises as `checked_hooks` and `PromptSource`."""
    if not isinstance(tokens, str):
        raise InputError(f"tokens={tokens!r}; expected 'all', or the name of a span such as 'image'.")
    whole_number(prompts_per_forward, "prompts_per_forward", least=1)
    names = checked_hooks(model, hooks, tokens)
    folder = None if images is None else Path(images)
    prompts = PromptSource(data, DataOptions(images=folder), seed=seed, epochs=epochs)
    return ModelSource(model, names, prompts, tokens, prompts_per_forward, prefetch, options or {})


def checked_hooks(model: HookedLLaVA, hooks: Sequence[Any], tokens: str) -> list[str]:
    """Full names in firing order; raises `InputError` for what has no vector at every position, or at different ones."""
    table = model.hooks_table
    found = {table.one(hook) for hook in hooks}
    for name in found:
        axes = table[name].axes
        if axes[1] not in ("pos", "patch", "feature") or not vector_width(table, name):
            raise InputError(
                f"hooks={name!r} has the axes {axes}; expected a hook with a vector at every position, such as "
                "'blocks.3.hook_resid_post'. What enters from an image is 'hook_embed' at tokens='image'."
            )
        if table[name].on_image_side and tokens not in (ALL, "image"):
            raise InputError(f"tokens={tokens!r} at hooks={name!r}, which fires at images; expected 'image' or 'all'.")
    if not found:
        raise InputError("hooks=[] names no hook; give at least one, such as 'blocks.3.hook_resid_post'.")
    names = [name for name in table.names if name in found]
    if len({table[name].axes[:2] for name in names}) > 1:
        raise InputError(f"hooks={names} have activations at different positions; give each a stream of its own.")
    return names
