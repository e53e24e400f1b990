"""How often work waits for the device: each time it reads a number of a tensor on it, the queue must run empty first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_consecutive"}
"""Operators of aten whose result, or its size, is known only when the device has computed it."""
_COPIES = {"_to_copy", "copy_"}
_INDEXING = {"index", "index_put", "index_put_"}


def host_reads(work: Callable[[], object], device: torch.device) -> int:
    """Numbers and tensors that one run of some work reads from tensors on the device.

    On a CPU no copy from the device is one, so that these are left out; reads of the prompt, which lies on the CPU where a
    GPU computes, count there too.

    >>> x = torch.ones(3)
    >>> host_reads(lambda: (x.sum().item(), bool(x.all()), x + 1), x.device)
    2
    """
    with _Reads(device) as reads:
        work()
    return reads.n


class _Reads(TorchDispatchMode):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.n = device, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [t for t in tree_iter((args, kwargs or {})) if isinstance(t, Tensor)]
        if any(t.device.type == self.device.type for t in given):
            by_mask = name in _INDEXING and any(t.dtype == torch.bool for t in given[1:])
            self.n += name in _READS or by_mask or (name in _COPIES and self._leaves(result))
        return result

    def _leaves(self, result: object) -> bool:
        """Whether a copy went from a device to the CPU."""
        return self.device.type != "cpu" and isinstance(result, Tensor) and result.device.type == "cpu"
