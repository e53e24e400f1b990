"""What ranks images and features: activations of cells as one number for each."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int

Pooling: TypeAlias = Literal["mean", "max"]
"""How the cells of an image become one number; the mean counts cells where a feature is not active as 0."""


class TopImage(NamedTuple):
    """An image in which a feature is active.

    Attributes:
        image (int): Its number in the store.
        score (float): How active the feature is, over the cells of the image.
    """

    image: int
    score: float


class ActiveFeature(NamedTuple):
    """A feature that is active in an image, or in a part of one.

    Attributes:
        feature (int): Which feature.
        score (float): How active it is, over the cells.
    """

    feature: int
    score: float


def ranking(number: Int[np.ndarray, " image"], score: Float[np.ndarray, " image"]) -> Int[np.ndarray, " image"]:
    """The order from the highest score down; equal scores in the order of their numbers.

    >>> ranking(np.array([7, 3, 5]), np.array([1.0, 1.0, 2.0]))
    array([2, 1, 0])
    """
    return np.lexsort((number, -score))


def pooled(
    group: Int[np.ndarray, " entry"],
    values: Float[np.ndarray, " entry"],
    n_cells: Int[np.ndarray, " group"],
    by: Pooling,
) -> Float[np.ndarray, " group"]:
    """Values as one number for each group, of which some cells are zero and not among the values.

    >>> pooled(np.array([0, 0, 1]), np.array([1.0, 3.0, 5.0]), np.array([4, 2]), "mean")
    array([1. , 2.5])
    """
    if by == "max":
        most = np.zeros(len(n_cells))
        np.maximum.at(most, group, values)
        return most
    return np.bincount(group, values, minlength=len(n_cells)) / np.maximum(n_cells, 1)
