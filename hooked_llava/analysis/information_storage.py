"""Where is the answer, or the object's name, stored before the answer reads it?

Yu & Ananiadou (arXiv 2411.10950) read vectors at the positions that matter in the space of words, and compare a correct
word with a distractor: by their logit difference, and by the reciprocal of their ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.caching import Positions, resolve_positions, saver
from hooked_llava.errors import InputError
from hooked_llava.messages import attention_messages
from hooked_llava.readout import token_id, words
from hooked_llava.results import analysis, numbers, stack
from hooked_llava.saliency.decision import Decision, decide, one_each
from hooked_llava.saliency.scores import Heads, check_choice, chosen_heads, named_heads, score_positions
from hooked_llava.saliency.vocabulary import SPACES, Space, project

if TYPE_CHECKING:
    from hooked_llava.inputs import Inputs
    from hooked_llava.model import HookedLLaVA

Words = str | int | Sequence[str | int]


def information_storage(
    model: HookedLLaVA,
    inputs: Any,
    correct: Words,
    distractor: Words,
    *,
    positions: Positions | None = None,
    top: int = 20,
    heads: Heads = 1,
    spaces: Sequence[Space] = ("unembed", "embed"),
) -> xr.Dataset:
    """How plainly a correct word and a distractor can be read in the stream by layer, and in what heads take from it.

    Args:
        model: the model.
        inputs: prompts, anything `model.as_inputs` takes; several give a first axis prompt.
        correct: the word that should be stored (the colour, the object's name), one token; a list has one for each prompt.
        distractor: a word of the same kind that should not, likewise.
        positions: where to read; by default the `top` positions with the largest scores for the best of the heads (for
            the model's own answer), the best first.
        top: how many.
        heads: whose messages are read: the k best, or (layer, head) pairs.
        spaces: how vectors become words, see `head_readings`.

    Returns, for the stream entering each layer (layer 0 is the embedding: at image positions what the projector gives;
    layer n_layers the final stream), `logit_difference` and `rank` [space, layer, position, (word)], and for the heads'
    messages to the answer's position `message_logit_difference` and `message_rank` [space, head, position, (word)]. A rank
    counts from 1; the paper's MRR is the mean of its reciprocal, as `reciprocal_rank` takes it. "Logits" of the spaces
    "embed" and "cosine" are inner products and cosines. Raises `InputError` for words of several tokens, and for spaces,
    heads or positions that are not there. Methods (e) and (f) of the paper.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> stored = information_storage(model, model.prepare("Who made the star?"), "star", "ring", positions="question")
    >>> stored["rank"].dims, bool(stored["rank"].min() >= 1)
    (('space', 'layer', 'position', 'word'), True)
    """
    prompts = model.as_inputs(inputs)
    if outside := [space for space in spaces if space not in SPACES]:
        raise InputError(f"spaces={outside}; expected some of {', '.join(SPACES)}.")
    check_choice(model, heads)
    pairs = list(zip(one_each(correct, len(prompts)), one_each(distractor, len(prompts)), strict=True))
    ids = [(token_id(model, one), token_id(model, other)) for one, other in pairs]
    results = [
        _one_prompt(model, prompt, two, positions, top, heads, spaces) for prompt, two in zip(prompts, ids, strict=True)
    ]
    return results[0] if len(results) == 1 else stack(results, "prompt")


def reciprocal_rank(stored: xr.Dataset, *, dim: Sequence[str] = ("prompt", "position")) -> xr.Dataset:
    """Mean of 1 / rank over prompts and positions (MRR) of what `information_storage` found: `stream` and `message`.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> stored = information_storage(model, model.prepare("Who made the star?"), "star", "ring", positions="question")
    >>> reciprocal_rank(stored).stream.dims
    ('space', 'layer', 'word')
    """
    over = [name for name in dim if name in stored.dims]
    return xr.Dataset({"stream": (1 / stored["rank"]).mean(over), "message": (1 / stored["message_rank"]).mean(over)})


def _one_prompt(
    model: HookedLLaVA,
    prompt: Inputs,
    ids: tuple[int, int],
    positions: Positions | None,
    top: int,
    heads: Heads,
    spaces: Sequence[Space],
) -> xr.Dataset:
    chosen = None if positions is None else resolve_positions(positions, prompt)[0]
    with analysis(model, prompt, n_forward=2, spaces=list(spaces)) as made:
        decision = decide(model, prompt, parts=("pattern", "v", "z"))
        pairs = chosen_heads(decision, heads)[0]
        index = _best_positions(decision, pairs[0], top) if chosen is None else chosen
        streams = _streams(model, prompt, index)  # (layer, position, d_model)
        messages = torch.stack([_messages(decision, layer, head, index) for layer, head in pairs])
        scale = decision.scale[0, 0]
        read = [_compare(project(model, streams, space, scale), ids) for space in spaces]
        sent = [_compare(project(model, messages, space, scale), ids) for space in spaces]
        by_layer, by_head = ("space", "layer", "position"), ("space", "head", "position")
        return xr.Dataset(
            {
                "logit_difference": (by_layer, numbers(torch.stack([difference for difference, _ in read]))),
                "rank": ((*by_layer, "word"), torch.stack([rank for _, rank in read]).cpu().numpy()),
                "message_logit_difference": (by_head, numbers(torch.stack([difference for difference, _ in sent]))),
                "message_rank": ((*by_head, "word"), torch.stack([rank for _, rank in sent]).cpu().numpy()),
            },
            coords={
                "space": list(spaces),
                "layer": range(len(streams)),
                "head": range(len(pairs)),
                "position": index.tolist(),
                "label": ("position", [prompt.token_map.labels[i] for i in index.tolist()]),
                "word": ["correct", "distractor"],
            },
            attrs=made.attrs(
                correct=str(words(model, torch.tensor(ids[0]))),
                distractor=str(words(model, torch.tensor(ids[1]))),
                heads=named_heads([pairs])[0],
            ),
        )


def _best_positions(decision: Decision, pair: tuple[int, int], top: int) -> Int[Tensor, " position"]:
    scores = score_positions(decision, *pair)[0]
    return scores.topk(min(top, len(scores))).indices.cpu()


def _streams(
    model: HookedLLaVA, prompt: Inputs, index: Int[Tensor, " position"]
) -> Float[Tensor, "layer position d_model"]:
    """What enters every layer, and what leaves the last, at some positions."""
    names = [*model.hooks_table.resolve("resid_pre"), f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]
    store: dict[str, Tensor] = {}
    hooks: list[Any] = [(names, saver(store, model.hooks_table, index[None]))]
    with torch.no_grad():
        model.run_with_hooks(prompt, fwd_hooks=hooks, stop_at_layer=model.cfg.n_layers)
    return torch.stack([store[name][0] for name in names])


def _messages(
    decision: Decision, layer: int, head: int, index: Int[Tensor, " position"]
) -> Float[Tensor, "position d_model"]:
    pattern, value = decision.part(layer, "pattern")[0], decision.part(layer, "v")[0]
    where = index.to(value.device)
    return attention_messages(decision.model, layer, pattern[..., where], value[where], heads=[head])[0, 0]


def _compare(
    logits: Float[Tensor, "*shape d_vocab"], ids: tuple[int, int]
) -> tuple[Float[Tensor, "*shape"], Int[Tensor, "*shape word"]]:
    """Logit of the first word less the second's, and the rank of each, from 1."""
    two = logits[..., list(ids)]  # (*shape, word)
    rank = (logits[..., None, :] > two[..., None]).sum(-1) + 1
    return two[..., 0] - two[..., 1], rank
