"""`hooked-llava ask`: the model's answer on the terminal."""

from __future__ import annotations

from hooked_llava.cli.command import command
from hooked_llava.cli.common import PromptOptions
from hooked_llava.cli.options import MaxNewTokens, Top
from hooked_llava.cli.terminal import busy, show_answer


@command(
    'ask demo "What color is the star?"',
    'ask "Who made the star?"',
    'ask cat.jpg "What is this?" -m llava-hf/llava-1.5-7b-hf --dtype bfloat16',
)
def ask(prompt: PromptOptions, max_new_tokens: MaxNewTokens = 20, top: Top = 5) -> None:
    """Print the model's answer, and the most probable tokens it could have begun with."""
    model, inputs = prompt.prepare()
    with busy("answering"):
        from hooked_llava.analysis import next_tokens

        answer = model.generate(inputs, max_new_tokens=max_new_tokens)
        tokens = next_tokens(model, inputs, k=min(top, model.cfg.d_vocab))
    show_answer(prompt.question, answer, tokens)
