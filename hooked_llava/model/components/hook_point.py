"""TransformerLens's HookPoint, with hook functions kept from harming what they do not own.

Neighboring hooks share storage (`blocks.0.hook_resid_post` is `blocks.1.hook_resid_pre`), so a function that
writes in place would change another hook's cached tensor. Each function therefore works on a private copy, and
what it wrote takes effect from here on.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
import transformer_lens.hook_points as tl_hook_points
from torch import Tensor

from hooked_llava.errors import HookValueError


def reads_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a hook function that never writes to its tensor, so that it is given the tensor itself, not a copy."""
    function.reads_only = True  # type: ignore[attr-defined]
    return function


def has_functions(module: torch.nn.Module) -> bool:
    """Whether any function, forward or backward, is attached to a module, be it by us, by TransformerLens or by torch.

    >>> has_functions(torch.nn.Identity())
    False
    """
    return bool(
        module._forward_hooks or module._backward_hooks or module._forward_pre_hooks or module._backward_pre_hooks  # noqa: SLF001
    )


def with_hook(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """The function as one of (tensor, hook), whether it was written as fn(tensor) or fn(tensor, hook).

    It gets the hook if it has a parameter of that name, takes any keywords, or needs a second argument.

    >>> with_hook(lambda x: x + 1)(1, "the hook"), with_hook(lambda x, hook: hook)(1, "the hook")
    (2, 'the hook')
    """
    asked = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        parameters = inspect.signature(asked).parameters.values()
    except (TypeError, ValueError):  # built-in functions such as torch.relu do not say
        return lambda tensor, hook: function(tensor)
    if any((p.name == "hook" and p.kind is not p.POSITIONAL_ONLY) or p.kind is p.VAR_KEYWORD for p in parameters):
        return lambda tensor, hook: function(tensor, hook=hook)
    needed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    if len(needed) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return lambda tensor, hook: function(tensor, hook)  # noqa: PLW0108 (it is called with hook=)
    return lambda tensor, hook: function(tensor)


def start_graph(x: Tensor) -> Tensor:
    """Let gradients reach this activation: weights are frozen, so without it the graph would have no beginning."""
    return x.requires_grad_() if torch.is_grad_enabled() and not x.requires_grad else x


class HookPoint(tl_hook_points.HookPoint):
    """An identity through which one activation passes, and where functions may read or replace it."""

    then: Callable[[Tensor], Tensor] | None = None
    """What the activation passes through after the functions: an attached autoencoder."""

    def __call__(self, x: Tensor) -> Tensor:
        """The activation, through the attached functions; as it is where there are none."""
        # nn.Module's own call costs several times as much, and a forward pass makes one for every name. `has_functions` is
        # written out here, since its call would cost half as much again.
        if self._forward_hooks or self._backward_hooks or self._forward_pre_hooks or self._backward_pre_hooks:
            x = super().__call__(x)
        return x if self.then is None else self.then(x)

    @property
    def hooked(self) -> bool:
        """Whether the activation is hooked: by functions, forward or backward, or by an autoencoder."""
        return self.then is not None or has_functions(self)

    def add_hook(
        self,
        hook: Any,
        dir: Literal["fwd", "bwd"] = "fwd",  # noqa: A002 (TransformerLens's name)
        *args: Any,
        **kwargs: Any,
    ) -> tl_hook_points.LensHandle:
        """Attach `hook(tensor)` or `hook(tensor, hook)`; it may return a tensor of the same shape, or None to keep it."""
        guarded = hook
        if not getattr(hook, "reads_only", False):
            guarded = _guard(hook) if dir == "fwd" else functools.wraps(hook)(with_hook(hook))
        handle = super().add_hook(guarded, dir, *args, **kwargs)
        handle.user_hook = hook
        return handle


def _guard(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give the function a private copy of the tensor and check what it returns."""
    called = with_hook(function)

    @functools.wraps(function)
    def guarded(tensor: Tensor, hook: HookPoint) -> Tensor | None:
        private = tensor.clone()
        tracks_writes = not private.is_inference()
        version = private._version if tracks_writes else 0
        returned = called(private, hook)
        if returned is None:
            # With gradients the copy itself goes on, so that those of a tensor that the function kept can be had.
            on_path = private.requires_grad or not tracks_writes or private._version != version
            return private if on_path else None
        _check_returned(returned, tensor, hook.name)
        return returned

    return guarded


def _check_returned(returned: Any, given: Tensor, name: str | None) -> None:
    if not isinstance(returned, torch.Tensor):
        raise HookValueError(
            f"A function on {name} returned {type(returned).__name__}; expected a tensor of shape "
            f"{tuple(given.shape)}, or None to leave the activation as it is."
        )
    if returned.shape != given.shape or returned.dtype != given.dtype:
        raise HookValueError(
            f"A function on {name} returned a tensor of shape {tuple(returned.shape)} and {returned.dtype}; expected "
            f"{tuple(given.shape)} and {given.dtype}, as it was given. Return the whole activation, changed where "
            "wanted."
        )
    if returned.device != given.device:
        raise HookValueError(
            f"A function on {name} returned a tensor on {returned.device}; expected one on {given.device}, where it was "
            "given."
        )
