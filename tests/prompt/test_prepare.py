from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchFeature, LlavaProcessor, PreTrainedTokenizerFast

from hooked_llava.errors import ImageCropped, InputError, PromptWithoutTemplate, SpanError
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import as_inputs
from hooked_llava.prompt.prepare import prepare as prepare_inputs
from hooked_llava.prompt.templates import Template
from hooked_llava.toy.processor import build_processor
from tests.builders import IMAGE_TOKEN_ID
from tests.fixtures_processor import make_config, make_processor
from tests.messages import says
from tests.pairs import as_users_run

CONFIG, PROCESSOR = make_config(), make_processor()
QUESTION = "What color is the star?"
PIXELS = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)


def prepare(question: Any, images: Any = None, **settings: Any) -> Inputs:
    return prepare_inputs(question, images, **{"config": CONFIG, "processor": PROCESSOR, **settings})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("metaspace", [False, True])
def test_equals_the_processors_own_output(side: str, metaspace: bool) -> None:
    processor = make_processor(metaspace=metaspace)
    questions, images = [QUESTION, "Is it?", "Is <image> the <image>?"], [IMAGE, None, [IMAGE, IMAGE]]
    inputs = prepare(questions, images, processor=processor, padding_side=side)
    texts = [
        f"USER: <image>\n{QUESTION} ASSISTANT:",
        "USER: Is it? ASSISTANT:",
        "USER: Is <image> the <image>? ASSISTANT:",
    ]
    expected = processor(text=texts, images=[IMAGE] * 3, padding=True, padding_side=side, return_tensors="pt")
    assert inputs.prompts == tuple(texts)
    assert torch.equal(inputs.input_ids, expected["input_ids"])
    assert torch.equal(inputs.attention_mask, expected["attention_mask"].bool())
    assert torch.equal(inputs.pixel_values, expected["pixel_values"])
    assert inputs.images_per_prompt == (1, 0, 2)
    for row in range(3):
        own = inputs[row].token_map
        for name in ("image", "text", "last"):
            back = as_inputs(expected, config=CONFIG, processor=processor).token_maps[row]
            assert own.spans.get(name) == back.spans.get(name)


def test_every_kind_of_image_gives_the_same_pixels(tmp_path: Path) -> None:
    IMAGE.save(tmp_path / "star.png")
    expected = prepare(QUESTION, IMAGE)
    for image in (
        tmp_path / "star.png",
        str(tmp_path / "star.png"),
        PIXELS,
        PIXELS / 255,
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        [IMAGE],
    ):
        inputs = prepare(QUESTION, image)
        assert torch.equal(inputs.pixel_values, expected.pixel_values)
        assert inputs.images is not None
        np.testing.assert_array_equal(np.asarray(inputs.images[0]), PIXELS)


def test_templates() -> None:
    assert prepare(QUESTION).prompts == (f"USER: {QUESTION} ASSISTANT:",)
    assert prepare(QUESTION, template="tiny-shapes").prompts == (f"USER: {QUESTION} Answer briefly. ASSISTANT:",)
    assert prepare(QUESTION, template="tiny-shapes", tail=None, answer_prefix="The color is").prompts == (
        f"USER: {QUESTION} ASSISTANT: The color is",
    )
    assert prepare(QUESTION, tail="Answer in one word.").prompts == (
        f"USER: {QUESTION}\nAnswer in one word. ASSISTANT:",
    )
    assert prepare(QUESTION, template=Template(name="mine", user="Q: ")).prompts == (f"Q: {QUESTION}",)
    whole = prepare("USER: <image> a star ASSISTANT:", IMAGE, template=None)
    assert whole.prompts == ("USER: <image> a star ASSISTANT:",)
    chat = make_processor(chat_template="{% for m in messages %}Q {{ m.content[-1].text }} A{% endfor %}")
    inputs = prepare(QUESTION, processor=chat)
    assert inputs.prompts == (f"Q {QUESTION} A",)
    assert [inputs.token_map.labels[p] for p in inputs.token_map["question"]] == [
        "What",
        "color",
        "is",
        "the",
        "star",
        "?",
    ]


