"""The ways to steer, and what a sweep of strengths is compared with: names, and what each does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from hooked_llava.options.markdown import markdown_rows

SteeringMode = Literal["add", "add_keep_norm", "project_out", "clamp", "replace"]
Control = Literal["reconstruction", "random_feature", "random_direction", "mean_difference"]


class Mode(NamedTuple):
    """What a mode makes of an activation.

    Attributes:
        direction (str): Of a direction.
        features (str): Of features of a sparse autoencoder.
    """

    direction: str
    features: str


_ALONG_DECODER = "the same, for the features' decoder directions times their values"
STEERING_MODES: dict[SteeringMode, Mode] = {
    "add": Mode("adds strength times the direction", _ALONG_DECODER),
    "add_keep_norm": Mode("adds it, then scales the activation back to its norm", _ALONG_DECODER),
    "project_out": Mode(
        "takes away the share `strength` of what lies along the direction",
        "the same, for the span of decoder directions",
    ),
    "clamp": Mode(
        "sets what lies along the direction to strength times its norm",
        "sets the features to strength times their values; other features and the error stay (default)",
    ),
    "replace": Mode(
        "puts strength times the direction in the activation's place",
        "sets the features before the largest are chosen, and the reconstruction takes the activation's place in every pass "
        "(Zhang et al., arXiv 2411.14982)",
    ),
}
"""By the name that `steer(mode=)` takes."""
CONTROLS: dict[Control, str] = {
    "reconstruction": "no feature is set, and the autoencoder's reconstruction takes the activation's place",
    "random_feature": "features drawn at random, at the same values",
    "random_direction": "a random direction of the same norm",
    "mean_difference": "the difference of means of two sets of prompts, scaled to the same norm",
}
"""By the name on the axis `steered_by` of a sweep."""


def markdown_table(modes: Mapping[SteeringMode, Mode] = STEERING_MODES) -> str:
    """The modes as a table for the documentation.

    >>> markdown_table().splitlines()[2]
    "| `add` | adds strength times the direction | the same, for the features' decoder directions times their values |"
    """
    rows = [(f"`{name}`", one.direction, one.features) for name, one in modes.items()]
    return markdown_rows(("mode", "what it makes of a direction", "of features"), rows)
