"""What an explanation of a feature is scored by: names, titles and meanings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from hooked_llava.options.markdown import markdown_rows


class FeatureScore(NamedTuple):
    """A score of explanations.

    Attributes:
        title (str): What it is called on a page.
        meaning (str): What it says.
    """

    title: str
    meaning: str


FEATURE_SCORES: dict[str, FeatureScore] = {
    "iou": FeatureScore(
        "IoU",
        "overlap (intersection over union) of where the feature is active with what a segmenter finds for the phrase, 0 to 1",
    ),
    "clip_score": FeatureScore("CLIP", "100 times the cosine of CLIP's embeddings of the phrase and of each image"),
    "detection": FeatureScore(
        "Detection",
        "whether the explainer tells from the phrase in which images the feature is active (balanced accuracy), 0 to 1, 0.5 by "
        "chance",
    ),
}
"""By the name in the result of `score_features`."""


def markdown_table(scores: Mapping[str, FeatureScore] = FEATURE_SCORES) -> str:
    """The scores as a table for the documentation.

    >>> markdown_table().splitlines()[0]
    '| score | what it is |'
    """
    return markdown_rows(("score", "what it is"), [(f"`{name}`", score.meaning) for name, score in scores.items()])
