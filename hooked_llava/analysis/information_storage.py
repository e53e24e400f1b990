"""Where is the answer, or the object's name, stored before the answer reads it?

Yu & Ananiadou (arXiv 2411.10950) read vectors at the positions that matter in the space of words, and compare a correct
word with a distractor: by their logit difference, and by the reciprocal of their ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, SupportsIndex

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.analysis.maps.scores import (
    Heads,
    best_of,
    best_positions,
    check_choice,
    check_top,
    chosen_heads,
    named_heads,
)
from hooked_llava.errors import InputError
from hooked_llava.machine.devices import to_device
from hooked_llava.prompt.where import PositionsLike, resolve_positions
from hooked_llava.readout.answer_cache import AnswerCache, as_answer_cache, cache_answer, prompts_of, split_prompts
from hooked_llava.readout.answer_tokens import per_prompt, single_token
from hooked_llava.readout.head_outputs import head_outputs
from hooked_llava.readout.lens import Space, check_spaces, project
from hooked_llava.readout.resid import resid_by_layer, resid_names
from hooked_llava.readout.vocabulary import decode_text
from hooked_llava.results.arrays import position_coords, resid_coords, stack, to_numpy
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs
    from hooked_llava.prompt.prepare import InputsLike
    from hooked_llava.prompt.token_map import TokenMap

Words = str | SupportsIndex | Sequence[str | SupportsIndex]


def information_storage(
    model: HookedLLaVA,
    inputs: InputsLike | AnswerCache,
    correct: Words,
    distractor: Words,
    *,
    positions: PositionsLike | None = None,
    top: int | None = None,
    heads: Heads = 1,
    spaces: Sequence[Space] = ("unembed", "embed"),
) -> xr.Dataset:
    """How plainly a correct word and a distractor can be read in the residual stream by layer, and in what heads take from it.

    Args:
        model: the model.
        inputs: prompts, anything `model.as_inputs` takes; several give a first axis prompt. Or a `AnswerCache` of them, with
            a target of one token.
        correct: the word that should be stored (the color, the object's name), one token where it follows the prompt; a list
            has one for each prompt.
        distractor: a word of the same kind that should not, likewise.
        positions: where to read: a span or numbers; by default anywhere in the prompt.
        top: only so many of these positions: those with the largest scores for the best of the heads, the best first. All
            of them, in their order, where positions are named and `top` is not; by default 20 of the prompt. The
            paper's metric at image positions is positions="image", top=20.
        heads: whose outputs are read: the k best by their scores, "all", or (layer, head) pairs. Scores are those for
            the model's own answer (or the answer cache's target).
        spaces: how vectors become words, see `head_readings`.

    Returns, for what enters each layer (layer 0 is the embedding: at image positions what the projector gives; layer
    n_layers the final residual stream), `logit_difference` and `rank` [space, layer, position, (word)], and for what heads
    write at the answer's position from each of these positions `head_output_logit_difference` and `head_output_rank`
    [space, head, position, (word)]. A rank counts from 1; the paper's MRR is the mean of its reciprocal, see
    `reciprocal_rank`. One forward pass for each prompt. "Logits" of the spaces "embed" and "cosine" are inner products and
    cosines. Raises `InputError` for words of several tokens, and for spaces, heads or positions that are not there. Methods
    (e) and (f) of the paper.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> stored = information_storage(model, model.prepare("Who made the star?"), "star", "ring", positions="question")
    >>> stored["rank"].dims, bool(stored["rank"].min() >= 1)
    (('space', 'layer', 'position', 'word'), True)
    """
    apart = [prompt for prompt, _ in split_prompts(model, inputs, None)]
    check_spaces(spaces)
    heads = check_choice(model, heads)
    top = check_top(20 if top is None else top) if positions is None or top is not None else None
    given = [per_prompt(words, len(apart), what) for words, what in ((correct, "correct"), (distractor, "distractor"))]
    maps = prompts_of(model, inputs).token_maps

    def tokens(token_map: TokenMap, one: str | SupportsIndex, other: str | SupportsIndex) -> tuple[int, int]:
        return single_token(model, token_map, one), single_token(model, token_map, other)

    ids = prompts_of(model, inputs).each(tokens, maps, *given)
    if isinstance(inputs, AnswerCache) and inputs.logit_positions.shape[1] != 1:
        raise InputError(
            "information_storage reads one head output from each position; give an AnswerCache of one token."
        )
    each = zip(apart, ids, strict=True)
    results = [_one_prompt(model, *one, positions, top, heads, spaces) for one in each]
    return results[0] if len(results) == 1 else stack(results, "prompt")


def reciprocal_rank(stored: xr.Dataset, *, dim: Sequence[str] = ("prompt", "position")) -> xr.Dataset:
    """Mean of 1 / rank over prompts and positions (MRR) of what `information_storage` found, by layer and by head.

    `resid` [space, layer, word] is of the residual stream that enters each layer, `head_output` [space, head, word] of the heads'
    outputs.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> stored = information_storage(model, model.prepare("Who made the star?"), "star", "ring", positions="question")
    >>> reciprocal_rank(stored).resid.dims
    ('space', 'layer', 'word')
    """
    over = [name for name in dim if name in stored.dims]
    means = {"resid": (1 / stored["rank"]).mean(over), "head_output": (1 / stored["head_output_rank"]).mean(over)}
    return xr.Dataset(means, attrs=stored.attrs)


def _one_prompt(
    model: HookedLLaVA,
    inputs: Inputs | AnswerCache,
    ids: tuple[int, int],
    positions: PositionsLike | None,
    top: int | None,
    heads: Heads,
    spaces: Sequence[Space],
) -> xr.Dataset:
    prompt = prompts_of(model, inputs)
    index = among = None if positions is None else resolve_positions(positions, prompt)[0]
    with provenance("information_storage", model, prompt, n_forward=1, spaces=spaces, top=top) as made:
        cache = _run(model, inputs, among)
        pairs = chosen_heads(cache, heads)[0]
        if top is not None:
            best = pairs[0] if isinstance(heads, int) else best_of(cache, pairs)
            index = best_positions(cache, best, top, None if among is None else among.tolist())
        assert index is not None  # without positions there is always a `top`
        resid = _resid(cache, prompt, index, among)
        written = torch.stack([_written(cache, layer, head, index) for layer, head in pairs])
        scale = cache.scale[0, 0]
        read = [_compare(project(model, resid, space, scale, bias=True), ids) for space in spaces]
        sent = [_compare(project(model, written, space, scale), ids) for space in spaces]
        by_layer, by_head = ("space", "layer", "position"), ("space", "head", "position")
        return xr.Dataset(
            {
                "logit_difference": (by_layer, to_numpy(torch.stack([difference for difference, _ in read]))),
                "rank": ((*by_layer, "word"), torch.stack([rank for _, rank in read]).cpu().numpy()),
                "head_output_logit_difference": (
                    by_head,
                    to_numpy(torch.stack([difference for difference, _ in sent])),
                ),
                "head_output_rank": ((*by_head, "word"), torch.stack([rank for _, rank in sent]).cpu().numpy()),
            },
            coords={
                "space": list(spaces),
                **resid_coords(len(resid) - 1),
                "head": range(len(pairs)),
                **position_coords(prompt.token_map, index.tolist()),
                "word": ["correct", "distractor"],
            },
            attrs=made.attrs(
                correct=decode_text(model, [ids[0]]),
                distractor=decode_text(model, [ids[1]]),
                heads=named_heads([pairs])[0],
            ),
        )


def _run(model: HookedLLaVA, inputs: Inputs | AnswerCache, among: Int[Tensor, " candidate"] | None) -> AnswerCache:
    """What the answer is read from, and, unless a cache is given, the residual stream wherever it may be asked for."""
    parts = ("pattern", "v", "z")
    if isinstance(inputs, AnswerCache):
        return as_answer_cache(model, inputs, None, parts)[0]
    kept = None if among is None else among[None]
    return cache_answer(model, inputs, parts=parts, beside=resid_names(model), positions=kept)


def _resid(
    cache: AnswerCache, prompt: Inputs, index: Int[Tensor, " position"], among: Int[Tensor, " candidate"] | None
) -> Float[Tensor, "layer position d_model"]:
    """The residual stream by layer: of the same run, or of another where an answer cache was given."""
    if not cache.beside:
        return resid_by_layer(cache.model, prompt, index[None])[:, 0]
    places = index.tolist() if among is None else [among.tolist().index(position) for position in index.tolist()]
    beside = [cache.beside[name][0] for name in resid_names(cache.model)]
    return torch.stack([resid[to_device(places, resid.device)] for resid in beside])


def _written(
    cache: AnswerCache, layer: int, head: int, index: Int[Tensor, " position"]
) -> Float[Tensor, "position d_model"]:
    pattern, value = cache.part(layer, "pattern")[0], cache.part(layer, "v")[0]
    where = to_device(index, value.device)
    return head_outputs(cache.model, layer, pattern[..., where], value[where], heads=[head])[0, 0]


def _compare(
    logits: Float[Tensor, "*shape d_vocab"], ids: tuple[int, int]
) -> tuple[Float[Tensor, "*shape"], Int[Tensor, "*shape word"]]:
    """Logit of the first word less the second's, and the rank of each, from 1."""
    two = logits[..., to_device(ids, logits.device)]  # (*shape, word)
    rank = (logits[..., None, :] > two[..., None]).sum(-1) + 1
    return two[..., 0] - two[..., 1], rank
