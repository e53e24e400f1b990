"""The processes of one training run: what `accelerate launch` or `torchrun` has started, or this one alone."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_INDEX, _COUNT = "RANK", "WORLD_SIZE"  # what launchers set


def launched_as() -> tuple[int, int]:
    """(i, n): which of how many processes of a launch this is; (0, 1) where there was none.

    >>> launched_as()
    (0, 1)
    """
    return int(os.environ.get(_INDEX, "0")), int(os.environ.get(_COUNT, "1"))


@dataclass(frozen=True)
class Processes:
    """What processes that train together tell each other; one alone tells nothing.

    >>> Processes(0, 1).sum(torch.ones(2))
    tensor([1., 1.])

    Attributes:
        index (int): Which process this is.
        n (int): How many there are.
    """

    index: int
    n: int

    @classmethod
    def current(cls, device: torch.device) -> Processes:
        """The processes of the launch, connected (over gloo on CPUs, nccl on GPUs) if they are not yet."""
        index, n = launched_as()
        if n > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(index, n)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def most(self, tensor: Tensor) -> Tensor:
        """The largest over all processes, entry by entry, in place."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def all(self, flag: bool, device: torch.device) -> bool:
        """Whether it is so in every process."""
        missing = torch.tensor([0 if flag else 1], device=device)
        return not bool(self.sum(missing))

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, of equal shape, one after the other."""
        if self.n == 1:
            return tensor
        found = [torch.empty_like(tensor) for _ in range(self.n)]
        dist.all_gather(found, tensor.contiguous())
        return torch.cat(found)

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.n > 1:
            dist.barrier()

    def _reduced(self, tensor: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.n > 1:
            dist.all_reduce(tensor, how)
        return tensor
