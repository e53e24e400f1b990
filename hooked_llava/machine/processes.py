"""The processes of one launch: what `accelerate launch` or `torchrun` has started, or this one alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

_INDEX, _COUNT, _ON_MACHINE = "RANK", "WORLD_SIZE", "LOCAL_RANK"  # what launchers set


def launched_as() -> tuple[int, int]:
    """(i, n): which of how many processes of a launch this is; (0, 1) where there was none.

    >>> launched_as()
    (0, 1)
    """
    return int(os.environ.get(_INDEX, "0")), int(os.environ.get(_COUNT, "1"))


def is_first_process() -> bool:
    """Whether this is the process of a launch that prints and writes for all.

    >>> is_first_process()
    True
    """
    return launched_as()[0] == 0


def own_accelerator() -> str | None:
    """The GPU of this process, each of a launch having its own on its machine; None where there is no GPU."""
    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    place = os.environ.get(_ON_MACHINE)
    return None if n == 0 else "cuda" if place is None else f"cuda:{int(place) % n}"


@dataclass(frozen=True)
class Processes:
    """What processes that work together tell each other; one alone tells nothing.

    >>> Processes(0, 1).sum(torch.ones(2))
    tensor([1., 1.])

    Attributes:
        index (int): Which process this is.
        n (int): How many there are.
        group (dist.ProcessGroup | None): How they are connected; None for the way that is made first.
    """

    index: int
    n: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def current(cls, device: torch.device, patience: timedelta | None = None) -> Processes:
        """The processes of the launch, connected if they are not yet: over gloo on CPUs, over nccl between GPUs.

        With `patience` they have a connection of their own, over gloo, on which one waits so long for the others.
        """
        index, n = launched_as()
        if n > 1 and not dist.is_initialized():
            with_gpus = device.type == "cuda" or (torch.cuda.is_available() and dist.is_nccl_available())
            dist.init_process_group("cpu:gloo,cuda:nccl" if with_gpus else "gloo")
        own = dist.new_group(backend="gloo", timeout=patience) if n > 1 and patience is not None else None
        assert not isinstance(own, int), "a number stands for a group without this process"
        return cls(index, n, own)

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
        dist.all_gather(found, tensor.contiguous(), self.group)
        return torch.cat(found)

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """What each process gives, of any length, in their order.

        >>> Processes(0, 1).gather_bytes(b"all of it")
        [b'all of it']
        """
        if self.n == 1:
            return [data]
        lengths = self.gather(torch.tensor([len(data)])).tolist()
        filled = torch.frombuffer(bytearray(data.ljust(max(*lengths, 1))), dtype=torch.uint8)
        rows = self.gather(filled).view(self.n, -1)
        return [row[:length].numpy().tobytes() for row, length in zip(rows, lengths, strict=True)]

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.n > 1:
            dist.barrier(self.group)

    def _reduced(self, tensor: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.n > 1:
            dist.all_reduce(tensor, how, self.group)
        return tensor
