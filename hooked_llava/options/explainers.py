"""Who may explain features: how each is named on the command line, what it is, and what all of them are told and say."""

from __future__ import annotations

from typing import NamedTuple

UNABLE = "Unable to produce descriptions"
"""What an explainer says where images share nothing (Zhang et al. 2411.14982)."""
DIMMED = 224 / 255
"""How far the released code of 2411.14982 blends what is not active to black."""


class ExplainerChoice(NamedTuple):
    """A kind of explainer.

    Attributes:
        written (str): How it is written, with its NAME where it has one.
        meaning (str): What it is.
    """

    written: str
    meaning: str


EXPLAINERS: dict[str, ExplainerChoice] = {
    "oracle": ExplainerChoice("oracle", "knows what the images of tiny-shapes hold, and is the default there"),
    "transformers": ExplainerChoice(
        "transformers:NAME", "a model that answers prompts about images, from the hub or a folder, in this process"
    ),
    "server": ExplainerChoice(
        "server:NAME",
        "a model behind a server that speaks OpenAI's protocol, such as vLLM or SGLang; --base-url says where",
    ),
}
"""By the word that stands first."""
