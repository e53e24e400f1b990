"""Vectors -> words: reading a residual stream through the unembedding, or by the input embeddings.

Three lenses are in use, and papers differ in which: `final` applies the final norm to the vector itself, `frozen` the
final norm with the scale that the actual final residual stream had (so that parts add up to the logits), `none` no norm at all.
A LayerNorm also subtracts the mean of every vector and adds its bias once, to the whole residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.checks import one_of
from hooked_llava.errors import InputError
from hooked_llava.machine.devices import to_device
from hooked_llava.model.components.precision import at_least_float32
from hooked_llava.readout.vocabulary import check_k

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA

Lens = Literal["final", "frozen", "none"]
Space = Literal["unembed", "embed", "cosine"]
_CHUNK = 2**24  # logits held at once
_SCORED = 2**19  # the same, where they are only summed up: small pieces cost no time and little memory
_WIDENED = 2**13  # words whose unembedding is converted at once


def lens(
    model: HookedLLaVA,
    vectors: Float[Tensor, "*shape d_model"],
    *,
    norm: Lens = "final",
    scale: Float[Tensor, "*scale 1"] | None = None,
    bias: bool = True,
) -> Float[Tensor, "*shape d_vocab"]:
    """Logits that vectors of the residual stream stand for.

    Args:
        model: the model whose final norm and unembedding are used; its hooks do not fire.
        vectors: in the residual stream.
        norm: "final": (u / rms(u) * weight) W_U; "frozen": (u / scale * weight) W_U; "none": u W_U. With a LayerNorm u
            is centered first and the norm's bias added; an unembedding's bias is added, too.
        scale: for "frozen", `ln_final.hook_scale` of the position that the answer is read at.
        bias: for "frozen" and "none", False where the vectors are parts of the residual stream: biases of the norm and of the
            unembedding belong to the whole only.

    In the vectors' dtype and on their device. Raises `InputError` for an unknown norm, or "frozen" without a scale.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> bool((lens(model, model.W_E[:2], norm="none") == model.W_E[:2] @ model.W_U).all())
    True
    """
    if norm == "final":
        return _unembed(model, model.ln_final.fused(vectors.to(model.ln_final.weight.device))).to(vectors.device)
    if norm == "none":
        return _unembed(model, vectors, bias=bias).to(vectors.device)
    if norm != "frozen":
        raise InputError(f"norm={norm!r} is no lens; expected 'final', 'frozen' or 'none'.")
    if scale is None:
        raise InputError("norm='frozen' needs scale=, the final norm's scale at the position of the answer.")
    return _unembed(model, model.ln_final.frozen(vectors, scale, bias=bias), bias=bias).to(vectors.device)


def _unembed(
    model: HookedLLaVA, vectors: Float[Tensor, "*shape d_model"], *, bias: bool = True
) -> Float[Tensor, "*shape d_vocab"]:
    """The product with the unembedding, where that lies, in the vectors' dtype: a finer one tells large logits apart."""
    weight, added = model.unembed.weight, model.unembed.bias if bias else None
    vectors = vectors.to(weight.device)
    if vectors.dtype == weight.dtype:
        return F.linear(vectors, weight, added)
    logits = torch.cat([vectors @ part.to(vectors.dtype).T for part in weight.split(_WIDENED)], -1)
    return logits if added is None else logits + added.to(logits.dtype)


def logits_of_tokens(
    model: HookedLLaVA, vectors: Float[Tensor, "*shape d_model"], ids: Sequence[int]
) -> Float[Tensor, "*shape token"]:
    """The logits of some tokens alone, through the final norm, in float32 at least.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> vectors = torch.ones(3, model.cfg.d_model)
    >>> torch.allclose(logits_of_tokens(model, vectors, [7, 4]), lens(model, vectors)[:, [7, 4]], atol=1e-4)
    True
    """
    normed = at_least_float32(model.ln_final.fused(vectors.to(model.ln_final.weight.device)))
    weight, bias = model.unembed.weight, model.unembed.bias
    index = to_device(list(ids), weight.device)
    added = None if bias is None else bias[index].to(normed.dtype)
    return F.linear(normed.to(weight.device), weight[index].to(normed.dtype), added).to(vectors.device)


