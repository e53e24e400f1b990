"""Outputs and heads taken away, softer heads, and Grad-CAM, by hooks on the modules of Hugging Face's model: full forward passes.

Written from what each is called after; nothing of the library is used. Prompts are single and unpadded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Heads = Sequence[tuple[int, int]]


@torch.no_grad()
def _logits(hf: Any, prompt: dict[str, Tensor], handles: Iterable[Any]) -> Tensor:
    """Logits [d_vocab] at the last position, while hooks are there."""
    handles = list(handles)
    try:
        return hf(**prompt).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()


def without_outputs(
    hf: Any, prompt: dict[str, Tensor], kind: str, layers: Iterable[int], positions: Sequence[int]
) -> Tensor:
    """Logits with what attention ("attn") or the MLP ("mlp") of some layers add at some positions set to zero."""

    def zero(module: Any, given: Any, out: Any) -> Any:
        value = (out[0] if isinstance(out, tuple) else out).clone()
        for position in positions:
            value[0, position] = 0
        return (value, *out[1:]) if isinstance(out, tuple) else value

    blocks = hf.model.language_model.layers
    parts = [blocks[i].self_attn if kind == "attn" else blocks[i].mlp for i in layers]
    return _logits(hf, prompt, [part.register_forward_hook(zero) for part in parts])


@torch.no_grad()
def head_values(hf: Any, prompt: dict[str, Tensor]) -> list[Tensor]:
    """What enters the output projection of every layer, [pos, head, d_head]."""
    seen: list[Tensor] = []
    n_heads = hf.config.text_config.num_attention_heads

    def keep(module: Any, given: Any) -> None:
        seen.append(given[0][0].reshape(given[0].shape[1], n_heads, -1).clone())

    _logits(hf, prompt, [b.self_attn.o_proj.register_forward_pre_hook(keep) for b in hf.model.language_model.layers])
    return seen


def without_heads(
    hf: Any,
    prompt: dict[str, Tensor],
    heads: Heads,
    positions: Sequence[int],
    values: Mapping[tuple[int, int], Tensor] | None = None,
) -> Tensor:
    """Logits with what heads (layer, head) read at some positions replaced by zero, or by a vector for each."""
    n_heads = hf.config.text_config.num_attention_heads

    def swap(layer: int) -> Any:
        def change(module: Any, given: Any) -> Any:
            x = given[0].clone()
            rows = x.view(x.shape[1], n_heads, -1)
            for at, head in heads:
                if at == layer:
                    for position in positions:
                        rows[position, head] = 0 if values is None else values[at, head]
            return (x,)

        return change

    blocks = hf.model.language_model.layers
    return _logits(hf, prompt, [b.self_attn.o_proj.register_forward_pre_hook(swap(i)) for i, b in enumerate(blocks)])


def softened(hf: Any, prompt: dict[str, Tensor], layers: Iterable[int], temperature: float) -> Tensor:
    """Logits with the scores of all heads of some layers divided by a number: the scale that they are multiplied by is."""
    attention = [hf.model.language_model.layers[i].self_attn for i in layers]
    for one in attention:
        one.scaling /= temperature
    try:
        return _logits(hf, prompt, [])
    finally:
        for one in attention:
            one.scaling *= temperature


def grad_cam(hf: Any, prompt: dict[str, Tensor], layer: int, token: int, positions: Sequence[int]) -> list[float]:
    """Each position's residual stream entering a layer, along the mean gradient of a token's logit there; where positive."""
    leaf: list[Tensor] = []

    def enter(module: Any, given: Any, kwargs: dict[str, Any]) -> Any:
        leaf.append(given[0].detach().clone().requires_grad_())
        return (leaf[0], *given[1:]), kwargs

    handle = hf.model.language_model.layers[layer].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with torch.enable_grad():
            hf(**prompt).logits[0, -1, token].backward()
    finally:
        handle.remove()
    gradient = leaf[0].grad
    assert gradient is not None
    weights = sum(gradient[0, p] for p in positions) / len(positions)
    return [max(0.0, float((weights * leaf[0].detach()[0, p]).sum())) for p in positions]
