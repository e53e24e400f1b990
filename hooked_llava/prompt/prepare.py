"""Questions and images, or tensors, become `Inputs`: everything is checked here, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.architecture.layouts import layout_of, layout_without_original
from hooked_llava.errors import InputError, PromptWithoutTemplate, a_type, counted, naming_prompt, warn_user
from hooked_llava.prompt import validation as check
from hooked_llava.prompt.images import ImagesLike, open_images
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.pixels import process_images, warn_of_cropped
from hooked_llava.prompt.positions import Positions
from hooked_llava.prompt.processor import Processor, Tokenizer
from hooked_llava.prompt.requirements import without_processor
from hooked_llava.prompt.templates import (
    CHAT,
    DEFAULT,
    Prompt,
    Template,
    conversation_marks,
    count_message,
    default_template,
    find_template,
    format_chat,
    image_token_of,
)
from hooked_llava.prompt.token_map import TokenMap
from hooked_llava.prompt.token_text import TokenText, begins_with_bos, prompt_offsets

TemplateLike: TypeAlias = Template | str | None
"""A template, the name of one, "chat" for the processor's own, or None where the text is the whole prompt."""
InputsLike: TypeAlias = Inputs | str | Sequence[str] | Tensor | Mapping[str, Any]
"""What stands for inputs: themselves, one or more whole prompts, token ids, or what a processor returns."""
PromptsLike: TypeAlias = InputsLike | Sequence[InputsLike]
"""One prompt, a batch, or a list of either."""
_SET_LATER = "leave options= out and set the span afterwards: inputs.with_spans(options=positions)"
TEMPLATE_TAIL = "template"
"""`tail=` of `prepare` for the instruction that the template brings along."""


