"""Keys and values of the tokens already seen, so that decoding runs one position at a time."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.architecture.sizes import TowerConfig


class KVCache:
    """Room for `capacity` positions of every layer, allocated once and filled from the front.

    Nothing is concatenated while decoding: each step writes its keys and values into place and reads a view.
    """

    def __init__(
        self, cfg: TowerConfig, *, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (cfg.n_layers, 2, batch, cfg.n_key_value_heads, capacity, cfg.d_head)
        self._store = torch.empty(shape, device=device, dtype=dtype)
        self.capacity = capacity
        self.length = 0

    def append(
        self, layer: int, k: Float[Tensor, "batch kv_head pos d_head"], v: Float[Tensor, "batch kv_head pos d_head"]
    ) -> tuple[Float[Tensor, "batch kv_head key d_head"], Float[Tensor, "batch kv_head key d_head"]]:
        """Write one layer's new keys and values after the old ones; returns all of them as views.

        `length` moves only when `advance` is called, after the last layer: all layers of a step write the same slots.
        """
        end = self.length + k.shape[2]
        self._store[layer, 0, :, :, self.length : end] = k
        self._store[layer, 1, :, :, self.length : end] = v
        return self._store[layer, 0, :, :, :end], self._store[layer, 1, :, :, :end]

    def layer(
        self, layer: int
    ) -> tuple[Float[Tensor, "batch kv_head key d_head"], Float[Tensor, "batch kv_head key d_head"]]:
        """One layer's keys and values of all positions seen, as views."""
        return self._store[layer, 0, :, :, : self.length], self._store[layer, 1, :, :, : self.length]

    def to(self, *, device: torch.device | str, dtype: torch.dtype) -> KVCache:
        """Itself, or a copy elsewhere or in another dtype."""
        moved = copy.copy(self)
        moved._store = self._store.to(device, dtype)  # noqa: SLF001 (a copy of itself)
        return moved

    @property
    def nbytes(self) -> int:
        """Size of what is allocated."""
        return self._store.numel() * self._store.element_size()

    def advance(self, n: int) -> None:
        """Count n further positions as seen."""
        self.length += n
