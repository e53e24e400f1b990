from __future__ import annotations

import re
from typing import Any

import pytest

from hooked_llava.datasets import GQA_TAIL
from hooked_llava.datasets.vqa_constraints import CONSTRAINTS_TAIL
from hooked_llava.errors import InputError
from hooked_llava.prompt.templates import (
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
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)
HUMAN = VICUNA.replace("user", "human")
LLAMA_3 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
IMAGES = "{% for c in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
TEXTS = "{% for c in message['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}"
SPACED_TEXTS = TEXTS.replace("c['text']", "c['text'] + ' '")
# What llava-hf/llava-1.5-7b-hf carries as its chat template.
LLAVA_CHAT = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    + IMAGES
    + SPACED_TEXTS
    + "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAMA_3_CHAT = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}" + IMAGES + TEXTS + "{{ '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN_CHAT = (
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}" + IMAGES + TEXTS + "{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' }}" + IMAGES + TEXTS + "{{ ' [/INST]' }}"
    "{% else %}{{ ' ' }}" + TEXTS + "{{ '</s>' }}{% endif %}{% endfor %}"
)
# For text alone, as language models carry them: the content is a string, and may be cut.
LLAMA_3_TEXT_CHAT = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML_TEXT_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' ~ message['role'] ~ '\n' ~ message['content'] ~ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA_TEXT_CHAT = (
    "{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user')"
    " + '\n' + message['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
CHATS = {
    "llava": LLAVA_CHAT,
    "llama-3": LLAMA_3_CHAT,
    "qwen": QWEN_CHAT,
    "mistral": MISTRAL_CHAT,
    "spaced": LLAVA_CHAT.replace("'ASSISTANT:'", "'ASSISTANT: '"),
}
TEXT_CHATS = {"llama-3": LLAMA_3_TEXT_CHAT, "chatml": CHATML_TEXT_CHAT, "gemma": GEMMA_TEXT_CHAT}
SILENT_CHAT = LLAVA_CHAT.replace(SPACED_TEXTS, f"{{% if message['role'] != 'assistant' %}}{SPACED_TEXTS}{{% endif %}}")
"""Which leaves out what the assistant says."""
OTHER_CHAT = (
    "{% for message in messages %}{{ '[INST] ' if message.role == 'user' else ' ' }}{% for c in message['content'] %}"
    "{{ '<image>\n' if c['type'] == 'image' else c['text'] }}{% endfor %}{{ ' [/ASK]' if message.role == 'user' }}"
    "{% endfor %}"
)


def parts(prompt: Prompt) -> dict[str, str]:
    return {name: prompt.text[start:stop] for name, (start, stop) in prompt.spans.items()}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llava-1.5", f"USER: <image>\n{QUESTION} ASSISTANT:"),
        ("vicuna-v1", f"{VICUNA} USER: <image>\n{QUESTION} ASSISTANT:"),
        ("tiny-shapes", f"USER: <image>\n{QUESTION} Answer briefly. ASSISTANT:"),
        # LLaVA's llava/conversation.py: vicuna_v1, llava_v1, mistral_instruct, llava_llama_3, chatml_direct, plain
        ("llava-v1", f"{HUMAN} USER: <image>\n{QUESTION} ASSISTANT:"),
        ("mistral-instruct", f"[INST] <image>\n{QUESTION} [/INST]"),
        (
            "llava-llama-3",
            f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{LLAMA_3}<|eot_id|>"
            f"<|start_header_id|>user<|end_header_id|>\n\n<image>\n{QUESTION}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "chatml-direct",
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n"
            f"<image>\n{QUESTION}<|im_end|><|im_start|>assistant\n",
        ),
        (
            "qwen-2",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"<image>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("plain", f"<image>\n{QUESTION}\n"),
        ("yu-2024", f"USER: <image>\n{QUESTION}\nASSISTANT:"),
        ("basu-2024", f"<image>\nUSER: {QUESTION}? Answer in a few words.\nASSISTANT:"),
    ],
)
def test_texts(name: str, text: str) -> None:
    prompt = find_template(name).format(QUESTION, n_images=1)
    assert prompt.text == text
    assert parts(prompt)["question"] == QUESTION
    without = find_template(name).format(QUESTION)
    assert without.text == text.replace("<image>\n", "")
    assert parts(without)["question"] == QUESTION


def test_every_template_is_tested() -> None:
    (texts,) = [mark for mark in test_texts.pytestmark if mark.name == "parametrize"]
    assert sorted(name for name, _ in texts.args[1]) == sorted(TEMPLATES)


