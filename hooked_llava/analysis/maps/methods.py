"""One function for each entry of `options.patch_maps`: a model, prompts, a target and the method's options in, maps out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.analysis.maps import attention_flow, gradients
from hooked_llava.analysis.maps import grad_cam as weighted
from hooked_llava.analysis.maps import occlusion as taken_away
from hooked_llava.analysis.maps.scores import (
    Heads,
    chosen_heads,
    named_heads,
    score_positions,
    score_positions_of_layer,
)
from hooked_llava.analysis.maps.token_activation import token_activation_maps
from hooked_llava.machine.devices import to_device
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.readout.answer import AnswerReading, unwrap_single
from hooked_llava.readout.answer_cache import AnswerCache, Asked, as_answer_cache, cache_answer, read_target
from hooked_llava.results.image_axes import ImageAxes, take_each

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA


def shared_run(model: HookedLLaVA, inputs: Any, target: Asked) -> AnswerCache:
    """One run that every method with `takes_cache` reads from."""
    return cache_answer(
        model, inputs, target, parts=("pattern", "v", "z"), beside=[model.hooks_table.name("resid_post", -1)]
    )


@dataclass(frozen=True)
class Drawn:
    """Maps, what they speak for, what they cost, and options that were chosen for lack of given ones."""

    maps: Float[Tensor, "prompt image place"]
    target: dict[str, Any]
    n_forward: int | float = 1
    n_backward: int = 0
    heads: Any = None
    chosen: dict[str, Any] = field(default_factory=dict)


def log_increase(model: HookedLLaVA, inputs: Any, target: Asked, heads: Heads | None) -> Drawn:
    """S of what heads write from each patch at the answer's position: of the best head by default, of the k best, or of all."""
    parts = ("pattern", "v") if heads == "all" else ("pattern", "v", "z")
    cache, n_forward = as_answer_cache(model, inputs, target, parts)
    where = ImageAxes.of(cache.inputs).positions_of_all(cache.inputs)
    keys = where.flatten(1).clamp(min=0)
    if heads == "all":
        chosen, layers = "all", [score_positions_of_layer(cache, i, keys) for i in range(cache.n_layers)]
        scores = torch.stack(layers).sum(0)
    else:
        chosen = chosen_heads(cache, 1 if heads is None else heads)
        scores = torch.zeros(keys.shape, device=keys.device)
        for layer, head in sorted({pair for row in chosen for pair in row}):
            rows = [i for i, row in enumerate(chosen) if (layer, head) in row]
            at = to_device(rows, keys.device)
            scores[at] += score_positions(cache.take(rows), layer, head, keys[at]).float()
    maps = scores.reshape(where.shape).masked_fill(where < 0, torch.nan)
    return Drawn(maps, cache.target_attrs(), n_forward, heads=chosen if chosen == "all" else named_heads(chosen))


def attention(model: HookedLLaVA, inputs: Any, target: Asked, heads: Heads | None) -> Drawn:
    """The pattern from the answer's position, mean over all heads by default, or over the k best."""
    heads = "all" if heads is None else heads
    parts = ("pattern", "z") if isinstance(heads, int) else ("pattern",)
    cache, n_forward = as_answer_cache(model, inputs, target, parts)
    where = ImageAxes.of(cache.inputs).positions_of_all(cache.inputs)
    pattern = torch.stack([cache.part(i, "pattern").float().mean(2) for i in range(cache.n_layers)], 1)
    chosen = chosen_heads(cache, heads)
    rows = [torch.stack([row[pair] for pair in pairs]).mean(0) for row, pairs in zip(pattern, chosen, strict=True)]
    maps = take_each(torch.stack(rows), where)
    return Drawn(maps, cache.target_attrs(), n_forward, heads="all" if heads == "all" else named_heads(chosen))


def grad_x_input(model: HookedLLaVA, prompts: Inputs, target: Asked, vision: bool) -> Drawn:
    """Gradient of log P times the image embeddings, or times the pixels."""
    found = read_target(model, prompts, target)
    maps, ids = gradients.gradient_times_input(model, found.inputs, found.logit_positions, found.ids, vision=vision)
    return Drawn(maps, _said(model, found, ids), n_backward=1)


def integrated_gradients(model: HookedLLaVA, prompts: Inputs, target: Asked, steps: int, vision: bool) -> Drawn:
    """The gradient averaged on the way from the image's mean, times the difference."""
    found = read_target(model, prompts, target)
    reading = (found.inputs, found.logit_positions, found.ids)
    maps, ids = gradients.integrated_gradients(model, *reading, steps=steps, vision=vision)
    return Drawn(maps, _said(model, found, ids), n_forward=steps + (found.ids is None), n_backward=steps)


def rollout(model: HookedLLaVA, prompts: Inputs, target: Asked, vision: bool) -> Drawn:
    """Attention multiplied through all layers; it asks for no answer."""
    found = read_target(model, prompts, target)
    own = {"target": unwrap_single(("any",) * len(prompts)), "measured": found.measured}
    maps = attention_flow.attention_rollout(model, found.inputs, found.logit_positions, vision=vision)
    return Drawn(maps, found.attrs(model, "target") if found.texts else own)


def relevancy(model: HookedLLaVA, prompts: Inputs, target: Asked, vision: bool) -> Drawn:
    """Attention times its gradient, accumulated through all layers."""
    found = read_target(model, prompts, target)
    maps, ids = attention_flow.relevancy(model, found.inputs, found.logit_positions, found.ids, vision=vision)
    return Drawn(maps, _said(model, found, ids), n_backward=1)


def grad_cam(model: HookedLLaVA, prompts: Inputs, target: Asked, layer: int | None, vision: bool) -> Drawn:
    """The residual stream in the directions in which the answer's logit grows, on average over the image."""
    layer, found = weighted.chosen_layer(model, layer, vision=vision), read_target(model, prompts, target)
    reading = (found.inputs, found.logit_positions, found.ids)
    maps, ids = weighted.grad_cam(model, *reading, layer=layer, vision=vision)
    return Drawn(maps, _said(model, found, ids), n_backward=1, chosen={"layer": layer})


def tam(model: HookedLLaVA, inputs: Any, target: Asked) -> Drawn:
    """What the image's positions say of the answer's tokens, less what earlier words say there."""
    cache, n_forward = as_answer_cache(model, inputs, target, (), [model.hooks_table.name("resid_post", -1)])
    return Drawn(token_activation_maps(cache), cache.target_attrs(), n_forward)


def occlusion(model: HookedLLaVA, prompts: Inputs, target: Asked, window: int, grid: str) -> Drawn:
    """log P less what it is with patches blanked in the image."""
    return _taken_away(model, prompts, target, where="image", window=window, grid=grid)


def token_ablation(model: HookedLLaVA, prompts: Inputs, target: Asked, window: int, fill: Tensor | None) -> Drawn:
    """The same with image embeddings replaced, by default by their mean."""
    return _taken_away(model, prompts, target, where="tokens", window=window, fill=fill)


def _taken_away(model: HookedLLaVA, prompts: Inputs, target: Asked, **options: Any) -> Drawn:
    found = read_target(model, prompts, target)
    reading = (found.inputs, found.logit_positions, found.ids)
    maps, ids, n_forward = taken_away.occlusion(model, *reading, **options)
    return Drawn(maps[None], _said(model, found, ids), n_forward=n_forward)


def _said(model: HookedLLaVA, found: AnswerReading, ids: Int[Tensor, "prompt read variant"]) -> dict[str, Any]:
    """What a result says of the target, be it the model's own."""
    return found.with_ids(model, ids).attrs(model, "target")
