"""Gradient x input and integrated gradients, of the image embeddings or of the pixels.

Gradient x input: the first-order estimate of what the log probability owes to an input (Shrikumar et al. 2016).
Integrated gradients (Sundararajan et al. 2017): the same with the gradient averaged on the straight line from a baseline,
so that the parts add up to the difference of log probability between input and baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.checks import whole_number
from hooked_llava.machine.devices import to_device
from hooked_llava.model.components.hook_point import reads_only
from hooked_llava.model.components.precision import at_least_float32
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.readout.answer import answer_log_probability
from hooked_llava.readout.resid import logits_at
from hooked_llava.results.image_axes import ImageAxes, take_each

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA

Ids = Int[Tensor, "prompt read variant"] | None
Read = Int[Tensor, "prompt read"]


def log_probability_of_run(
    model: HookedLLaVA, inputs: Inputs, entering: Float[Tensor, "prompt pos d_model"], read: Read, ids: Ids
) -> tuple[Float[Tensor, " prompt"], Int[Tensor, "prompt read variant"]]:
    """log P(answer) of every prompt given what enters the language tower, and the answer's tokens.

    With `ids` None the answer is the model's own next token.
    """
    logits = _read_logits(model, inputs, entering, read)
    target = logits.argmax(-1, keepdim=True) if ids is None else ids
    return answer_log_probability(logits, target), target


def _read_logits(
    model: HookedLLaVA, inputs: Inputs, entering: Float[Tensor, "prompt pos d_model"], read: Read
) -> Float[Tensor, "prompt read d_vocab"]:
    where = {"attention_mask": inputs.padding_mask, "position_ids": inputs.position_ids}
    return at_least_float32(logits_at(model, model(entering, **where, stop_at_layer=model.cfg.n_layers), read))


def gradient_times_input(
    model: HookedLLaVA, inputs: Inputs, read: Read, ids: Ids, *, vision: bool = False
) -> tuple[Float[Tensor, "prompt image place"], Int[Tensor, "prompt read variant"]]:
    """d log P / d x . x of every patch, and the answer's tokens; x is the image embedding or, with `vision`, the pixels.

    Pixels are normalised, so that 0 is the color that the processor subtracts.
    """
    end, log_p = _path(model, inputs, read, vision=vision)
    gradient, ids = _gradient(log_p, end, ids)
    return _by_place(model, inputs, gradient * end, vision=vision), ids


def integrated_gradients(
    model: HookedLLaVA,
    inputs: Inputs,
    read: Read,
    ids: Ids,
    *,
    steps: int = 16,
    vision: bool = False,
    baseline: Tensor | None = None,
) -> tuple[Float[Tensor, "prompt image place"], Int[Tensor, "prompt read variant"]]:
    """(x - x0) . mean gradient on the line from the baseline x0 to x, over the midpoints of `steps` equal parts.

    The model's own answer is the one that it gives at x.

    The baseline of image embeddings is the mean of the image's own (Neo et al. 2024 take a data set's mean: give it as
    `baseline` [d_model]), that of pixels the color that the processor subtracts, 0. Gradients are added up in float32 at
    least, however the model computes. The parts sum to log P(x) - log
    P(x0), as closely as the steps allow. Raises `InputError` for fewer than one step.
    """
    whole_number(steps, "steps", least=1, expected="the number of points on the path, at least 1")
    end, log_p = _path(model, inputs, read, vision=vision)
    if ids is None:
        with torch.no_grad():
            ids = log_p(end, None)[1]
    start = torch.zeros_like(end) if vision else _without_image(inputs, end, baseline)
    way = at_least_float32(end) - at_least_float32(start)
    total = torch.zeros_like(way)
    for step in range(steps):
        total += _gradient(log_p, (start + (step + 0.5) / steps * way).to(end.dtype), ids)[0]
    return _by_place(model, inputs, total / steps * way, vision=vision), ids


_LogP = Callable[[Tensor, Ids], tuple[Tensor, Tensor]]


def _path(model: HookedLLaVA, inputs: Inputs, read: Read, *, vision: bool) -> tuple[Tensor, _LogP]:
    """Where the path ends, and log P as a function of points on it."""
    if vision:
        assert inputs.pixel_values is not None

        def of_pixels(pixels: Tensor, ids: Ids) -> tuple[Tensor, Tensor]:
            embedding = model.embed(replace(inputs, pixel_values=pixels))
            return log_probability_of_run(model, inputs, embedding, read, ids)

        return inputs.pixel_values, of_pixels
    with torch.no_grad():
        end = model.embed(inputs)
    return end, lambda entering, ids: log_probability_of_run(model, inputs, entering, read, ids)


def _gradient(log_p: _LogP, at: Tensor, ids: Ids) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = at.detach().requires_grad_()
        values, ids = log_p(leaf, ids)
        return torch.autograd.grad(values.sum(), leaf)[0], ids


def _without_image(
    inputs: Inputs, end: Float[Tensor, "prompt pos d_model"], baseline: Tensor | None
) -> Float[Tensor, "prompt pos d_model"]:
    """The embeddings with every image's replaced by one vector; text stays."""
    start = end.clone()
    for row, token_map in enumerate(inputs.token_maps):
        for image in range(token_map.n_images):
            where = token_map.image(image).tensor(end.device)
            own = at_least_float32(end[row, where]).mean(0) if baseline is None else to_device(baseline, end.device)
            start[row, where] = own.to(end.dtype)
    return start


def _by_place(
    model: HookedLLaVA, inputs: Inputs, parts: Tensor, *, vision: bool
) -> Float[Tensor, "prompt image place"]:
    axes = ImageAxes.of(inputs)
    if vision:
        return axes.of_patches(sum_pixels(model, parts.float())).unflatten(0, (len(inputs), -1))
    return take_each(parts.float().sum(-1), axes.positions_of_all(inputs))


def sum_pixels(
    model: HookedLLaVA, values: Float[Tensor, "tile channel height width"]
) -> Float[Tensor, "tile patch_row patch_col"]:
    """Values by pixel, added up over every patch."""
    size = model.config.vision.patch_size
    return values.sum(1).unfold(1, size, size).unfold(2, size, size).sum((-1, -2))


def with_gradients(
    model: HookedLLaVA, inputs: Inputs, read: Read, ids: Ids, names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Int[Tensor, "prompt read variant"]]:
    """Activations of one forward pass, the gradients of the answer's logit there, and the answer's tokens.

    The logit, since the gradient of log P vanishes where the model is sure, and products of such gradients even more.
    """
    held: dict[str, Tensor] = {}

    @reads_only
    def keep(tensor: Tensor, hook: Any) -> None:
        held[hook.name] = tensor

    with torch.enable_grad(), model.hooks([(list(names), keep)]):
        logits = _read_logits(model, inputs, model.embed(inputs), read)
        target = logits.argmax(-1, keepdim=True) if ids is None else ids
        total = logits.gather(-1, to_device(target, logits.device)).logsumexp(-1).sum()
        found = torch.autograd.grad(total, [held[name] for name in names])
    gradients = {name: gradient.to(inputs.device) for name, gradient in zip(names, found, strict=True)}
    return {name: held[name].detach().to(inputs.device) for name in names}, gradients, target
