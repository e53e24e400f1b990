"""Keys and values of the tokens already seen, so that decoding runs one position at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.architecture.sizes import TowerConfig


class KVCache:
    """Room for `capacity` positions of every layer, allocated once, where the layer runs, and filled from the front.

    Nothing is concatenated while decoding: each step writes its keys and values into place and reads a view.
    """

    def __init__(self, cfg: TowerConfig, *, batch: int, capacity: int, dtype: torch.dtype) -> None:
        self._n_layers, self._dtype = cfg.n_layers, dtype
        self._shape = (2, batch, cfg.n_key_value_heads, capacity, cfg.d_head)  # of keys and values of a layer
        self._stores: dict[int, Tensor] = {}  # by layer
        self.capacity = capacity
        self.length = 0

    def append(
        self, layer: int, k: Float[Tensor, "batch kv_head pos d_head"], v: Float[Tensor, "batch kv_head pos d_head"]
    ) -> tuple[Float[Tensor, "batch kv_head key d_head"], Float[Tensor, "batch kv_head key d_head"]]:
        """Write one layer's new keys and values after the old ones; returns all of them as views.

        `length` moves only when `advance` is called, after the last layer: all layers of a step write the same slots.
        """
        if layer not in self._stores:
            self._stores[layer] = torch.empty(self._shape, device=k.device, dtype=self._dtype)
        store, end = self._stores[layer], self.length + k.shape[2]
        store[0, :, :, self.length : end] = k
        store[1, :, :, self.length : end] = v
        return store[0, :, :, :end], store[1, :, :, :end]

    def layer(
        self, layer: int
    ) -> tuple[Float[Tensor, "batch kv_head key d_head"], Float[Tensor, "batch kv_head key d_head"]]:
        """One layer's keys and values of all positions seen, as views."""
        k, v = self._stores[layer][:, :, :, : self.length]
        return k, v

    def copied(self) -> KVCache:
        """Another of the same layers, of which each can be kept elsewhere without a change of this one."""
        other = copy.copy(self)
        other._stores = dict(self._stores)  # noqa: SLF001 (a copy of itself)
        return other

    def keep(self, layer: int, kept: Callable[[Tensor], Tensor]) -> None:
        """Put what a function makes of one layer's keys and values in their place: a copy elsewhere or in another dtype."""
        self._stores[layer] = kept(self._stores[layer])

    @property
    def nbytes(self) -> int:
        """Size of what is allocated once every layer has been run."""
        to_come = (self._n_layers - len(self._stores)) * math.prod(self._shape) * self._dtype.itemsize
        return sum(store.nbytes for store in self._stores.values()) + to_come

    def advance(self, n: int) -> None:
        """Count n further positions as seen."""
        self.length += n
