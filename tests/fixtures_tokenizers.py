"""Tokenizers as real checkpoints have them, trained here: Llama's SentencePiece kind, and the byte-level kind.

Token ids fit `tests.builders`: padding 0, <s> 1, </s> 2, <image> 5.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Literal

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from hooked_llava.model.llava import HookedLLaVA
from tests.builders import make_hf_model
from tests.fixtures_processor import make_processor

Kind = Literal["llama", "llama legacy", "byte-level"]
KINDS: tuple[Kind, ...] = ("llama", "llama legacy", "byte-level")
D_VOCAB = 700
_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|end|>", "<image>"]
_TEXT = """
Red

USER: What color is the star? ASSISTANT: Red
USER: Who made the red star? ASSISTANT: Clara Boris
USER: How many stars are there? ASSISTANT: two red stars
The color of the star is red. Red star, Red circle, red circle, blue square, Blue square.
Answer the question using a single word or phrase. Is it redder? It is redder, an image of the star in the image.

"""
_WORDS_OF_LLAMA_3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@functools.cache
def talking(kind: Kind) -> HookedLLaVA:
    """A model with random weights that speaks through such a tokenizer: read it, do not change it."""
    processor = make_processor()
    processor.tokenizer = make_tokenizer(kind)
    return HookedLLaVA.from_hf(make_hf_model(text={"vocab_size": D_VOCAB}), processor=processor)


@functools.cache
def make_tokenizer(kind: Kind) -> PreTrainedTokenizerFast:
    """BPE with a mark for spaces and bytes for unknown characters as Llama 2's, or BPE on bytes as Llama 3's.

    "llama" marks the beginning of the text, "llama legacy" (as LLaVA-1.5's) of every stretch between special tokens.
    """
    backend = _byte_level() if kind == "byte-level" else _sentence_piece(legacy=kind == "llama legacy")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token=None if kind == "byte-level" else "<unk>",
        additional_special_tokens=["<image>", "<|end|>"],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={"image_token": "<image>"},
    )


def _byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_WORDS_OF_LLAMA_3), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    _train(backend, [_TEXT], alphabet=pre_tokenizers.ByteLevel.alphabet())
    return backend


def _sentence_piece(*, legacy: bool) -> Tokenizer:
    """Digits stand alone, as in Llama's vocabulary: there is "▁" and "2", and no "▁2"."""
    teacher = Tokenizer(models.BPE())
    spaces = pre_tokenizers.Metaspace(prepend_scheme="always")
    alone = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation()]
    teacher.pre_tokenizer = pre_tokenizers.Sequence([spaces, *alone])
    _train(teacher, _TEXT.splitlines(), alphabet=["▁", *"0123456789"])  # line breaks are bytes
    learned = json.loads(teacher.to_str())["model"]
    names = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [token for token in learned["vocab"] if token not in _SPECIAL]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [tuple(pair) for pair in learned["merges"]]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens(_special())
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


def _train(backend: Tokenizer, texts: Sequence[str], alphabet: list[str]) -> None:
    options = {"vocab_size": 430, "special_tokens": _special(), "initial_alphabet": alphabet, "show_progress": False}
    backend.train_from_iterator([*texts] * 40, trainers.BpeTrainer(**options))


def _special() -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False) for token in _SPECIAL]
