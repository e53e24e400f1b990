"""A buffer of fixed size that mixes activations of many prompts."""

from __future__ import annotations

from typing import Any

import torch

from hooked_llava.datasets.forwards import PLACES, Rows


class ShuffleBuffer:
    """Holds up to `capacity` activations; what is taken are random ones of all that are in it.

    Args:
        capacity: how many activations it holds at most; the memory is claimed when the first come.
        seed: of the order.

    >>> buffer = ShuffleBuffer(capacity=4, seed=0)
    >>> left = buffer.add({"x": torch.arange(5)})
    >>> left["x"].tolist(), sorted(buffer.take(3)["x"].tolist() + buffer.take(3)["x"].tolist())
    ([4], [0, 1, 2, 3])
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.size = 0
        self.generator = torch.Generator().manual_seed(seed)
        self._held: Rows = {}

    @property
    def room(self) -> int:
        """How many more activations it can hold."""
        return self.capacity - self.size

    def add(self, rows: Rows) -> Rows | None:
        """Put in as many rows as there is room for; what is left of them, if anything."""
        n = min(self.room, n_rows(rows))
        if not self._held:
            self._held = {name: x.new_empty(self.capacity, *x.shape[1:]) for name, x in rows.items()}
        for name, x in rows.items():
            self._held[name][self.size : self.size + n] = x[:n]
        self.size += n
        return {name: x[n:] for name, x in rows.items()} if n < n_rows(rows) else None

    def take(self, n: int) -> Rows:
        """n random rows (all there are, if fewer), which leave the buffer."""
        chosen = torch.randperm(self.size, generator=self.generator)[:n]
        kept = self.size - len(chosen)
        is_taken = torch.zeros(self.size, dtype=torch.bool)
        is_taken[chosen] = True
        holes = is_taken[:kept].nonzero()[:, 0]
        last = (~is_taken[kept:]).nonzero()[:, 0] + kept  # rows from the end, moved into the holes
        taken = {}
        for name, x in self._held.items():
            taken[name] = x[chosen.to(x.device)]
            x[holes.to(x.device)] = x[last.to(x.device)]
        self.size = kept
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Its rows and its generator, as tensors."""
        rows = {name: x[: self.size].clone() for name, x in self._held.items()}
        return {"rows": rows, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str) -> None:
        """Make it what it was when `state_dict` was called; rows other than places go to the device."""
        self.size, self._held = 0, {}
        self.generator.set_state(state["generator"])
        if state["rows"]:
            self.add(on_device(state["rows"], device))


def n_rows(rows: Rows) -> int:
    """How many rows each tensor has.

    >>> n_rows({"x": torch.zeros(3, 2)})
    3
    """
    return len(next(iter(rows.values())))


def on_device(rows: Rows, device: torch.device | str) -> Rows:
    """The rows on a device, places on the CPU."""
    return {name: x if name == PLACES else x.to(device) for name, x in rows.items()}