def test_the_papers_prompts() -> None:
    yu = TEMPLATES["yu-2024"].format("What is the color of the dog?", 1, answer_prefix="The color of the dog is")
    assert yu.text == "USER: <image>\nWhat is the color of the dog?\nASSISTANT: The color of the dog is"
    asked = "Is the floor black or tan?"
    zhang = TEMPLATES["vicuna-v1"].with_tail(GQA_TAIL).format(asked, 1)
    assert zhang.text == (
        f"{VICUNA} USER: <image>\n{asked} \nAnswer the question using a single word or phrase. ASSISTANT:"
    )
    assert parts(zhang)["tail"] == "Answer the question using a single word or phrase."
    # With llava_llama_3 the released code adds one more line break, since that model would write it first.
    llama = TEMPLATES["llava-llama-3"].with_tail(GQA_TAIL).format(asked, 1, answer_prefix=" \n").text
    assert llama.endswith(
        f"<image>\n{asked} \nAnswer the question using a single word or phrase.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n \n"
    )
    basu = TEMPLATES["basu-2024"].format("This building is located in", 1)
    assert basu.text == "<image>\nUSER: This building is located in? Answer in a few words.\nASSISTANT:"
    assert parts(basu) == {"question": "This building is located in", "tail": CONSTRAINTS_TAIL}
    # The question's own mark stays, and the template adds its own, as the released code does.
    assert "located in?? Answer" in TEMPLATES["basu-2024"].format("This building is located in?", 1).text
    assert TEMPLATES["basu-2024"].format("Why", 2).text.startswith("<image>\n<image>\nUSER: Why? Answer")


@pytest.mark.parametrize(
    ("tail", "text"),
    [
        ("One word.", "Why?\nOne word."),
        (" \nOne word.", "Why? \nOne word."),
        (" One word. ", "Why? One word. "),
        ("\n\nOne word.", "Why?\n\nOne word."),
        ("", "Why?"),
        ("  ", "Why?"),
    ],
)
def test_a_tail_may_bring_its_own_separator(tail: str, text: str) -> None:
    prompt = TEMPLATES["llava-1.5"].with_tail(tail).format("Why?")
    assert prompt.text == f"USER: {text} ASSISTANT:"
    assert parts(prompt).get("tail", "") == tail.lstrip()


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("llava-1.5", "ASSISTANT: The"),
        ("vicuna-v1", "ASSISTANT: The"),
        ("mistral-instruct", "[/INST] The"),
        ("llava-llama-3", "<|end_header_id|>\n\nThe"),
        ("chatml-direct", "assistant\nThe"),
        ("qwen-2", "<|im_start|>assistant\nThe"),
        ("plain", f"{QUESTION}\nThe"),
    ],
)
def test_where_an_answer_begins(name: str, end: str) -> None:
    prompt = TEMPLATES[name].format(QUESTION, 1, answer_prefix="The")
    assert prompt.text.endswith(end)
    assert parts(prompt)["answer_prefix"] == "The"


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
    assert TEMPLATES["plain"].format("What is <pic>?", 1, image_token="<pic>").text == "What is <pic>?\n"
    with pytest.raises(InputError, match="2 <image>.*question, 1 image.*<image>.*2 images"):
        TEMPLATES["llava-1.5"].format("Is <image> like <image>?", 1)


def test_count_message_speaks_of_images() -> None:
    assert count_message(1, 0).startswith("1 <image> in the prompt, 0 images given:")
    assert count_message(1, 0).endswith("Give 1 image, or change the prompt.")


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_refused(question: str) -> None:
    with pytest.raises(InputError, match="question is empty.*one word"):
        TEMPLATES["plain"].format(question)


def test_unknown_name() -> None:
    known = (
        r"llava-1\.5, vicuna-v1, llava-v1, mistral-instruct, llava-llama-3, chatml-direct, qwen-2, plain, yu-2024, "
        r"basu-2024, tiny-shapes, and 'chat'"
    )
    with pytest.raises(InputError, match=rf"template 'vicuna_v1'.*: vicuna-v1\?.*{known}.*None"):
        find_template("vicuna_v1")


def test_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hooked_llava.prompt.templates.TEMPLATES", dict(TEMPLATES))
    mine = register_template(Template(name="mine", user="Q: "))
    assert find_template("mine") is mine
    for name in ("mine", "chat", "default"):
        with pytest.raises(InputError, match=f"template.*'{name}'"):
            register_template(Template(name=name))


def test_default_is_what_the_processor_writes() -> None:
    assert default_template(build_processor()) is TEMPLATES["tiny-shapes"]
    assert default_template(make_processor()) is TEMPLATES["llava-1.5"]
    assert default_template(make_processor(chat_template=LLAVA_CHAT)) is TEMPLATES["llava-1.5"]
    assert default_template(make_processor(chat_template=MISTRAL_CHAT)) is TEMPLATES["mistral-instruct"]
    assert default_template(make_processor(chat_template=QWEN_CHAT)) is TEMPLATES["qwen-2"]
    for chat in (OTHER_CHAT, LLAMA_3_CHAT, CHATS["spaced"]):
        assert default_template(make_processor(chat_template=chat)) is None
    # What ends an answer's announcement counts too: this one goes on without a space.
    joined = MISTRAL_CHAT.replace("{{ ' ' }}", "")
    assert default_template(make_processor(chat_template=joined)) is None
    assert default_template(make_processor(chat_template=SILENT_CHAT)) is TEMPLATES["llava-1.5"]


