"""Conversation templates: a question becomes a prompt, and stays findable in it by its characters.

A template is data. Its text reads: system, user, one line per image, question, tail, assistant, answer prefix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from hooked_llava.errors import InputError, counted, did_you_mean
from hooked_llava.prompt.processor import Processor

IMAGE_TOKEN = "<image>"
CHAT = "chat"
"""The name under which a processor's own chat template is used."""
DEFAULT = "default"
"""The name under which the template that suits the processor is used."""
_ASSISTANT_SYSTEM = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)
_LLAMA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_PROBE, _PROBE_PREFIX = "Is this a question?", "It is"


@dataclass(frozen=True)
class Prompt:
    """The whole text that the model reads, and where its parts lie.

    Attributes:
        text (str): The prompt, with one image token per image.
        spans (Mapping[str, tuple[int, int]]): Name of a part (system, question, tail, answer_prefix) -> its first
            character and the one after its last.
        answer_separator (str | None): What stands between the text and the answer; None where no template says so.
    """

    text: str
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    answer_separator: str | None = None


@dataclass(frozen=True, kw_only=True)
class Template:
    r"""How a question becomes a prompt for one family of models.

    >>> Template(name="mine", user="Q: ", assistant=" A:").format("What is this?", n_images=1).text
    'Q: <image>\nWhat is this? A:'

    Attributes:
        name (str): What `prepare(template=...)` calls it.
        system (str): What stands before everything else, with its trailing space.
        user (str): What announces the user, with its trailing space.
        images_first (bool): Whether the images stand before `user` rather than after it.
        image_end (str): What follows each image token.
        tail (str): An instruction after the question, such as "Answer briefly."; part of the span `rest`.
        tail_separator (str): What stands between question and tail.
        assistant (str): What ends the user's turn and announces the answer, with its leading space.
        answer_separator (str): What stands between `assistant` and the answer's first character.
    """

    name: str
    system: str = ""
    user: str = ""
    images_first: bool = False
    image_end: str = "\n"
    tail: str = ""
    tail_separator: str = "\n"
    assistant: str = ""
    answer_separator: str = " "

    def format(
        self, question: str, n_images: int = 0, *, answer_prefix: str = "", image_token: str = IMAGE_TOKEN
    ) -> Prompt:
        r"""The prompt for a question about so many images, ending where the answer, or its continuation, begins.

        Images come before the question, unless the question itself holds image tokens: then they stay where they
        are. Raises `InputError` for an empty question, and for image tokens in it that do not match `n_images`.

        >>> TEMPLATES["tiny-shapes"].format("What color is the star?", n_images=1).text
        'USER: <image>\nWhat color is the star? Answer briefly. ASSISTANT:'
        >>> prompt = TEMPLATES["llava-1.5"].format("What is it?", answer_prefix="The color is")
        >>> prompt.text, prompt.spans["question"]
        ('USER: What is it? ASSISTANT: The color is', (6, 17))
        """
        images = _image_lines(question, n_images, image_token, self.image_end)
        parts = [
            ("system", self.system),
            ("", images + self.user if self.images_first else self.user + images),
            ("question", question),
            ("", self.tail_separator if self.tail else ""),
            ("tail", self.tail),
            ("", self.assistant + (self.answer_separator if answer_prefix else "")),
            ("answer_prefix", answer_prefix),
        ]
        text, spans = "", {}
        for name, part in parts:
            if name and part:
                spans[name] = (len(text), len(text) + len(part))
            text += part
        return Prompt(text, spans, None if answer_prefix else self.answer_separator)

    def with_tail(self, tail: str | None) -> Template:
        r"""The same template with another instruction after the question; None or "" for none.

        Spaces and line breaks at the beginning of the tail replace `tail_separator`.

        >>> TEMPLATES["tiny-shapes"].with_tail(None).format("Why?").text
        'USER: Why? ASSISTANT:'
        >>> TEMPLATES["tiny-shapes"].with_tail(" \nOne word.").format("Why?").text
        'USER: Why? \nOne word. ASSISTANT:'
        """
        instruction = (tail or "").lstrip()
        separator = (tail or "").removesuffix(instruction) or self.tail_separator
        return replace(self, tail=instruction, tail_separator=separator)


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(name="llava-1.5", user="USER: ", assistant=" ASSISTANT:"),
        # The conversations of LLaVA's and LLaVA-NeXT's own code (llava/conversation.py), character by character.
        Template(
            name="vicuna-v1",
            system=_ASSISTANT_SYSTEM.format(who="user") + " ",
            user="USER: ",
            assistant=" ASSISTANT:",
        ),
        Template(
            name="llava-v1",
            system=_ASSISTANT_SYSTEM.format(who="human") + " ",
            user="USER: ",
            assistant=" ASSISTANT:",
        ),
        Template(name="mistral-instruct", user="[INST] ", assistant=" [/INST]"),
        Template(
            name="llava-llama-3",
            system=f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{_LLAMA_SYSTEM}<|eot_id|>",
            user="<|start_header_id|>user<|end_header_id|>\n\n",
            assistant="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            answer_separator="",
        ),
        Template(
            name="chatml-direct",
            system="<|im_start|>system\nAnswer the questions.<|im_end|>",
            user="<|im_start|>user\n",
            assistant="<|im_end|><|im_start|>assistant\n",
            answer_separator="",
        ),
        Template(
            name="qwen-2",
            system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
            user="<|im_start|>user\n",
            assistant="<|im_end|>\n<|im_start|>assistant\n",
            answer_separator="",
        ),
        Template(name="plain", assistant="\n", answer_separator=""),
        # Yu & Ananiadou (arXiv 2411.10950), whose prompts end with an answer prefix ("The color of the dog is").
        Template(name="yu-2024", user="USER: ", assistant="\nASSISTANT:"),
        # Basu et al. (arXiv 2406.04236). Their code writes a question mark after every question, also after one that has
        # its own; so does this template. Leave the question's own mark off for a single one.
        Template(
            name="basu-2024",
            user="USER: ",
            images_first=True,
            tail="Answer in a few words.",
            tail_separator="? ",
            assistant="\nASSISTANT:",
        ),
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


