"""Which components write the answer's logit?

Direct logit attribution (Elhage et al. 2021): the final residual stream is the sum of what the embedding, the heads and
the MLPs added, and the final norm divides it by one number. So a logit is a sum of one term for each component: its
output, divided by that scale, times the norm's weight and the token's unembedding (a LayerNorm also centers it, and its
bias is a term of its own). What a component does by way of later ones is not in its term.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import xarray as xr
from fancy_einsum import einsum
from jaxtyping import Float
from torch import Tensor

from hooked_llava.checks import one_of
from hooked_llava.errors import InputError
from hooked_llava.model.cache_hooks import caching_hook
from hooked_llava.model.components.precision import at_least_float32
from hooked_llava.model.requirements import check_supported
from hooked_llava.prompt.where import resolve_positions
from hooked_llava.readout.answer import FIRST, WHOLE
from hooked_llava.readout.answer_tokens import single_token
from hooked_llava.readout.head_outputs import head_outputs_along
from hooked_llava.readout.resid import logits_at, rows_at
from hooked_llava.readout.vocabulary import decode_text
from hooked_llava.results.arrays import stack, to_numpy
from hooked_llava.results.image_axes import ImageAxes, take
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs
    from hooked_llava.prompt.token_map import TokenMap

By = Literal["component", "layer", "head", "neuron", "source", "patch"]


def logit_attribution(
    model: HookedLLaVA,
    inputs: Any,
    answer: str | int | None = None,
    baseline: str | int | None = None,
    *,
    by: By = "component",
    position: int | str = "last",
) -> xr.DataArray:
    """Direct contribution, in logits, of every component to the answer's logit (less the baseline's, if given).

    Args:
        model: the model.
        inputs: one prompt, anything `model.as_inputs` takes; several give a first axis prompt.
        answer: a token id, or a word that is one token after the prompt; the model's own next token by default.
        baseline: likewise, a token whose logit is subtracted.
        by: what the logit is divided among:
            "component" [component] (embed, 0_attn, 0_mlp, ..., ln_final_bias of a LayerNorm, and unembed_bias);
            "layer" [layer] (attention and MLP of each together);
            "head" [layer, head]; "neuron" [layer, neuron];
            "source" [layer, head, source], each head's part by the position it comes from (A v W_O, its
            value-output); "patch" [layer, head, patch_row, patch_col] of the image ([layer, head, image, ...] of several;
            for images of several grids feature in place of patch_row and patch_col, see `results.image_axes`).
        position: where the logit is read.

    The parts and the attribute `rest` (what is divided no further: the embedding, biases, for heads and neurons
    everything else, for components only the model's rounding) sum to the attribute `logit`. Attributes `answer` and
    `baseline` name the tokens, `measured` says "first token" of the model's own answer. Raises `InputError` for several
    positions, a word that is not one token, or patches of a prompt without an image.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> parts = logit_attribution(model, model.prepare("Who made the star?"), "red")
    >>> bool(abs(parts.sum() - parts.logit) < 1e-3)
    True
    """
    prompts = model.as_inputs(inputs)
    one_of(by, _PARTS, "by", expected=f"one of {', '.join(map(repr, _PARTS))}")
    if by == "patch":
        check_supported("logit_attribution(by='patch')", model, prompts)
    words_of = (answer, baseline)

    def tokens(token_map: TokenMap) -> list[int | None]:
        own = [None if word is None else single_token(model, token_map, word) for word in words_of]
        if own[0] is not None and own[0] == own[1]:
            same = _word(model, own[0])
            raise InputError(f"answer and baseline are both {same!r}, whose difference is 0; name another baseline.")
        return own

    each = prompts.each(tokens, prompts.token_maps)  # all are checked before anything is run
    divide = partial(_by_patch, axes=ImageAxes.of(prompts)) if by == "patch" else _DIVIDE[by]
    results = prompts.each(
        lambda one, own: _one_prompt(model, one, own[0], own[1], by, divide, position), prompts, each
    )
    return results[0] if len(results) == 1 else stack(results, "prompt")


def contribution_sums(components: xr.DataArray) -> dict[str, float]:
    """What the contributions of all components, by="component", add up to: all attention, all MLPs, the rest, and the total.

    >>> parts = xr.DataArray([1.0, 2.0, -0.5], dims="component", coords={"component": ["embed", "0_attn", "0_mlp"]})
    >>> contribution_sums(parts)
    {'attention': 2.0, 'mlp': -0.5, 'other': 1.0, 'total': 2.5}
    """
    values = dict(zip(map(str, components["component"].values), components.values.tolist(), strict=True))
    attention, mlp = (sum(v for name, v in values.items() if name.endswith(end)) for end in ("_attn", "_mlp"))
    total = sum(values.values())
    return {"attention": attention, "mlp": mlp, "other": total - attention - mlp, "total": total}


def _one_prompt(
    model: HookedLLaVA,
    prompt: Inputs,
    answer: int | None,
    baseline: int | None,
    by: By,
    divide: Callable[..., xr.DataArray],
    position: int | str,
) -> xr.DataArray:
    where = resolve_positions(position, prompt)[0].tolist()
    if len(where) != 1:
        raise InputError(f"position={position!r} means {len(where)} positions; expected one, such as 'last'.")
    with provenance("logit_attribution", model, prompt, n_forward=1, by=by, position=where[0]) as made:
        cache, final = _cache(model, prompt, where, by)
        index = torch.tensor([where])
        logits = logits_at(model, final, index)[0, 0]  # (d_vocab)
        measured = FIRST if answer is None else WHOLE
        answer = int(logits.argmax()) if answer is None else answer
        scale = model.ln_final.scale_of(rows_at(final, index))[0, 0]
        direction = _direction(model, answer, baseline) / scale  # (d_model)
        total = float(logits[answer] - (0.0 if baseline is None else logits[baseline]))
        result = divide(model, cache, direction, prompt)
        if by == "component":
            result = xr.concat([result, *_biases(model, answer, baseline)], "component")
        attrs = {
            "logit": total,
            "answer": _word(model, answer),
            "baseline": _word(model, baseline),
            "measured": measured,
        }
        return result.assign_attrs(made.attrs(**attrs, rest=total - float(result.sum())))


def _cache(
    model: HookedLLaVA, prompt: Inputs, where: list[int], by: str
) -> tuple[dict[str, Tensor], Float[Tensor, "1 pos d_model"]]:
    """What the parts are made of where the logit is read, but values everywhere; and the final residual stream."""
    table = model.hooks_table
    store: dict[str, Tensor] = {}
    hooks: list[Any] = [(table.resolve(list(_PARTS[by])), caching_hook(store, model, torch.tensor([where])))]
    if by in ("source", "patch"):
        hooks.append((table.resolve("v"), caching_hook(store, model)))
    final = model.run_with_hooks(prompt, fwd_hooks=hooks, stop_at_layer=model.cfg.n_layers)
    assert final is not None
    return store, final


def _direction(model: HookedLLaVA, answer: int, baseline: int | None) -> Float[Tensor, " d_model"]:
    """What the normalized residual stream is multiplied by, in float32 at least."""
    direction = model.tokens_to_residual_directions(answer)
    if baseline is not None:
        direction = direction - model.tokens_to_residual_directions(baseline)
    return at_least_float32(direction)


def _by_component(
    model: HookedLLaVA, cache: dict[str, Tensor], direction: Float[Tensor, " d_model"], prompt: Inputs
) -> xr.DataArray:
    names = {"embed": "hook_embed"}
    for layer in range(model.cfg.n_layers):
        names |= {f"{layer}_{part}": model.hooks_table.name(f"{part}_out", layer) for part in ("attn", "mlp")}
    values = torch.stack([cache[name][0, 0].to(direction.dtype) @ direction for name in names.values()])
    return xr.DataArray(to_numpy(values), dims="component", coords={"component": list(names)}, name="logit")


def _biases(model: HookedLLaVA, answer: int, baseline: int | None) -> list[xr.DataArray]:
    """What the biases of the final norm and of the unembedding, where there are any, give the logit, whatever the prompt."""

    def of_answer(table: Float[Tensor, "*rest d_vocab"]) -> Float[Tensor, "*rest"]:
        own = at_least_float32(table[..., answer])
        return own if baseline is None else own - at_least_float32(table[..., baseline])

    values: dict[str, Tensor] = {}
    if (bias := model.ln_final.bias) is not None:
        reading = of_answer(model.W_U)
        values["ln_final_bias"] = reading @ bias.to(reading)
    if model.unembed.bias is not None:
        values["unembed_bias"] = of_answer(model.b_U)
    return [
        xr.DataArray([float(value)], dims="component", coords={"component": [name]}, name="logit")
        for name, value in values.items()
    ]


def _by_layer(
    model: HookedLLaVA, cache: dict[str, Tensor], direction: Float[Tensor, " d_model"], prompt: Inputs
) -> xr.DataArray:
    parts = _by_component(model, cache, direction, prompt).values[1:].reshape(-1, 2)  # (layer, attention or MLP)
    return _labelled(torch.from_numpy(parts.sum(1)), "layer")


def _by_head(
    model: HookedLLaVA, cache: dict[str, Tensor], direction: Float[Tensor, " d_model"], prompt: Inputs
) -> xr.DataArray:
    rows = [
        einsum(
            "h d, h d m, m -> h",
            cache[model.hooks_table.name("z", i)][0, 0].to(direction.dtype),
            block.attn.W_O.to(direction),
            direction,
        )
        for i, block in enumerate(model.blocks)
    ]
    return _labelled(torch.stack(rows), "layer", "head")


def _by_neuron(
    model: HookedLLaVA, cache: dict[str, Tensor], direction: Float[Tensor, " d_model"], prompt: Inputs
) -> xr.DataArray:
    rows = [
        cache[name][0, 0].to(direction.dtype) * (block.mlp.W_out.to(direction) @ direction)
        for name, block in zip(model.hooks_table.resolve("mlp.post"), model.blocks, strict=True)
    ]
    return _labelled(torch.stack(rows), "layer", "neuron")


def _by_source(
    model: HookedLLaVA, cache: dict[str, Tensor], direction: Float[Tensor, " d_model"], prompt: Inputs
) -> xr.DataArray:
    values = _by_position(model, cache, direction)
    labels = ("source", prompt.token_map.labels)
    return _labelled(values, "layer", "head", "source").assign_coords(label=labels)


def _by_patch(
    model: HookedLLaVA,
    cache: dict[str, Tensor],
    direction: Float[Tensor, " d_model"],
    prompt: Inputs,
    *,
    axes: ImageAxes,
) -> xr.DataArray:
    by_position = _by_position(model, cache, direction)
    values = take(by_position, axes.positions(prompt.token_map))  # (layer, head, image, place)
    dims = ("layer", "head", "image")
    if prompt.n_images == 1:
        values, dims = values[:, :, 0], dims[:2]
    coords = dict(zip((*dims, *axes.dims), map(range, (*values.shape[:-1], *axes.shape)), strict=True))
    return axes.labelled(to_numpy(values), dims, layouts=prompt.layouts, coords=coords, name="logit")


def _by_position(
    model: HookedLLaVA, cache: dict[str, Tensor], direction: Float[Tensor, " d_model"]
) -> Float[Tensor, "layer head source"]:
    """A v W_O . direction: what each head carries from each position into the logit."""
    rows = []
    for i in range(model.cfg.n_layers):
        pattern, v = (cache[model.hooks_table.name(name, i)][0] for name in ("pattern", "v"))
        rows.append(head_outputs_along(model, i, pattern, v, direction)[:, 0])  # (head, source)
    return torch.stack(rows)


def _labelled(values: Tensor, *dims: str) -> xr.DataArray:
    coords = {dim: range(n) for dim, n in zip(dims, values.shape, strict=True)}
    return xr.DataArray(to_numpy(values), dims=dims, coords=coords, name="logit")


_PARTS: dict[str, tuple[str, ...]] = {
    "component": ("hook_embed", "attn_out", "mlp_out"),
    "layer": ("hook_embed", "attn_out", "mlp_out"),
    "head": ("z",),
    "neuron": ("mlp.post",),
    "source": ("pattern",),
    "patch": ("pattern",),
}
_DIVIDE: dict[str, Callable[..., xr.DataArray]] = {
    "component": _by_component,
    "layer": _by_layer,
    "head": _by_head,
    "neuron": _by_neuron,
    "source": _by_source,
}


def _word(model: HookedLLaVA, token: int | None) -> str:
    return "" if token is None else decode_text(model, [token])
