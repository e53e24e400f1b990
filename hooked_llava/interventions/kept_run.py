"""A finished forward pass, kept so that it can be entered again at any layer and position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_llava.components import AttentionContext, KVCache, Prefix

if TYPE_CHECKING:
    from hooked_llava.components.rotary import Rotation
    from hooked_llava.inputs import Inputs
    from hooked_llava.model import HookedLLaVA


@dataclass(frozen=True)
class KeptRun:
    """Residual stream entering every block, and every block's keys and values."""

    streams: tuple[Float[Tensor, "prompt pos d_model"], ...]
    """n_layers + 1 of them; the last one leaves the last block."""
    kv: KVCache
    """Keys (rotated) and values of all layers."""
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
        return self.streams[0].shape[1]

    @property
    def n_prompts(self) -> int:
        """Prompts in the batch."""
        return self.streams[0].shape[0]

    def stream(self, layer: int, start: int = 0) -> Float[Tensor, "prompt suffix d_model"]:
        """The stream entering a layer, from a position on."""
        return self.streams[layer][:, start:].to(self.device, self.dtype)

    def context(self, layer: int, start: int, n_rows: int, queries: Tensor | None = None) -> AttentionContext:
        """What attention needs where `n_rows` runs of every prompt re-enter a layer from a position on."""
        n_suffix = self.n_positions - start
        rotation = self.rotation
        if rotation is not None:
            rotation = (self._for_rows(rotation[0], start, n_rows), self._for_rows(rotation[1], start, n_rows))
        prefix = None
        if start:
            k, v = self.kv.layer(layer)
            before = None if self.mask is None else self.mask[:, None, None, :start]
            prefix = Prefix(self._fetch(k[:, :, :start]), self._fetch(v[:, :, :start]), before)
        wanted = torch.arange(n_suffix, device=self.device) if queries is None else queries
        if self.mask is None and not start and queries is None:
            return AttentionContext(causal=True, rotation=rotation)
        allowed = None
        if n_suffix > 1 and not (self.mask is None and wanted.tolist() == [n_suffix - 1]):
            allowed = (torch.arange(n_suffix, device=self.device) <= wanted[:, None])[None, None]  # (1, 1, query, key)
        if self.mask is not None:
            real = self.mask[:, None, None, start:].repeat_interleave(n_rows, 0)
            allowed = real.expand(-1, 1, len(wanted), -1) if allowed is None else allowed & real
        return AttentionContext(allowed=allowed, rotation=rotation, prefix=prefix, queries=queries)

    def _for_rows(self, x: Tensor, start: int, n_rows: int) -> Tensor:
        return x[:, start:] if len(x) == 1 else x[:, start:].repeat_interleave(n_rows, 0)

    def _fetch(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype)


@torch.no_grad()
def keep(
    model: HookedLLaVA, inputs: Inputs, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> KeptRun:
    """Run the model once, without logits, and keep what a re-run needs; optionally in another dtype or place."""
    embedded = model.embed(inputs)
    shape = {"batch": len(inputs), "capacity": inputs.shape[1]}
    kv = KVCache(model.language.cfg, device=embedded.device, dtype=embedded.dtype, **shape)
    mask = None if bool(inputs.attention_mask.all()) else inputs.attention_mask
    context = model.context(embedded, mask, inputs.position_ids, kv)
    streams = [embedded]
    for block in model.language.blocks:
        streams.append(block(streams[-1], context))
    kv.advance(inputs.shape[1])
    where = {"dtype": dtype or embedded.dtype, "device": device or embedded.device}
    return KeptRun(
        streams=tuple(stream.to(**where) for stream in streams),
        kv=kv.to(**where),
        rotation=context.rotation,
        mask=mask,
        device=embedded.device,
        dtype=embedded.dtype,
    )
