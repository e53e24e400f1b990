"""A sparse autoencoder in the place of a hook: its features and its error are hooks like any other.

With the error term nothing changes: activation = reconstruction + error. While features and error are neither read nor changed,
nothing is computed; where nothing is changed, the activation stays as it is bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.architecture.hooks import HookTable
from hooked_llava.errors import InputError, a_type
from hooked_llava.model.cache_hooks import widths
from hooked_llava.model.components.hook_point import HookPoint

_WIDTHS = ("d_model", "d_mlp", "d_features", "d_head", "head", "kv_head")
"""Axes of the vectors that an autoencoder can be attached to; heads lie side by side."""
_MOST_AT_ONCE = 2**25
"""Features times vectors that are held at once."""


@runtime_checkable
class Autoencoder(Protocol):
    """What is asked of an autoencoder that is attached; `hooked_llava.sae.SparseAutoencoder` is one."""

    cfg: Any
    """Has d_in, d_sae, hook and model_name."""

    @property
    def W_dec(self) -> Tensor:
        """[d_sae, d_in]: what each feature writes."""
        ...

    @property
    def b_dec(self) -> Tensor:
        """[d_in]: what the reconstruction is without features."""
        ...

    def pre_acts(self, x: Tensor, /) -> Tensor:
        """Every feature's activation before the choice."""
        ...

    def choose(self, pre_acts: Tensor, /) -> Any:
        """The features that stay active."""
        ...

    def encode(self, x: Tensor, /) -> Any:
        """The active features of vectors: `choose(pre_acts(x))`."""
        ...

    def decode(self, features: Any, /) -> Tensor:
        """The reconstruction of vectors from their active features."""
        ...

    def dense(self, features: Any, /) -> Tensor:
        """All features of each vector, zeros included."""
        ...


class AttachedSAE:
    """What an activation passes through at a hook with an autoencoder."""

    def __init__(self, sae: Autoencoder, *, keep_error: bool) -> None:
        self.sae, self.keep_error = sae, keep_error
        self.hook_sae_pre = HookPoint()
        self.hook_sae_acts = HookPoint()
        self.hook_sae_error = HookPoint()

    @property
    def points(self) -> tuple[HookPoint, HookPoint, HookPoint]:
        """Its hooks, in the order in which they fire."""
        return self.hook_sae_pre, self.hook_sae_acts, self.hook_sae_error

    def __call__(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The activation with its features and its error as functions on the hooks leave them."""
        if self.keep_error and not any(point.hooked for point in self.points):
            return x
        flat = side_by_side(x, self.sae.cfg.d_in)
        vectors = flat.to(self.sae.b_dec)  # its dtype, and its device: it may lie elsewhere than the layer
        pre = self.sae.pre_acts(vectors)
        new_pre = self.hook_sae_pre(pre)
        chosen = self.sae.choose(new_pre)
        if not (self.keep_error or self.hook_sae_acts.hooked or self.hook_sae_error.hooked):
            return self.sae.decode(chosen).to(x).view_as(x)
        features = chosen if new_pre is pre else self.sae.choose(pre)
        acts = self.sae.dense(features)  # (..., d_sae)
        error = vectors - self.sae.decode(features)
        new_acts = self.hook_sae_acts(acts if new_pre is pre else self.sae.dense(chosen))
        new_error = self.hook_sae_error(error.view_as(x)).view_as(vectors)
        if not self.keep_error:
            return self._decode(new_acts).to(x).view_as(x)
        if new_acts is acts and new_error.data_ptr() == error.data_ptr() and not torch.is_grad_enabled():
            return x
        # Zero where nothing is changed, so that these vectors stay as they are.
        change = (new_acts - acts) @ self.sae.W_dec + (new_error - error)
        out = (flat + change.to(x)).view_as(x)
        if not torch.is_grad_enabled():
            return out
        graph = (self._decode(new_acts) + new_error).to(x).view_as(x)  # gradients pass features and error
        return out.detach() + (graph - graph.detach())

    def _decode(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        return acts @ self.sae.W_dec + self.sae.b_dec


def side_by_side(x: Float[Tensor, "*batch width"], d_in: int) -> Float[Tensor, "*vector d_in"]:
    """An activation as vectors of that width: heads lie side by side."""
    return x if x.shape[-1] == d_in else x.flatten(-2)


def encoded_in_parts(sae: Autoencoder, x: Float[Tensor, "vector d_in"]) -> Iterator[Any]:
    """The active features of many vectors, of some at a time: all features of all vectors are never held at once."""
    yield from (sae.encode(part) for part in x.split(max(1, _MOST_AT_ONCE // len(sae.W_dec))))


def vector_width(table: HookTable, name: str) -> int:
    """Length of the vectors of a hook, its heads side by side; 0 for a hook without vectors, such as a pattern."""
    axes = table[name].axes
    sizes = {axis: size for axis, size in widths(table, name).items() if axis in _WIDTHS}
    return math.prod(sizes.get(axis, 0) for axis in axes if axis in ("head", "kv_head", axes[-1]))


def check_sae(sae: Autoencoder, hook: Any, table: HookTable, model_name: str | None) -> str:
    """The full name of the hook that an autoencoder is attached to; raises `InputError` where it does not belong there.

    Also for a hook that has an autoencoder already.
    """
    name = place_of_sae(sae, hook, table, model_name)
    if name in table.d_sae:
        raise InputError(f"hook={name!r} has an autoencoder attached already; leave its block first.")
    return name


def place_of_sae(sae: Autoencoder, hook: Any, table: HookTable, model_name: str | None) -> str:
    """The full name of the hook that an autoencoder fits; raises `InputError` for one of another width, hook or model."""
    if not isinstance(sae, Autoencoder):
        raise InputError(f"sae is {a_type(sae)}; expected a SparseAutoencoder, such as load_sae gives.")
    trained_on = sae.cfg.hook
    if hook is None and trained_on is None:
        raise InputError("hook=None, and the autoencoder does not say which hook it was trained on; name it.")
    name = table.one(trained_on if hook is None else hook)
    known = trained_on in table.hooks or trained_on in table.aliases
    if known and table.one(trained_on) != name:
        raise InputError(f"hook={hook!r}, and the autoencoder was trained on {trained_on!r}; attach it there.")
    if model_name is not None and sae.cfg.model_name not in (None, model_name):
        raise InputError(
            f"The autoencoder was trained on the model {sae.cfg.model_name!r} and this one is {model_name!r}; give any_model="
            "True if they are the same or the mismatch is meant."
        )
    width = vector_width(table, name)
    if width != sae.cfg.d_in:
        raise InputError(
            f"hook={name!r} has activations of width {width} and the autoencoder takes d_in={sae.cfg.d_in}; attach it to the "
            "hook it was trained on."
        )
    return name
