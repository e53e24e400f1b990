"""What an experiment compares: pairs of prompts, corruptions, edges of attention, windows of layers, baselines.

In: a model and a prompt. Out: another prompt, or interventions. Uses replay and what lies below it.
"""

from hooked_llava.experiments.corruptions import MeanEmbedding, Noise, OtherImage, Replace
from hooked_llava.experiments.edges import Edge
from hooked_llava.experiments.pairs import (
    blank_image,
    gaussian_noise,
    mean_embedding,
    other_image,
    other_question,
    prompt_pairs,
    swapped_objects,
    without_object,
)
from hooked_llava.experiments.windows import centered_window, paper_width, released_window

__all__ = [
    "Edge",
    "MeanEmbedding",
    "Noise",
    "OtherImage",
    "Replace",
    "blank_image",
    "centered_window",
    "gaussian_noise",
    "mean_embedding",
    "other_image",
    "other_question",
    "paper_width",
    "prompt_pairs",
    "released_window",
    "swapped_objects",
    "without_object",
]
