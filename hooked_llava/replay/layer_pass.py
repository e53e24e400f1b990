"""One pass over the layers for a batch of runs, each joining at its own layer."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_llava.architecture.hooks import Hook, NamesFilter
from hooked_llava.errors import InputError
from hooked_llava.machine.devices import to_device
from hooked_llava.model.cache_hooks import caching_hook
from hooked_llava.model.components.attention import AttentionContext
from hooked_llava.prompt.where import PositionsLike
from hooked_llava.readout.resid import rows_at
from hooked_llava.replay.plan import PlannedRun
from hooked_llava.replay.row_edits import RowEdit, edited
from hooked_llava.replay.state import ReplayState

_KEY_VALUE_SIDE = (
    "hook_resid_pre",
    "ln1.hook_scale",
    "ln1.hook_normalized",
    *(f"attn.hook_{name}" for name in ("k", "v", "rot_k", "k_input", "v_input")),
)
"""Hooks of the last block that still see every position: those on the way to keys and values."""
_EMBEDDING = ("hook_text_embed", "hook_embed")


class LayerPass:
    """Runs with a common start; rows of the batch are (prompt, run), prompts outermost.

    A run joins at the first layer that it changes; from then on its rows are active.

    Args:
        state: the Replay.
        runs: the runs that go together.
        wanted: positions at which logits are wanted, on the CPU.
        listen: names of hooks whose activations are kept in `seen`.
    """

    def __init__(
        self,
        state: ReplayState,
        runs: list[PlannedRun],
        wanted: Int[Tensor, "prompt position"],
        listen: list[str] | None = None,
    ) -> None:
        self.state, self.model, self.kept = state, state.model, state.kept
        self.runs = sorted(runs, key=lambda run: run.first_layer)  # rows are in the order in which they join
        self.start = min((run.start for run in runs if run.start is not None), default=self.kept.n_positions - 1)
        self.n_layers = self.model.cfg.n_layers
        self.wanted = wanted
        # The positions that reach the final norm: those wanted, or all from the start (see `needs_full_suffix`).
        self.reads = self._all_from_start() if needs_full_suffix(runs, self.n_layers) else wanted
        self.active: list[PlannedRun] = []
        self.seen: dict[str, Tensor] = {}
        self._context: tuple[int, AttentionContext] | None = None  # for how many runs, and what attention needs then
        self._listen = set(listen or [])

    def _all_from_start(self) -> Int[Tensor, "prompt position"]:
        """Every position from the start, or from the first wanted one if that is earlier."""
        first = min(self.start, int(self.wanted.min()))
        return torch.arange(first, self.kept.n_positions, device=self.wanted.device).expand(len(self.wanted), -1)

    @torch.no_grad()
    def logits(self) -> Float[Tensor, "run prompt position d_vocab"]:
        """Logits at the wanted positions, in the order of the runs given."""
        x: Tensor | None = None  # (prompt, run, suffix, d_model)
        for layer in range(min((run.first_layer for run in self.runs), default=self.n_layers), self.n_layers):
            x = self._join(x, layer)
            x = self._through(layer, x)
        return self._read(x)

    def _join(self, x: Tensor | None, layer: int) -> Float[Tensor, "prompt run suffix d_model"]:
        """The active rows, and appended to them those of the runs that join here."""
        joining = [run for run in self.runs if run.first_layer == layer]
        if joining:
            fresh = self.kept.entering(layer, self.start)[:, None].repeat(1, len(joining), 1, 1)
            before = _EMBEDDING if layer == 0 else (self.model.hooks_table.name("resid_post", layer - 1),)
            if layer == 0:
                self._put_images(fresh, joining)
            for name in before:
                self._edit_now(fresh, joining, name, self.start)
                if name in self._listen and name in _EMBEDDING:
                    self.seen[name] = fresh.flatten(0, 1).clone()
            x = fresh if x is None else torch.cat([x, fresh], dim=1)
            self.active += joining
        assert x is not None
        return x

    def _through(self, layer: int, x: Float[Tensor, "prompt run suffix d_model"]) -> Tensor:
        """One block; in the last one only the wanted positions give more than keys and values."""
        queries = self._queries() if layer == self.n_layers - 1 else None
        if self._context is None or len(x[0]) != self._context[0]:
            self._context = len(x[0]), self.kept.context(self.start, len(x[0]))
        with edited(self.model, self._edits(layer, queries), self._caching_hooks(layer)):
            blocks, only = self.model.language.blocks, range(layer, layer + 1)
            out = blocks.run(x.flatten(0, 1), self._context[1], layers=only, queries=queries)
        self.state.work.token_layers += self._cost(layer)
        return out.unflatten(0, x.shape[:2])

    def _read(self, x: Tensor | None) -> Float[Tensor, "run prompt position d_vocab"]:
        """Final norm and unembedding of all runs, those included that change something only after the blocks."""
        n_prompts = len(self.reads)
        fresh = rows_at(self.kept.entering(self.n_layers), self.reads)[:, None].repeat(
            1, len(self.runs), 1, 1
        )  # (prompt, run, position, d_model)
        if x is not None:
            fresh[:, : len(self.active)] = self._at_wanted(x, fresh[:, : len(self.active)])
        tables = [{int(p): i for i, p in enumerate(row)} for row in self.reads.tolist()]
        joining = self.runs[len(self.active) :]
        last = self.model.hooks_table.name("resid_post", -1)
        self._edit_now(fresh[:, len(self.active) :], joining, last, tables)
        edits = [
            RowEdit(self._row(prompt, i, len(self.runs)), prompt, r, tables[prompt])
            for i, run in enumerate(self.runs)
            for r in run.language
            if r.hook.stage == self.n_layers
            for prompt in range(n_prompts)
        ]
        self.active = list(self.runs)
        with edited(self.model, edits, self._caching_hooks(self.n_layers)):
            logits = self.model.language.to_logits(fresh.flatten(0, 1))
        logits = logits.unflatten(0, (n_prompts, len(self.runs))).transpose(0, 1)  # (run, prompt, position, d_vocab)
        order = sorted(range(len(self.runs)), key=lambda i: self.runs[i].index)
        logits = logits.index_select(0, to_device(order, logits.device))
        if self.reads is self.wanted:
            return logits
        among = to_device(self.wanted - self.reads[:, :1], logits.device)
        return logits[:, torch.arange(n_prompts, device=logits.device)[:, None], among]

    def _at_wanted(self, x: Tensor, fresh: Tensor) -> Tensor:
        """The residual stream at the positions that are read: re-run where it was, kept before the start."""
        queries = self._queries()
        if queries is not None:
            places = {p + self.start: i for i, p in enumerate(queries)}
        else:
            places = {p: p - self.start for p in range(self.start, self.kept.n_positions)}
        fresh = fresh.clone()
        for prompt, row in enumerate(self.reads.tolist()):
            here = [(i, places[p]) for i, p in enumerate(row) if p in places]
            if here:
                to, source = to_device(here, x.device).unbind(-1)
                fresh[prompt][:, to] = x[prompt].index_select(1, source)
        return fresh

    def _queries(self) -> list[int] | None:
        """Suffix positions whose output the last block must give, if they are the same for all prompts and not all."""
        if not bool((self.reads == self.reads[:1]).all()):
            return None
        inside = sorted({int(p) - self.start for p in self.reads[0].tolist() if p >= self.start})
        if not inside or len(inside) == self.kept.n_positions - self.start:
            return None
        return inside

    def _edits(self, layer: int, queries: list[int] | None) -> list[RowEdit]:
        """All edits inside a block, on the active rows."""
        narrow = None if queries is None else {q + self.start: i for i, q in enumerate(queries)}
        edits = []
        for i, run in enumerate(self.active):
            for bound in run.language:
                # A run that enters because of an output of the block below was changed when it joined.
                if bound.hook.layer != layer:
                    continue
                where = self.start if narrow is None or fires_at_all_positions(bound.hook) else narrow
                edits += [
                    RowEdit(self._row(prompt, i, len(self.active)), prompt, bound, where)
                    for prompt in range(self.kept.n_prompts)
                ]
        return edits

    def _edit_now(self, fresh: Tensor, runs: list[PlannedRun], name: str, where: int | list[dict[int, int]]) -> None:
        """Edits at a hook that fires before the runs join, on their fresh rows [prompt, run, position, d_model]."""
        for i, run in enumerate(runs):
            edits = [bound for bound in run.language if bound.hook.name == name]
            for prompt in range(self.kept.n_prompts) if edits else ():
                row = fresh[prompt, i]
                if name == "hook_text_embed":
                    row = self._before_the_merge(row, prompt)
                for bound in edits:
                    bound.apply(row, where[prompt] if isinstance(where, list) else where, prompt)
                if name == "hook_text_embed":
                    fresh[prompt, i] = torch.where(self._image_mask(prompt), fresh[prompt, i], row)

    def _before_the_merge(self, row: Tensor, prompt: int) -> Float[Tensor, "suffix d_model"]:
        """A row with the placeholders' embeddings at its image positions: what a mean or a function sees there."""
        ids = self.state.inputs.input_ids[prompt, self.start :]
        return torch.where(self._image_mask(prompt), self.model.language.embed(ids).to(row), row)

    def _image_mask(self, prompt: int) -> Bool[Tensor, "suffix 1"]:
        return self.state.inputs.image_mask[prompt, self.start :, None]

    @cached_property
    def _image_embeds(self) -> dict[int, Float[Tensor, "image feature d_model"]]:
        """Image embeddings of the runs that change the image side, re-run there."""
        changed = [run for run in self.runs if run.image]
        if not changed:
            return {}
        embeds = self.state.image_side.rerun([run.image for run in changed])
        self.state.work.token_layers += self._image_cost
        return {run.index: embed for run, embed in zip(changed, embeds, strict=True)}

    def _put_images(self, fresh: Tensor, runs: list[PlannedRun]) -> None:
        """Overwrite the image positions of runs whose image side was re-run."""
        mask = self.state.inputs.image_mask[:, self.start :]
        for i, run in enumerate(runs):
            if run.index in self._image_embeds:
                fresh[:, i] = self._merged(fresh[:, i], self._image_embeds[run.index], mask)

    def _merged(self, rows: Tensor, embeds: Tensor, mask: Tensor) -> Tensor:
        """Image embeddings at the image positions from the start on; images before it were not changed."""
        inputs = self.state.inputs
        real = self.model.real_features(embeds, inputs)
        whole = self.kept.entering(0).masked_scatter(inputs.image_mask[..., None], real)
        return torch.where(mask[..., None], whole[:, self.start :], rows)

    def _caching_hooks(self, layer: int) -> list[tuple[Any, Any]]:
        """For `fwd_hooks`: what keeps the activations that are asked for, in one layer, or after the blocks."""
        table = self.model.hooks_table
        names = [name for name in self._listen if table[name].layer == (layer if layer < self.n_layers else None)]
        return [(names, caching_hook(self.seen, self.model))] if names else []

    def _row(self, prompt: int, run: int, n_runs: int) -> int:
        return prompt * n_runs + run

    @property
    def token_layers(self) -> float:
        """What the pass will cost, counted before it is run."""
        return sum((self._cost(layer) for layer in range(self.n_layers)), self._image_cost)

    @property
    def _image_cost(self) -> float:
        """The vision tower's blocks, in units of the language tower's."""
        rows = self.state.image_side.rows_through_blocks([run.image for run in self.runs if run.image])
        return rows * self.state.image_side.block_cost

    def _cost(self, layer: int) -> float:
        """One block for the rows that have joined by then."""
        n_runs, n_suffix = sum(run.first_layer <= layer for run in self.runs), self.kept.n_positions - self.start
        queries = self._queries() if layer == self.n_layers - 1 else None
        per_row = n_suffix if queries is None else len(queries) + n_suffix * self.state.key_value_share
        return float(len(self.wanted) * n_runs * per_row)


