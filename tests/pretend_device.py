"""Accelerators that are not there: tensors that say they are on `cuda:0` or `cuda:1`, with their numbers on the CPU.

Inside `accelerators()` whatever asks for such a device gets tensors of this kind. Their numbers are right, so control flow and
results are those of a real run. What an accelerator does not do is refused: operations on tensors of two devices. What
makes the CPU wait for it is written down: reading a number (`bool(x)`, `.item()`, `.tolist()`, `.cpu()`), results whose size
depends on numbers (`nonzero`, boolean indices), and copies to it that wait (`torch.tensor(list, device=...)`).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_flatten, tree_map

import hooked_llava

CPU = torch.device("cpu")
_PACKAGE = Path(hooked_llava.__file__).parent
_aten: Any = torch.ops.aten
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_READS = {
    *(
        _aten._local_scalar_dense,
        _aten.equal,
        _aten.is_nonzero,
        _aten.nonzero,
        _aten.masked_select,
        _aten.bincount,
        _aten.multinomial,
    ),
    *(_aten._unique, _aten._unique2, _aten.unique_dim, _aten.unique_consecutive),
}
"""Operations whose result, or its size, the CPU must wait for."""


class OnDevice(Tensor):
    """A tensor that says it is on an accelerator; `held` has its numbers. To torch's own code it lies on the CPU."""

    held: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, held: Tensor, place: torch.device) -> OnDevice:
        shape = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, held.size(), dtype=held.dtype, device=CPU, **shape)
        made.held, made.place = held, place
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({tuple(self.shape)}, {self.dtype}, {self.place})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FUNCTIONS:
            return _FUNCTIONS[func](*args, **kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on a tensor of an accelerator, outside of its block")


class Accelerators(TorchDispatchMode):
    """Torch with accelerators.

    Attributes:
        waits (Counter[tuple[str, str]]): What waited for one of them, and how often: the kind of wait ("read", "upload"), and
            the innermost function of the package, as "replay/state.py:ReplayState.check_fresh".
        moves (int): Copies from one of them to another, for which nothing waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.moves = 0
        self.back_to: torch.device | None = None  # where a gradient goes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = dict(kwargs or {}), func.overloadpacket
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        places = {x.place for x in tensors if isinstance(x, OnDevice)}
        target = next(iter(places), CPU)
        in_backward = places and torch._C._current_autograd_node() and self.back_to is None
        if kwargs.get("device") is not None and not in_backward:
            target = _device(kwargs["device"])  # in a backward pass it is torch that names it, and takes it for the CPU
        if target.type in ("cpu", "meta") and not places:
            return func(*args, **kwargs)
        if packet in (_aten._to_copy, _aten.copy_):
            target = self._copied(packet, tensors, target, kwargs.get("non_blocking") or args[2:] == (True,))
        else:
            self._check(func, tensors, args)
        kwargs |= {"device": CPU} if kwargs.get("device") is not None else {}
        out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if target == CPU:
            return out
        wrapped = tree_map(lambda x: OnDevice(x, target) if type(x) is Tensor else x, out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def _copied(self, packet: Any, tensors: list[Tensor], target: torch.device, eager: bool) -> torch.device:
        """Where a copy goes; one between the CPU and an accelerator makes the CPU wait, unless it is not to."""
        target, source = (_where(tensors[0]), tensors[1]) if packet is _aten.copy_ else (target, tensors[0])
        self.moves += CPU not in (_where(source), target) and _where(source) != target
        if _where(source) != target == CPU:
            self.waits["read", _place()] += 1
        elif _where(source) == CPU != target and source.numel() and not eager:
            self.waits["upload", _place()] += 1
        return target

    def _check(self, func: Any, tensors: list[Tensor], args: Any) -> None:
        """Refuse tensors of two devices, as torch does: a single number of the CPU may meet any tensor, and indices may."""
        packet = func.overloadpacket
        indices = [x for x in args[1] if x is not None] if packet in _INDEXING else []
        free = [i for i in indices if _where(i) == CPU]
        meeting = {_where(x) for x in tensors if (x.ndim or _where(x) != CPU) and not any(x is i for i in free)}
        if len(meeting) > 1:
            given = ", ".join(f"{tuple(x.shape)} on {_where(x)}" for x in tensors)
            raise RuntimeError(f"{func} got tensors of two devices: {given}; in {_place()}")
        if packet in _READS or any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            self.waits["read", _place()] += 1
        if free:
            self.waits["upload", _place()] += 1  # torch copies them there itself, and waits


def _place() -> str:
    """The innermost function of the package that is running, but for `to_device`, which others call."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE) and frame.f_code.co_name != "to_device":
            return f"{path.relative_to(_PACKAGE)}:{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "the test"


def _held(x: Any) -> Any:
    return x.held if isinstance(x, OnDevice) else x


def _where(x: Tensor) -> torch.device:
    """Where a tensor says it is."""
    return x.place if isinstance(x, OnDevice) else CPU


def _device(given: Any) -> torch.device:
    device = torch.device(given)
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


# ---------------------------------------------------------------------- what torch would ask of the device in its own code


def _to(x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    if "other" in kwargs:
        other = kwargs.pop("other")
        kwargs |= {"device": other.device, "dtype": other.dtype}
    device, dtype, eager, _ = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype = x.device if device is None else _device(device), dtype or x.dtype
    if (device, dtype) == (x.device, x.dtype) and not copy:
        return x
    if device != x.device and x.requires_grad and torch.is_grad_enabled():
        return _Moved.apply(x, device, dtype)
    return _aten._to_copy(x, dtype=dtype, device=device, non_blocking=eager)


class _Moved(torch.autograd.Function):
    """A copy on another device, whose gradient goes back to the first: torch itself would take both for the CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        ctx.came_from = x.device, x.dtype
        return _aten._to_copy(x, dtype=dtype, device=device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        device, dtype = ctx.came_from
        mode = next(m for m in reversed(_get_current_dispatch_mode_stack()) if isinstance(m, Accelerators))
        mode.back_to = device
        try:
            return _aten._to_copy(gradient, dtype=dtype, device=device), None, None
        finally:
            mode.back_to = None


def _cpu(x: Tensor, **kwargs: Any) -> Tensor:
    return _to(x, "cpu")


def _tolist(x: Tensor) -> Any:
    return _cpu(x).tolist()


def _numpy(x: Tensor, *, force: bool = False) -> Any:
    if not force:
        raise TypeError(f"can't convert a tensor on {x.device} to numpy; call .cpu() first")
    return _cpu(x.detach()).numpy()


def _data_ptr(x: Tensor) -> int:
    return _held(x).data_ptr()


def _embedding_bag(indices: Tensor, table: Tensor, *_: Any, per_sample_weights: Tensor, mode: str, **__: Any) -> Tensor:
    assert mode == "sum"  # torch makes offsets where it believes the indices to be
    return (table[indices] * per_sample_weights[..., None]).sum(-2)


def _new_tensor(x: Tensor, data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    return torch.tensor(data, dtype=dtype or x.dtype, device=device or x.device)


_DEVICE: Any = Tensor.device
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    _DEVICE.__get__: _where,
    Tensor.to: _to,
    Tensor.cpu: _cpu,
    Tensor.type_as: _to,
    Tensor.tolist: _tolist,
    Tensor.numpy: _numpy,
    Tensor.new_tensor: _new_tensor,
    Tensor.data_ptr: _data_ptr,
    torch.nn.functional.embedding_bag: _embedding_bag,
}


@contextmanager
def accelerators() -> Iterator[Accelerators]:
    """Inside the block torch has the accelerators `cuda:0` and `cuda:1`."""
    before = torch._C._only_lift_cpu_tensors(), torch.__future__.get_overwrite_module_params_on_conversion()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(list, device=...)` is made on the CPU, then copied
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # `model.to(...)` makes parameters of this kind
    try:
        memory = mock.patch.object(torch.cuda, "mem_get_info", return_value=(2**33, 2**33))
        with mock.patch.object(torch.cuda, "_lazy_init"), memory, Accelerators() as mode:
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(before[0])
        torch.__future__.set_overwrite_module_params_on_conversion(before[1])
