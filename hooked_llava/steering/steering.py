"""One engine to steer with: a direction, or features of an autoencoder, as plain interventions at one hook.

A `Steering` holds `Intervention`s. So it acts in one pass, in generation and in Replay alike, at the positions that it names.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, SupportsFloat, SupportsIndex, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.architecture.hooks import Hook
from hooked_llava.checks import as_index, finite_number, one_of
from hooked_llava.errors import InputError
from hooked_llava.model.attached_sae import AttachedSAE, Autoencoder, place_of_sae
from hooked_llava.model.cache_hooks import widths
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.prompt_hooks import Phase
from hooked_llava.options.steering_modes import STEERING_MODES, SteeringMode
from hooked_llava.prompt.where import Where
from hooked_llava.replay.intervention import Intervention
from hooked_llava.results.provenance import described
from hooked_llava.steering.changes import FeatureClamp, VectorChange

DirectionLike: TypeAlias = Tensor | np.ndarray | Mapping[int, SupportsFloat]
"""A vector of the hook's width, or features of an autoencoder with their values."""


@dataclass(frozen=True, eq=False, repr=False)
class Steering:
    """What steers a model at one hook; `steer` makes it.

    In a `with` block every run of the model is steered. `model.generate(..., steering=...)` takes it (or a list of them), and
    `Replay.run([steering.interventions])` replays it. With mode="replace" and features, `attached` puts the autoencoder in.

    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> steering = steer(model, torch.ones(128), hook=("resid_post", 2), positions="last")
    >>> with steering as steered:
    ...     text = steered.generate("USER: Who made the star? ASSISTANT:")
    >>> text == model.generate("USER: Who made the star? ASSISTANT:", steering=steering)
    True

    Attributes:
        model (HookedLLaVA): The model.
        hook (str): Full name of the hook.
        interventions (tuple[Intervention, ...]): The changes, as data.
        reconstructs (Autoencoder | None): The autoencoder whose reconstruction takes the activation's place, if one does.
        written (Float[Tensor, " d"]): What mode="add" adds: strength times the direction, or times what the features write.
        about (Mapping[str, Any]): The arguments, in plain words and numbers.
        _open (list[ExitStack]): The blocks that it steers now.
    """

    model: HookedLLaVA
    hook: str
    interventions: tuple[Intervention, ...]
    reconstructs: Autoencoder | None
    written: Float[Tensor, " d"]
    about: Mapping[str, Any]
    _open: list[ExitStack] = field(default_factory=list, init=False)

    def attached(self) -> AbstractContextManager[Any]:
        """The autoencoder attached inside the block where its reconstruction is used; otherwise a block that does nothing.

        Make a `Replay` inside it.
        """
        if self.reconstructs is None:
            return nullcontext()
        return self.model.attach_sae(self.reconstructs, self.hook, keep_error=False, any_model=True)

    def __enter__(self) -> HookedLLaVA:
        with ExitStack() as stack:
            stack.enter_context(self.attached())
            stack.enter_context(self.model.hooks(self.interventions))
            self._open.append(stack.pop_all())
        return self.model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._open.pop().__exit__(kind, error, where)

    def __repr__(self) -> str:
        return f"Steering({', '.join(f'{name}={value!r}' for name, value in self.about.items())})"