def positions_at_once(model: HookedLLaVA) -> int:
    """How many vectors are read together, so that their logits fit into memory."""
    return max(1, _CHUNK // model.cfg.d_vocab)


def top_tokens(
    model: HookedLLaVA,
    vectors: Float[Tensor, "*shape d_model"],
    k: int,
    *,
    norm: Lens = "final",
    scale: Float[Tensor, "*scale 1"] | None = None,
    bias: bool = True,
) -> tuple[Float[Tensor, "*shape k"], Int[Tensor, "*shape k"]]:
    """The k most probable tokens of each vector and their probabilities, without holding all logits at once.

    `norm`, `scale` and `bias` as for `lens`. Raises `InputError` as that, and for a k that the vocabulary does not have.
    """
    check_k(model, k)
    rows = vectors.reshape(-1, vectors.shape[-1])
    per_chunk = positions_at_once(model)
    chunks = rows.split(per_chunk)
    scales = [None] * len(chunks)
    if scale is not None:
        scales = scale.expand(*vectors.shape[:-1], 1).reshape(-1, 1).split(per_chunk)
    logits = (lens(model, chunk, norm=norm, scale=by, bias=bias) for chunk, by in zip(chunks, scales, strict=True))
    found = [own.float().softmax(-1).topk(k, dim=-1) for own in logits]
    shape = (*vectors.shape[:-1], k)
    return torch.cat([f.values for f in found]).reshape(shape), torch.cat([f.indices for f in found]).reshape(shape)


def project(
    model: HookedLLaVA,
    vectors: Float[Tensor, "*shape d_model"],
    space: Space,
    scale: Float[Tensor, "1"] | None = None,
    *,
    bias: bool = False,
) -> Float[Tensor, "*shape d_vocab"]:
    """One number for every word of the vocabulary, in float32 at least.

    "unembed": logits through the final norm with a given scale (frozen), as parts of the final residual stream are read; with
    `bias` as the whole residual stream is, with the biases of a LayerNorm and of the unembedding.
    "embed": inner product with each word's input embedding; "cosine": their cosine, which does not favour long vectors.

    Raises `InputError` for another space, or "unembed" without a scale.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> project(model, model.W_E[:3], "cosine").argmax(-1).tolist()
    [0, 1, 2]
    """
    rows = at_least_float32(vectors)
    if space == "unembed":
        if scale is None:
            raise InputError("space='unembed' needs scale=, the final norm's scale at the position of the answer.")
        return lens(model, rows, norm="frozen", scale=scale, bias=bias)
    check_spaces([space])
    table = model.W_E.to(rows.dtype)
    if space == "embed":
        return rows @ table.T
    return F.normalize(rows, dim=-1) @ F.normalize(table, dim=-1).T


def check_spaces(spaces: Sequence[str]) -> None:
    """Raise `InputError` for a space that there is not."""
    for space in spaces:
        one_of(space, get_args(Space), "space", expected=f"one of {', '.join(get_args(Space))}")


def log_probability_increase(
    model: HookedLLaVA,
    vectors: Float[Tensor, "*n d_model"],
    base: Float[Tensor, "*base d_model"],
    target: int | Sequence[int] | Int[Tensor, "*targets variant"],
    *,
    scale: Float[Tensor, "*scale 1"],
) -> Float[Tensor, "*n"]:
    """S(v | u) = log p(w | u + v) - log p(w | u) in nats, with the frozen final norm (Yu & Ananiadou 2411.10950).

    Args:
        model: the model whose final norm and unembedding are used; its hooks do not fire.
        vectors: what is added to the residual stream, v.
        base: the residual stream that they are added to, u; one for all, or shaped so that it broadcasts against the vectors.
        target: token w, or several whose probabilities add up; a tensor where the vectors have different ones.
        scale: `ln_final.hook_scale` of the position that the answer is read at.

    The zero vector scores 0, and scores telescope: what is added one after the other sums to log p at the end less log p
    at the beginning. In float32 at least; the vocabulary is taken in pieces, so that no more than some millions of
    logits are held.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> red = model.to_single_token("Red")
    >>> direction = model.tokens_to_residual_directions(red)
    >>> log_probability_increase(model, direction, torch.zeros_like(direction), red, scale=torch.ones(1)).item() > 1
    True
    """
    ids = target if isinstance(target, Tensor) else torch.tensor(target).reshape(-1)
    before = log_probabilities(model, base, ids, scale=scale)
    return log_probabilities(model, at_least_float32(vectors) + base, ids, scale=scale) - before


def log_probabilities(
    model: HookedLLaVA,
    vectors: Float[Tensor, "*n d_model"],
    target: Int[Tensor, "*targets variant"],
    *,
    scale: Float[Tensor, "*scale 1"],
) -> Float[Tensor, "*out"]:
    """log p(w | u) in nats of each vector u through the frozen final norm, over all variants of the target w.

    `target` and `scale` broadcast against the vectors; otherwise as `log_probability_increase`.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> everything = torch.arange(model.cfg.d_vocab)
    >>> bool(log_probabilities(model, model.W_E[7], everything, scale=torch.ones(1)).abs() < 1e-4)
    True
    """
    read = model.ln_final.frozen(at_least_float32(vectors), scale).to(model.unembed.weight.device)  # (*n, d_model)
    found = _over_vocabulary(model, lambda words_of: read @ words_of.to(read.dtype), read.shape[:-1], target)
    return found.to(vectors.device)


def expected_unembedding(
    model: HookedLLaVA, resid: Float[Tensor, "*n d_model"], scale: Float[Tensor, "*n 1"]
) -> Float[Tensor, "*n d_model"]:
    """The mean of the words' unembedding vectors under the probabilities that a residual stream stands for (frozen lens).

    What a vector adds to a word's log probability is, to first order, its product with that word's unembedding less this.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> even = expected_unembedding(model, torch.zeros(1, model.cfg.d_model), torch.ones(1, 1))
    >>> torch.allclose(even[0], model.W_U.mean(-1), atol=1e-5)
    True
    """
    weight = model.unembed.weight
    p = lens(model, at_least_float32(resid), norm="frozen", scale=scale).softmax(-1).to(weight.device)
    parts = zip(p.split(_WIDENED, -1), weight.split(_WIDENED), strict=True)
    zeros = torch.zeros_like(at_least_float32(resid), device=weight.device)
    return sum((own @ part.to(p.dtype) for own, part in parts), zeros).to(resid.device)


def log_probabilities_along(
    model: HookedLLaVA,
    coordinates: Float[Tensor, "*n rank"],
    basis: Float[Tensor, "rank d_model"],
    base: Float[Tensor, "*base d_model"],
    target: Int[Tensor, "*targets variant"],
    *,
    scale: Float[Tensor, "*scale 1"],
) -> Float[Tensor, "*n"]:
    """`log_probabilities` of u + c B, for vectors given by their coordinates c in a small basis B.

    What one head writes lies in the d_head directions of its output weights, so thousands of its outputs meet the
    vocabulary at that width instead of d_model's. `base`, `target` and `scale` broadcast against the vectors.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> basis, red = model.blocks[2].attn.W_O[3], torch.tensor([model.to_single_token("Red")])
    >>> c, u, one = torch.randn(5, len(basis)), model.W_E[7], torch.ones(1)
    >>> whole = log_probabilities(model, u + c @ basis, red, scale=one)
    >>> torch.allclose(log_probabilities_along(model, c, basis, u, red, scale=one), whole, atol=1e-4)
    True
    """
    norm, there = model.ln_final, model.unembed.weight.device
    steps = (at_least_float32(coordinates) / at_least_float32(scale)).to(there)  # (*n, rank)
    start = norm.frozen(at_least_float32(base), scale).to(there)  # (*base, d_model)
    directions = norm.frozen(at_least_float32(basis), basis.new_ones(1), bias=False).to(there)  # (rank, d_model)

    def logits(words_of: Float[Tensor, "d_model word"]) -> Float[Tensor, "*n word"]:
        return steps @ (directions @ words_of) + start @ words_of

    return _over_vocabulary(model, logits, steps.shape[:-1], target).to(coordinates.device)


def _over_vocabulary(
    model: HookedLLaVA,
    logits_of: Callable[[Float[Tensor, "d_model word"]], Float[Tensor, "*n word"]],
    shape: torch.Size,
    target: Int[Tensor, "*targets variant"],
) -> Float[Tensor, "*out"]:
    """log P of the target's tokens together, from logits of a piece of the vocabulary at a time."""
    shape = torch.broadcast_shapes(shape, target.shape[:-1])
    target, first, bias = to_device(target, model.unembed.weight.device).expand(*shape, -1), 0, model.unembed.bias
    own, others = [], []
    for part in model.unembed.weight.split(max(1, _SCORED // max(1, shape.numel()))):
        logits = logits_of(at_least_float32(part).T)
        if bias is not None:
            logits = logits + bias[first : first + len(part)].to(logits.dtype)
        logits = logits.expand(*shape, -1)
        index = (target - first).clamp(0, len(part) - 1)
        here = index == target - first
        own.append(logits.gather(-1, index).masked_fill(~here, float("-inf")).logsumexp(-1))
        gone = torch.where(here, float("-inf"), float("inf")).to(logits.dtype)
        others.append(logits.scatter_reduce(-1, index, gone, "amin").logsumexp(-1))
        first += len(part)
    return log_p_of_odds(torch.stack(own).logsumexp(0) - torch.stack(others).logsumexp(0))


def log_p_of_odds(odds: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log P in nats of what has these odds in nats, log (P / (1 - P)): -log(1 + exp(-odds)).

    Where the model is sure, log P lies so near to 0 that log_softmax would round away what a small change does.

    >>> log_p_of_odds(torch.tensor([0.0, 30.0]))
    tensor([-6.9315e-01, -9.3576e-14])
    """
    return F.logsigmoid(odds)
