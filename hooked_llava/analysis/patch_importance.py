"""Which patches of the image decide the answer?

The log-probability increase (Yu & Ananiadou, arXiv 2411.10950) asks what each patch's part of a head's output adds
at the answer's position; it costs one forward pass. The other methods are what it is to be compared with; occlusion is the
only one that takes the patch away and looks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.analysis.maps.attention_flow import attention_rollout, relevancy
from hooked_llava.analysis.maps.gradients import gradient_times_input, integrated_gradients
from hooked_llava.analysis.maps.occlusion import occlusion
from hooked_llava.analysis.maps.patches import at_patches, patch_positions
from hooked_llava.analysis.maps.scores import (
    Heads,
    check_choice,
    chosen_heads,
    named_heads,
    score_positions,
    score_positions_of_layer,
)
from hooked_llava.checks import one_of
from hooked_llava.errors import InputError
from hooked_llava.prompt.prepare import Inputs
from hooked_llava.readout.answer import AnswerReading, unwrap_single
from hooked_llava.readout.answer_cache import AnswerCache, Target, as_answer_cache, prompts_of, read_target
from hooked_llava.readout.answer_tokens import per_prompt
from hooked_llava.results.arrays import stack, to_numpy
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA

Method = Literal[
    "log_increase",
    "attention",
    "grad_x_input",
    "integrated_gradients",
    "rollout",
    "relevancy",
    "occlusion",
    "token_ablation",
]


def patch_importance(
    model: HookedLLaVA,
    inputs: Any,
    target: Target = None,
    *,
    method: Method = "log_increase",
    heads: Heads | None = None,
    vision: bool = False,
    steps: int = 16,
    window: int = 1,
    fill: Float[Tensor, " d_model"] | None = None,
) -> xr.DataArray:
    """How much every patch matters for the answer, [image, patch_row, patch_col]; several prompts give a first axis prompt.

    Args:
        model: the model.
        inputs: prompts with equally many images each, anything `model.as_inputs` takes. For "log_increase" and
            "attention" also a `AnswerCache` of them (`hooked_llava.readout.cache_answer`), which brings its own target.
        target: answer that is scored; the model's own next token by default. Text of several tokens is scored under
            teacher forcing; a list has one word for each prompt.
        method: how.
            "log_increase": S of what heads write from each patch at the answer's position, in nats, by the heads with the largest
            scores: the best one by default (the paper's tool), the sum over the k best, or with "all" over the layers,
            each with all its heads together.
            "attention": pattern from the answer's position, mean over all heads by default, or over the k best.
            "grad_x_input", "integrated_gradients": of the image embeddings.
            "rollout" (arXiv 2005.00928), "relevancy" (arXiv 2103.15679): attention followed through all layers.
            "occlusion": log P less what it is with the patch blanked in the image, in nats.
            "token_ablation": the same with the image embedding replaced by `fill`, by default their mean.
        heads: for "log_increase" and "attention": a number, "all", or (layer, head) pairs.
        vision: for gradients, rollout and relevancy: carry on through the vision tower to the pixels and patches.
        steps: points of the path, for "integrated_gradients".
        window: side in patches of the square that is blanked, for "occlusion" and "token_ablation".
        fill: what takes the place of an image embedding, for "token_ablation".

    Positive numbers speak for the answer (attention and rollout do not know for or against). Attributes: `target`,
    `units`, `n_forward`, `n_backward`, and `heads` where some were chosen. Raises `InputError` for prompts without
    images, for options that the method does not have, and for targets that do not fit.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.toy.images import image_path, image_scene
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> inputs = model.prepare("What color is the star?", images=image_path("demo"))
    >>> importance = patch_importance(model, inputs)
    >>> row, column = divmod(int(importance.values.argmax()), 8)
    >>> star = inputs.token_map.box_to_patches(image_scene("demo").find("star").box, coverage=0.2)
    >>> inputs.token_map.patch_to_position(row, column) in star
    True
    """
    given = {"heads": heads, "vision": vision, "steps": steps, "window": window, "fill": fill}
    options, how = _options(model, method, given), _METHODS[method]
    if isinstance(inputs, AnswerCache) and not how.takes_cache:
        raise InputError(f"method={method!r} runs the model itself; give it the prompts, not a decision.")
    prompts = prompts_of(model, inputs)
    patch_positions(prompts)  # refuses prompts without images before anything runs
    if how.one_by_one and len(prompts) > 1:
        apart = zip(prompts, per_prompt(target, len(prompts)), strict=True)
        return stack([_importance(model, p, t, method, options).isel(prompt=0, drop=True) for p, t in apart], "prompt")
    result = _importance(model, inputs if how.takes_cache else prompts, target, method, options)
    return result if len(prompts) > 1 else result.isel(prompt=0, drop=True)


def _options(model: HookedLLaVA, method: Method, given: dict[str, Any]) -> dict[str, Any]:
    """The method's own options; raises `InputError` if others were given, and for heads that are not there."""
    one_of(method, _METHODS, "method")
    own = _METHODS[method].options
    if foreign := [name for name, value in given.items() if name not in own and value is not _DEFAULTS[name]]:
        takes = f"; it takes {', '.join(own)}" if own else ""
        raise InputError(f"method={method!r} has no option {', '.join(foreign)}{takes}.")
    heads = given["heads"]
    given = given | {"heads": None if heads is None else check_choice(model, heads)}
    return {name: given[name] for name in own}


@dataclass(frozen=True)
class _Found:
    """Maps, what they speak for, and what they cost."""

    maps: Float[Tensor, "prompt image patch"]
    target: dict[str, Any]
    n_forward: int | float = 1
    n_backward: int = 0
    heads: Any = None


def _importance(
    model: HookedLLaVA, inputs: Any, target: Target, method: Method, options: dict[str, Any]
) -> xr.DataArray:
    said = {name: value for name, value in options.items() if name not in ("heads", "fill")}
    said["units"] = _METHODS[method].units
    prompts = prompts_of(model, inputs)
    with provenance("patch_importance", model, prompts, n_forward=1, method=method, **said) as made:
        found = _METHODS[method].run(model, inputs, target, **options)
        attrs = found.target | {"n_backward": found.n_backward}
        attrs |= {} if found.heads is None else {"heads": unwrap_single(found.heads)}
        return xr.DataArray(
            to_numpy(found.maps.unflatten(-1, prompts.patch_grid)),
            dims=("prompt", "image", "patch_row", "patch_col"),
            name=method,
            attrs=made.attrs(**attrs) | {"n_forward": found.n_forward},
        )


def _log_increase(model: HookedLLaVA, inputs: Any, target: Target, heads: Heads | None) -> _Found:
    parts = ("pattern", "v") if heads == "all" else ("pattern", "v", "z")
    cache, n_forward = as_answer_cache(model, inputs, target, parts)
    where = patch_positions(cache.inputs)
    if heads == "all":
        layers = [score_positions_of_layer(cache, i, where.flatten(1)) for i in range(cache.n_layers)]
        return _Found(torch.stack(layers).sum(0).reshape(where.shape), cache.target_attrs(), n_forward, heads="all")
    chosen = chosen_heads(cache, 1 if heads is None else heads)
    maps = torch.zeros(where.shape, device=where.device)
    for layer, head in sorted({pair for row in chosen for pair in row}):
        rows = [i for i, row in enumerate(chosen) if (layer, head) in row]
        scores = score_positions(cache.take(rows), layer, head, where[rows].flatten(1))
        maps[rows] += scores.float().reshape(len(rows), *where.shape[1:])
    return _Found(maps, cache.target_attrs(), n_forward, heads=named_heads(chosen))


def _attention(model: HookedLLaVA, inputs: Any, target: Target, heads: Heads | None) -> _Found:
    heads = "all" if heads is None else heads
    parts = ("pattern", "z") if isinstance(heads, int) else ("pattern",)
    cache, n_forward = as_answer_cache(model, inputs, target, parts)
    where = patch_positions(cache.inputs)
    pattern = torch.stack([cache.part(i, "pattern").float().mean(2) for i in range(cache.n_layers)], 1)
    chosen = chosen_heads(cache, heads)
    rows = [torch.stack([row[pair] for pair in pairs]).mean(0) for row, pairs in zip(pattern, chosen, strict=True)]
    maps = at_patches(torch.stack(rows), where)
    return _Found(maps, cache.target_attrs(), n_forward, heads="all" if heads == "all" else named_heads(chosen))


def _gradient(model: HookedLLaVA, prompts: Inputs, target: Target, vision: bool) -> _Found:
    found = read_target(model, prompts, target)
    maps, ids = gradient_times_input(model, found.inputs, found.logit_positions, found.ids, vision=vision)
    return _Found(maps, _said(model, found, ids), n_backward=1)


def _integrated(model: HookedLLaVA, prompts: Inputs, target: Target, steps: int, vision: bool) -> _Found:
    found = read_target(model, prompts, target)
    maps, ids = integrated_gradients(model, found.inputs, found.logit_positions, found.ids, steps=steps, vision=vision)
    return _Found(maps, _said(model, found, ids), n_forward=steps + (found.ids is None), n_backward=steps)


def _rollout(model: HookedLLaVA, prompts: Inputs, target: Target, vision: bool) -> _Found:
    found = read_target(model, prompts, target)
    own = {"target": unwrap_single(("any",) * len(prompts)), "measured": found.measured}  # it asks for no answer
    return _Found(
        attention_rollout(model, found.inputs, found.logit_positions, vision=vision),
        found.attrs(model, "target") if found.texts else own,
    )


def _relevancy(model: HookedLLaVA, prompts: Inputs, target: Target, vision: bool) -> _Found:
    found = read_target(model, prompts, target)
    maps, ids = relevancy(model, found.inputs, found.logit_positions, found.ids, vision=vision)
    return _Found(maps, _said(model, found, ids), n_backward=1)


def _occlusion(model: HookedLLaVA, prompts: Inputs, target: Target, window: int) -> _Found:
    found = read_target(model, prompts, target)
    maps, ids, n_forward = occlusion(model, found.inputs, found.logit_positions, found.ids, window=window)
    return _Found(maps[None], _said(model, found, ids), n_forward=n_forward)


def _token_ablation(model: HookedLLaVA, prompts: Inputs, target: Target, window: int, fill: Tensor | None) -> _Found:
    found = read_target(model, prompts, target)
    maps, ids, n_forward = occlusion(
        model, found.inputs, found.logit_positions, found.ids, where="tokens", window=window, fill=fill
    )
    return _Found(maps[None], _said(model, found, ids), n_forward=n_forward)


def _said(model: HookedLLaVA, found: AnswerReading, ids: Int[Tensor, "prompt read variant"]) -> dict[str, Any]:
    """What a result says of the target, be it the model's own."""
    return found.with_ids(model, ids).attrs(model, "target")


@dataclass(frozen=True)
class _How:
    run: Callable[..., _Found]
    options: tuple[str, ...]
    units: str
    one_by_one: bool = False
    takes_cache: bool = False


_NATS = "change of log P (nats)"
_METHODS: dict[str, _How] = {
    "log_increase": _How(_log_increase, ("heads",), "log-probability increase (nats)", takes_cache=True),
    "attention": _How(_attention, ("heads",), "attention", takes_cache=True),
    "grad_x_input": _How(_gradient, ("vision",), _NATS),
    "integrated_gradients": _How(_integrated, ("steps", "vision"), _NATS),
    "rollout": _How(_rollout, ("vision",), "attention rollout"),
    "relevancy": _How(_relevancy, ("vision",), "relevancy"),
    "occlusion": _How(_occlusion, ("window",), _NATS, one_by_one=True),
    "token_ablation": _How(_token_ablation, ("window", "fill"), _NATS, one_by_one=True),
}
_DEFAULTS = {"heads": None, "vision": False, "steps": 16, "window": 1, "fill": None}
