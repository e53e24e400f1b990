"""Scores of explanations as they are written in the papers, slowly: pixels one by one, CLIP from its parts."""

from __future__ import annotations

import numpy as np
import torch


def plain_iou(one: np.ndarray, other: np.ndarray) -> float:
    """Pixels in both over pixels in either."""
    both = either = 0
    for row in range(one.shape[0]):
        for column in range(one.shape[1]):
            both += bool(one[row, column]) and bool(other[row, column])
            either += bool(one[row, column]) or bool(other[row, column])
    return both / either if either else 0.0


def plain_region(activations: np.ndarray, layout, threshold: float) -> np.ndarray:
    """The pixels of a layout of one grid whose cell is above a threshold, each pixel by its own middle."""
    (grid,) = layout.names
    cells = layout.unfold(activations)[grid]
    height, width = layout.original_size
    region = np.zeros((height, width), dtype=bool)
    rows, columns = cells.shape
    for y in range(height):
        for x in range(width):
            row, column = int((y + 0.5) / height * rows), int((x + 0.5) / width * columns)
            region[y, x] = cells[row, column] > threshold
    return region


def plain_balanced_accuracy(said: list[bool | None], truth: list[bool]) -> float:
    """Mean of the share of active images called so, and of others called so; None is wrong."""
    on_active = [answer is True for answer, is_active in zip(said, truth, strict=True) if is_active]
    on_others = [answer is False for answer, is_active in zip(said, truth, strict=True) if not is_active]
    return (sum(on_active) / len(on_active) + sum(on_others) / len(on_others)) / 2


@torch.no_grad()
def plain_clip_scores(model, processor, images, phrase: str) -> list[float]:
    """100 cos of CLIP's embeddings, by its towers and projections, one image at a time."""
    tokens = processor.tokenizer(phrase, return_tensors="pt")
    states = model.text_model(**tokens).last_hidden_state[0]
    end = tokens["input_ids"][0].tolist().index(processor.tokenizer.eos_token_id)
    text = (model.text_projection.weight @ states[end]).double()
    scores = []
    for image in images:
        pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        states = model.vision_model(pixel_values=pixels).last_hidden_state[0, 0]
        shown = (model.visual_projection.weight @ model.vision_model.post_layernorm(states)).double()
        scores.append(float(100 * (text @ shown) / (text.norm() * shown.norm())))
    return scores