def saved_with(folder: Path, *, metaspace: bool = False, **settings: Any) -> Any:
    """A processor whose tokenizer.json has truncation and padding switched on, saved and loaded again."""
    processor = make_processor(metaspace=metaspace, **settings)
    backend = processor.tokenizer.backend_tokenizer
    backend.enable_truncation(max_length=8)
    backend.enable_padding(length=40, pad_id=0, pad_token="<pad>", pad_to_multiple_of=16)
    backend.save(str(folder / "tokenizer.json"))
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        extra_special_tokens={"image_token": "<image>"},
    )
    processor.save_pretrained(folder)
    return LlavaProcessor.from_pretrained(folder)


@pytest.mark.parametrize("metaspace", [False, True])
def test_prompts_are_neither_cut_nor_filled_up(metaspace: bool, tmp_path: Path) -> None:
    processor, plain = saved_with(tmp_path, metaspace=metaspace), make_processor(metaspace=metaspace)
    text = f"USER: <image>\n{QUESTION} ASSISTANT:"
    cut = processor(text=text, images=IMAGE, return_tensors="pt")["input_ids"]
    assert cut.shape[1] == 8  # what transformers makes of it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ImageCropped)
        for questions, images in ((QUESTION, IMAGE), (["Is it?", QUESTION], [IMAGE, None])):
            ours, wanted = (prepare(questions, images, processor=p) for p in (processor, plain))
            assert torch.equal(ours.input_ids, wanted.input_ids)
            assert torch.equal(ours.attention_mask, wanted.attention_mask)
            assert [m.spans for m in ours.token_maps] == [m.spans for m in wanted.token_maps]


def test_a_tokenizer_that_would_cut_at_a_length_of_its_own_does_not() -> None:
    processor = make_processor()
    processor.tokenizer.model_max_length = 5
    processor.tokenizer.init_kwargs["truncation"] = True
    assert torch.equal(prepare(QUESTION, IMAGE, processor=processor).input_ids, prepare(QUESTION, IMAGE).input_ids)


