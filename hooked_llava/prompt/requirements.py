"""What calls may need of their prompts: what is missing and what to do, for each condition in one place; None where it is met.

What is said follows the name of a call: "causal_trace takes one prompt, got 2; ...". The call refuses with it, and
`model.describe(inputs)` says the same beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence

WORDS_UNKNOWN = (
    "the prompt was given as token ids and the model has no tokenizer. Pass processor= to from_hf, or name positions "
    "yourself: token_map.with_spans(...)."
)
"""Why words cannot be looked for in a prompt."""


def without_processor(why: str = "none was given") -> str:
    """Said where text or images are to become a prompt, of a model without a processor; `why` is the model's own reason."""
    return (
        f"needs a processor, and this model has no processor ({why}). Pass processor= to from_hf, or give token ids and "
        "pixel_values."
    )


def one_prompt(n_prompts: int) -> str | None:
    """Of what is measured within one prompt."""
    if n_prompts == 1:
        return None
    return f"takes one prompt, got {n_prompts}; call it once for each: inputs[0], inputs[1], ..."


def an_image(n_images: int) -> str | None:
    """Of what changes images, whichever prompts have them."""
    return None if n_images else "needs an image, and there is none; give one with prepare(question, images=...)."


def images_alike(images_per_prompt: Sequence[int]) -> str | None:
    """Of what has a place for every patch."""
    if len(set(images_per_prompt)) == 1 and images_per_prompt[0]:
        return None
    return (
        f"needs images, equally many in every prompt, and the prompts have {', '.join(map(str, images_per_prompt))}; give them "
        "with prepare(question, images=...)."
    )


def one_image(images_per_prompt: Sequence[int]) -> str | None:
    """Of what compares a map of each prompt with a mask."""
    if set(images_per_prompt) == {1}:
        return None
    counts = ", ".join(map(str, images_per_prompt))
    return f"takes one image in every prompt, and the prompts have {counts}; ask about one image at a time."


def original_image(originals: Sequence[object] | None) -> str | None:
    """Of what paints in an image as it was given, or prepares it anew."""
    return None if originals else "needs the original image; make the prompt with prepare(question, images=...)."
