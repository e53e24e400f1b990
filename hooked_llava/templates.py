"""Conversation templates: a question becomes a prompt, and stays findable in it by its characters.

A template is data. Its text reads: system, user, one line per picture, question, tail, assistant, answer prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hooked_llava.errors import InputError, did_you_mean

IMAGE_TOKEN = "<image>"
CHAT = "chat"
"""The name under which a processor's own chat template is used."""
DEFAULT = "default"
"""The name under which the template that suits the processor is used."""
_VICUNA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_PROBE = "Is this a question?"


@dataclass(frozen=True)
class Prompt:
    """The whole text that the model reads, and where its parts lie."""

    text: str
    """The prompt, with one image token per picture."""
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Name of a part (system, question, tail, answer_prefix) -> its first character and the one after its last."""


@dataclass(frozen=True, kw_only=True)
class Template:
    r"""How a question is dressed for one family of models.

    >>> Template(name="mine", user="Q: ", assistant=" A:").format("What is this?", n_images=1).text
    'Q: <image>\nWhat is this? A:'
    """

    name: str
    """What `prepare(template=...)` calls it."""
    system: str = ""
    """What stands before everything else, with its trailing space."""
    user: str = ""
    """What announces the user, with its trailing space."""
    image_end: str = "\n"
    """What follows each image token."""
    tail: str = ""
    """An instruction after the question, such as "Answer briefly."; part of the span `rest`."""
    tail_separator: str = "\n"
    """What stands between question and tail."""
    assistant: str = ""
    """What announces the answer, with its leading space."""

    def format(
        self, question: str, n_images: int = 0, *, answer_prefix: str = "", image_token: str = IMAGE_TOKEN
    ) -> Prompt:
        r"""The prompt for a question about so many pictures, ending where the answer, or its continuation, begins.

        Pictures come before the question, unless the question itself holds image tokens: then they stay where they
        are. Raises `InputError` for an empty question, and for image tokens in it that do not match `n_images`.

        >>> TEMPLATES["tiny-shapes"].format("What color is the star?", n_images=1).text
        'USER: <image>\nWhat color is the star? Answer briefly. ASSISTANT:'
        >>> prompt = TEMPLATES["llava-1.5"].format("What is it?", answer_prefix="The color is")
        >>> prompt.text, prompt.spans["question"]
        ('USER: What is it? ASSISTANT: The color is', (6, 17))
        """
        pictures = _picture_lines(question, n_images, image_token, self.image_end)
        parts = [
            ("system", self.system),
            ("", self.user + pictures),
            ("question", question),
            ("", self.tail_separator if self.tail else ""),
            ("tail", self.tail),
            ("", self.assistant + (" " if answer_prefix else "")),
            ("answer_prefix", answer_prefix),
        ]
        text, spans = "", {}
        for name, part in parts:
            if name and part:
                spans[name] = (len(text), len(text) + len(part))
            text += part
        return Prompt(text, spans)

    def with_tail(self, tail: str | None) -> Template:
        """The same template with another instruction after the question; None or "" for none.

        >>> TEMPLATES["tiny-shapes"].with_tail(None).format("Why?").text
        'USER: Why? ASSISTANT:'
        """
        return replace(self, tail=tail or "")


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(name="llava-1.5", user="USER: ", assistant=" ASSISTANT:"),
        Template(name="vicuna-v1", system=_VICUNA_SYSTEM + " ", user="USER: ", assistant=" ASSISTANT:"),
        Template(name="plain"),
        Template(
            name="tiny-shapes", user="USER: ", tail="Answer briefly.", tail_separator=" ", assistant=" ASSISTANT:"
        ),
    )
}
"""Every template by name; `register_template` adds to it."""


def register_template(template: Template) -> Template:
    """Make a template known by its name; raises `InputError` if the name is taken.

    >>> register_template(TEMPLATES["plain"])
    Traceback (most recent call last):
    hooked_llava.errors.InputError: There is a template named 'plain' already; give yours another name.
    """
    if template.name in (*TEMPLATES, CHAT, DEFAULT):
        raise InputError(f"There is a template named {template.name!r} already; give yours another name.")
    TEMPLATES[template.name] = template
    return template


def find_template(name: str) -> Template:
    """The registered template of that name; raises `InputError` with a suggestion for an unknown one.

    >>> find_template("plain").user
    ''
    """
    if name not in TEMPLATES:
        raise InputError(
            f"There is no template {name!r}.{did_you_mean(name, (*TEMPLATES, CHAT))} Known: "
            f"{', '.join(TEMPLATES)}, and {CHAT!r} for the processor's own; None takes the text as the whole prompt."
        )
    return TEMPLATES[name]


def default_template(processor: Any) -> Template | None:
    """The registered template that writes what the processor's chat template writes; None if none of them does.

    A processor without a chat template gets "llava-1.5". None means that only the chat template itself will do
    (`format_chat`).

    >>> class Processor: chat_template = None
    >>> default_template(Processor()).name
    'llava-1.5'
    """
    if not getattr(processor, "chat_template", None):
        return TEMPLATES["llava-1.5"]
    wanted = _render_chat(processor, _PROBE, 1)
    for template in TEMPLATES.values():
        # Spaces around line breaks and at the end differ between otherwise equal chat templates.
        if template.format(_PROBE, 1, image_token=image_token_of(processor)).text == wanted.rstrip():
            return template
    return None


def format_chat(processor: Any, question: str, n_images: int = 0, *, answer_prefix: str = "") -> Prompt:
    """The prompt that the processor's own chat template makes of a question.

    Raises `InputError` when the processor has no chat template, or one that does not keep the question's words.
    """
    if not getattr(processor, "chat_template", None):
        raise InputError(
            f"template={CHAT!r} needs a processor with a chat template, and this one has none; "
            f"expected one of {', '.join(TEMPLATES)}."
        )
    inline = _picture_lines(question, n_images, image_token_of(processor), "") == ""
    text = _render_chat(processor, question, 0 if inline else n_images)
    start = text.rfind(question)
    if start < 0:
        raise InputError(
            f"The processor's chat template changes the question {question!r} beyond recognition: {text!r}. "
            "Give the whole prompt with template=None."
        )
    spans = {"question": (start, start + len(question))}
    if answer_prefix:
        text = text.rstrip() + " "
        spans["answer_prefix"] = (len(text), len(text) + len(answer_prefix))
    return Prompt(text + answer_prefix, spans)


def image_token_of(processor: Any) -> str:
    """The text that stands for a picture in this processor's prompts.

    >>> image_token_of(None)
    '<image>'
    """
    return getattr(processor, "image_token", None) or IMAGE_TOKEN


def _picture_lines(question: str, n_images: int, image_token: str, image_end: str) -> str:
    """The text that introduces the pictures; empty if the question says itself where they go."""
    if not question.strip():
        raise InputError("The question is empty; give at least one word to ask.")
    inline = len(re.findall(re.escape(image_token), question))
    if inline and inline != n_images:
        raise InputError(count_message(inline, n_images, image_token, "question"))
    return "" if inline else (image_token + image_end) * n_images


def count_message(in_text: int, given: int, image_token: str = IMAGE_TOKEN, where: str = "prompt") -> str:
    """What to say when a text announces another number of pictures than are given.

    >>> count_message(2, 1)
    '2 <image> in the prompt, 1 picture given: expected one <image> per picture. Give 2 pictures, or change the prompt.'
    """
    return (
        f"{in_text} {image_token} in the {where}, {given} picture{'' if given == 1 else 's'} given: expected one "
        f"{image_token} per picture. Give {in_text} picture{'' if in_text == 1 else 's'}, or change the {where}."
    )


def _render_chat(processor: Any, question: str, n_images: int) -> str:
    content = [{"type": "image"}] * n_images + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    try:
        return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:
        raise InputError(
            f"The processor's chat template cannot be filled in ({type(error).__name__}: {error}); "
            f"name a template instead: {', '.join(TEMPLATES)}."
        ) from error
