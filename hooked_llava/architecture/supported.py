"""The table of what loads, made from the registries of kinds."""

from __future__ import annotations

from hooked_llava.architecture.language import LANGUAGE_MODELS
from hooked_llava.architecture.llava import LLAVA_MODELS
from hooked_llava.architecture.vision import VISION_TOWERS

_PARTS = {"whole model": LLAVA_MODELS, "language model": LANGUAGE_MODELS, "vision tower": VISION_TOWERS}
_TESTED = (
    "Every language model is tested with every vision tower in every whole model, on random weights against transformers: "
    "every layer and the logits (1e-4 of the scale in float32), with and without images. Every pair of them in LLaVA, and one "
    "pair in LLaVA-NeXT and in LLaVA-OneVision, also padded on either side, in greedy generation token by token, and saved "
    "and loaded."
)


def supported() -> str:
    """What loads, by the `model_type` in a checkpoint's config, and how it is tested, as Markdown.

    >>> print(supported().splitlines()[2])
    | whole model | `llava` | LLaVA | LLaVA-1.5 7B and 13B, BakLLaVA |
    """
    rows = ["| part | `model_type` | name | in |", "|---|---|---|---|"]
    rows += [
        f"| {part} | `{model_type}` | {kind.title} | {kind.examples} |"
        for part, kinds in _PARTS.items()
        for model_type, kind in kinds.items()
    ]
    return "\n".join([*rows, "", _TESTED])
