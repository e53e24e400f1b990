"""Patchscopes the slow and plain way: Hugging Face's model, one full forward pass for every token of every run.

Written from the paper's definition (2401.06102, section 3) on Hugging Face's own class; nothing of the library is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def entering(hf: Any, prompt: dict[str, Tensor], layer: int) -> Tensor:
    """The residual stream [pos, d_model] that enters a block; for the number of blocks, what leaves the last."""
    seen: list[Tensor] = []
    layers = hf.model.language_model.layers
    if layer == len(layers):
        handle = layers[-1].register_forward_hook(lambda module, args, out: seen.append(_first(out).clone()))
    else:
        handle = layers[layer].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        hf(**prompt)
    finally:
        handle.remove()
    return seen[0][0]


@torch.no_grad()
def patched(hf: Any, prompt: dict[str, Tensor], layer: int, position: int, vector: Tensor) -> Tensor:
    """Logits [d_vocab] after a prompt with a vector in place of what enters a block at one position."""
    layers = hf.model.language_model.layers

    def put(resid: Tensor) -> Tensor:
        resid = resid.clone()
        resid[0, position] = vector
        return resid

    if layer == len(layers):
        handle = layers[-1].register_forward_hook(lambda module, args, out: put(_first(out)))
    else:
        handle = layers[layer].register_forward_pre_hook(lambda module, args: (put(args[0]), *args[1:]))
    try:
        return hf(**prompt).logits[0, -1]
    finally:
        handle.remove()


def continued(hf: Any, prompt: dict[str, Tensor], n: int, layer: int, position: int, vector: Tensor) -> list[int]:
    """The n tokens that follow, greedily, each by a full forward pass of all before it."""
    ids = prompt["input_ids"]
    for _ in range(n):
        fields = {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        token = patched(hf, fields, layer, position, vector).argmax()
        ids = torch.cat([ids, token.reshape(1, 1)], dim=1)
    return ids[0, prompt["input_ids"].shape[1] :].tolist()


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out
