"""A finished forward pass, kept so that it can be entered again at any layer and position."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import functional_call

from hooked_llava.model.components.attention import AttentionContext
from hooked_llava.model.components.kv_cache import KVCache
from hooked_llava.model.components.prefix_attention import SharedPrefix
from hooked_llava.model.language import count_positions
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.replay.offloading import run_keeper


@dataclass(frozen=True, eq=False)
class KeptRun:
    """The residual stream entering some or all blocks, and, where it is kept, every block's keys and values.

    Attributes:
        model (HookedLLaVA): The model that ran.
        resid (Mapping[int, Float[Tensor, "prompt pos d_model"]]): By the layer that it enters; n_layers is what leaves
            the last block. It may lie elsewhere and in another dtype.
        kv (KVCache | None): Keys (rotated) and values of all layers, likewise; without them a run is entered at
            position 0 only.
        position_ids (Int[Tensor, "prompt_or_1 pos"]): Positions for the rotary embedding.
        mask (Bool[Tensor, "prompt pos"] | None): False at padding; None without padding.
    """

    model: HookedLLaVA
    resid: Mapping[int, Float[Tensor, "prompt pos d_model"]]
    kv: KVCache | None
    position_ids: Int[Tensor, "prompt_or_1 pos"]
    mask: Bool[Tensor, "prompt pos"] | None

    @property
    def n_positions(self) -> int:
        """Length of the prompts, padding included."""
        return next(iter(self.resid.values())).shape[1]

    @property
    def n_prompts(self) -> int:
        """Prompts in the batch."""
        return next(iter(self.resid.values())).shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(x.nbytes for x in self.resid.values()) + (0 if self.kv is None else self.kv.nbytes)

    def entering(self, layer: int, start: int = 0) -> Float[Tensor, "prompt suffix d_model"]:
        """The residual stream entering a layer, from a position on, on the device where it was computed."""
        return self.resid[layer][:, start:].to(self.model.language.device_of(layer), self.model.cfg.dtype)

    def context(self, start: int = 0, n_rows: int = 1) -> AttentionContext:
        """What attention needs where `n_rows` runs of every prompt re-enter the blocks from a position on."""
        cfg, positions, mask = self.model.cfg, self.position_ids[:, start:], self.mask
        if mask is not None or len(positions) > 1:
            positions = positions.expand(self.n_prompts, -1).repeat_interleave(n_rows, 0)
        prefix = None
        if start:
            assert self.kv is not None
            before = None if mask is None else mask[:, None, None, :start]
            prefix = SharedPrefix(self.kv, start, before, cfg.dtype)
        return self.model.language.context(
            self.n_positions - start,
            attention_mask=None if mask is None else mask[:, start:].repeat_interleave(n_rows, 0),
            position_ids=positions,
            prefix=prefix,
            device=cfg.device,
            dtype=cfg.dtype,
        )

    def rerun(
        self,
        layers: range,
        resid: Float[Tensor, "prompt suffix d_model"] | None = None,
        *,
        start: int = 0,
        queries: Sequence[int] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Float[Tensor, "prompt any_pos d_model"]:
        """The residual stream that leaves the last of `layers`, run again from a position on; gradients pass.

        `resid` enters in place of what was kept, and `weights`, by parameter name, act in place of the model's own. With
        `queries`, only these of the positions leave the last layer.
        """
        language, context = self.model.language, self.context(start)
        resid = self.entering(layers.start, start) if resid is None else resid
        if weights is None:
            return language.blocks.run(resid, context, layers=layers, queries=queries)
        named = {name.removeprefix("language."): weight for name, weight in weights.items()}
        where = {"start_at_layer": layers.start, "stop_at_layer": layers.stop, "queries": queries}
        return functional_call(language, named, (resid, context), where)

    def logits(
        self, layer: int, resid: Float[Tensor, "prompt suffix d_model"] | None = None, **options: Any
    ) -> Float[Tensor, "prompt any_pos d_vocab"]:
        """Logits of a re-run from a layer on; arguments as of `rerun`."""
        return self.model.language.to_logits(self.rerun(range(layer, self.model.cfg.n_layers), resid, **options))

    def __getitem__(self, prompts: Sequence[int] | slice) -> KeptRun:
        """The run of some of the prompts, entered at position 0 only, without columns that are padding in all of them."""
        index: Any = prompts if isinstance(prompts, slice) else list(prompts)
        mask = None if self.mask is None else self.mask[index]
        first = int(mask.any(0).nonzero()[0]) if mask is not None and len(mask) else 0
        positions = self.position_ids if len(self.position_ids) == 1 else self.position_ids[index]
        return replace(
            self,
            resid={layer: resid[index][:, first:] for layer, resid in self.resid.items()},
            kv=None,
            position_ids=positions[:, first:],
            mask=None if mask is None or bool(mask[:, first:].all()) else mask[:, first:],
        )

    def appended(self, ids: Int[Tensor, "prompt token"]) -> KeptRun:
        """The prompts, which end in a real token each, with further tokens, to be entered at layer 0."""
        further = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        return replace(
            self,
            resid={0: torch.cat([self.entering(0), self.model.language.embed_tokens(ids)], dim=1)},
            kv=None,
            position_ids=torch.cat([self.position_ids, self.position_ids[:, -1:] + further], dim=1),
            mask=None if self.mask is None else F.pad(self.mask, (0, ids.shape[1]), value=True),
        )


@torch.no_grad()
def keep(
    model: HookedLLaVA,
    inputs: Inputs,
    *,
    layers: Collection[int] | None = None,
    keys_and_values: bool = True,
    kept: Callable[[Tensor], Tensor] | None = None,
) -> KeptRun:
    """Run the model once, without logits, and keep what a re-run needs; in another dtype or place as `kept` says, if it does.

    `layers` are those for which the residual stream entering them is kept, all by default.
    """
    kept = run_keeper() if kept is None else kept
    embedded = model.embed(inputs)
    kv = None
    if keys_and_values:
        shape = {"batch": len(inputs), "capacity": inputs.shape[1]}
        kv = KVCache(model.language.cfg, dtype=embedded.dtype, **shape)
    mask = inputs.padding_mask
    context = model.context(embedded, mask, inputs.position_ids, kv)
    resid = {}
    for i, state in enumerate(itertools.chain([embedded], model.language.blocks.states(embedded, context))):
        if layers is None or i in layers:
            resid[i] = kept(state)
        if kv is not None and i:
            kv.keep(i - 1, kept)  # now: where they are kept elsewhere, those of one layer at a time lie here
    if kv is not None:
        kv.advance(inputs.shape[1])
    position_ids = inputs.position_ids
    if position_ids is None:
        position_ids = count_positions(inputs.shape[1], mask, embedded.device)
    return KeptRun(model, resid, kv, position_ids, mask)


def joined_runs(runs: Sequence[KeptRun]) -> KeptRun:
    """Runs of prompts of one length as one run, without keys and values."""
    first, position_ids, mask = runs[0], runs[0].position_ids, None
    if len(runs) == 1:
        return replace(first, kv=None)
    if any(run.mask is not None for run in runs):
        mask = torch.cat([_full_mask(run) for run in runs])
    if not all(torch.equal(run.position_ids, position_ids) for run in runs) or len(position_ids) > 1:
        position_ids = torch.cat([run.position_ids.expand(run.n_prompts, -1) for run in runs])
    kept = run_keeper()
    resid = {layer: kept(torch.cat([run.resid[layer] for run in runs])) for layer in first.resid}
    return replace(first, resid=resid, kv=None, position_ids=position_ids, mask=mask)


def _full_mask(run: KeptRun) -> Bool[Tensor, "prompt pos"]:
    full = torch.ones(run.n_prompts, run.n_positions, dtype=torch.bool, device=run.model.cfg.device)
    return full if run.mask is None else run.mask