CHAT_WITH_BOS = "{{ '<s>' }}{% for m in messages %}" + (
    "{{ m.role ~ '\\n' }}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}{{ '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("prefix", ["", "The color is"])
@pytest.mark.parametrize("bos", [True, False])
def test_a_chat_is_tokenized_as_transformers_does(bos: bool, prefix: str) -> None:
    processor = make_processor(chat_template=CHAT_WITH_BOS if bos else CHAT_WITH_BOS.removeprefix("{{ '<s>' }}"))
    messages = [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": QUESTION}]}]
    messages += [{"role": "assistant", "content": [{"type": "text", "text": prefix}]}] if prefix else []
    end: Any = {"continue_final_message": True} if prefix else {"add_generation_prompt": True}
    wanted = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **end)
    ours = prepare(QUESTION, IMAGE, processor=processor, answer_prefix=prefix)
    assert ours.input_ids.tolist() == wanted["input_ids"].tolist()
    assert ours.input_ids.tolist()[0].count(1) == 1
    assert torch.equal(ours.pixel_values, wanted["pixel_values"])
    assert [ours.token_map.labels[p] for p in ours.token_map["question"]] == ["What", "color", "is", "the", "star", "?"]


def test_the_beginning_of_text_is_written_once() -> None:
    bare = prepare("USER: a star", template=None)
    assert torch.equal(prepare("<s>USER: a star", template=None).input_ids, bare.input_ids)
    assert prepare("<s>USER: a star", template=None).prompts == ("<s>USER: a star",)
    with says("Prompt 1.*'<s>'.*prompt 0"):
        prepare(["a star", "<s>a star"], template=None)


def test_the_embedded_processor_brings_its_template() -> None:
    processor = build_processor()
    config = make_config(64, image_token_id=processor.image_token_id, text={"vocab_size": len(processor.tokenizer)})
    inputs = prepare("Is the star red or blue?", IMAGE, processor=processor, config=config, options=["red", "blue"])
    assert inputs.prompts == ("USER: <image>\nIs the star red or blue? Answer briefly. ASSISTANT:",)
    token_map = inputs.token_map
    assert [token_map.labels[p] for p in token_map["rest"]] == ["Answer", "briefly", "."]
    assert [token_map.labels[p] for p in token_map["options"]] == ["red", "blue"]
    assert token_map.layout().grids[0].shape == (8, 8)
    assert token_map.layout().original_size == (30, 50)


def test_llavas_layout_end_to_end() -> None:
    config, processor = make_config(336, 14, text={"max_position_embeddings": 1000}), make_processor(336, 14)
    token_map = prepare(QUESTION, Image.new("RGB", (640, 480)), config=config, processor=processor).token_map
    assert token_map.layout().grids[0].shape == (24, 24)
    assert len(token_map["image"]) == 24 * 24
    assert token_map.patch_box(0, 0) == pytest.approx((80, 0, 100, 20))
    assert token_map.position_to_patch(token_map.patch_to_position(*token_map.pixel_to_patch(320, 240))) == (0, 12, 12)
    assert token_map.outside((0, 0, 160, 480)) == pytest.approx(0.5)


def test_options_in_a_batch() -> None:
    inputs = prepare(["Is it red or blue?", "Is it a star or a circle?"], options=[["red", "blue"], ["star", "circle"]])
    for row, words in enumerate((["red", "blue"], ["star", "circle"])):
        token_map = inputs.token_maps[row]
        assert [token_map.labels[p] for p in token_map["options"]] == words
    whole = prepare("USER: Is it red or blue? ASSISTANT:", template=None, options=["red"])
    assert whole.token_map["options"] == whole.token_map.find("red")
    with pytest.raises(SpanError, match="'green'.*question 'Is it red or blue"):
        prepare("Is it red or blue?", options=["red", "green"])
    with pytest.raises(SpanError, match="'red' occurs 2.*question"):
        prepare("Is the red star red or blue?", options=["red", "blue"])
    for options in (["red", "blue"], [["red"]], [["red"], "blue"]):
        with says(rf"options={re.escape(repr(options))}.*2 prompts.*list.*words.*question.*list.*lists"):
            prepare(["Is it red?", "Is it blue?"], options=options)
    with says("options='red'.*1 prompt.*list.*words.*question"):
        prepare("Is it red?", options="red")


def test_device_and_dtype() -> None:
    inputs = prepare(QUESTION, IMAGE, dtype=torch.bfloat16)
    assert inputs.pixel_values is not None
    assert inputs.pixel_values.dtype == torch.bfloat16
    assert prepare(QUESTION, IMAGE, device="meta").device.type == "meta"


@pytest.mark.parametrize(
    ("question", "images", "message"),
    [
        (
            "Is <image> a <image>?",
            [IMAGE],
            "2 <image>.*question, 1 image.*<image>",
        ),
        (
            "Is <image> a star?",
            [IMAGE, IMAGE],
            "1 <image>.*question, 2 images.*<image>",
        ),
        (
            "Is <image> a star?",
            None,
            "1 <image>.*question, 0 images.*<image>.*image.*1",
        ),
        (
            ["A?", "B?"],
            [IMAGE],
            "2 prompts.*1 entries.*images.*list.*entry.*prompt.*image",
        ),
        (["A?", "B?"], IMAGE, "2 prompts.*image.*images.*list.*entry.*prompt"),
        ("", None, "Question 0.*empty.*word"),
        (["A?", " "], None, "Question 1.*empty.*word"),
        ([], None, "question.*empty list"),
        (5, None, "question.*int.*list of texts"),
        (
            "A?",
            "no/such.png",
            r"Image 0.*prompt 0.*path 'no/such\.png'.*file.*path",
        ),
        (
            ["A?", "B?"],
            [None, [IMAGE, np.zeros((5, 7, 9))]],
            "Image 1.*prompt 1.*array.*5 x 7 x 9",
        ),
        ("is " * 300, None, "Prompt 0.*303 tokens, image tokens.*model.*256"),
    ],
)
def test_questions_and_images_that_do_not_fit(question: Any, images: Any, message: str) -> None:
    with says(message):
        prepare(question, images)


def test_whole_prompts_that_do_not_fit() -> None:
    with says("2 <image>.*prompt, 1 image.*<image>.*image.*2 images"):
        prepare("<image> <image> a", [IMAGE], template=None)
    with says("Prompt 1.*: 0 <image>.*prompt, 1 image.*<image>.*image.*0 images"):
        prepare(["<image> a", "a"], [IMAGE, IMAGE], template=None)
    with says("answer_prefix='The'.*template=None.*text.*prompt"):
        prepare("a", template=None, answer_prefix="The")
    with says("tail=None.*template=None.*text.*prompt.*template"):
        prepare("a", template=None, tail=None)
    chat = make_processor(chat_template="{% for m in messages %}Q {{ m.content[-1].text }} A{% endfor %}")
    with says("tail='b'.*template='chat'.*template"):
        prepare("a", processor=chat, tail="b")
    with says(r"template 'vicuna'.*vicuna-v1\?"):
        prepare("a", template="vicuna")


def test_processors_that_do_not_fit() -> None:
    with says("images.*processor.*model.*processor.*processor=.*from_hf"):
        prepare("a", processor=None)
    with as_users_run(), says("model.*TokenizersBackend.*processor"):
        prepare("a", processor=PROCESSOR.tokenizer)
    with says("processor.*'<image>'.*token 5.*model.*images.*token 6.*processor"):
        prepare("a", config=make_config(image_token_id=6))
    with says("LlavaProcessor.*5 <image> tokens.*image"):
        prepare("a", IMAGE, processor=make_processor(select_strategy="full"))
    with says("LlavaProcessor.*images.*24 x 24 pixels.*model.*16 x 16"):
        prepare("a", IMAGE, processor=make_processor(24, 12))
    no_padding = make_processor()
    no_padding.tokenizer.pad_token = None
    with says(r"2 prompts.*padding.*padding token.*processor\.tokenizer\.pad_token"):
        prepare(["a", "is"], processor=no_padding)
    assert len(prepare("a", processor=no_padding)) == 1


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize(
    "lacking",
    [
        {"num_additional_image_tokens": 0},
        {"patch_size": 4},
    ],
)
def test_the_advice_for_an_old_processor_works(lacking: dict[str, Any], strategy: str) -> None:
    config = make_config(select_strategy=strategy)
    processor, wanted = (make_processor(select_strategy=strategy) for _ in range(2))
    for name, value in lacking.items():
        setattr(processor, name, value)
    with pytest.raises(InputError, match="set processor") as caught:
        prepare(QUESTION, IMAGE, processor=processor, config=config)
    for name, value in re.findall(r"processor\.(\w+) = ('?\w+'?)", str(caught.value)):
        setattr(processor, name, value.strip("'") if "'" in value else int(value))
    ours = prepare(QUESTION, IMAGE, processor=processor, config=config)
    assert torch.equal(ours.input_ids, prepare(QUESTION, IMAGE, processor=wanted, config=config).input_ids)


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("lacking", ["num_additional_image_tokens", "patch_size", "vision_feature_select_strategy"])
def test_a_processor_that_does_not_know_the_model_gives_the_same_prompt(lacking: str, strategy: str) -> None:
    config = make_config(select_strategy=strategy)
    processor, wanted = (make_processor(select_strategy=strategy) for _ in range(2))
    setattr(processor, lacking, None)
    ours, theirs = (prepare(QUESTION, IMAGE, processor=one, config=config) for one in (processor, wanted))
    assert torch.equal(ours.input_ids, theirs.input_ids)


def test_the_prompt_is_the_one_that_the_processor_makes() -> None:
    questions, images = ["USER: <image> What is this?", "<image> a <image> star"], [[IMAGE], [IMAGE, IMAGE]]
    for side in ("left", "right"):
        ours = prepare(questions, images, template=None, padding_side=side)
        flat = [image for own in images for image in own]
        theirs = PROCESSOR(text=questions, images=flat, padding=True, padding_side=side, return_tensors="pt")
        for name in ("input_ids", "attention_mask", "pixel_values"):
            assert torch.equal(getattr(ours, name).to(theirs[name].dtype), theirs[name]), name


def test_a_slow_tokenizer_gives_no_question_span() -> None:
    processor = make_processor()

    class Slow:
        """Stands for a tokenizer that cannot say which characters a token spells."""

        is_fast = False
        pad_token = "<pad>"
        decode = processor.tokenizer.decode

        def __call__(self, texts: list[str], return_offsets_mapping: bool, **settings: Any) -> BatchFeature:
            assert not return_offsets_mapping
            return processor.tokenizer(texts, **settings)

    class Processor:
        tokenizer, image_processor, image_token = Slow(), processor.image_processor, "<image>"
        image_token_id, patch_size, chat_template = IMAGE_TOKEN_ID, 8, None

    token_map = prepare(QUESTION, IMAGE, processor=Processor()).token_map
    with pytest.raises(SpanError, match="no span 'question'"):
        token_map["question"]
    assert [token_map.labels[p] for p in token_map.find(QUESTION)] == ["What", "color", "is", "the", "star", "?"]


def test_as_inputs_takes_what_stands_for_inputs() -> None:
    ids = torch.tensor([1, 7, 8, 9])
    for value in (
        ids,
        ids.int(),
        ids[None],
        {"input_ids": ids},
        {"input_ids": [[1, 7, 8, 9]]},
        BatchFeature({"input_ids": ids}),
    ):
        inputs = as_inputs(value, config=CONFIG)
        assert inputs.input_ids.tolist() == [[1, 7, 8, 9]]
        assert inputs.input_ids.dtype == torch.int64
        assert inputs.attention_mask.all()
        assert inputs.pixel_values is None
        assert as_inputs(inputs, config=CONFIG) is inputs
    assert as_inputs("USER: a star ASSISTANT:", config=CONFIG, processor=PROCESSOR).prompts == (
        "USER: a star ASSISTANT:",
    )
    assert len(as_inputs(["USER: a", "is it ASSISTANT:"], config=CONFIG, processor=PROCESSOR)) == 2


def chat(template: str | None) -> Any:
    processor = make_processor()
    processor.chat_template = template
    return processor


LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% for c in m['content'] %}{{ c['text'] if c['type'] == 'text' else '<image>\n' }}{% endfor %}{{ '<|eot_id|>' }}"
    "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
