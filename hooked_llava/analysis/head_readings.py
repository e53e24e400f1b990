"""What does a head find, and what does it make of it?

The query-key and value-output readings of Yu & Ananiadou (arXiv 2411.10950): at the positions that matter, the words in
the residual stream that a head reads, in the two parts of it that attention and the MLPs wrote (by which the paper explains where
the head looks and what it takes), and in what it writes from there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.analysis.maps.scores import best_positions, check_heads, check_top, score_positions
from hooked_llava.errors import InputError
from hooked_llava.machine.devices import to_device
from hooked_llava.model.components.precision import at_least_float32
from hooked_llava.model.requirements import supported_inputs
from hooked_llava.prompt.where import PositionsLike, resolve_positions
from hooked_llava.readout.answer_cache import AnswerCache, Target, cache_answer, read_target
from hooked_llava.readout.head_outputs import head_outputs
from hooked_llava.readout.lens import Space, check_spaces, project
from hooked_llava.readout.vocabulary import check_k
from hooked_llava.results.arrays import position_coords, to_numpy, word_variables
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs
    from hooked_llava.prompt.prepare import InputsLike

READINGS = ("layer_input", "key_input", "value_input", "value_output")


def head_readings(
    model: HookedLLaVA,
    inputs: InputsLike,
    layer: int,
    head: int,
    target: Target = None,
    *,
    positions: PositionsLike | int | None = None,
    top: int = 6,
    k: int = 10,
    space: Space = "unembed",
) -> xr.Dataset:
    """Words at the positions that a head reads from: `token`, `token_id`, `value`, each [reading, position, rank].

    Readings of position p, at the head's layer l: "layer_input" the residual stream x_l; "key_input" what attention wrote
    there in earlier layers, "value_input" what the MLPs wrote (together x_l - x_0); "value_output" what the head writes
    from p at the answer's position. All are read with the final norm's scale at the answer's position, as the paper's code does.

    Args:
        model: the model.
        inputs: one prompt.
        layer: the head's layer.
        head: the head.
        target: answer by which positions are scored; the model's own next token by default.
        positions: which; by default the `top` positions with the largest scores, best first, padding left out.
        top: how many of them.
        k: number of words.
        space: "unembed" reads logits; "embed" inner products with the words' input embeddings, "cosine" their cosine.

    Also `score` and `attention` [position] of the head. Raises `InputError` for several prompts, a target of several
    tokens, and heads, positions or spaces that are not there. One forward pass. Methods (c), (d) and (f) of the paper.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> read = head_readings(model, model.prepare("Who made the star?"), 3, 2, top=3)
    >>> read["token"].dims, read.sizes["position"]
    (('reading', 'position', 'rank'), 3)
    """
    prompt = supported_inputs("head_readings", model, inputs)
    cfg = model.config.language
    layer, head = check_heads([(layer, head)], cfg.n_layers, cfg.n_heads)[0]
    check_k(model, k)
    check_spaces([space])
    top = check_top(top)
    chosen = None if positions is None else resolve_positions(positions, prompt)[0]
    if read_target(model, prompt, target).logit_positions.shape[1] != 1:
        raise InputError(f"target={target!r} has several tokens; head_readings reads the head for one. Give one token.")
    with provenance("head_readings", model, prompt, n_forward=1, layer=layer, head=head, space=space) as made:
        kept = None if chosen is None else chosen[None]
        how: dict[str, Any] = {"parts": ("pattern", "v"), "beside": _names(model, layer), "positions": kept}
        cache = cache_answer(model, prompt, target, **how)
        index = best_positions(cache, (layer, head), top) if chosen is None else chosen
        result = _read(cache, layer, head, index, k, space, everywhere=chosen is None)
        scores = score_positions(cache, layer, head, to_device(index[None], prompt.device))[0]
        result["score"] = ("position", to_numpy(scores))
        return result.assign_attrs(made.attrs(**cache.target_attrs()))


def _read(
    cache: AnswerCache,
    layer: int,
    head: int,
    index: Int[Tensor, " position"],
    k: int,
    space: Space,
    *,
    everywhere: bool,
) -> xr.Dataset:
    """The k best words of every reading at every position, and the attention that the head pays it."""
    model, prompt = cache.model, cache.inputs
    pattern, value = cache.part(layer, "pattern")[0], cache.part(layer, "v")[0]
    where = to_device(index, value.device)
    written = head_outputs(model, layer, pattern, value, heads=[head])[0, 0, where]
    held = {name: tensor[0, where] if everywhere else tensor[0] for name, tensor in cache.beside.items()}
    resid, *parts = [*_vectors(held, _names(model, layer)), written]
    read = [project(model, resid, space, cache.scale[0, 0], bias=True)]  # the bias belongs to the whole residual stream
    read.append(project(model, torch.stack(parts), space, cache.scale[0, 0]))
    values, ids = torch.cat([read[0][None], read[1]]).topk(k, dim=-1)
    seen = to_numpy(pattern[head, 0, to_device(index, pattern.device)])
    return xr.Dataset(
        {
            **word_variables(model, values, ids, ("reading", "position", "rank"), "value"),
            "attention": ("position", seen),
        },
        coords={"reading": list(READINGS), **position_coords(prompt.token_map, index.tolist())},
    )


def _names(model: HookedLLaVA, layer: int) -> list[str]:
    """The embedding, the residual stream entering a layer, and what attention wrote in each layer below."""
    table = model.hooks_table
    return ["hook_embed", table.name("resid_pre", layer), *(table.name("attn_out", below) for below in range(layer))]


def _vectors(held: dict[str, Tensor], names: list[str]) -> Float[Tensor, "3 position d_model"]:
    """The residual stream entering a layer, and what attention and the MLPs below wrote into it."""
    embed, resid, *by_layer = (at_least_float32(held[name]) for name in names)
    by_attention = sum(by_layer, torch.zeros_like(resid))
    return torch.stack([resid, by_attention, resid - embed - by_attention])


def attention_to_object(
    model: HookedLLaVA,
    same: InputsLike,
    other: InputsLike,
    positions: PositionsLike,
    *,
    heads: list[tuple[int, int]] | None = None,
) -> xr.DataArray:
    """Attention to an object's positions under a question about it and under one about another, [question, layer, head].

    Args:
        model: the model.
        same: prompts that ask about the object; several are averaged.
        other: as many, with the same images, that ask about another object.
        positions: the object's: a span that each prompt has (of its own length, as `Inputs.with_spans` makes it), or
            numbers.
        heads: (layer, head) pairs; the result is then [question, head] with the coordinate `layer_head`, such as "2.1".

    A head that looks for what the question names attends less under the other question: the causal-flavoured check of the
    paper's query-key analysis. Raises `InputError` for another number of prompts on one side, and that or `SpanError` for
    spans that are not there.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> asked = [model.prepare(f"Who made the {shape}?") for shape in ("star", "ring")]
    >>> attention_to_object(model, *asked, [5]).dims
    ('question', 'layer', 'head')
    """
    sides = [model.as_inputs(same), model.as_inputs(other)]
    if len(sides[0]) != len(sides[1]):
        raise InputError(
            f"{len(sides[0])} prompts ask about the object and {len(sides[1])} about another; give as many of each, with "
            "the same images, so that only the question differs."
        )
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    pairs = None if heads is None else check_heads(heads, n_layers, n_heads)
    where = {"heads": pairs, "positions": positions}
    with provenance("attention_to_object", model, sides[0], n_forward=2, units="attention", **where) as made:
        mass = torch.stack([_mass(model, prompts, positions) for prompts in sides])  # (question, layer, head)
        attrs = made.attrs(other=list(sides[1].prompts or ()))
        if pairs is None:
            coords = {"question": ["same", "other"], "layer": range(n_layers), "head": range(n_heads)}
            return xr.DataArray(to_numpy(mass), coords=coords, dims=list(coords), name="attention", attrs=attrs)
        chosen = torch.stack([mass[:, layer, head] for layer, head in pairs], -1)
        coords = {"question": ["same", "other"], "head": range(len(pairs))}
        named = ("head", [f"{layer}.{head}" for layer, head in pairs])
        found = xr.DataArray(to_numpy(chosen), coords=coords, dims=list(coords), name="attention", attrs=attrs)
        return found.assign_coords(layer_head=named)


def _mass(model: HookedLLaVA, prompts: Inputs, positions: PositionsLike) -> Float[Tensor, "layer head"]:
    """Attention from the answer's position to the object's, averaged over prompts."""
    cache = cache_answer(model, prompts, parts=("pattern",))
    total = []
    for i, prompt in enumerate(prompts):
        index = resolve_positions(positions, prompt)[0]
        rows = [cache.part(layer, "pattern")[i, :, 0].float() for layer in range(cache.n_layers)]
        total.append(torch.stack([row[:, to_device(index, row.device)].sum(-1) for row in rows]))
    return torch.stack(total).mean(0)
