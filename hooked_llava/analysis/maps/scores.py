"""Log-probability increase of layers, heads and positions, for all prompts of a batch together (arXiv 2411.10950)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from fancy_einsum import einsum
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.checks import is_whole_number, whole_number, whole_numbers
from hooked_llava.errors import InputError
from hooked_llava.machine.devices import to_device
from hooked_llava.model.components.precision import at_least_float32
from hooked_llava.readout.answer_cache import AnswerCache
from hooked_llava.readout.head_outputs import summed_head_outputs

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA

Heads = int | Literal["all"] | Sequence[tuple[int, int]]
"""Which heads make a map: the k best by their scores, all of them, or (layer, head) pairs."""


def score_layers(cache: AnswerCache) -> Float[Tensor, "prompt layer 2"]:
    """S(attention | resid_pre) and S(MLP | resid_pre + attn_out); the second is resid_mid, but in a parallel block."""
    rows = []
    for layer in range(cache.n_layers):
        resid, attention = cache.resid[layer], cache.part(layer, "attn_out")
        middle = at_least_float32(resid) + attention
        scores = [
            cache.score(at_least_float32(attention), resid),
            cache.score(at_least_float32(cache.part(layer, "mlp_out")), middle),
        ]
        rows.append(torch.stack(scores, -1))
    return torch.stack(rows, 1)


def score_heads(cache: AnswerCache, layers: Sequence[int] | None = None) -> Float[Tensor, "prompt layer head"]:
    """S(z W_O | resid_pre) of every head."""
    rows = []
    for layer in range(cache.n_layers) if layers is None else layers:
        z = at_least_float32(cache.part(layer, "z"))
        output = at_least_float32(cache.model.blocks[layer].attn.W_O.to(z.device))
        written = einsum("b r h d, h d m -> b r h m", z, output)  # (prompt, read, head, d_model)
        rows.append(cache.score(written, cache.resid[layer]))
    return torch.stack(rows, 1)


def score_positions(
    cache: AnswerCache, layer: int, head: int, positions: Int[Tensor, "prompt key"] | None = None
) -> Float[Tensor, "prompt key"]:
    """S(A v W_O | resid_pre) of what one head writes at the answer's positions from every key.

    Its coordinates A v in the head's own directions W_O are all that is made of it.
    """
    pattern, value = _at(cache, layer, positions)
    cfg = cache.model.config.language
    own = value[:, None, :, head // (cfg.n_heads // cfg.n_key_value_heads)]  # (prompt, 1, key, d_head)
    coordinates = at_least_float32(pattern[:, head])[..., None] * at_least_float32(own)  # (prompt, read, key, d_head)
    basis = cache.model.blocks[layer].attn.W_O[head].to(coordinates.device)
    return cache.score_along(coordinates, basis, cache.resid[layer])


def score_positions_of_layer(
    cache: AnswerCache, layer: int, positions: Int[Tensor, "prompt key"] | None = None
) -> Float[Tensor, "prompt key"]:
    """The same for what all heads of a layer together bring from each position."""
    written = summed_head_outputs(cache.model, layer, *_at(cache, layer, positions))
    return cache.score(written, cache.resid[layer])


def best_heads(scores: Float[Tensor, "prompt layer head"], k: int) -> list[list[tuple[int, int]]]:
    """The k heads with the largest scores of every prompt, the best first; raises `InputError` for a k out of range."""
    n_heads = scores.shape[-1]
    whole_number(k, "k", least=1, most=scores[0].numel(), of=" heads")
    best = scores.flatten(1).topk(k, dim=-1).indices
    return [[divmod(index, n_heads) for index in row] for row in best.tolist()]


def check_choice(model: HookedLLaVA, heads: Heads) -> Heads:
    """The choice, checked before anything runs; raises `InputError` for heads that are not there."""
    cfg = model.config.language
    if isinstance(heads, Iterable) and not isinstance(heads, str):
        return check_heads(heads, cfg.n_layers, cfg.n_heads)
    if heads == "all":
        return "all"
    if not is_whole_number(heads):
        raise InputError(f"heads={heads!r}; expected a whole number, 'all', or (layer, head) pairs.")
    return whole_number(heads, "k", least=1, most=cfg.n_layers * cfg.n_heads, of=" heads")


def chosen_heads(cache: AnswerCache, heads: Heads) -> list[list[tuple[int, int]]]:
    """The heads of each prompt that `heads` means, the best first where they are chosen by their scores."""
    cfg = cache.model.config.language
    if isinstance(heads, int):
        return best_heads(score_heads(cache), heads)
    if isinstance(heads, str):
        pairs = [(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    else:
        pairs = check_heads(heads, cfg.n_layers, cfg.n_heads)
    return [pairs] * len(cache.inputs)


def best_of(cache: AnswerCache, pairs: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of one prompt's heads the one with the largest score."""
    layers = sorted({layer for layer, _ in pairs})
    scores = score_heads(cache, layers)[0]
    return max(pairs, key=lambda pair: float(scores[layers.index(pair[0]), pair[1]]))


