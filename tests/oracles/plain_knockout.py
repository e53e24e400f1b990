"""Attention knockout as Zhang et al. release it: masks added to the scores of Hugging Face's model, full forward passes.

Written from the paper's formula on Hugging Face's own class; nothing of the library is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def knocked_out(
    hf: Any,
    prompt: dict[str, Tensor],
    layers: Iterable[int],
    source: Sequence[int],
    target: Sequence[int],
    read: Any = -1,
    *,
    factor: float = 0.0,
) -> Tensor:
    """Logits [d_vocab] at the last position (or others) of one unpadded prompt, with an edge blocked in some layers.

    With a factor the edge is weighted: the softmax of scores to which its logarithm is added is the pattern multiplied by it,
    each row divided by its sum.
    """
    n = prompt["input_ids"].shape[1]
    lowest = torch.finfo(hf.dtype).min
    causal = torch.zeros(n, n, dtype=hf.dtype)
    for query in range(n):
        for key in range(n):
            if key > query:
                causal[query, key] = lowest
    blocked = causal.clone()
    for query in target:
        for key in source:
            blocked[query, key] = lowest if factor == 0 or key > query else math.log(factor)
    decoder = hf.model.language_model.layers
    handles = []
    for i, layer in enumerate(decoder):
        mask = (blocked if i in set(layers) else causal)[None, None]

        def put(module: Any, args: Any, kwargs: dict[str, Any], mask: Tensor = mask) -> Any:
            return args, {**kwargs, "attention_mask": mask}

        handles.append(layer.self_attn.register_forward_pre_hook(put, with_kwargs=True))
    try:
        return hf(**prompt).logits[0, read]
    finally:
        for handle in handles:
            handle.remove()


def window_of(l: int, w: int, n_layers: int) -> list[int]:
    """The paper's window: max(0, l - floor(w/2)) to min(L, l + ceil(w/2)) - 1."""
    return list(range(max(0, l - math.floor(w / 2)), min(n_layers, l + math.ceil(w / 2))))


def relative_change(before: Tensor, after: Tensor) -> float:
    """100 (p2 - p1) / p1 of the first token that the unblocked model generates."""
    token = int(before.argmax())
    p1, p2 = before.softmax(-1)[token].item(), after.softmax(-1)[token].item()
    return 100 * (p2 - p1) / p1


def appended(prompt: dict[str, Tensor], answer: Sequence[int]) -> dict[str, Tensor]:
    """One unpadded prompt with token ids at its end."""
    ids = torch.cat([prompt["input_ids"], torch.tensor([list(answer)])], dim=1)
    return {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def log_probability(logits: Tensor, answer: Sequence[int]) -> float:
    """log P of an answer whose tokens are predicted by the rows of some logits, one after the other."""
    total = 0.0
    for row, token in zip(logits.double(), answer, strict=True):
        total += row[token].item() - math.log(sum(math.exp(x) for x in row.tolist()))
    return total
