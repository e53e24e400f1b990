"""Which neurons of the MLPs make the answer likelier, and what do they write?

The neuron-level method of Yu & Ananiadou (arXiv 2312.12141, used in 2411.10950): neuron n of a layer adds m_n W_out[n] to the
residual stream, and its score is the log-probability increase S(m_n W_out[n] | resid_mid), read with the final norm's scale
frozen. Reading every neuron through the unembedding would cost many forward passes. But log P is concave along what a neuron
writes: S is at most its first-order part, which one product with W_out gives for all neurons of a layer. Neurons
are read in the order of that bound until no other can be among the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_llava.checks import as_indices, whole_number
from hooked_llava.errors import InputError
from hooked_llava.machine.devices import to_device
from hooked_llava.model.components.precision import at_least_float32
from hooked_llava.readout.answer_cache import AnswerCache, Target, as_answer_cache, prompts_of
from hooked_llava.readout.lens import expected_unembedding, project
from hooked_llava.readout.vocabulary import check_k
from hooked_llava.results.arrays import stack, to_numpy, word_variables
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs
    from hooked_llava.prompt.prepare import InputsLike

_SHARE = 0.5  # of a forward pass: what reading neurons may cost
_AT_ONCE = 32  # neurons at least, read together


def neuron_scores(
    model: HookedLLaVA,
    inputs: InputsLike | AnswerCache,
    target: Target = None,
    *,
    layers: int | Sequence[int] | None = None,
    top: int = 10,
    k: int = 5,
) -> xr.Dataset:
    """The neurons of each layer that make the answer likelier, the best first: `neuron`, `score` [layer, rank], and their words.

    Args:
        model: the model.
        inputs: prompts, anything `model.as_inputs` takes; several give a first axis prompt. Or an `AnswerCache` of them with
            the parts "attn_out" and "post".
        target: answer that is scored; the model's own next token by default, of several tokens the sum over them.
        layers: which; all by default.
        top: neurons of each layer.
        k: words that are shown of what each writes.

    `score` is S in nats given what enters the MLP's sum (resid_mid, in a parallel block resid_pre + attn_out), `first_order`
    its linear part, which is never less, and `activation` m_n, the mean over the answer's tokens. `token`, `token_id` and
    `value` [layer, rank, word] are the largest logits of what the neuron writes, m_n W_out[n]. `certain` [layer] says whether
    no other neuron of the layer can have a larger score: False only where half a forward pass did not suffice to show it.
    One forward pass (`n_forward`), and at most half of one more (`work`), beyond `top` neurons in every layer. Scores do not add
    up, and say nothing of what the answer would be without a neuron. Raises `InputError` for layers, a `top` or a k that
    are not there.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> found = neuron_scores(model, model.prepare("Who made the star?"), top=3)
    >>> found["score"].dims, found["token"].dims, bool((found["score"] <= found["first_order"] + 1e-4).all())
    (('layer', 'rank'), ('layer', 'rank', 'word'), True)
    """
    prompts, cfg = prompts_of(model, inputs), model.config.language
    chosen = list(range(cfg.n_layers)) if layers is None else as_indices(layers, cfg.n_layers, "layers")
    top = whole_number(top, "top", least=1, most=cfg.d_mlp, of=" neurons")
    check_k(model, k)
    units = "log-probability increase (nats)"
    with provenance("neuron_scores", model, prompts, n_forward=1, units=units, layers=chosen) as made:
        cache, made.n_forward = as_answer_cache(model, inputs, target, ("attn_out", "post"))
        several = range(len(cache.logit_positions))
        results = [_one_prompt(cache.take([i]), prompts[i], chosen, top, k) for i in several]
        work = sum(float(result.attrs["work"]) for result in results) / len(results)
        joined = results[0] if len(results) == 1 else stack(results, "prompt")
        return joined.assign_attrs(made.attrs(**cache.target_attrs(), work=work))


def top_neurons(scores: xr.Dataset, k: int = 10) -> list[tuple[int, int]]:
    """The k (layer, neuron) pairs with the largest scores of one prompt's `neuron_scores`, the best first.

    Raises `InputError` for scores of several prompts, and for more neurons than each layer gives (`top=`), since the next
    ones of a layer are not known.

    >>> dims = ("layer", "rank")
    >>> scores = {"neuron": (dims, [[7, 4], [2, 9]]), "score": (dims, [[0.5, 0.1], [0.9, 0.3]])}
    >>> top_neurons(xr.Dataset(scores, coords={"layer": [0, 1]}), 2)
    [(1, 2), (0, 7)]
    """
    if set(scores["score"].dims) != {"layer", "rank"}:
        raise InputError(f"Scores have the axes {scores['score'].dims}; expected layer and rank, of one prompt.")
    whole_number(k, "k", least=1, most=scores.sizes["rank"], of=" neurons of each layer")
    score, neuron = (scores[name].transpose("layer", "rank").values for name in ("score", "neuron"))
    best = score.ravel().argsort(kind="stable")[::-1][:k]
    layers = scores["layer"].values
    return [(int(layers[i // score.shape[1]]), int(neuron.ravel()[i])) for i in best]


@dataclass(frozen=True)
class _Best:
    """The best neurons of a layer.

    Attributes:
        neuron (Int[Tensor, " rank"]): Which, the best first.
        score (Float[Tensor, " rank"]): S of each.
        bound (Float[Tensor, " rank"]): Its first-order part.
        certain (bool): Whether no other neuron can be among them.
        n_read (int): How many neurons were read through the unembedding.
    """

    neuron: Int[Tensor, " rank"]
    score: Float[Tensor, " rank"]
    bound: Float[Tensor, " rank"]
    certain: bool
    n_read: int


def _one_prompt(cache: AnswerCache, prompt: Inputs, layers: list[int], top: int, k: int) -> xr.Dataset:
    model, scale = cache.model, cache.scale[0].mean(0)
    dims, n_words = ("layer", "rank"), len(layers) * top
    readings_per_pass = _readings_per_pass(model, prompt.shape[1])
    limit = int((_SHARE * readings_per_pass - n_words) // len(layers)) // cache.target.shape[1]
    found = [_best_of_layer(cache, layer, top, limit) for layer in layers]
    activation, values, ids = [], [], []
    for layer, best in zip(layers, found, strict=True):
        own = at_least_float32(cache.part(layer, "post")[0])[:, best.neuron].mean(0)  # (rank)
        written = own[:, None] * at_least_float32(_weight_of(cache, layer)[best.neuron])
        logits = project(model, written, "unembed", scale).topk(k, dim=-1)  # (rank, word)
        activation.append(own)
        values.append(logits.values)
        ids.append(logits.indices)
    by_rank = {
        "score": [one.score for one in found],
        "first_order": [one.bound for one in found],
        "activation": activation,
    }
    n_read = sum(one.n_read for one in found) * cache.target.shape[1] + n_words
    return xr.Dataset(
        {
            "neuron": (dims, to_numpy(torch.stack([one.neuron for one in found]))),
            **{name: (dims, to_numpy(torch.stack(rows))) for name, rows in by_rank.items()},
            "certain": ("layer", [one.certain for one in found]),
            **word_variables(model, torch.stack(values), torch.stack(ids), (*dims, "word"), "value"),
        },
        coords={"layer": layers, "rank": range(top)},
        attrs={"work": n_read / readings_per_pass},
    )


def _best_of_layer(cache: AnswerCache, layer: int, top: int, limit: int) -> _Best:
    """The neurons with the largest S: read in the order of their bounds until the next bound is below what is found."""
    m = at_least_float32(cache.part(layer, "post"))[0]  # (read, d_mlp)
    base = at_least_float32(cache.resid[layer]) + cache.part(layer, "attn_out")  # (1, read, d_model)
    bound = _bounds(cache, layer, m, base)
    order = bound.argsort(descending=True)
    step, scores, n_read = max(2 * top, _AT_ONCE), bound.new_zeros(0), 0
    weight = _weight_of(cache, layer)
    while n_read < len(order) and (n_read < top or n_read < limit) and not _settled(scores, bound, order, top):
        some = order[n_read : min(n_read + step, max(limit, top))]
        written = m[:, some, None] * at_least_float32(weight[some])  # (read, neuron, d_model)
        scores = torch.cat([scores, cache.score(written[None], base)[0]])
        n_read += len(some)
    best = scores.topk(top).indices
    neuron = order[best]
    certain = bool(n_read == len(order) or _settled(scores, bound, order, top))
    return _Best(neuron, scores[best], bound[neuron], certain, n_read)


def _settled(
    scores: Float[Tensor, " read"], bound: Float[Tensor, " d_mlp"], order: Tensor, top: int
) -> Bool[Tensor, ""] | bool:
    """Whether what is read holds the best: no unread neuron's bound lies above the last of them."""
    n_read = len(scores)
    if n_read < top:
        return False
    return n_read == len(order) or scores.topk(top).values[-1] >= bound[order[n_read]]


