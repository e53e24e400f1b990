"""What a device asks of those that use it: not to wait for it, and to go on with less where its memory runs out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor

from hooked_llava.errors import ConfigError, HookedLLaVAWarning, InputError, warn_user
from hooked_llava.storage import check_folder, on_disk


@runtime_checkable
class Batch(Protocol):
    """Something that can be cut: a list of runs, a range of rows, prompts."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, part: slice, /) -> Self:
        """Some of them."""
        ...


_Batch = TypeVar("_Batch", bound=Batch)
_Result = TypeVar("_Result")


def check_device(
    device: torch.device | str, what: str, expected: str = "cpu, or an accelerator that is there, such as cuda:1"
) -> None:
    """Raise `ConfigError` for a device that torch does not know, or that is not there.

    >>> check_device("abacus", "device='abacus'")
    Traceback (most recent call last):
    hooked_llava.errors.ConfigError: device='abacus' cannot be used here (torch knows no such device); expected cpu, or an ...
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        why = str(error).splitlines()[0]
        if "device string" in why:
            why = "torch knows no such device"
        elif isinstance(error, NotImplementedError | ImportError) or "not compiled" in why:
            why = "this torch is built without it"
        raise ConfigError(f"{what} cannot be used here ({why}); expected {expected}.") from None


def to_device(numbers: Tensor | Sequence[Any], device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """The numbers as a tensor on a device; the CPU goes on at once, whatever the device still has to do.

    `torch.tensor(numbers, device="cuda")` and `.to("cuda")` wait until everything before them is computed. Ints become int64.

    >>> to_device([3, 5], "cpu"), to_device([], "cpu").dtype
    (tensor([3, 5]), torch.int64)
    """
    if not isinstance(numbers, Tensor):
        dtype = torch.int64 if dtype is None and len(numbers) == 0 else dtype
        numbers = torch.tensor(numbers, dtype=dtype, device="cpu")
    # Back to the CPU it waits: numbers would be read before they are there.
    goes_up = numbers.device.type == "cpu" and torch.device(device).type == "cuda"
    return numbers.to(device, dtype, non_blocking=goes_up)


def keeper(
    device: torch.device | str | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
) -> Callable[[Tensor], Tensor]:
    """What keeps a tensor: on a device, in files of a folder, or where it is; in a dtype, or in its own.

    Raises `InputError` for both a device and a folder, and for a folder that there is not.

    >>> keeper("cpu", dtype=torch.bfloat16)(torch.ones(1))
    tensor([1.], dtype=torch.bfloat16)
    """
    if offload_folder is None:
        return lambda x: x.to(x.device if device is None else device, dtype or x.dtype)
    if device is not None:
        raise InputError(f"device={str(device)!r} and offload_folder={os.fspath(offload_folder)!r}; give one of them.")
    folder = Path(offload_folder).expanduser()
    check_folder(folder)
    return lambda x: on_disk(x.to(dtype or x.dtype), folder)


def in_batches(batches: Iterable[_Batch], work: Callable[[_Batch], _Result]) -> Iterator[tuple[_Batch, _Result]]:
    """Each batch, and what the work makes of it; where memory runs out the batch and all after it are halved.

    A batch is asked for when those before it are done. Work that fails must leave nothing behind, since it is done again. Each
    halving is a `HookedLLaVAWarning`. Raises `torch.OutOfMemoryError` where not even one item fits.

    >>> [(list(batch), total) for batch, total in in_batches([[1, 2], [3]], sum)]
    [([1, 2], 3), ([3], 3)]
    """
    waiting, most, rest = deque[_Batch](), None, iter(batches)
    while True:
        if not waiting:
            if (following := next(rest, None)) is None:
                return
            waiting.append(following)
        batch = waiting.popleft()
        if most is not None and len(batch) > most:
            waiting.extendleft(reversed([batch[i : i + most] for i in range(0, len(batch), most)]))
            continue
        try:
            result = work(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            most = (len(batch) + 1) // 2
        else:
            yield batch, result
            continue
        # Only here, when the error is gone, is the memory free of what it held.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warn_user(f"Memory ran out with {len(batch)} at once; going on with {most} at once.", HookedLLaVAWarning)
        waiting.appendleft(batch)
