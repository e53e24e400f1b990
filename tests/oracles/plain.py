"""What the library computes in one call, written as loops over plain tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def loss_by_hand(logits: Tensor, input_ids: Tensor, mask: Tensor, image_token_id: int) -> float:
    """Mean surprise in nats at each text token that has a real token before it."""
    surprises = []
    for row in range(len(input_ids)):
        for position in range(1, input_ids.shape[1]):
            if not (mask[row, position] and mask[row, position - 1]) or input_ids[row, position] == image_token_id:
                continue
            scores = logits[row, position - 1].double()
            surprises.append(
                math.log(sum(math.exp(s) for s in scores.tolist())) - scores[input_ids[row, position]].item()
            )
    return sum(surprises) / len(surprises)


def warped_distribution(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Probabilities of one row after temperature, then the k best, then the smallest set that reaches p."""
    weights = [math.exp(score / temperature) for score in (logits.double() - logits.double().max()).tolist()]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    if top_k is not None:
        order = order[:top_k]
    if top_p is not None:
        total, reached, kept = sum(weights[i] for i in order), 0.0, []
        for i in order:
            kept.append(i)
            reached += weights[i] / total
            if reached >= top_p:
                break
        order = kept
    total = sum(weights[i] for i in order)
    probabilities = torch.zeros(len(weights), dtype=torch.float64)
    for i in order:
        probabilities[i] = weights[i] / total
    return probabilities


def appended(prompt: Any, ids: Tensor) -> dict[str, Tensor]:
    """The fields of prompts, padded on the left if at all, with token ids [prompt, n] at their ends."""
    mask = torch.cat([prompt.attention_mask, torch.ones_like(ids)], 1)
    return {**prompt.image_fields, "input_ids": torch.cat([prompt.input_ids, ids], 1), "attention_mask": mask}
