from __future__ import annotations

import re

import pytest

from hooked_llava.errors import InputError
from hooked_llava.templates import (
    TEMPLATES,
    Prompt,
    Template,
    count_message,
    default_template,
    find_template,
    format_chat,
    image_token_of,
    register_template,
)
from hooked_llava.toy.processor import build_processor
from tests.fixtures_processor import make_processor

QUESTION = "What color is the star?"
VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
# What llava-hf/llava-1.5-7b-hf carries as its chat template, cut to the roles used here.
LLAVA_CHAT = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
OTHER_CHAT = (
    "{% for message in messages %}[INST] {% for c in message['content'] %}"
    "{{ '<image>\n' if c['type'] == 'image' else c['text'] }}{% endfor %} [/INST]{% endfor %}"
)


def parts(prompt: Prompt) -> dict[str, str]:
    return {name: prompt.text[start:stop] for name, (start, stop) in prompt.spans.items()}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llava-1.5", f"USER: <image>\n{QUESTION} ASSISTANT:"),
        ("vicuna-v1", f"{VICUNA} USER: <image>\n{QUESTION} ASSISTANT:"),
        ("plain", f"<image>\n{QUESTION}"),
        ("tiny-shapes", f"USER: <image>\n{QUESTION} Answer briefly. ASSISTANT:"),
    ],
)
def test_texts(name: str, text: str) -> None:
    prompt = find_template(name).format(QUESTION, n_images=1)
    assert prompt.text == text
    assert parts(prompt)["question"] == QUESTION
    without = find_template(name).format(QUESTION)
    assert without.text == text.replace("<image>\n", "")
    assert parts(without)["question"] == QUESTION


def test_spans_of_every_part() -> None:
    template = TEMPLATES["vicuna-v1"].with_tail("One word.")
    prompt = template.format(QUESTION, n_images=2, answer_prefix="The color of the star is")
    assert prompt.text == (
        f"{VICUNA} USER: <image>\n<image>\n{QUESTION}\nOne word. ASSISTANT: The color of the star is"
    )
    assert parts(prompt) == {
        "system": VICUNA + " ",
        "question": QUESTION,
        "tail": "One word.",
        "answer_prefix": "The color of the star is",
    }


@pytest.mark.parametrize("tail", [None, ""])
def test_the_tail_can_be_switched_off(tail: str | None) -> None:
    prompt = TEMPLATES["tiny-shapes"].with_tail(tail).format(QUESTION, 1, answer_prefix="The color of the star is")
    assert prompt.text == f"USER: <image>\n{QUESTION} ASSISTANT: The color of the star is"
    assert "tail" not in prompt.spans


def test_image_tokens_in_the_question_stay_where_they_are() -> None:
    assert (
        TEMPLATES["llava-1.5"].format("Is <image> like <image>?", 2).text == "USER: Is <image> like <image>? ASSISTANT:"
    )
    assert TEMPLATES["plain"].format("What is <pic>?", 1, image_token="<pic>").text == "What is <pic>?"
    message = (
        "2 <image> in the question, 1 picture given: expected one <image> per picture. Give 2 pictures, or change the "
        "question."
    )
    with pytest.raises(InputError, match=re.escape(message)):
        TEMPLATES["llava-1.5"].format("Is <image> like <image>?", 1)


def test_count_message_speaks_of_pictures() -> None:
    assert count_message(1, 0).startswith("1 <image> in the prompt, 0 pictures given:")
    assert count_message(1, 0).endswith("Give 1 picture, or change the prompt.")


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_refused(question: str) -> None:
    with pytest.raises(InputError, match=r"The question is empty; give at least one word to ask\."):
        TEMPLATES["plain"].format(question)


def test_unknown_name() -> None:
    message = (
        "There is no template 'llava-1.6'. Did you mean: llava-1.5? Known: llava-1.5, vicuna-v1, plain, tiny-shapes, "
        "and 'chat' for the processor's own; None takes the text as the whole prompt."
    )
    with pytest.raises(InputError, match=re.escape(message)):
        find_template("llava-1.6")


def test_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hooked_llava.templates.TEMPLATES", dict(TEMPLATES))
    mine = register_template(Template(name="mine", user="Q: "))
    assert find_template("mine") is mine
    for name in ("mine", "chat", "default"):
        with pytest.raises(InputError, match=f"There is a template named '{name}' already; give yours another name"):
            register_template(Template(name=name))


def test_default_is_what_the_processor_writes() -> None:
    assert default_template(build_processor()) is TEMPLATES["tiny-shapes"]
    assert default_template(make_processor()) is TEMPLATES["llava-1.5"]
    assert default_template(make_processor(chat_template=LLAVA_CHAT)) is TEMPLATES["llava-1.5"]
    assert default_template(make_processor(chat_template=OTHER_CHAT)) is None


def test_chat_uses_the_processors_own_template() -> None:
    processor = make_processor(chat_template=OTHER_CHAT)
    prompt = format_chat(processor, QUESTION, 2, answer_prefix="It is")
    assert prompt.text == f"[INST] <image>\n<image>\n{QUESTION} [/INST] It is"
    assert parts(prompt) == {"question": QUESTION, "answer_prefix": "It is"}
    assert format_chat(processor, "What is in <image>?", 1).text == "[INST] What is in <image>? [/INST]"


def test_chat_errors() -> None:
    with pytest.raises(
        InputError,
        match=r"template='chat' needs a processor with a chat template, and this one has none; "
        r"expected one of llava-1\.5, ",
    ):
        format_chat(make_processor(), QUESTION)
    broken = make_processor(chat_template="{{ messages[5].content }}")
    with pytest.raises(
        InputError,
        match=r"The processor's chat template cannot be filled in \(UndefinedError: .*\); name a "
        r"template instead: llava-1\.5, ",
    ):
        format_chat(broken, QUESTION)
    shouting = make_processor(chat_template="{% for m in messages %}{{ m.content[-1].text.upper() }}{% endfor %}")
    with pytest.raises(
        InputError,
        match=r"changes the question 'What color is the star\?' beyond recognition: 'WHAT "
        r".*'\. Give the whole prompt with template=None\.",
    ):
        format_chat(shouting, QUESTION)


def test_image_token() -> None:
    assert image_token_of(None) == "<image>"
    assert image_token_of(make_processor()) == "<image>"
