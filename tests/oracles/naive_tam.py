"""Token activation maps by loops over logits, written from the released code's steps; nothing of the library is used."""

from __future__ import annotations

import numpy as np


def rank_gaussian(values: np.ndarray) -> np.ndarray:
    """Every 3 x 3 window sorted, and its values averaged with weights that fall with the distance from the median's rank."""
    rows, columns = values.shape
    found = np.zeros((rows, columns))
    for row in range(rows):
        for column in range(columns):
            window = sorted(
                values[mirrored(row + down, rows), mirrored(column + right, columns)]
                for down in (-1, 0, 1)
                for right in (-1, 0, 1)
            )
            mean = sum(window) / 9
            if mean <= 0:
                continue
            spread = (sum((v - mean) ** 2 for v in window) / 9) ** 0.5 / mean
            if spread < 1e-12:
                found[row, column] = mean
                continue
            weights = [np.exp(-((k - 4) ** 2) / (2 * spread**2)) for k in range(9)]
            found[row, column] = sum(w * v for w, v in zip(weights, window, strict=True)) / sum(weights)
    return found


def mirrored(index: int, n: int) -> int:
    """The index that stands in for one beyond the border, which itself is not repeated."""
    if n == 1:
        return 0
    return -index if index < 0 else 2 * (n - 1) - index if index >= n else index


def without_context(logits: np.ndarray, image: list[int], earlier: list[tuple[int, int]], token: int) -> np.ndarray:
    """One token's activations at the image, of logits [position, word]; `earlier` are (position, word) of the context."""
    own = np.array([max(logits[p, token], 0) for p in image])
    context = [(position, word) for position, word in earlier if word != token]
    total = sum(max(logits[position, token], 0) for position, _ in context)
    interference = np.zeros(len(image))
    for position, word in context:
        share = max(logits[position, token], 0) / (total + 1e-8)
        interference += share * np.array([max(logits[p, word], 0) for p in image])
    scale = np.linalg.lstsq(interference[:, None], own, rcond=None)[0][0] if interference.any() else 0.0
    return np.clip(own - scale * interference, 0, None)