def _bounds(
    cache: AnswerCache, layer: int, m: Float[Tensor, "read d_mlp"], base: Float[Tensor, "1 read d_model"]
) -> Float[Tensor, " d_mlp"]:
    """At least S of every neuron: m v . (u_w - mean of u), for unembedding vectors u, summed over the answer's tokens.

    log of the sum over words of p exp(m v . u) is at least m v . (mean of u under p), by Jensen's inequality. Of several
    variants of the answer the one that rises most bounds their sum.
    """
    model = cache.model
    scale, target = cache.scale[0], cache.target[0]  # (read, 1), (read, variant)
    norm, weight = model.ln_final, at_least_float32(_weight_of(cache, layer))
    mean = expected_unembedding(model, base[0], scale)  # (read, d_model)
    words = model.unembed.weight
    own = at_least_float32(words[to_device(target, words.device)]).to(mean.device)  # (read, variant, d_model)
    direction = norm.direction(own - mean[:, None]) / scale[:, None]
    along = torch.einsum("rn,nd,rvd->rvn", m, weight, direction)
    return along.amax(1).sum(0)


def _weight_of(cache: AnswerCache, layer: int) -> Float[Tensor, "d_mlp d_model"]:
    """What each neuron of a layer writes, on the device of what was cached."""
    return cache.model.blocks[layer].mlp.W_out.to(cache.scale.device)


def _readings_per_pass(model: HookedLLaVA, n_positions: int) -> float:
    """How many vectors through the unembedding cost as much as the language model's forward pass over a prompt."""
    in_blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
    return n_positions * in_blocks / model.unembed.weight.numel()
