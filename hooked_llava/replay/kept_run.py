"""A finished forward pass, kept so that it can be entered again at any layer and position."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_llava.model.components.attention import AttentionContext
from hooked_llava.model.components.kv_cache import KVCache
from hooked_llava.model.components.prefix_attention import SharedPrefix
from hooked_llava.model.components.rotary import Rotation
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs


@dataclass(frozen=True)
class KeptRun:
    """The residual stream entering some or all blocks, and, where it is kept, every block's keys and values."""

    streams: Mapping[int, Float[Tensor, "prompt pos d_model"]]
    """By layer; n_layers is what leaves the last block."""
    kv: KVCache | None
    """Keys (rotated) and values of all layers; without them a run is entered at position 0 only."""
    rotation: Rotation | None
    """Rotary cosine and sine of every position."""
    mask: Bool[Tensor, "prompt pos"] | None
    """False at padding; None without padding."""
    device: torch.device
    """Where the model runs; what is kept may lie elsewhere and in another dtype."""
    dtype: torch.dtype

    @property
    def n_positions(self) -> int:
        """Length of the prompts, padding included."""
        return next(iter(self.streams.values())).shape[1]

    @property
    def n_prompts(self) -> int:
        """Prompts in the batch."""
        return next(iter(self.streams.values())).shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(s.nbytes for s in self.streams.values()) + (0 if self.kv is None else self.kv.nbytes)

    def stream(self, layer: int, start: int = 0) -> Float[Tensor, "prompt suffix d_model"]:
        """The stream entering a layer, from a position on."""
        return self.streams[layer][:, start:].to(self.device, self.dtype)

    def context(self, start: int = 0, n_rows: int = 1) -> AttentionContext:
        """What attention needs where `n_rows` runs of every prompt re-enter the blocks from a position on."""
        n_suffix = self.n_positions - start
        rotation, prefix, allowed = self.rotation, None, None
        if rotation is not None:
            rotation = (self._for_rows(rotation[0], start, n_rows), self._for_rows(rotation[1], start, n_rows))
        if start:
            assert self.kv is not None
            before = None if self.mask is None else self.mask[:, None, None, :start]
            prefix = SharedPrefix(self.kv, start, before, self.device, self.dtype)
        if self.mask is not None:
            earlier = torch.ones(n_suffix, n_suffix, dtype=torch.bool, device=self.device).tril()
            allowed = earlier & self.mask[:, None, None, start:].repeat_interleave(n_rows, 0)
        return AttentionContext(causal=self.mask is None, allowed=allowed, rotation=rotation, prefix=prefix)

    def __getitem__(self, prompts: Sequence[int] | slice) -> KeptRun:
        """The run of some of the prompts, entered at position 0 only, without columns that are padding in all of them."""
        index: Any = prompts if isinstance(prompts, slice) else list(prompts)
        mask = None if self.mask is None else self.mask[index]
        first = int(mask.any(0).nonzero()[0]) if mask is not None and len(mask) else 0
        rotation = self.rotation
        if rotation is not None:
            cos, sin = (part[:, first:] if len(part) == 1 else part[index][:, first:] for part in rotation)
            rotation = (cos, sin)
        streams = {layer: stream[index][:, first:] for layer, stream in self.streams.items()}
        cut = None if mask is None or bool(mask[:, first:].all()) else mask[:, first:]
        return replace(self, streams=streams, kv=None, rotation=rotation, mask=cut)

    def _for_rows(self, x: Tensor, start: int, n_rows: int) -> Tensor:
        return x[:, start:] if len(x) == 1 else x[:, start:].repeat_interleave(n_rows, 0)


@torch.no_grad()
def keep(
    model: HookedLLaVA,
    inputs: Inputs,
    *,
    layers: Collection[int] | None = None,
    keys_and_values: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> KeptRun:
    """Run the model once, without logits, and keep what a re-run needs; optionally in another dtype or place.

    `layers` are those whose entering stream is kept, all by default.
    """
    embedded = model.embed(inputs)
    kv = None
    if keys_and_values:
        shape = {"batch": len(inputs), "capacity": inputs.shape[1]}
        kv = KVCache(model.language.cfg, device=embedded.device, dtype=embedded.dtype, **shape)
    mask = None if bool(inputs.attention_mask.all()) else inputs.attention_mask
    context = model.context(embedded, mask, inputs.position_ids, kv)
    where: dict[str, Any] = {"dtype": dtype or embedded.dtype, "device": device or embedded.device}
    states = itertools.chain([embedded], model.language.blocks.states(embedded, context))
    streams = {i: state.to(**where) for i, state in enumerate(states) if layers is None or i in layers}
    if kv is not None:
        kv.advance(inputs.shape[1])
        kv = kv.to(**where)
    return KeptRun(streams, kv, context.rotation, mask, embedded.device, embedded.dtype)


def joined_runs(runs: Sequence[KeptRun]) -> KeptRun:
    """Runs of prompts of one length as one run, without keys and values."""
    if len(runs) == 1:
        return replace(runs[0], kv=None)
    n_prompts = [run.n_prompts for run in runs]
    mask = None
    if any(run.mask is not None for run in runs):
        mask = torch.cat([_full_mask(run) for run in runs])
    rotation = runs[0].rotation
    rotations = [run.rotation for run in runs if run.rotation is not None]
    if any(len(cos) > 1 for cos, _ in rotations):  # positions are counted for each prompt
        pairs = list(zip(rotations, n_prompts, strict=True))
        rotation = tuple(torch.cat([one[i].expand(n, *one[i].shape[1:]) for one, n in pairs]) for i in (0, 1))
    streams = {layer: torch.cat([run.streams[layer] for run in runs]) for layer in runs[0].streams}
    return replace(runs[0], streams=streams, kv=None, rotation=rotation, mask=mask)


def _full_mask(run: KeptRun) -> Bool[Tensor, "prompt pos"]:
    full = torch.ones(run.n_prompts, run.n_positions, dtype=torch.bool, device=run.device)
    return full if run.mask is None else run.mask
