"""What to change and where: plain data, checked against a model and its inputs before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from numbers import Real
from typing import Any, SupportsFloat, SupportsIndex, TypeAlias, cast, get_args

import numpy as np
import torch
from torch import Tensor

from hooked_llava.checks import Indices, finite_number, one_of
from hooked_llava.errors import InputError
from hooked_llava.model.prompt_hooks import Phase
from hooked_llava.prompt.spans import split_edge
from hooked_llava.prompt.where import Where

ACTIONS = ("value", "add", "scale", "zero", "position_mean", "mean_of", "block", "reweight", "temperature", "fn")
SCORES = "attn.hook_attn_scores"
Numbers: TypeAlias = Tensor | np.ndarray | SupportsFloat | Sequence[Any]


@dataclass(frozen=True, eq=False, repr=False)
class Intervention:
    """One change at one hook.

    Exactly one of `value`, `add`, `scale`, `zero`, `position_mean`, `mean_of`, `block`, `reweight`, `temperature` and `fn`
    says what to do; `InputError` otherwise.

    >>> Intervention("blocks.3.attn.hook_z", positions="last", heads=[2], zero=True)
    Intervention('blocks.3.attn.hook_z', positions='last', heads=[2], zero=True)
    >>> Intervention(("attn_scores", 3), reweight="image->last", factor=0.5)
    Intervention(('attn_scores', 3), reweight=('image', 'last'), factor=0.5)

    Attributes:
        hook (str or tuple): Name of the hook, or any other name of it that a cache takes: ("z", 3), or a short name
            that means one hook.
        positions (Where): Sequence positions (query rows, for scores and pattern); on image hooks indices of
            patches: of a tile, or on `hook_image_embed` of the image, as `token_map.patches` counts them. None: all.
        heads (int or sequence of int): One head or several, on hooks that have them. None: all.
        neurons (int or sequence of int): One MLP neuron or several, on hooks that have them. None: all.
        features (int or sequence of int): One feature of an attached autoencoder or several, on its `hook_sae_acts`. None: all.
        image (int): Which image of the prompt, counted from 0, on image hooks. None: all.
        tile (int): Which vision tile of the image, counted from 0 (the whole image, then its canvas row by row), on hooks
            of the vision tower and the projector. None: all.
        value (tensor, array or number): Replace by this: [d], [n_positions, ...], or the hook's own shape cut to
            positions and heads.
        add (tensor, array or number): Add this; shapes as for `value`.
        scale (float): Multiply by this number.
        zero (bool): Set to zero.
        position_mean (bool): Replace each of several positions by their mean, prompt by prompt; over a single one it
            would do nothing.
        mean (bool): Another word for `position_mean`, which it sets.
        mean_of (InputsLike, list of them, cache, Replay or tensor): Replace by the mean over a reference: prompts,
            batches of them, a cache, a Replay, or the mean itself as a tensor. It is one mean over all prompts and all
            positions that `positions` names in each; see `reference_means`.
        block (str or pair of Where): An edge, (source, target) or "source->target": target may not attend to source; on
            `hook_attn_scores`.
        reweight (str or pair of Where): An edge, named as for `block`: the attention that target pays to source is multiplied
            by `factor`, and each row of the pattern divided by its sum; on `hook_attn_scores`, to which it adds log factor.
        factor (float): Of `reweight`, at least 0: 0 blocks the edge, 1 changes nothing.
        temperature (float): Divide the scores by this number above 0, on `hook_attn_scores` of either tower: above 1 heads
            attend more evenly, below 1 more sharply.
        fn (Callable[..., Tensor] | None): Replace by fn(cut) or fn(cut, hook), where cut is the tensor at the
            intervention's positions and heads.
        phases (Phase): "prefill": of its positions only the prompt's; "decode": only those of the tokens that are
            generated, or appended as an answer; "both".
    """

    hook: str | tuple
    _: KW_ONLY
    positions: Where = None
    heads: Indices | None = None
    neurons: Indices | None = None
    features: Indices | None = None
    image: SupportsIndex | None = None
    tile: SupportsIndex | None = None
    value: Numbers | None = None
    add: Numbers | None = None
    scale: SupportsFloat | None = None
    zero: bool = False
    position_mean: bool = False
    mean: bool = False
    mean_of: Any = None
    block: str | Sequence[Where] | None = None
    reweight: str | Sequence[Where] | None = None
    factor: SupportsFloat | None = None
    temperature: SupportsFloat | None = None
    fn: Callable[..., Tensor] | None = None
    phases: Phase = "both"

    def __post_init__(self) -> None:
        one_of(self.phases, get_args(Phase), "phases")
        if self.mean:
            object.__setattr__(self, "mean", False)
            object.__setattr__(self, "position_mean", True)
        actions = [name for name in ACTIONS if self._is_set(name)]
        if len(actions) != 1:
            raise InputError(
                f"An intervention on {self.hook!r} says {' and '.join(actions) or 'nothing'} of what to do; give exactly "
                f"one of {', '.join(ACTIONS)}."
            )
        for name in ("block", "reweight"):
            self._set_edge(name)
        if self.scale is not None and not _is_number(self.scale):
            raise InputError(f"scale={self.scale!r}; expected one number. To multiply by a tensor, use fn=.")
        self._check_weights()
        if not isinstance(self.mean_of, Tensor) and hasattr(self.mean_of, "__array__"):
            object.__setattr__(self, "mean_of", _as_tensor("mean_of", self.mean_of))
        for name in ("value", "add"):
            object.__setattr__(self, name, _as_tensor(name, getattr(self, name)))

    def _set_edge(self, name: str) -> None:
        """Take "source->target" apart, and refuse what is no edge."""
        edge = getattr(self, name)
        if edge is not None and self.positions is not None:
            raise InputError(f"{name}=(source, target) names its positions itself; leave positions= out.")
        if isinstance(edge, str):
            object.__setattr__(self, name, edge := split_edge(edge))
        if edge is not None and (not isinstance(edge, Sequence) or len(edge) != 2):
            raise InputError(f"{name}={edge!r}; expected two places, (source, target), such as ('image', 'last').")

    def _check_weights(self) -> None:
        """Refuse a factor that no weight can have, one without an edge or an edge without one, and such a temperature."""
        if (self.reweight is None) != (self.factor is None):
            raise InputError(
                f"reweight={self.reweight!r} with factor={self.factor!r}; expected both: reweight='image->last', factor=0.5."
            )
        if self.factor is not None:
            as_factor(self.factor)
        if self.temperature is not None and finite_number(self.temperature, "temperature") <= 0:
            raise InputError(
                f"temperature={self.temperature}; expected a number above 0: below 1 a head attends more sharply, above 1 more "
                "evenly."
            )

    @property
    def edge(self) -> Sequence[Where] | None:
        """(source, target) of `block` or `reweight`; None for what changes no edge."""
        return cast("Sequence[Where] | None", self.reweight if self.block is None else self.block)

    @property
    def changes_nothing(self) -> bool:
        """Whether it is known to leave everything as it is: a factor or a temperature of 1."""
        return (self.reweight is not None and float(cast("float", self.factor)) == 1.0) or (
            self.temperature is not None and float(self.temperature) == 1.0
        )

    def _is_set(self, name: str) -> bool:
        value = getattr(self, name)
        if name == "phases":
            return value != "both"
        return bool(value) if name in ("zero", "mean", "position_mean") else value is not None

    @property
    def action(self) -> str:
        """Name of the field that says what to do."""
        return next(name for name in ACTIONS if self._is_set(name))

    @property
    def operand(self) -> Tensor | None:
        """`value` or `add`, which are tensors by now."""
        return cast("Tensor | None", self.add if self.value is None else self.value)

    def __repr__(self) -> str:
        given = [f.name for f in fields(self) if f.name != "hook" and self._is_set(f.name)]
        return f"Intervention({', '.join([repr(self.hook), *(f'{n}={_show(getattr(self, n))}' for n in given)])})"

    def _key(self) -> tuple[Any, ...]:
        return tuple(comparable(getattr(self, f.name)) for f in fields(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Intervention) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def as_factor(factor: SupportsFloat) -> float:
    """What attention is multiplied by, as a number; raises `InputError` for what is none, or negative.

    >>> as_factor(1)
    1.0
    """
    return finite_number(factor, "factor", least=0.0)


def _is_number(given: object) -> bool:
    return isinstance(given, Real) or getattr(given, "ndim", None) == 0


def _show(value: Any) -> str:
    return f"tensor{list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _as_tensor(name: str, given: Any) -> Tensor | None:
    if given is None or isinstance(given, Tensor):
        return given
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name}={given!r}; expected a tensor, an array or numbers.") from None


def comparable(value: Any) -> Any:
    """A hashable stand-in that is equal exactly where the field is."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), str(value.dtype), value.detach().cpu().double().numpy().tobytes())
    if isinstance(value, slice):
        return (slice, value.start, value.stop, value.step)
    value = value.tolist() if hasattr(value, "tolist") else value  # arrays, and numbers that came out of one
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        try:
            hash(value)
        except TypeError:  # a dict of activations, say: the same only as itself
            return id(value)
        return value
    return tuple(comparable(v) for v in value)
