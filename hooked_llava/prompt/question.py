"""What was asked, in words."""

from __future__ import annotations

from hooked_llava.prompt.inputs import Inputs


def question_text(inputs: Inputs) -> str:
    """The question's words if the one prompt says where they are, else the prompt.

    >>> from hooked_llava import HookedLLaVA
    >>> question_text(HookedLLaVA.from_pretrained("tiny-shapes").prepare("Who made the star?"))
    'Who made the star?'
    """
    words = inputs.token_map.words
    if words is not None and words.prompt is not None and "question" in words.parts:
        start, stop = words.parts["question"]
        return words.prompt[start:stop]
    return inputs.prompts[0] if inputs.prompts else f"a prompt of {inputs.shape[1]} token ids"