def steer(
    model: HookedLLaVA,
    direction: DirectionLike,
    *,
    hook: str | tuple[str, int] | None = None,
    positions: Where = None,
    phases: Phase = "both",
    mode: SteeringMode | None = None,
    strength: SupportsFloat = 1.0,
    sae: Autoencoder | None = None,
    image: SupportsIndex | None = None,
    tile: SupportsIndex | None = None,
    any_model: bool = False,
) -> Steering:
    """Steer along a direction, or by features: a context manager, an option of `generate`, and interventions for Replay.

    Args:
        model: the model.
        direction: a vector of the hook's width, such as `mean_difference` gives; or {feature: value}. {} with
            mode="replace" puts the reconstruction in and sets nothing.
        hook: any name of the hook; by default the one that the autoencoder was trained on.
        positions: where, as for `Intervention`; None: every position. Named positions are the prompt's; "answer" is what is
            generated.
        phases: "prefill": in the pass over the prompt; "decode": in the passes over generated tokens (or those of an
            appended answer); "both".
        mode: one of the names in `hooked_llava.options.steering_modes.STEERING_MODES`; by default "add" for a direction,
            and "clamp" for features.
        strength: multiplies the direction, or the features' values; with "project_out" the share that is taken away.
        sae: the autoencoder of the features; by default the one that is attached to the hook.
        image: which image, on hooks of the image side.
        tile: which tile of the image, on hooks of the vision tower and the projector.
        any_model: take an autoencoder that was trained on a model of another name.

    Raises `InputError` for a direction of another width, one that is 0 where a mode needs its length, numbers that are not
    finite, features and modes that are not there, and hooks without vectors; `HookNameError` for unknown hooks. Positions are
    checked when it is used.

    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> inputs = model.prepare("Who made the star?")
    >>> steering = steer(model, torch.ones(128), hook=("resid_post", 2), positions="last")
    >>> with steering:
    ...     steered = model(inputs)
    >>> bool((steered != model(inputs))[0, -1].any())
    True
    """
    strength = finite_number(strength, "strength")
    if mode is not None:
        one_of(mode, STEERING_MODES, "mode")
    where = {"positions": positions, "phases": phases, "image": image, "tile": tile}
    given = {name: described(value) for name, value in where.items() if value is not None}
    if isinstance(direction, Mapping):
        sae = _autoencoder(model, sae, hook)
        name = place_of_sae(sae, hook, model.hooks_table, None if any_model else model.config.model_name)
        made = _by_features(model, name, sae, direction, mode or "clamp", strength, where)
    elif hook is None or sae is not None:
        kind = type(direction).__name__
        raise InputError(f"For features give {{feature: value}}; a direction ({kind}) needs hook= and no sae=.")
    else:
        made = _along_direction(model, model.hooks_table.one(hook), direction, mode or "add", strength, where)
    return replace(made, about=dict(made.about) | given)


def _along_direction(
    model: HookedLLaVA, name: str, direction: Any, mode: SteeringMode, strength: float, where: Mapping[str, Any]
) -> Steering:
    at = _checked_hook(model, name)
    vector = _vector(model, at, direction, mode)
    change = VectorChange(mode, vector[None], strength * vector, strength)
    about = {"hook": name, "mode": mode, "strength": strength, "width": len(vector)}
    return Steering(model, name, (_along(model, at, change, where),), None, change.total, about)


def _by_features(
    model: HookedLLaVA,
    name: str,
    sae: Autoencoder,
    features: Mapping[Any, Any],
    mode: SteeringMode,
    strength: float,
    where: Mapping[str, Any],
) -> Steering:
    at = _checked_hook(model, name)
    values = _values(sae, features, strength)
    if not values and mode != "replace":
        raise InputError(
            "direction={} sets no feature; expected {feature: value}, or mode='replace' for the reconstruction."
        )
    decoder = sae.W_dec.detach()[torch.tensor(list(values), dtype=torch.long, device=sae.W_dec.device)]
    written = torch.tensor(list(values.values()), dtype=decoder.dtype, device=decoder.device) @ decoder
    changes: tuple[Intervention, ...]
    if mode == "replace":
        pre = f"{name}.hook_sae_pre"
        changes = tuple(Intervention(pre, features=[one], value=value, **where) for one, value in values.items())
    elif mode == "clamp":
        changes = (Intervention(name, fn=FeatureClamp(sae, values), **where),)
    else:
        changes = (_along(model, at, VectorChange(mode, decoder, written, strength), where),)
    about = {
        "hook": name,
        "mode": mode,
        "strength": strength,
        "features": {int(f): float(v) for f, v in features.items()},
    }
    return Steering(model, name, changes, _to_attach(model, sae, name) if mode == "replace" else None, written, about)