MISTRAL = (
    "{% for m in messages %}[INST] {% for c in m['content'] %}{{ c['text'] if c['type'] == 'text' else '<image>\n' }}"
    "{% endfor %} [/INST]{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "bare", "whole"),
    [
        (None, "Who made the star?", "USER: Who made the star?"),
        (None, "Is it user: or assistant:?", "Is it red? ASSISTANT:"),
        (LLAMA3, "USER: Is it? ASSISTANT:", "<|start_header_id|>user<|end_header_id|>\n\nIs it?<|eot_id|>"),
        (MISTRAL, "Is it?", "[INST] Is it? [/INST]"),
        (MISTRAL, "Is the INST it?", "Is it?</s> No"),  # a special token: written by somebody who writes whole prompts
    ],
)
def test_a_bare_question_to_a_conversational_model_warns(template: str | None, bare: str, whole: str) -> None:
    processor = chat(template)
    given = {"config": CONFIG, "processor": processor}
    with pytest.warns(PromptWithoutTemplate, match=re.escape(repr(bare)) + ".*prepare") as caught:
        inputs = as_inputs(bare, **given)
    assert [Path(w.filename) for w in caught] == [Path(__file__)], "at the user's line"
    assert inputs.prompts == (bare,), "a string stays a whole prompt"
    with pytest.warns(PromptWithoutTemplate, match="Prompt 1.*" + re.escape(repr(bare))):
        as_inputs([whole, bare], **given)
    as_inputs(whole, **given)
    prepare(bare, processor=processor)
    prepare(bare, processor=processor, template=None)
    as_inputs(prepare(bare, processor=processor, template=None), **given)


