"""Steering the slow and plain way: a hook function, one full forward pass over prompt and answer for every token.

Written from the definitions of the modes alone, position by position, so that nothing of the engine under test is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.oracles.plain import appended


def along(mode: str, x: Tensor, direction: Tensor, strength: float) -> Tensor:
    """One vector, steered along a direction."""
    moved = x + strength * direction
    unit = direction / direction.norm()
    if mode == "add":
        return moved
    if mode == "add_keep_norm":
        return moved / moved.norm() * x.norm()
    if mode == "project_out":
        return x - strength * (x @ unit) * unit
    if mode == "clamp":
        return x - (x @ unit) * unit + strength * direction
    return strength * direction


def active(sae: Any, x: Tensor, clamp: Mapping[int, float] | None = None) -> Tensor:
    """All features of one vector, some of them set before the largest are chosen."""
    acts = (sae.encoder.weight @ (x - sae.b_dec) + sae.encoder.bias).clamp(min=0)
    for feature, value in (clamp or {}).items():
        acts[feature] = value
    for weakest in acts.argsort()[: len(acts) - sae.cfg.k].tolist():
        acts[weakest] = 0.0
    return acts


def by_features(mode: str, x: Tensor, sae: Any, values: Mapping[int, float]) -> Tensor:
    """One vector, steered by features."""
    if mode == "replace":
        return active(sae, x, values) @ sae.W_dec + sae.b_dec
    acts = active(sae, x)
    changed = acts.clone()
    for feature, value in values.items():
        changed[feature] = value
    return changed @ sae.W_dec + sae.b_dec + (x - acts @ sae.W_dec - sae.b_dec)


def as_hook(change: Any, rows: Sequence[Sequence[int]], elsewhere: Any = None) -> Any:
    """A hook function that changes each row at its positions, and all other positions by `elsewhere`."""

    def hook(tensor: Tensor) -> Tensor:
        out = tensor.clone()
        for row, positions in enumerate(rows):
            for p in range(tensor.shape[1]):
                what = change if p in positions else elsewhere
                if what is not None:
                    flat = tensor[row, p].flatten()
                    out[row, p] = what(flat).view_as(tensor[row, p])
        return out

    return hook


def generated(
    model: Any, inputs: Any, name: str, change: Any, rows: Sequence[Sequence[int]], phases: str, n_new: int, **more: Any
) -> Tensor:
    """Greedy tokens; the change acts on the prompt's positions `rows` in "prefill", on every new token in "decode"."""
    prompt = inputs.padded_left()
    n, tokens = prompt.shape[1], prompt.input_ids.new_zeros(len(prompt), 0)
    for step in range(n_new):
        longer = appended(prompt, torch.cat([tokens, torch.full((len(prompt), 1), 9)], 1))
        of_prompt = rows if phases != "decode" else [[] for _ in rows]
        of_answer = list(range(n, n + step)) if phases != "prefill" else []
        hook = as_hook(change, [[*own, *of_answer] for own in of_prompt], **more)
        logits = model.run_with_hooks(longer, fwd_hooks=[(name, hook)])
        tokens = torch.cat([tokens, logits[:, -2].argmax(-1, keepdim=True)], 1)
    return tokens