def _along(model: HookedLLaVA, at: Hook, change: VectorChange, where: Mapping[str, Any]) -> Intervention:
    """The change at the hook; where it only adds or puts a vector, as that vector."""
    shape = width_of(model, at)
    if change.mode in ("add", "replace"):
        vector = change.total.detach().view(shape)
        return Intervention(at.name, **({"add": vector} if change.mode == "add" else {"value": vector}), **where)
    return Intervention(at.name, fn=change, **where)


def width_of(model: HookedLLaVA, at: Hook) -> tuple[int, ...]:
    """The shape of a hook's activation at one position: [d], or [head, d_head]."""
    sizes, first = widths(model.hooks_table, at.name), (at.position_axis or 1) + 1
    return tuple(sizes[axis] for axis in at.axes[first:])


def _checked_hook(model: HookedLLaVA, name: str) -> Hook:
    at = model.hooks_table[name]
    if at.position_axis != 1 or "key" in at.axes or at.axes[-1] == "1":
        raise InputError(f"hook={name!r} is [{' '.join(at.axes)}]; expected one with a vector at every position.")
    return at


def _vector(model: HookedLLaVA, at: Hook, direction: Any, mode: SteeringMode) -> Float[Tensor, " d"]:
    """The direction as a vector on the model's device; raises `InputError`."""
    shape = width_of(model, at)
    try:
        vector = torch.as_tensor(direction).to(model.cfg.device).detach()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"direction={direction!r}; expected a vector of shape {shape}, or {{feature: value}}."
        ) from None
    if tuple(vector.shape) not in (shape, (int(np.prod(shape)),)) or not vector.is_floating_point():
        raise InputError(
            f"direction has shape {tuple(vector.shape)} and {vector.dtype}; expected floating point numbers of shape {shape} "
            f"at {at.name!r}."
        )
    if not bool(vector.isfinite().all()):
        raise InputError("direction has NaN or infinite numbers.")
    if mode in ("project_out", "clamp") and not bool(vector.any()):
        raise InputError(f"direction is 0 everywhere, so nothing lies along it; mode={mode!r} needs one with a length.")
    return vector.flatten()


def _autoencoder(model: HookedLLaVA, sae: Autoencoder | None, hook: Any) -> Autoencoder:
    """The autoencoder that was given, or the one that is attached to the hook."""
    if sae is not None:
        return sae
    held = [point.then.sae for point in model.hook_dict.values() if isinstance(point.then, AttachedSAE)]
    if hook is not None:
        then = model.hook_dict[model.hooks_table.one(hook)].then
        held = [then.sae] if isinstance(then, AttachedSAE) else []
    if len(held) != 1:
        where = "the model" if hook is None else f"hook={hook!r}"
        raise InputError(
            f"sae=None, and {len(held)} autoencoders are attached to {where}; give the features' own as sae=."
        )
    return held[0]


def _to_attach(model: HookedLLaVA, sae: Autoencoder, name: str) -> Autoencoder | None:
    """The autoencoder, unless it is there already and replaces the activation; raises `InputError` for another one."""
    then = model.hook_dict[name].then
    if then is None:
        return sae
    if isinstance(then, AttachedSAE) and then.sae is sae and not then.keep_error:
        return None
    raise InputError(
        f"mode='replace' puts the reconstruction in the place of {name!r}, which has an autoencoder attached with its error "
        "kept, or another one. Leave its block first, or attach this one with keep_error=False."
    )


def _values(sae: Autoencoder, features: Mapping[Any, Any], strength: float) -> dict[int, float]:
    """The features' values times the strength; raises `InputError` for features that are not there, and for no numbers."""
    values = {}
    for feature, value in features.items():
        index = as_index(feature, len(sae.W_dec), "feature", from_end=False)
        values[index] = strength * finite_number(value, f"direction[{index}]")
    return values