def test_a_large_crop_warns_once_of_the_image_that_loses_most() -> None:
    images = [Image.new("RGB", size) for size in ((64, 64), (90, 60), (60, 120))]
    with pytest.warns(ImageCropped, match=r"(?s)50%.*image 2 of prompt 0.*60 x 120.*0, 30, 60, 90.*2 of 3") as caught:
        prepare("Is it red?", images)
    assert [Path(w.filename) for w in caught] == [Path(__file__)], "at the user's line"
    with pytest.warns(ImageCropped, match=r"33%.*90 x 60"):
        prepare("Is it red?", images[1])
    prepare("Is it red?", Image.new("RGB", (80, 60)))  # a quarter of it


def test_no_warning_where_a_conversation_adds_nothing() -> None:
    as_inputs(
        "a star", config=CONFIG, processor=chat("{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}")
    )


def test_as_inputs_of_processor_output() -> None:
    text = ["USER: <image>\nWhat is it? ASSISTANT:", f"USER: <image>\n{QUESTION} ASSISTANT:"]
    encoded = PROCESSOR(text=text, images=[IMAGE, IMAGE], padding=True, return_tensors="pt")
    inputs = as_inputs(encoded, config=CONFIG, processor=PROCESSOR, dtype=torch.bfloat16)
    assert inputs.images_per_prompt == (1, 1)
    assert inputs.attention_mask.dtype == torch.bool
    assert inputs.pixel_values is not None
    assert inputs.pixel_values.dtype == torch.bfloat16
    prepared = prepare(["What is it?", QUESTION], [IMAGE, IMAGE], padding_side="right")
    for own, map_ in zip(prepared.token_maps, inputs.token_maps, strict=True):
        for name in ("system", "image", "text", "last"):
            assert own[name] == map_[name]
        assert map_["rest"] == own["question"] | own["rest"]
        assert map_.find("is") == own.find("is")
    without = as_inputs(encoded, config=CONFIG)
    assert without.token_maps[1]["image"] == prepared.token_maps[1]["image"]