def prepare(
    question: str | Sequence[str],
    images: ImagesLike | None = None,
    *,
    config: LLaVAConfig,
    processor: Processor | None,
    template: TemplateLike = DEFAULT,
    options: Sequence[str] | Sequence[Sequence[str]] | None = None,
    answer_prefix: str = "",
    tail: str | None = TEMPLATE_TAIL,
    padding_side: Literal["left", "right"] = "left",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Write questions into the conversation template, tokenize them and process their images, all checked.

    For one question, `images` is an image or a list of its images; for a list of questions, a list with one entry
    each (an image, a list of images, or None). Images are paths, PIL images, arrays [height, width, 3] or tensors
    [3, height, width]. The model sees them, and `inputs.images` holds them, as a person does: upright by their EXIF data
    and with white under what is transparent (`hooked_llava.prompt.images`), where transformers' processors take a file's
    pixels as they are stored. What a processor made already is taken as it is (`as_inputs`).

    `template` is a registered name, a `Template`, "chat" (the processor's own chat template), "default" (the one that
    suits the processor), or None: then the text is the whole prompt. `tail` replaces the instruction after the
    question (None for none); spaces and line breaks at its beginning replace what the template puts between the two.
    `answer_prefix` is the beginning of the answer, already written ("The color of the star is"), where the answer's
    own text would begin: with a chat template as transformers continues a final message. `options` names the answer
    options that stand in the question, for the span `options`.

    Nothing is cut off, filled up or stripped, whatever the tokenizer was saved with. A prompt that begins with the
    tokenizer's beginning-of-text token gets no second one, as in transformers' chats.

    Raises `InputError` for whatever does not fit, and `SpanError` for options that are not in the question. Warns with
    `ImageCropped`, once for all images, if the processor cuts a large part of one away.
    """
    questions = _questions(question)
    processor = _checked_processor(processor, config, len(questions), padding_side)
    opened = open_images(images, len(questions), single=isinstance(question, str))
    chosen = _template(template, tail, answer_prefix, processor)
    prompts = _prompts(questions, opened, chosen, answer_prefix, processor)
    layouts = [_layouts(own, processor, config) for own in opened]
    encoded = _encode(prompts, layouts, processor, padding_side)
    offsets = encoded.pop("offset_mapping", None)
    encoded |= process_images(opened, processor.image_processor, config)
    # from_tensors knows no original image, and takes layouts from the tensors; _with_texts puts in those from above.
    inputs = from_tensors(encoded, config=config, tokenizer=processor.tokenizer, device=device, dtype=dtype)
    token_maps = _with_texts(inputs.token_maps, prompts, layouts, offsets, image_token_of(processor))
    flat = tuple(image for own in opened for image in own)
    texts = tuple(prompt.text for prompt in prompts)
    inputs = replace(inputs, token_maps=token_maps, prompts=texts, images=flat or None)
    warn_of_cropped([m.layouts for m in token_maps])
    return inputs if options is None else _with_options(inputs, options, single=isinstance(question, str))


def as_inputs(
    value: InputsLike,
    *,
    config: LLaVAConfig,
    processor: Processor | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Whatever stands for inputs, as `Inputs` on that device: ids [position] or [batch position], text, or a dict.

    Text is the whole prompt, without template and images; warns with `PromptWithoutTemplate` where it looks like a bare
    question to a model that answers in a conversation template. A dict is what a Hugging Face processor returns:
    input_ids, pixel_values, attention_mask, position_ids. Token ids without a mask are all real. Raises `InputError`
    before anything is computed if they do not fit the model or each other.

    >>> from transformers import LlavaConfig
    >>> as_inputs({"input_ids": [[1, 5, 7]]}, config=LLaVAConfig.from_hf(LlavaConfig()))
    Inputs(batch=1, positions=3, images_per_prompt=(0,))
    """
    if isinstance(value, Inputs):
        check.check_layouts((layout for m in value.token_maps for layout in m.layouts), config)
        return value.to(device, dtype)
    if isinstance(value, Tensor):
        value = {"input_ids": value}
    if isinstance(value, Mapping):
        tokenizer = getattr(processor, "tokenizer", None)
        return from_tensors(value, config=config, tokenizer=tokenizer, device=device, dtype=dtype)
    whole = prepare(value, template=None, config=config, processor=processor, device=device, dtype=dtype)
    assert processor is not None  # prepare has raised without one
    _warn_of_bare(whole.prompts or (), processor)
    return whole


def _warn_of_bare(prompts: Sequence[str], processor: Processor) -> None:
    """Warn of the first prompt in which nothing says that it was written as a whole prompt."""
    marks = conversation_marks(processor)
    written = (*marks, image_token_of(processor), *processor.tokenizer.all_special_tokens)
    for row, text in enumerate(prompts):
        if marks and not any(mark in text for mark in written):
            which = f"Prompt {row}, " if len(prompts) > 1 else ""
            warn_user(
                f"{which}{text!r} is taken as the whole prompt, without the conversation template ({' ... '.join(marks)}) "
                "in which this model answers questions. Give model.prepare(text), which writes it; or, if this is meant, "
                "model.prepare(text, template=None).",
                PromptWithoutTemplate,
            )
            return


def from_tensors(
    entries: Mapping[str, Any],
    *,
    config: LLaVAConfig,
    tokenizer: Tokenizer | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Inputs from token ids, mask, pixels and position ids; raises `InputError` if they do not fit."""
    given = {name: check.as_tensor(value, name) for name, value in check.check_keys(entries).items()}
    # Checks read values one by one: on the CPU that costs nothing, on a GPU every look would wait for it.
    ids = check.check_token_ids(given["input_ids"].cpu(), config)
    mask = check.check_mask(given["attention_mask"].cpu() if "attention_mask" in given else None, ids)
    check.check_length(mask, config)
    positions = check.check_position_ids(given["position_ids"].cpu() if "position_ids" in given else None, ids)
    pixels, layouts = _checked_images(given, config)
    starts = check.find_images(ids, mask, config, layouts)
    n_images = [len(row) for row in starts]
    check.check_images(n_images, None if pixels is None else len(pixels if layouts is None else layouts))
    layouts = layouts or [layout_without_original(config.vision)] * sum(n_images)
    inputs = Inputs(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=pixels if sum(n_images) else None,
        images_per_prompt=tuple(n_images),
        token_maps=tuple(_token_maps(ids, mask, starts, layouts, config, tokenizer)),
        position_ids=positions,
    )
    return inputs.to(device, dtype)


def _checked_images(
    given: Mapping[str, Tensor], config: LLaVAConfig
) -> tuple[Float[Tensor, "tile channel height width"] | None, list[ImageLayout] | None]:
    """The tiles of all images; and their layouts, or None for LLaVA-1.5, where by pixel values alone all are equal."""
    pixels = given.get("pixel_values")
    if config.tiling is None:
        return None if pixels is None else check.check_pixels(pixels, config), None
    layouts = check.layouts_of_sizes(given, config)
    return None if pixels is None else check.check_tiles(pixels, layouts, config), layouts


def _questions(question: str | Sequence[str]) -> list[str]:
    if not isinstance(question, Iterable):
        raise InputError(f"The question is {a_type(question)}; expected text, or a list of texts.")
    questions = [question] if isinstance(question, str) else list(question)
    if not questions:
        raise InputError("There is no question: an empty list was given; expected at least one.")
    for row, text in enumerate(questions):
        if not isinstance(text, str):
            raise InputError(f"Question {row} is {a_type(text)}; expected text.")
        if not text.strip():
            raise InputError(f"Question {row} is empty; give at least one word to ask.")
    return questions


def _checked_processor(
    processor: Processor | None, config: LLaVAConfig, n_prompts: int, padding_side: str
) -> Processor:
    tokenizer = getattr(processor, "tokenizer", None)
    if processor is None or tokenizer is None or getattr(processor, "image_processor", None) is None:
        if processor is None:
            raise InputError(f"A prompt of text and images {without_processor()}")
        raise InputError(
            f"The model has {a_type(processor)} as its processor; expected a LlavaProcessor, with tokenizer and image "
            "processor. Pass processor= when loading, or give token ids and pixel_values."
        )
    if processor.image_token_id != config.image_token_id:
        raise InputError(
            f"The processor writes {processor.image_token!r} as token {processor.image_token_id} and the model expects "
            f"images at token {config.image_token_id}; use the processor of this checkpoint."
        )
    check.check_processor_fits(processor, config)
    if n_prompts > 1 and tokenizer.pad_token is None:
        raise InputError(
            f"{n_prompts} prompts need padding and the tokenizer has no padding token; set "
            "processor.tokenizer.pad_token, for example to its eos_token, or give one prompt at a time."
        )
    if padding_side not in ("left", "right"):
        raise InputError(f"padding_side is {padding_side!r}; expected 'left' or 'right'.")
    return processor


def _template(template: TemplateLike, tail: str | None, answer_prefix: str, processor: Processor) -> TemplateLike:
    """The `Template` with its tail settled; or "chat", or None, which have no place for a tail."""
    if template == DEFAULT:
        template = default_template(processor) or CHAT
    if isinstance(template, str) and template != CHAT:
        template = find_template(template)
    if isinstance(template, Template):
        return template if tail == TEMPLATE_TAIL else template.with_tail(tail)
    if tail != TEMPLATE_TAIL:
        what = "the text is the whole prompt" if template is None else "the processor's chat template is used as it is"
        raise InputError(
            f"tail={tail!r} has no place where template={template!r}: {what}. Name a template, or drop it."
        )
    if template is None and answer_prefix:
        raise InputError(
            f"answer_prefix={answer_prefix!r} has no place where template=None: the text is the whole prompt. "
            "Write it at the prompt's end."
        )
    return template


def _prompts(
    questions: list[str],
    images: list[list[Image.Image]],
    template: TemplateLike,
    answer_prefix: str,
    processor: Processor,
) -> list[Prompt]:
    """The text of every prompt, with an image token for each of its images."""
    token, made = image_token_of(processor), []
    for row, (text, own) in enumerate(zip(questions, images, strict=True)):
        with naming_prompt(row, text) if len(questions) > 1 else nullcontext():
            if template is None:
                prompt = Prompt(text)
            elif isinstance(template, str):
                prompt = format_chat(processor, text, len(own), answer_prefix=answer_prefix)
            else:
                prompt = template.format(text, len(own), answer_prefix=answer_prefix, image_token=token)
            if (in_text := prompt.text.count(token)) != len(own):
                raise InputError(count_message(in_text, len(own), token))
            made.append(prompt)
    return made


def _layouts(images: Sequence[Image.Image], processor: Processor, config: LLaVAConfig) -> tuple[ImageLayout, ...]:
    """How each image of a prompt becomes positions, and which pixels of the original each position shows."""
    several = len(images) > 1
    sizes = [{"height": image.height, "width": image.width} for image in images]
    return tuple(layout_of(config, processor.image_processor, **size, several_images=several) for size in sizes)


def _encode(
    prompts: list[Prompt], layouts: list[tuple[ImageLayout, ...]], processor: Processor, padding_side: str
) -> dict[str, Tensor]:
    """Token ids and mask, with each token's characters where the tokenizer knows them.

    An image takes as many image tokens as its layout has features, whatever the processor would write.
    """
    tokenizer, token = processor.tokenizer, image_token_of(processor)
    begun = [begins_with_bos(tokenizer, prompt.text) for prompt in prompts]
    if any(begun) and not all(begun):
        raise InputError(
            f"Prompt {begun.index(True)} begins with {tokenizer.bos_token!r} and prompt {begun.index(False)} does not; "
            "write it before all of them, or before none: then the tokenizer adds it."
        )
    # A tokenizer may have been saved with truncation or padding switched on: here a prompt is what it is.
    encoded = tokenizer(
        [_expanded(prompt.text, token, own) for prompt, own in zip(prompts, layouts, strict=True)],
        padding="longest" if len(prompts) > 1 else False,
        padding_side=padding_side,
        pad_to_multiple_of=None,
        truncation=False,
        add_special_tokens=not any(begun),
        return_offsets_mapping=tokenizer.is_fast,
        return_tensors="pt",
    )
    return dict(encoded)


def _expanded(text: str, image_token: str, layouts: Sequence[ImageLayout]) -> str:
    """The prompt with an image token for every feature of its images."""
    first, *rest = text.split(image_token)
    return first + "".join(image_token * o.n_features + part for o, part in zip(layouts, rest, strict=True))


def _with_texts(
    token_maps: tuple[TokenMap, ...],
    prompts: list[Prompt],
    layouts: list[tuple[ImageLayout, ...]],
    offsets: Tensor | None,
    image_token: str,
) -> tuple[TokenMap, ...]:
    """The token maps with the characters of their prompts, the question's span, and the images' layouts."""
    mapped = []
    for row, (token_map, prompt, own) in enumerate(zip(token_maps, prompts, layouts, strict=True)):
        assert token_map.words is not None  # a processor has a tokenizer
        separator = prompt.answer_separator
        words = replace(token_map.words, prompt=prompt.text, parts=prompt.spans, answer_separator=separator)
        if offsets is not None:
            pairs = [(start, stop) for start, stop in offsets[row].tolist()]
            sizes = [len(image) for image in words.images]
            words = replace(words, prompt_offsets=prompt_offsets(pairs, prompt.text, image_token, sizes))
        token_map = replace(token_map, words=words, layouts=own)
        if "question" in prompt.spans and offsets is not None:
            token_map = token_map.with_spans(question=token_map.locate(*prompt.spans["question"]))
        mapped.append(token_map)
    return tuple(mapped)


def _with_options(inputs: Inputs, options: Sequence[str] | Sequence[Sequence[str]], *, single: bool) -> Inputs:
    per_prompt: Sequence[Any] = [options] if single else options
    if isinstance(options, str) or len(per_prompt) != len(inputs) or any(isinstance(o, str) for o in per_prompt):
        raise InputError(
            f"options={options!r} for {counted(len(inputs), 'prompt')}; expected a list "
            "of words for one question, and a list of such lists, one per question, for several."
        )
    found = inputs.each(lambda m, words: m.with_spans(options=_find_options(m, words)), inputs.token_maps, per_prompt)
    return replace(inputs, token_maps=tuple(found))


def _find_options(token_map: TokenMap, words: Sequence[str]) -> Positions:
    # In a whole prompt (template=None) no part is known to be the question.
    within = "question" if token_map.words is not None and "question" in token_map.words.parts else None
    found = Positions()
    for word in words:
        found |= token_map.find(word, within=within, advice=_SET_LATER)
    return found


def _token_maps(
    ids: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    starts: list[tuple[int, ...]],
    layouts: Sequence[ImageLayout],
    config: LLaVAConfig,
    tokenizer: Tokenizer | None,
) -> Iterable[TokenMap]:
    remaining = iter(layouts)
    for row, real, firsts in zip(ids.tolist(), mask, starts, strict=True):
        own = tuple(islice(remaining, len(firsts)))
        at = real.nonzero()[:, 0].tolist()
        tokens, positions = tuple(row), range(at[0], at[-1] + 1)
        words = None
        if tokenizer is not None:
            words = TokenText(
                token_ids=tokens,
                tokenizer=tokenizer,
                image_token_id=config.image_token_id,
                images=tuple(
                    range(first, first + layout.n_features) for first, layout in zip(firsts, own, strict=True)
                ),
                real=positions,
            )
        yield TokenMap(token_ids=tokens, real=positions, image_starts=firsts, layouts=own, words=words)