def default_template(processor: Processor) -> Template | None:
    """The registered template that writes what the processor's chat template writes; None if none of them does.

    A processor without a chat template gets "llava-1.5". None means that only the chat template itself will do
    (`format_chat`).

    >>> from hooked_llava import HookedLLaVA
    >>> default_template(HookedLLaVA.from_pretrained("tiny-shapes").processor).name
    'tiny-shapes'
    """
    if not getattr(processor, "chat_template", None):
        return TEMPLATES["llava-1.5"]
    token = image_token_of(processor)
    wanted = {"": format_chat(processor, _PROBE, 1).text}
    with suppress(InputError):  # some chat templates know of no answers, and are compared by the question alone
        wanted[_PROBE_PREFIX] = format_chat(processor, _PROBE, 1, answer_prefix=_PROBE_PREFIX).text
    for template in TEMPLATES.values():
        texts = {p: template.format(_PROBE, 1, answer_prefix=p, image_token=token).text for p in wanted}
        if texts == wanted:
            return template
    return None


def conversation_marks(processor: Processor) -> tuple[str, ...]:
    """Words by which a prompt shows that it is in the conversation template that `prepare` would use, as "USER:".

    Empty if that template has no such words.

    >>> from hooked_llava import HookedLLaVA
    >>> conversation_marks(HookedLLaVA.from_pretrained("tiny-shapes").processor)
    ('USER:', 'ASSISTANT:')
    """
    template = default_template(processor)
    if template is not None:
        return tuple(word for part in (template.user, template.assistant) if (word := part.strip()))
    before, _, after = _render_chat(processor, _PROBE, 0).partition(_PROBE)
    beside = [*before.split()[-1:], *after.split()[:1], *after.split()[-1:]]
    pieces = [piece for word in beside for piece in re.split(r"(<\|.*?\|>)", word)]  # tags as "<|eot_id|>" apart
    return tuple(dict.fromkeys(piece for piece in pieces if piece and not piece.isalnum()))


