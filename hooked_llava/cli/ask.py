"""`hooked-llava ask`: the model's answer on the terminal."""

from __future__ import annotations

from hooked_llava.cli.common import prepare, split_arguments
from hooked_llava.cli.options import (
    EMBEDDED_MODEL,
    Device,
    DTypeOption,
    First,
    MaxNewTokens,
    Model,
    NoImage,
    Second,
    TemplateName,
    Top,
)
from hooked_llava.cli.terminal import busy, clear_errors, examples, show_answer

_LARGE = 'ask cat.jpg "What is this?" -m llava-hf/llava-1.5-7b-hf --dtype bfloat16'
EPILOG = examples('ask demo "What color is the star?"', 'ask "Who made the star?"', _LARGE)


def ask(
    first: First = None,
    second: Second = None,
    model: Model = EMBEDDED_MODEL,
    no_image: NoImage = False,
    template: TemplateName = "default",
    max_new_tokens: MaxNewTokens = 20,
    top: Top = 5,
    device: Device = "auto",
    dtype: DTypeOption = None,
) -> None:
    """Print the model's answer, and the most probable tokens it could have begun with."""
    with clear_errors():
        image, question = split_arguments(first, second, no_image)
        loaded, inputs = prepare(model, image, question, template, device, dtype)
        with busy("answering"):
            from hooked_llava.analysis import next_tokens

            answer = loaded.generate(inputs, max_new_tokens=max_new_tokens)
            tokens = next_tokens(loaded, inputs, k=min(top, loaded.cfg.d_vocab))
        show_answer(question, answer, tokens)