def test_as_inputs_keeps_positions_and_several_images() -> None:
    image = [IMAGE_TOKEN_ID] * 4
    ids = [[1, *image, *image, 7]]
    inputs = as_inputs(
        {"input_ids": ids, "pixel_values": torch.rand(2, 3, 16, 16), "position_ids": [list(range(10))]}, config=CONFIG
    )
    assert inputs.token_map.image(1) == range(5, 9)
    assert inputs.position_ids is not None
    assert inputs.position_ids.tolist() == [list(range(10))]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([1, IMAGE_TOKEN_ID, 7]), "Prompt 0.*1 <image> tokens.*position 1"),
        (torch.tensor([1, *[IMAGE_TOKEN_ID] * 4]), "input_ids.*1 image.*pixel_values"),
        (
            {"input_ids": [[1, 7]], "pixel_values": torch.rand(1, 3, 16, 16)},
            r"input_ids.*0 images \(per prompt: \[0\]\)",
        ),
        ({"pixel_values": torch.rand(1, 3, 16, 16)}, "pixel_values.*input_ids"),
        (
            {"input_ids": [[1, 7]], "attention_mask": [[1, 1, 1]]},
            r"attention_mask.*\[1, 3\].*input_ids \[1, 2\]",
        ),
        ({"input_ids": [[1, 7], [1]]}, "input_ids.*list.*tensor"),
        ({"input_ids": [[1, 700]]}, "input_ids.*1 to 700"),
        (torch.rand(1, 4), "input_ids.*float32"),
        (torch.ones(1, 300, dtype=torch.int64), "Prompt 0.*300 tokens"),
        ("a <image>", "1 <image>.*prompt, 0 images"),
        ("", "Question 0.*empty"),
    ],
)
def test_as_inputs_refuses(value: Any, message: str) -> None:
    with says(message):
        as_inputs(value, config=CONFIG, processor=PROCESSOR)


def test_as_inputs_refuses_inputs_of_another_model() -> None:
    with says("model.*4 positions.*image.*16"):
        as_inputs(prepare(QUESTION, IMAGE), config=make_config(32))
    with says("images.*processor.*model.*processor"):
        as_inputs("a star", config=CONFIG)
