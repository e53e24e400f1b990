"""What one forward pass begins with and how far it goes, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_llava.architecture.sizes import LanguageConfig
from hooked_llava.checks import one_of
from hooked_llava.errors import InputError
from hooked_llava.machine.devices import to_device
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.validation import check_mask, check_position_ids

ReturnType: TypeAlias = Literal["logits", "loss"] | None
"""What a forward pass gives."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ForwardRequest:
    """A forward pass that is about to be run: over prompts, or over a residual stream that enters some layer.

    Attributes:
        begin (Inputs | Float[Tensor, "batch pos d_model"]): The prompts, or the residual stream.
        attention_mask (Bool[Tensor, "batch pos"] | None): True at real tokens; None if nothing is padded.
        position_ids (Int[Tensor, "batch pos"] | None): Rotary positions; None to count the real tokens.
        start (int): The first layer.
        stop (int | None): The first layer that is not run; None if there are logits.
        return_type (ReturnType): "logits", "loss" or None.
        n_layers (int): How many blocks the language tower has.
    """

    begin: Inputs | Float[Tensor, "batch pos d_model"]
    attention_mask: Bool[Tensor, "batch pos"] | None
    position_ids: Int[Tensor, "batch pos"] | None
    start: int
    stop: int | None
    return_type: ReturnType
    n_layers: int

    @property
    def prompt(self) -> Inputs | None:
        """The prompts; None if the pass begins with a residual stream."""
        return self.begin if isinstance(self.begin, Inputs) else None

    @property
    def fires(self) -> dict[str, Any]:
        """Which hooks fire, as keyword arguments of `HookTable.resolve`; stages are numbered as in `Hook.stage`."""
        end = self.n_layers + 1 if self.stop is None else self.stop
        if self.prompt is None:
            return {"with_image": False, "stages": range(self.start or -1, end)}
        return {"with_image": self.prompt.pixel_values is not None, "stages": range(-2, end)}


def forward_request(
    as_inputs: Callable[[Any], Inputs],
    language: LanguageConfig,
    inputs: Any,
    *,
    return_type: ReturnType = "logits",
    start_at_layer: int | None = 0,
    stop_at_layer: int | None = None,
    input_ids: Int[Tensor, "batch pos"] | None = None,
    pixel_values: Float[Tensor, "*image tile channel height width"] | None = None,
    image_sizes: Int[Tensor, "image 2"] | None = None,
    batch_num_images: Int[Tensor, " prompt"] | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Int[Tensor, "batch pos"] | None = None,
) -> ForwardRequest:
    """The arguments of `HookedLLaVA.forward`, checked; raises `InputError`."""
    start, stop = _layer(start_at_layer, language.n_layers) or 0, _layer(stop_at_layer, language.n_layers)
    if return_type is not None:
        one_of(return_type, ("logits", "loss"), "return_type", expected="'logits', 'loss' or None")
    if stop is not None and stop < start:
        raise InputError(f"start_at_layer={start} lies above stop_at_layer={stop}; a run goes upward.")
    if start or (isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim == 3):
        begin = _checked_residual(inputs, language.d_model, with_loss=return_type == "loss" and stop is None)
        like = begin.new_zeros(begin.shape[:2], dtype=torch.long)
        mask = None if attention_mask is None else _padding(check_mask(attention_mask, like), like.device)
        position_ids = check_position_ids(position_ids, like)
    else:
        fields = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "image_sizes": image_sizes,
            "batch_num_images": batch_num_images,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        begin = as_inputs(_gathered(inputs, {name: value for name, value in fields.items() if value is not None}))
        mask, position_ids = begin.padding_mask, begin.position_ids
    return ForwardRequest(
        begin=begin,
        attention_mask=mask,
        position_ids=position_ids,
        start=start,
        stop=stop,
        return_type=return_type,
        n_layers=language.n_layers,
    )


def _padding(mask: Bool[Tensor, "batch pos"], device: torch.device) -> Bool[Tensor, "batch pos"] | None:
    """A mask that was given, on the device; None if it is known to mask nothing, which only a mask on the CPU is asked."""
    return None if mask.device.type == "cpu" and bool(mask.all()) else to_device(mask, device)


def _layer(layer: int | None, n_layers: int) -> int | None:
    """A layer counted from 0, given that or a negative number; raises `InputError` out of range."""
    if layer is not None and not -n_layers <= layer <= n_layers:
        raise InputError(f"Layer {layer} is out of range; this model has layers {-n_layers}..{n_layers}.")
    return layer if layer is None or layer >= 0 else layer + n_layers


def _gathered(inputs: Any, fields: dict[str, Tensor]) -> Any:
    """One value for `as_inputs`: what was given alone, or a Hugging Face processor's fields as a mapping."""
    if not fields:
        return inputs
    if isinstance(inputs, Tensor) and "input_ids" not in fields:
        return {"input_ids": inputs, **fields}
    if inputs is not None:
        raise InputError(
            f"Both inputs ({type(inputs).__name__}) and {', '.join(fields)} were given; give either prepared inputs, "
            "or the fields that a Hugging Face processor returns."
        )
    return fields


def _checked_residual(resid: Any, d_model: int, *, with_loss: bool) -> Float[Tensor, "batch pos d_model"]:
    shape = tuple(resid.shape) if isinstance(resid, Tensor) else type(resid).__name__
    if not isinstance(resid, Tensor) or resid.ndim != 3 or resid.shape[-1] != d_model or not resid.is_floating_point():
        raise InputError(f"start_at_layer takes a residual stream [batch pos {d_model}] as inputs; got {shape}.")
    if with_loss:
        raise InputError(
            "return_type='loss' needs the tokens, which a residual stream does not hold; ask for 'logits'."
        )
    return resid
