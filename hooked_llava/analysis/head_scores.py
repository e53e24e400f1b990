"""Which layers, heads and positions make the answer likelier?

Yu & Ananiadou (arXiv 2411.10950) score every vector v that is added to the residual stream u at the answer's position by the
log-probability increase S(v | u) = log p(w | u + v) - log p(w | u), read through the unembedding with the final norm's
scale frozen. One forward pass; of the patterns only the answer's row is kept. S is not additive over heads or positions,
and it says nothing about what would happen without them: for that see `ablate_heads`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr

from hooked_llava.analysis.maps.scores import (
    Heads,
    best_heads,
    check_choice,
    chosen_heads,
    named_heads,
    score_heads,
    score_layers,
    score_positions,
)
from hooked_llava.errors import InputError
from hooked_llava.machine.devices import to_device
from hooked_llava.prompt.where import PositionsLike, resolve_positions
from hooked_llava.readout.answer import unwrap_single
from hooked_llava.readout.answer_cache import AnswerCache, Target, as_answer_cache, prompts_of, split_prompts
from hooked_llava.results.arrays import position_coords, stack, to_numpy
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs
    from hooked_llava.prompt.prepare import InputsLike

_UNITS = "log-probability increase (nats)"


def head_scores(model: HookedLLaVA, inputs: InputsLike | AnswerCache, target: Target = None) -> xr.DataArray:
    """S of what every head adds at the answer's position, given the residual stream entering its block, [layer, head].

    Args:
        model: the model.
        inputs: prompts, anything `model.as_inputs` takes; several give a first axis prompt. Or an `AnswerCache` of them
            (`hooked_llava.readout.answer_cache.cache_answer`), so that several analyses share one forward pass.
        target: answer that is scored; the model's own next token by default. Text of several tokens is scored under
            teacher forcing, as the sum over its tokens; a list has one for each prompt.

    Attributes `target`, `answer_tokens` and `measured` ("whole answer", or "first token" of the model's own) say what was
    scored. Raises `InputError` for a target that does not fit. Method (a) of the paper.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> scores = head_scores(model, model.prepare("Who made the star?"))
    >>> scores.dims, scores.units
    (('layer', 'head'), 'log-probability increase (nats)')
    """
    with provenance("head_scores", model, prompts_of(model, inputs), n_forward=1, units=_UNITS) as made:
        cache, made.n_forward = as_answer_cache(model, inputs, target, ("z",))
        scores = score_heads(cache)
        return _labelled(scores, ("prompt", "layer", "head"), "head_score", made.attrs(**cache.target_attrs()))


def layer_scores(model: HookedLLaVA, inputs: InputsLike | AnswerCache, target: Target = None) -> xr.DataArray:
    """S of attention and of the MLP of every layer, each given the residual stream that it is added to, [layer, component].

    The scores telescope: they sum to the answer's log probability (attribute `log_probability`) less what the embedding
    alone gives (`log_probability_of_embedding`), exactly, because the norm's scale is frozen. Where attention and MLP stand
    side by side (Phi) there is no residual stream between them: the MLP is given `resid_pre` and `attn_out`, which keeps the
    sum, and the attribute `mlp_given` says so. Arguments as for `head_scores`.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> scores = layer_scores(model, model.prepare("Who made the star?"))
    >>> gained = scores.log_probability - scores.log_probability_of_embedding
    >>> bool(abs(scores.sum() - gained) < 1e-3)
    True
    """
    with provenance("layer_scores", model, prompts_of(model, inputs), n_forward=1, units=_UNITS) as made:
        cache, made.n_forward = as_answer_cache(model, inputs, target, ("attn_out", "mlp_out"))
        ends = [cache.log_probability(cache.resid[i]).tolist() for i in (-1, 0)]
        attrs = {
            "log_probability": unwrap_single(ends[0]),
            "log_probability_of_embedding": unwrap_single(ends[1]),
            **({"mlp_given": "resid_pre + attn_out"} if model.config.language.parallel_attn_mlp else {}),
            **cache.target_attrs(),
        }
        dims = ("prompt", "layer", "component")
        result = _labelled(score_layers(cache), dims, "layer_score", made.attrs(**attrs))
        return result.assign_coords(component=["attn", "mlp"])


def position_scores(
    model: HookedLLaVA,
    inputs: InputsLike | AnswerCache,
    target: Target = None,
    *,
    heads: Heads = 1,
    positions: PositionsLike | None = None,
) -> xr.Dataset:
    """What the heads bring from every position: `score`, S of A v W_O, and `attention`, [head, position].

    Args:
        model: the model.
        inputs: as for `head_scores`.
        target: as for `head_scores`; a list may here have words of several tokens.
        heads: the k heads with the largest scores (best first), or (layer, head) pairs. The coordinate
            `layer_head` on their axis says which they are, such as "2.1"; of several prompts each has its own.
        positions: which; all of the prompt by default. Padding has the score NaN.

    With an answer of several tokens scores are summed and attention averaged over them, and positions are those of the
    prompts padded on the left. Raises `InputError` for heads or positions that are not there.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> read = position_scores(model, model.prepare("Who made the star?"), heads=2)
    >>> read["score"].dims, read.sizes["head"]
    (('head', 'position'), 2)
    """
    heads = check_choice(model, heads)
    apart = split_prompts(model, inputs, target)
    prompts = prompts_of(model, inputs)
    results = prompts.each(lambda one: _positions_of(model, one[0], one[1], heads, positions), apart)
    if len(results) == 1:
        return results[0]
    names = np.stack([result.layer_head.values for result in results])  # each prompt has its own best heads
    joined = stack([result.drop_vars("layer_head") for result in results], "prompt")
    return joined.assign_coords(layer_head=(("prompt", "head"), names))


def _positions_of(
    model: HookedLLaVA, inputs: Inputs | AnswerCache, target: Target, heads: Heads, positions: PositionsLike | None
) -> xr.Dataset:
    prompt, named = prompts_of(model, inputs), slice(None) if positions is None else positions
    index = resolve_positions(named, prompt)
    with provenance(
        "position_scores", model, prompt, n_forward=1, units=_UNITS, heads=heads, positions=positions
    ) as made:
        cache, made.n_forward = as_answer_cache(model, inputs, target, ("pattern", "v", "z"))
        if cache.logit_positions.shape[1] > 1 and not isinstance(
            inputs, AnswerCache
        ):  # the answer is appended to the prompt
            prompt = prompt.padded_left()
            index = resolve_positions(named, prompt)
        where = to_device(index, prompt.device)
        pairs = chosen_heads(cache, heads)[0]
        scores = torch.stack([score_positions(cache, layer, head, where)[0] for layer, head in pairs])
        scores = scores.masked_fill(~prompt.attention_mask[0, where[0]], float("nan"))
        seen = torch.stack([cache.part(layer, "pattern")[0, head].float().mean(0) for layer, head in pairs])
        dims = ("head", "position")
        return xr.Dataset(
            {"score": (dims, to_numpy(scores)), "attention": (dims, to_numpy(seen[:, where[0]]))},
            coords={
                "head": range(len(pairs)),
                "layer_head": ("head", named_heads([pairs])[0]),
                **position_coords(prompt.token_map, index[0].tolist()),
            },
            attrs=made.attrs(**cache.target_attrs()),
        )


# ---------------------------------------------------------------------- the best heads


def top_heads(scores: xr.DataArray, k: int = 10) -> list[tuple[int, int]]:
    """The k (layer, head) pairs with the largest scores, the best first; of several prompts by their mean score.

    Raises `InputError` for scores without axes layer and head, or for a k out of range. Method (b) of the paper.

    >>> scores = xr.DataArray([[0.1, 0.5], [0.9, 0.0]], dims=("layer", "head"))
    >>> top_heads(scores, 2)
    [(1, 0), (0, 1)]
    """
    if not {"layer", "head"} <= set(scores.dims):
        raise InputError(f"Scores have the axes {scores.dims}; expected layer and head, as head_scores gives them.")
    others = [dim for dim in scores.dims if dim not in ("layer", "head")]
    mean = scores.mean(others) if others else scores
    values = mean.transpose("layer", "head").values.astype(np.float64)
    layers, heads = (scores[axis].values for axis in ("layer", "head"))  # of chosen ones, not their places
    best = best_heads(torch.from_numpy(values)[None], k)[0]
    return [(int(layers[row]), int(heads[column])) for row, column in best]


def head_overlap(first: Iterable[tuple[int, int]], second: Iterable[tuple[int, int]]) -> float:
    """Share of heads that two equally large sets have in common: 8 of 10 shared heads give 0.8.

    Raises `InputError` for sets of different size, whose share would depend on the order, and for empty ones.

    >>> head_overlap([(1, 0), (0, 1)], [(0, 1), (2, 2)])
    0.5
    """
    one, other = set(first), set(second)
    if len(one) != len(other) or not one:
        raise InputError(f"The sets have {len(one)} and {len(other)} heads; compare equally many, at least one.")
    return len(one & other) / len(one)


def heads_by_attention(
    model: HookedLLaVA, inputs: InputsLike | AnswerCache, span: PositionsLike = "image"
) -> xr.DataArray:
    """Attention of every head from the answer's position to a span, [layer, head]: the other way to rank heads.

    Of several prompts each has a span of its own length, and a first axis prompt comes before. A `AnswerCache` may stand in
    their place, as for `head_scores`. Raises `InputError` or `SpanError` for positions that are not there.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> to_question = heads_by_attention(model, model.prepare("Who made the star?"), "question")
    >>> bool((to_question <= 1).all())
    True
    """
    prompts = prompts_of(model, inputs)
    places = prompts.each(lambda prompt: to_device(resolve_positions(span, prompt)[0], prompts.device), prompts)
    said = span if isinstance(span, str) else places[0].tolist()
    with provenance("heads_by_attention", model, prompts, n_forward=1, span=said, units="attention") as made:
        cache, made.n_forward = as_answer_cache(model, inputs, None, ("pattern",))
        rows = torch.stack([cache.part(i, "pattern").float().mean(2) for i in range(cache.n_layers)], 1)
        mass = torch.stack([row[..., where].sum(-1) for row, where in zip(rows, places, strict=True)])
        return _labelled(mass, ("prompt", "layer", "head"), "attention", made.attrs())


def _labelled(values: torch.Tensor, dims: Sequence[str], name: str, attrs: dict[str, Any]) -> xr.DataArray:
    coords = {dim: range(n) for dim, n in zip(dims, values.shape, strict=True)}
    result = xr.DataArray(to_numpy(values), dims=dims, coords=coords, name=name, attrs=attrs)
    return result.isel(prompt=0, drop=True) if len(values) == 1 else result