def format_chat(processor: Processor, question: str, n_images: int = 0, *, answer_prefix: str = "") -> Prompt:
    """The prompt that the processor's own chat template makes of a question, up to the answer or with its beginning.

    The text is that of transformers: `apply_chat_template(..., add_generation_prompt=True)`, and with an answer prefix
    `apply_chat_template(..., continue_final_message=True)` of the prefix as the assistant's message. Raises `InputError`
    when the processor has no chat template, or one that does not keep the words of the question or of the prefix.
    """
    if not getattr(processor, "chat_template", None):
        raise InputError(
            f"template={CHAT!r} needs a processor with a chat template, and this one has none; "
            f"expected one of {', '.join(TEMPLATES)}."
        )
    token = image_token_of(processor)
    inline = _image_lines(question, n_images, token, "") == ""
    text = _render_chat(processor, question, 0 if inline else n_images, answer_prefix)
    end = len(text) - len(answer_prefix)
    if text[end:] != answer_prefix:
        raise InputError(
            f"The processor's chat template changes answer_prefix={answer_prefix!r}: the prompt ends with "
            f"{text[-len(answer_prefix) - 1 :]!r}. Give the prefix as the template writes it (many drop spaces at its ends), "
            "or the whole prompt with template=None."
        )
    start = text.rfind(question, 0, end)
    if start < 0:
        raise InputError(
            f"The processor's chat template changes the question {question!r} beyond recognition: {text!r}. "
            "Give the whole prompt with template=None."
        )
    spans = {"question": (start, start + len(question))}
    if answer_prefix:
        return Prompt(text, {**spans, "answer_prefix": (end, len(text))})
    separator = None
    with suppress(InputError):  # some chat templates know of no answers
        answered = _render_chat(processor, question, 0 if inline else n_images, _PROBE_PREFIX)
        if answered.startswith(text) and answered.endswith(_PROBE_PREFIX):
            separator = answered[len(text) : -len(_PROBE_PREFIX)]
    return Prompt(text, spans, separator)


def image_token_of(processor: Processor | None) -> str:
    """The text that stands for an image in this processor's prompts.

    >>> image_token_of(None)
    '<image>'
    """
    return getattr(processor, "image_token", None) or IMAGE_TOKEN


def _image_lines(question: str, n_images: int, image_token: str, image_end: str) -> str:
    """The text that introduces the images; empty if the question says itself where they go."""
    if not question.strip():
        raise InputError("The question is empty; give at least one word to ask.")
    inline = len(re.findall(re.escape(image_token), question))
    if inline and inline != n_images:
        raise InputError(count_message(inline, n_images, image_token, "question"))
    return "" if inline else (image_token + image_end) * n_images


def count_message(in_text: int, given: int, image_token: str = IMAGE_TOKEN, where: str = "prompt") -> str:
    """What to say when a text announces another number of images than are given.

    >>> count_message(2, 1)
    '2 <image> in the prompt, 1 image given: expected one <image> per image. Give 2 images, or change the prompt.'
    """
    return (
        f"{in_text} {image_token} in the {where}, {counted(given, 'image')} given: expected one "
        f"{image_token} per image. Give {counted(in_text, 'image')}, or change the {where}."
    )


def _render_chat(processor: Processor, question: str, n_images: int, answer_prefix: str = "") -> str:
    """The chat template filled in by transformers; templates for text alone get the image tokens within the question."""
    parts = [{"type": "image"}] * n_images + [{"type": "text", "text": question}]
    lines = (image_token_of(processor) + "\n") * n_images + question
    # With an answer to go on with there is no other to announce.
    end = {"continue_final_message": True} if answer_prefix else {"add_generation_prompt": True}
    failed: Exception | None = None
    for asked, answer in ((parts, [{"type": "text", "text": answer_prefix}]), (lines, answer_prefix)):
        messages: list[dict[str, Any]] = [{"role": "user", "content": asked}]
        messages += [{"role": "assistant", "content": answer}] if answer_prefix else []
        try:
            rendered = processor.apply_chat_template(messages, tokenize=False, **end)
        except Exception as error:  # noqa: BLE001 - a chat template may raise anything
            failed = failed or error
            continue
        if not any(written in rendered for written in (str(parts), json.dumps(parts))):
            return rendered
    raise InputError(
        f"The processor's chat template cannot be filled in ({type(failed).__name__}: {failed}); "
        f"name a template instead: {', '.join(TEMPLATES)}."
    ) from failed
