"""Where kept runs lie whose makers do not say it: those of analyses and edits, which take no argument for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from hooked_llava.errors import InputError
from hooked_llava.machine.devices import keeper

_PLACE: ContextVar[tuple[torch.device | str | None, Path | None]] = ContextVar("place_of_kept_runs")


@contextmanager
def offloaded_runs(
    offload_folder: str | os.PathLike[str] | None = None, *, device: torch.device | str | None = None
) -> Iterator[None]:
    """Inside the block every kept run that is made lies on disk, in files of a folder, or on a device such as "cpu".

    It holds for what analyses, edits and `Replay` make in this thread, layer by layer while the model runs. A `Replay` that is
    told where to keep its run does as it is told. Blocks may be nested; the inner one counts. What was made inside stays
    where it is after the block. Raises `InputError` where neither or both are given, and for a folder that there is not.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.analysis import attention_knockout
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> with offloaded_runs(device="cpu"):
    ...     knockout = attention_knockout(model, model.prepare("Who made the star?"), "question->last")
    >>> dict(knockout.sizes)
    {'edge': 1, 'layer': 6}
    """
    if offload_folder is None and device is None:
        raise InputError('offloaded_runs() is told no place; expected offload_folder="...", or device="cpu".')
    folder = None if offload_folder is None else Path(offload_folder).expanduser().resolve()
    keeper(device, folder)  # raises
    before = _PLACE.set((device, folder))
    try:
        yield
    finally:
        _PLACE.reset(before)


def run_keeper(
    device: torch.device | str | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
) -> Callable[[Tensor], Tensor]:
    """What keeps a run's tensors: where it is told, else where the innermost `offloaded_runs` says, else where they are.

    Raises `InputError` as `keeper` does.
    """
    if device is None and offload_folder is None:
        device, offload_folder = _PLACE.get((None, None))
    return keeper(device, offload_folder, dtype)