def needs_full_suffix(runs: Iterable[PlannedRun], n_layers: int) -> bool:
    """Whether some change must see all positions that it names, where otherwise only those that are read are computed.

    So it is with a mean over positions, or a function, at a hook that fires after the last block's keys and values.
    """
    return any(
        (r.intervention.position_mean or r.intervention.fn is not None)
        and r.hook.stage >= n_layers - 1
        and not fires_at_all_positions(r.hook)
        for run in runs
        for r in run.language
    )


def fires_at_all_positions(hook: Hook) -> bool:
    """Whether a hook of the last block fires for every position; the others do for those that are read."""
    return hook.site in _KEY_VALUE_SIDE


def recordable(state: ReplayState, names_filter: NamesFilter) -> list[str]:
    """Full names of the hooks that a filter asks for; raises `InputError` for one on the image side."""
    table = state.model.hooks_table
    names = table.resolve(names_filter, with_image=state.inputs.pixel_values is not None)
    if image_side := [name for name in names if table[name].on_image_side]:
        raise InputError(
            f"{image_side[0]} fires before the image enters the language tower, and a re-run records hooks of the "
            "language tower only; read it with model.run_with_hooks, or name others, such as 'blocks.*.hook_z'."
        )
    return names


def recorded(
    state: ReplayState, run: PlannedRun, names: list[str], positions: PositionsLike
) -> tuple[Float[Tensor, "prompt position d_vocab"], dict[str, Tensor]]:
    """Run one run: its logits, and the named activations that were recomputed for it."""
    layer_pass = LayerPass(state, [run], state.wanted(positions), names)
    logits = layer_pass.logits()[0] if run.changes else state.kept_logits(positions)
    state.work.runs += len(state.inputs) * run.changes
    return logits, layer_pass.seen
