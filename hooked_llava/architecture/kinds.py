"""One kind of tower: an entry of the tables of language models and vision towers that load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TowerKind:
    """One kind of language model or vision tower.

    Attributes:
        title (str): What it is called.
        examples (str): Models that have it.
        read (Callable[[Any], dict[str, Any]]): The fields of `LanguageConfig` or `VisionConfig` in which it differs from
            others, from its Hugging Face config.
        names (Mapping[str, str]): Names of its tensors: Hugging Face's, below the tower, and ours; `{}` stands for the
            layer.
    """

    title: str
    examples: str
    read: Callable[[Any], dict[str, Any]]
    names: Mapping[str, str]