@pytest.mark.parametrize("prefix", ["", "The color is", "It", "is it, and"])
@pytest.mark.parametrize("n_images", [0, 1, 2])
@pytest.mark.parametrize("chat", CHATS)
def test_a_prefix_continues_the_chat_as_transformers_does(chat: str, n_images: int, prefix: str) -> None:
    processor = make_processor(chat_template=CHATS[chat])
    content = [{"type": "image"}] * n_images + [{"type": "text", "text": QUESTION}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if prefix:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": prefix}]})
    options: dict[str, Any] = {"continue_final_message": True} if prefix else {"add_generation_prompt": True}
    wanted = processor.apply_chat_template(messages, tokenize=False, **options)
    prompt = format_chat(processor, QUESTION, n_images, answer_prefix=prefix)
    assert prompt.text == wanted
    assert parts(prompt) == {"question": QUESTION} | ({"answer_prefix": prefix} if prefix else {})
    default = default_template(processor)
    if default is not None:
        assert default.format(QUESTION, n_images, answer_prefix=prefix).text == wanted


@pytest.mark.parametrize(
    ("chat", "separator"),
    [
        (LLAVA_CHAT, " "),
        (CHATS["spaced"], ""),
        (LLAMA_3_CHAT, ""),
        (QWEN_CHAT, ""),
        (MISTRAL_CHAT, " "),
        (MISTRAL_CHAT.replace("{{ ' ' }}", ""), ""),
        (MISTRAL_CHAT.replace("{{ ' ' }}", "{{ '\n> ' }}"), "\n> "),
        (LLAMA_3_TEXT_CHAT, ""),
        (SILENT_CHAT, None),
    ],
)
def test_what_a_chat_puts_before_an_answer(chat: str, separator: str | None) -> None:
    prompt = format_chat(make_processor(chat_template=chat), QUESTION)
    assert prompt.answer_separator == separator
    if separator is not None:
        continued = format_chat(make_processor(chat_template=chat), QUESTION, answer_prefix="Red")
        assert continued.text == prompt.text + separator + "Red"
    assert (
        format_chat(make_processor(chat_template=LLAMA_3_CHAT), QUESTION, answer_prefix="It").answer_separator is None
    )


@pytest.mark.parametrize("prefix", ["", "The color is"])
@pytest.mark.parametrize("chat", TEXT_CHATS)
def test_chat_templates_for_text_alone(chat: str, prefix: str) -> None:
    processor = make_processor(chat_template=TEXT_CHATS[chat])
    messages = [{"role": "user", "content": f"<image>\n{QUESTION}"}]
    messages += [{"role": "assistant", "content": prefix}] if prefix else []
    options: dict[str, Any] = {"continue_final_message": True} if prefix else {"add_generation_prompt": True}
    wanted = processor.apply_chat_template(messages, tokenize=False, **options)
    prompt = format_chat(processor, QUESTION, 1, answer_prefix=prefix)
    assert prompt.text == wanted
    assert "'type'" not in prompt.text
    assert parts(prompt) == {"question": QUESTION} | ({"answer_prefix": prefix} if prefix else {})


@pytest.mark.parametrize("prefix", ["The color is ", " The", " ", "It is\n"])
def test_a_prefix_is_kept_as_it_is_or_refused(prefix: str) -> None:
    kept = format_chat(make_processor(chat_template=LLAMA_3_CHAT), QUESTION, answer_prefix=prefix)
    assert kept.text.endswith("<|end_header_id|>\n\n" + prefix)
    trimming = make_processor(chat_template=LLAMA_3_TEXT_CHAT)
    with pytest.raises(InputError, match=f"changes answer_prefix={re.escape(repr(prefix))}.*template=None"):
        format_chat(trimming, QUESTION, answer_prefix=prefix)


def test_chat_uses_the_processors_own_template() -> None:
    processor = make_processor(chat_template=OTHER_CHAT)
    prompt = format_chat(processor, QUESTION, 2, answer_prefix="It is")
    assert prompt.text == f"[INST] <image>\n<image>\n{QUESTION} [/ASK] It is"
    assert parts(prompt) == {"question": QUESTION, "answer_prefix": "It is"}
    assert format_chat(processor, "What is in <image>?", 1).text == "[INST] What is in <image>? [/ASK]"


def test_chat_errors() -> None:
    with pytest.raises(
        InputError,
        match=r"template='chat'.*processor.*template.*llava-1\.5",
    ):
        format_chat(make_processor(), QUESTION)
    broken = make_processor(chat_template="{{ messages[5].content }}")
    with pytest.raises(
        InputError,
        match=r"template.*template.*llava-1\.5",
    ):
        format_chat(broken, QUESTION)
    shouting = make_processor(chat_template="{% for m in messages %}{{ m.content[-1].text.upper() }}{% endfor %}")
    with pytest.raises(
        InputError,
        match=r"question 'What color is the star\?'.*'WHAT .*'.*prompt.*template=None",
    ):
        format_chat(shouting, QUESTION)


def test_image_token() -> None:
    assert image_token_of(None) == "<image>"
    assert image_token_of(make_processor()) == "<image>"
