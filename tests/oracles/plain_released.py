"""The released cache of Zhang et al. (2411.14982) as their code writes and reads it, entry by entry."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def edges_by_hand(width: int, n_splits: int) -> list[int]:
    return [int(edge) for edge in torch.linspace(0, width, steps=n_splits + 1).long()]


def write_by_hand(dense: list[np.ndarray], folder: Path, n_splits: int, *, loses_last: bool) -> None:
    """`dense` is [token, feature] for each image; `loses_last` is their mistake: the end, less one, is left out again."""
    folder.mkdir(parents=True)
    edges = edges_by_hand(dense[0].shape[1], n_splits)
    for start, stop in pairwise(edges):
        locations, activations = [], []
        for image, acts in enumerate(dense):
            for token, row in enumerate(acts):
                for feature in range(start, stop - 1 if loses_last else stop):
                    if abs(row[feature]) > 1e-5:
                        locations.append([image, token, feature])
                        activations.append(row[feature])
        tensors = {
            "locations": torch.tensor(locations, dtype=torch.int64).reshape(-1, 3),
            "activations": torch.tensor(activations, dtype=torch.float16),
        }
        save_file(tensors, folder / f"{start}_{stop - 1}.safetensors")


def read_by_hand(folder: Path, width: int, n_splits: int, shapes: list[tuple[int, int]]) -> list[np.ndarray]:
    """Each image's activations [token, feature] out of the files that their loader looks for."""
    dense, edges = [np.zeros(shape) for shape in shapes], edges_by_hand(width, n_splits)
    for start, stop in pairwise(edges):
        split = load_file(folder / f"{start}_{stop - 1}.safetensors")
        for (image, token, feature), value in zip(
            split["locations"].tolist(), split["activations"].tolist(), strict=True
        ):
            dense[image][token, feature] = value
    return dense
