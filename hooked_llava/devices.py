"""Numbers that the CPU knows, on the device that computes with them, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(numbers: Tensor | Sequence[Any], device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """The numbers as a tensor on a device; the CPU goes on at once, whatever the device still has to do.

    `torch.tensor(numbers, device="cuda")` and `.to("cuda")` wait until everything before them is computed. Ints become int64.

    >>> to_device([3, 5], "cpu"), to_device([], "cpu").dtype
    (tensor([3, 5]), torch.int64)
    """
    if not isinstance(numbers, Tensor):
        dtype = torch.int64 if dtype is None and len(numbers) == 0 else dtype
        numbers = torch.tensor(numbers, dtype=dtype, device="cpu")
    goes_up = numbers.device.type == "cpu" and torch.device(device).type == "cuda"
    return numbers.to(
        device, dtype, non_blocking=goes_up
    )  # back to the CPU it waits, or numbers would be read too early
