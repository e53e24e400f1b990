"""A small real LlavaProcessor: word-level fast tokenizer and CLIP's own image processor, for any geometry.

Token ids fit `tests.builders`: padding 0, <s> 1, </s> 2, <image> 5, all ids below D_VOCAB.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hooked_llava.architecture.config import LLaVAConfig
from tests.builders import D_VOCAB, IMAGE_TOKEN_ID, PAD_TOKEN_ID, tiny_hf_config

WORDS = [
    "USER:",
    "ASSISTANT:",
    ".",
    "?",
    ",",
    "!",
    "a",
    "an",
    "the",
    "A",
    "The",
    "is",
    "are",
    "Is",
    "it",
    "this",
    "What",
    "what",
    "color",
    "shape",
    "star",
    "circle",
    "square",
    "red",
    "redder",
    "blue",
    "green",
    "or",
    "and",
    "of",
    "to",
    "left",
    "right",
    "in",
    "image",
    "there",
    "Answer",
    "briefly",
    "Who",
    "made",
    "Yes",
    "No",
    "yes",
    "no",
    "Red",
    "Blue",
    "Describe",
    "two",
    "Which",
]
_PIECE = r"USER:|ASSISTANT:|\w+|[^\w\s]"


def make_processor(
    image_size: int = 16,
    patch_size: int = 8,
    *,
    select_strategy: str = "default",
    metaspace: bool = False,
    chat_template: str | None = None,
    image_processor: Any = None,
    n_class_tokens: int = 1,
    **image_settings: Any,
) -> LlavaProcessor:
    """A processor for square images of that size; `metaspace` gives tokens that hold the space before a word.

    `image_settings` go to CLIPImageProcessorPil.
    """
    settings = {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
        **image_settings,
    }
    return LlavaProcessor(
        image_processor=image_processor or CLIPImageProcessorPil(**settings),
        tokenizer=make_tokenizer(metaspace=metaspace),
        patch_size=patch_size,
        vision_feature_select_strategy=select_strategy,
        num_additional_image_tokens=n_class_tokens,
        chat_template=chat_template,
    )


def make_tokenizer(*, metaspace: bool = False) -> PreTrainedTokenizerFast:
    """One token a word; with `metaspace` as Llama's: "▁star" where a space, or the text's beginning, comes before."""
    vocab = {"<pad>": PAD_TOKEN_ID, "<s>": 1, "</s>": 2, "<unk>": 3, "\n": 4, "<image>": IMAGE_TOKEN_ID}
    words = ["▁", *("▁" + word for word in WORDS), "?", "!", ",", ".", "What"] if metaspace else WORDS
    for word in words:
        vocab.setdefault(word, len(vocab))
    assert len(vocab) <= D_VOCAB
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    if metaspace:
        metaspaces = pre_tokenizers.Metaspace(prepend_scheme="first")
        marks = pre_tokenizers.Split(Regex(r"\n|[^\w\s▁:]"), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([metaspaces, marks])
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), behavior="removed", invert=True)
        backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={"image_token": "<image>"},
    )


def make_config(image_size: int = 16, patch_size: int = 8, **overrides: Any) -> LLaVAConfig:
    """The config of a tiny model that fits `make_processor`."""
    return LLaVAConfig.from_hf(tiny_hf_config(image_size=image_size, patch_size=patch_size, **overrides))