def best_positions(
    cache: AnswerCache, pair: tuple[int, int], top: int, among: Sequence[int] | None = None
) -> Int[Tensor, " position"]:
    """The tokens of one prompt with the largest scores for a head, the best first; padding is no token."""
    real = cache.inputs.token_map.real
    where = torch.tensor([p for p in (real if among is None else among) if p in real])
    scores = score_positions(cache, *pair, to_device(where[None], cache.scale.device))[0]  # (position)
    return where[scores.topk(min(top, len(where))).indices.cpu()]


def check_top(top: int) -> int:
    """How many positions; raises `InputError` unless it is a whole number from 1 on."""
    return whole_number(top, "top", least=1, of=" positions", expected="a whole number, at least 1")


def named_heads(chosen: list[list[tuple[int, int]]]) -> list[list[str]]:
    """Heads as "layer.head", for attributes of results."""
    return [[f"{layer}.{head}" for layer, head in row] for row in chosen]


def check_heads(heads: Iterable[Any], n_layers: int, n_heads: int) -> list[tuple[int, int]]:
    """(layer, head) pairs, either counted from the end where negative; raises `InputError` for heads that are not there.

    >>> check_heads([(-1, 2), (0, -4)], 6, 4)
    [(5, 2), (0, 0)]
    """
    listed = list(heads) if isinstance(heads, Iterable) and not isinstance(heads, str) else [heads]
    try:
        pairs = [whole_numbers(pair, "heads") for pair in listed]
    except InputError:
        pairs = [[]]
    if not all(len(pair) == 2 for pair in pairs):
        raise InputError(f"heads={heads!r}; expected (layer, head) pairs, such as [(2, 1)].")
    if outside := [
        (layer, head) for layer, head in pairs if not (-n_layers <= layer < n_layers and -n_heads <= head < n_heads)
    ]:
        raise InputError(
            f"There are no heads {outside}; expected ({-n_layers}..{n_layers - 1}, {-n_heads}..{n_heads - 1})."
        )
    if not pairs:
        raise InputError("No heads are named; give at least one (layer, head).")
    return [(layer % n_layers, head % n_heads) for layer, head in pairs]


def _at(
    cache: AnswerCache, layer: int, positions: Int[Tensor, "prompt key"] | None
) -> tuple[Float[Tensor, "prompt head read key"], Float[Tensor, "prompt key kv_head d_head"]]:
    pattern, value = cache.part(layer, "pattern"), cache.part(layer, "v")
    if positions is None:
        return pattern, value
    rows = torch.arange(len(positions), device=value.device)[:, None]
    keys = positions[:, None, None].expand(-1, *pattern.shape[1:3], -1)
    return pattern.gather(-1, keys), value[rows, positions]
