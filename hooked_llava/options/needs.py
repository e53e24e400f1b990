"""What a call may need of the model and of its prompts, by name."""

from __future__ import annotations

from typing import Literal

Need = Literal[
    "processor",
    "identity_prompt",
    "separate_mlps",
    "floating_point",
    "no_functions",
    "hf_config",
    "one_prompt",
    "an_image",
    "images_alike",
    "one_image",
    "original_image",
    "originals_known",
    "words_known",
    "image_span",
    "question_span",
]

NEEDS: dict[Need, str] = {
    "processor": "a processor: tokenizer and image processor",
    "identity_prompt": "a tokenizer that can say the identity prompt of patchscopes",
    "separate_mlps": "blocks in which the MLP has an input of its own: not Phi's",
    "floating_point": "weights in floating point, not in 8 or 4 bits",
    "no_functions": "no functions attached to the model (`model.reset_hooks()`)",
    "hf_config": "the config of transformers that the model was loaded with",
    "one_prompt": "one prompt, no batch",
    "an_image": "an image in some prompt",
    "images_alike": "images, equally many in every prompt",
    "one_image": "one image in every prompt",
    "original_image": "the image as it was given, not its pixel values alone",
    "originals_known": "the images, if there are some, as they were given",
    "words_known": "the text of the prompt, or a tokenizer that knows it",
    "image_span": "an image in every prompt, for the span `image`",
    "question_span": "the place of the question in every prompt, for the span `question`",
}
"""What each need means."""
