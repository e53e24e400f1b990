"""`hooked-llava describe`: what a model and a prompt support."""

from __future__ import annotations

from hooked_llava.cli.command import command
from hooked_llava.cli.common import PromptOptions
from hooked_llava.cli.terminal import escape, say


@command("describe", 'describe demo "What color is the star?"', "describe -m llava-hf/llava-1.5-7b-hf --dtype bfloat16")
def describe(prompt: PromptOptions) -> None:
    """Print the model's parts, and what it supports and what not, with the reasons; with a question also of that prompt.

    Nothing is computed.
    """
    model, inputs = (prompt.load(), None) if prompt.first is None else prompt.prepare()
    say(escape(str(model.describe(inputs))))
