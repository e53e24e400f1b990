"""Logistic regression by Newton's method, and what a probe's accuracies and controls are made of, one prompt at a time."""

from __future__ import annotations

import numpy as np


def plain_logistic(x: np.ndarray, labels: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Names, weights [label, d] and biases of the softmax regression that minimizes -sum log p + penalty / 2 |W|^2.

    Features are standardized first; weights are of the features as they are. Of two labels only one has weights (a sigmoid),
    halves of which, of opposite signs, are returned for both.
    """
    names = np.unique(labels)
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale == 0, 1, scale)
    z = np.concatenate([(x - mean) / scale, np.ones((len(x), 1))], 1)
    free = len(names) if len(names) > 2 else 1
    y = np.array([[float(label == name) for name in names] for label in labels])
    w = np.zeros((free, z.shape[1]))
    decay = np.full(z.shape[1], penalty)
    decay[-1] = 0
    for _ in range(100):
        logits = z @ w.T if free > 1 else np.concatenate([np.zeros((len(z), 1)), z @ w.T], 1)
        p = np.exp(logits - logits.max(1, keepdims=True))
        p = (p / p.sum(1, keepdims=True))[:, -free:]
        gradient = (p - y[:, -free:]).T @ z + w * decay
        hessian = np.zeros((free, z.shape[1], free, z.shape[1]))
        for a in range(free):
            for b in range(free):
                weight = p[:, a] * ((a == b) - p[:, b])
                hessian[a, :, b, :] = (z * weight[:, None]).T @ z + (np.diag(decay) if a == b else 0)
        flat = hessian.reshape(w.size, w.size)
        step = np.linalg.lstsq(flat, gradient.ravel(), rcond=1e-12)[0].reshape(
            w.shape
        )  # biases are free of one constant
        w = w - step
        if np.abs(step).max() < 1e-9:
            break
    if free == 1:
        w = np.concatenate([-w, w]) / 2
    weights = w[:, :-1] / scale
    return names, weights, w[:, -1] - weights @ mean


def plain_accuracy(x: np.ndarray, labels: np.ndarray, tested_in: np.ndarray, fold: int, penalty: float) -> float:
    """The share of a fold's prompts whose label has the largest logit, by a probe of all other folds."""
    names, weights, biases = plain_logistic(x[tested_in != fold], labels[tested_in != fold], penalty)
    right = n = 0
    for vector, label in zip(x[tested_in == fold], labels[tested_in == fold], strict=True):
        n += 1
        right += names[int(np.argmax(weights @ vector + biases))] == label
    return right / n


def plain_majority(labels: np.ndarray, tested_in: np.ndarray, fold: int) -> float:
    """The share of a fold's prompts that have the label most frequent in the others, the first of several such."""
    known = [label for label, at in zip(labels, tested_in, strict=True) if at != fold]
    usual = max(known, key=known.count)
    asked = [label for label, at in zip(labels, tested_in, strict=True) if at == fold]
    return asked.count(usual) / len(asked)
