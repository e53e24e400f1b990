"""Interventions the slow and plain way: hooks on the whole prompt, one full forward pass for each run.

Written from the definition of `Intervention` alone, with loops over single positions and heads, so that nothing of the
engine under test is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def run_naively(model: Any, inputs: Any, runs: list[list[Any]]) -> Tensor:
    """Logits at every position under each run, [run, prompt, pos, d_vocab]."""
    rows = []
    for run in runs:
        hooks = [(iv.hook, lambda t, hook, iv=iv: _change(model, inputs, iv, hook.name, t)) for iv in run]
        with torch.no_grad():
            rows.append(model.run_with_hooks(inputs, fwd_hooks=hooks))
    return torch.stack(rows)


def _change(model: Any, inputs: Any, iv: Any, name: str, tensor: Tensor) -> Tensor:
    axes = model.hooks_table[name].axes[1:]
    out = tensor.clone()
    if axes and tensor.shape[0] == inputs.n_images and name.startswith(("vision.", "projector.", "hook_image_embed")):
        row = 0
        for n in inputs.images_per_prompt:
            for image in range(n):
                if iv.image is None or iv.image == image:
                    out[row] = _change_row(iv, axes, out[row], _patch_rows(model, iv, axes, name, out[row]), None)
                row += 1
        return out
    for prompt, token_map in enumerate(inputs.token_maps):
        edge = iv.block or iv.reweight
        where = _sequence(edge[1] if edge else iv.positions, token_map, inputs.shape[1])
        keys = _sequence(edge[0], token_map, inputs.shape[1]) if edge else None
        out[prompt] = _change_row(iv, axes, out[prompt], where, keys)
    return out


def _sequence(where: Any, token_map: Any, n: int) -> list[int]:
    if where is None:
        return list(token_map.real)
    if isinstance(where, str):
        return list(token_map[where])
    return [p % n for p in ([where] if isinstance(where, int) else where)]


def _patch_rows(model: Any, iv: Any, axes: tuple[str, ...], name: str, row: Tensor) -> list[int]:
    vision = model.config.vision
    n = row.shape[next(i for i, a in enumerate(axes) if a in ("pos", "query", "patch", "feature"))]
    if iv.positions is None:
        return list(range(n))
    given = [iv.positions] if isinstance(iv.positions, int) else list(iv.positions)
    class_token_first = "pos" in axes or "query" in axes or ("feature" in axes and not vision.drop_class_token)
    return [p % vision.n_patches + int(class_token_first and vision.class_token) for p in given]


def _change_row(iv: Any, axes: tuple[str, ...], row: Tensor, where: list[int], keys: list[int] | None) -> Tensor:
    """One row, axes moved so that (position, head or neuron) come first, and changed entry by entry."""
    p_axis = next(i for i, a in enumerate(axes) if a in ("pos", "query", "patch", "feature"))
    row = row.clone()
    if keys is not None:
        heads = range(row.shape[0]) if iv.heads is None else _numbers(iv.heads, row.shape[0])
        for h in heads:
            for q in where:
                if iv.reweight:
                    row[h, q] = _reweighted(row[h, q], keys, iv.factor)
                    continue
                for k in keys:
                    row[h, q, k] = float("-inf")
        return row
    if not where:
        return row
    cut = torch.stack([row.select(p_axis, p) for p in where], dim=p_axis)
    inner_axis = next((i for i, a in enumerate(axes) if a in ("head", "kv_head", "d_mlp")), None)
    chosen = iv.heads if iv.heads is not None else iv.neurons
    picked = None
    if chosen is not None:
        assert inner_axis is not None
        picked = _numbers(chosen, row.shape[inner_axis])
        cut = torch.stack([cut.select(inner_axis, i) for i in picked], dim=inner_axis)
    new = _new(iv, cut, p_axis)
    for i, p in enumerate(where):
        if picked is None:
            row.select(p_axis, p).copy_(new.select(p_axis, i))
        else:
            for j, h in enumerate(picked):
                after = inner_axis - (1 if inner_axis > p_axis else 0)
                row.select(p_axis, p).select(after, h).copy_(new.select(p_axis, i).select(after, j))
    return row


def _reweighted(scores: Tensor, keys: list[int], factor: float) -> Tensor:
    """Scores whose softmax is that of `scores`, times a factor at some keys, divided by its sum."""
    if scores.amax() == float("-inf"):  # a query that sees no key
        return scores
    weights = scores.double().softmax(-1)
    for k in set(keys):
        weights[k] = weights[k] * factor
    return (weights / weights.sum() if weights.sum() > 0 else weights).log().to(scores.dtype)


def _tempered(scores: Tensor, temperature: float) -> Tensor:
    """Scores whose softmax has the weights of theirs to the power 1 / T, divided by their sum."""
    weights = scores.double().softmax(-1).nan_to_num(0.0) ** (1 / temperature)
    return weights.log().to(scores.dtype)


def _numbers(given: Any, n: int) -> list[int]:
    return [i % n for i in ([given] if isinstance(given, int) else given)]


def _new(iv: Any, cut: Tensor, p_axis: int) -> Tensor:
    if iv.zero:
        return cut * 0
    if iv.scale is not None:
        return cut * iv.scale
    if iv.temperature is not None:
        return _tempered(cut, iv.temperature)
    if iv.position_mean:
        return cut.mean(p_axis, keepdim=True).expand(cut.shape)
    if iv.fn is not None:
        return iv.fn(cut)
    operand = iv.value if iv.value is not None else iv.add
    if operand.ndim == 1:  # [d]
        full = operand.expand(cut.shape)
    elif operand.ndim < cut.ndim and p_axis == 0:  # [n_positions, d]: the same for every head
        full = operand[:, None].expand(cut.shape)
    else:
        full = operand.expand(cut.shape)
    return full.clone() if iv.value is not None else cut + full
