"""The word-level tokenizer of `tiny-shapes` and the LLaVA processor around it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hooked_llava.toy.facts import RELATIONS
from hooked_llava.toy.objects import COLOR_NAMES, PATCH_SIZE, PATTERNS, SHAPES
from hooked_llava.toy.questions import INSTRUCTION
from hooked_llava.toy.scenes import IMAGE_SIZE

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK, IMAGE)
# Words the model answers with, in both cases: "The color of the star is" -> red, "What color is the star?" -> Red.
DIRECTIONS = ("left", "right", "above", "below")
CASED_WORDS = (*SHAPES, *COLOR_NAMES, *PATTERNS, *DIRECTIONS, "color", "pattern", "yes", "no")

_PIECE = r"USER:|ASSISTANT:|\w+|[^\w\s]"
_PIECES = re.compile(r"<image>|</s>|<s>|" + _PIECE)
# The words, "picture" among them, are those that the shipped weights were trained on.
_TEMPLATE_WORDS = """
USER: ASSISTANT: . , ? Is is the a an or Which shape to of What do and have in common there Is that On which
side picture color The this Describe Answer briefly List shapes
"""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %} " + INSTRUCTION + " "
    "{% else %}ASSISTANT: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}</s>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def split_words(text: str) -> list[str]:
    """The pieces the tokenizer sees, in plain Python (the training loop's fast path)."""
    return _PIECES.findall(text)


def vocabulary(more: Sequence[str] = ()) -> dict[str, int]:
    """Every word of the world with its token id: special tokens first, `more` words of another world last."""
    words = [*SPECIAL_TOKENS, *_TEMPLATE_WORDS.split()]
    for word in CASED_WORDS:
        words += [word, word.capitalize()]
    for relation in RELATIONS:
        for template in relation.templates:
            words += split_words(template.replace("{subject}", ""))
        words += relation.pool
    words += more
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


def build_tokenizer(vocab: dict[str, int] | None = None) -> PreTrainedTokenizerFast:
    """A real fast tokenizer: one token per word or punctuation mark, `<s>` prepended, padding on the left."""
    vocab = vocabulary() if vocab is None else vocab
    backend = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), behavior="removed", invert=True)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins with spaces, none before punctuation
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[IMAGE],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={"image_token": IMAGE},
    )


def build_processor(
    vocab: dict[str, int] | None = None, *, image_size: int = IMAGE_SIZE, patch_size: int = PATCH_SIZE
) -> LlavaProcessor:
    """The processor saved beside the weights: images to 64 x 64, `<image>` to its 64 placeholders.

    Another small world gives its own words and sizes.
    """
    images = CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(vocab),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
