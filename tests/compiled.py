"""A LLaVA whose weights are set by hand, so that it is known how it comes to its answers.

It answers "What color is the star?" about images of `tests.patch_world`, by two attention heads:

    direct    L1H2 carries the shape's name   question -> last
              L3H0 finds the shape's patch    image -> last       and copies its color: the answer
    two_hops  L1H1 finds the shape's patch    image -> question   and copies its color
              L3H3 carries the color          question -> last    : the answer

All other heads, all MLPs and the vision tower's blocks are zero. `model.mechanism` says the same as data. The
architecture is LLaVA's own: a saved checkpoint gives the same logits in plain transformers.

How each part is used or made harmless:

Residual stream. It is divided into slots (kind, word, shape, color, memory, answer), and a slot always holds exactly one
    of its values as a one-hot vector; an empty one holds "nothing". A head that writes a value takes the old one away.
RMSNorm. Every position of every layer so has the same length, the square root of the number of slots: the norm divides
    by a constant, which its weight restores. (Only an intervention changes the length.)
Rotary positions. Linear scaling (as for long contexts) by a factor so large that all positions are turned alike.
Attention. A score is a multiple of `sharpness`: 3 for what the head looks for; 2 for the beginning of the prompt, where
    it looks if there is none; 1 for whatever has nothing to copy (in case the beginning is blocked); and 0 for all else.
    At the default the softmax is one-hot to the last bit of float32. The beginning has nothing to copy either, so
    "Unknown", which the last position holds at first, remains.
SwiGLU. Zero weights add zero.
Patch embedding. The convolution reads the color of each shape, less the ground's, by that shape's dual stamp: 1 on the
    stamp, 0 on the other stamps and on a uniform patch, which is therefore blank whatever its color.
CLIP's LayerNorm. It puts the features of all patches on a sphere, on which no point lies between others, so that a
    plane cuts each off from the rest.
Projector's GELU. For each pair of shape and color one hidden unit, with that plane as its threshold, far enough from
    both sides that GELU is exactly 0 or exactly the identity. The second map writes the pair's shape and color.
Class token, quick-GELU. Dropped by the projector; fed with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.errors import InputError
from hooked_llava.model.components.attention import Attention
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.toy.processor import BOS, EOS, IMAGE, PAD, build_processor
from tests.patch_world import (
    COLORS,
    GRID,
    IMAGE_SIZE,
    PATCH_SIZE,
    PHRASINGS,
    SHAPES,
    UNKNOWN,
    Objects,
    checked,
    image,
    questions,
    stamps,
    vocabulary,
)

__all__ = ["CompiledLLaVA", "Hop", "Mechanism", "compiled", "image", "questions"]

Variant = Literal["direct", "two_hops"]
Datum = Literal["shape", "color"]

NOTHING = "nothing"
END = "end"
START, ASK, OTHER = "start", "ask", "other"
SHARPNESS = 128.0
"""Nats between what a head looks for, the beginning, what has nothing to copy, and all else: exp(-128) is 0 in float32."""
_LAYERS, _HEADS = 5, 4  # layers without a part in it lie before, between and after those that have one
_ANSWER_LOGIT = 10.0
_STEP = 16.0  # a hidden unit's input is this for its own pair, and at most minus this for all others
_POLE = 1.5  # a constant feature, so that a blank patch has a direction too; about as long as a color is
_LINEAR_SCALING = 1e12  # of positions: an angle of 1e-12 is no angle


@dataclass(frozen=True)
class Hop:
    """One step of the mechanism: a head that carries something from one place to another."""

    name: Literal["carry", "match"]
    """Whether the head goes to the shape's word, or to the patch that shows the shape."""
    layer: int
    head: int
    source: Literal["word", "object"]
    """The place that is read: a span of `CompiledLLaVA.ask`."""
    target: Literal["word", "last"]
    """The place that reads."""
    carries: Datum
    """What is copied."""

    @property
    def edge(self) -> str:
        """Source and target as spans that every prompt has, such as "image->last"."""
        span = {"word": "question", "object": "image", "last": "last"}
        return f"{span[self.source]}->{span[self.target]}"


@dataclass(frozen=True)
class Mechanism:
    """How the answer comes about: the ground truth for every analysis."""

    variant: Variant
    hops: tuple[Hop, Hop]
    """In the order of their layers; the second writes the answer."""

    @property
    def heads(self) -> list[tuple[int, int]]:
        """(layer, head) of each hop."""
        return [(hop.layer, hop.head) for hop in self.hops]

    @property
    def edges(self) -> dict[str, int]:
        """The layer in which each edge is used; the answer needs these and no others."""
        return {hop.edge: hop.layer for hop in self.hops}

    def route(self, datum: Datum) -> list[str]:
        """For each layer the span whose `resid_pre` decides, if prompts differ in the shape asked for or its color.

        >>> compiled("direct").mechanism.route("color")
        ['object', 'object', 'object', 'object', 'last']
        """
        place = "word" if datum == "shape" else "object"
        places = []
        for layer in range(_LAYERS):
            places.append(place)
            for hop in self.hops:
                if hop.layer == layer and place in (hop.source, hop.target):
                    place = hop.target
        return places


_MECHANISMS = {
    "direct": Mechanism(
        "direct", (Hop("carry", 1, 2, "word", "last", "shape"), Hop("match", 3, 0, "object", "last", "color"))
    ),
    "two_hops": Mechanism(
        "two_hops", (Hop("match", 1, 1, "object", "word", "color"), Hop("carry", 3, 3, "word", "last", "color"))
    ),
}
# Slots of the stream and their values. The memory holds what the first hop brings: a shape, or a color.
_SLOTS = {
    "kind": (START, ASK, OTHER),
    "word": (*SHAPES, NOTHING),
    "shape": (*SHAPES, NOTHING),
    "color": (*COLORS, NOTHING),
    "memory": (*SHAPES, *COLORS, NOTHING),
    "answer": (*COLORS, UNKNOWN, END, NOTHING),
}
_AXIS = {pair: i for i, pair in enumerate((slot, value) for slot, values in _SLOTS.items() for value in values)}
"""Dimension of the stream for each value of each slot."""


class CompiledLLaVA(HookedLLaVA):
    """A `HookedLLaVA` that knows its own mechanism; `compiled` makes it."""

    mechanism: Mechanism
    """Which heads do what."""

    def ask(self, objects: Objects, shape: str, *, phrasing: int = 0) -> Inputs:
        """The question about a shape's color, with the spans `word` (the shape's name) and `object` (its patch, if there).

        Raises `InputError` for what is not of this world.

        >>> model = compiled()
        >>> inputs = model.ask({(0, 3): "red star", (2, 1): "blue ring"}, "ring")
        >>> model.generate(inputs)
        'Blue'
        >>> inputs.token_map.position_to_patch(inputs.token_map["object"][0])
        (0, 2, 1)
        """
        if shape not in SHAPES or not 0 <= phrasing < len(PHRASINGS):
            raise InputError(
                f"shape={shape!r}, phrasing={phrasing}; expected one of {', '.join(SHAPES)}, and 0 to {len(PHRASINGS) - 1}."
            )
        inputs = self.prepare(PHRASINGS[phrasing].format(shape=shape), image(objects))
        token_map = inputs.token_map
        spans = {"word": token_map.find(shape, within="question").tolist()}
        for place, (_, shown) in checked(objects).items():
            if shown == shape:
                spans["object"] = [token_map.patch_to_position(*place)]
        return replace(inputs, token_maps=(token_map.with_spans(**spans),))


@torch.no_grad()
def compiled(variant: Variant = "direct", *, sharpness: float = SHARPNESS) -> CompiledLLaVA:
    """Build the model, without any training or randomness; see the module for how it works.

    With a small `sharpness` (such as 4) attention is soft: gradients flow through it, and the mechanism is the same but
    no longer exact. Raises `InputError` for an unknown variant.

    >>> model = compiled("two_hops")
    >>> model.mechanism.heads, model.mechanism.edges
    ([(1, 1), (3, 3)], {'image->question': 1, 'question->last': 3})
    >>> model.generate(model.ask({(0, 3): "red star"}, "cross"))
    'Unknown'
    """
    if variant not in _MECHANISMS:
        raise InputError(f"There is no variant {variant!r}; expected one of {', '.join(_MECHANISMS)}.")
    words = vocabulary()
    hf_config = _config(words)
    config = LLaVAConfig.from_hf(hf_config, model_name=f"compiled-{variant}")
    processor = build_processor(words, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)
    model = CompiledLLaVA.build(config, processor=processor, hf_config=hf_config)
    assert isinstance(model, CompiledLLaVA)
    model.generation_config = GenerationConfig.from_model_config(hf_config)
    model.mechanism = _MECHANISMS[variant]
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if ".ln" in name and name.endswith("weight") else 0.0)
    _set_norms(model)
    _set_words(model, words)
    for hop in model.mechanism.hops:
        (_set_match if hop.name == "match" else _set_carry)(model, hop, sharpness)
    _set_patch_embedding(model)
    _set_projector(model)
    return model


def _config(words: dict[str, int]) -> LlavaConfig:
    n_patch_features = 3 * len(SHAPES) + 2
    ids = {"bos_token_id": words[BOS], "eos_token_id": words[EOS], "pad_token_id": words[PAD]}
    # The projector's hidden layer is as wide as the stream, and has a unit for each pair of shape and color.
    d_model = _multiple_of(_HEADS, max(len(_AXIS), len(SHAPES) * len(COLORS)))
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=n_patch_features,
            intermediate_size=n_patch_features,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            projection_dim=n_patch_features,
        ),
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=d_model,
            intermediate_size=d_model,
            num_hidden_layers=_LAYERS,
            num_attention_heads=_HEADS,
            num_key_value_heads=_HEADS,
            max_position_embeddings=256,
            rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": _LINEAR_SCALING},
            tie_word_embeddings=False,
            **ids,
        ),
        image_token_index=words[IMAGE],
        image_seq_length=GRID**2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **ids,
    )


def _multiple_of(n: int, at_least: int) -> int:
    return -(-at_least // (2 * n)) * 2 * n  # heads of even width, as the rotary embedding needs


def _content(**slots: str) -> Float[Tensor, " axis"]:
    """A vector of the stream with these values in their slots, and nothing in the others."""
    filled = {slot: slots.get(slot, OTHER if slot == "kind" else NOTHING) for slot in _SLOTS}
    vector = torch.zeros(len(_AXIS))
    vector[[_AXIS[slot, value] for slot, value in filled.items()]] = 1.0
    return vector


def _set_norms(model: HookedLLaVA) -> None:
    """Every vector of the stream has one 1 in each slot; the weight gives back what the norm divides by."""
    cfg = model.config.language
    restored = math.sqrt(len(_SLOTS) / cfg.d_model + cfg.eps)
    for norm in [model.ln_final, *(n for block in model.blocks for n in (block.ln1, block.ln2))]:
        norm.weight.fill_(restored)


def _set_words(model: HookedLLaVA, words: dict[str, int]) -> None:
    """What each token puts into the stream, and which token each answer is."""
    special = {
        BOS: _content(kind=START),
        "ASSISTANT:": _content(kind=ASK, answer=UNKNOWN),
        **{shape: _content(word=shape) for shape in SHAPES},
        **{answer: _content(answer=END) for answer in (UNKNOWN, *(color.capitalize() for color in COLORS))},
    }
    embed, unembed = model.language.embed.weight, model.language.unembed.weight
    for word, index in words.items():
        embed[index, : len(_AXIS)] = special.get(word, _content())
    spoken = {END: EOS, UNKNOWN: UNKNOWN, **{color: color.capitalize() for color in COLORS}}
    for value, word in spoken.items():
        unembed[words[word], _AXIS["answer", value]] = _ANSWER_LOGIT


# ---------------------------------------------------------------------- the two heads

_Reading = tuple[int, list[int], list[int]]
"""How much, as a multiple of the sharpness, a query with the first dimensions gives to a key with the second."""


def _set_carry(model: CompiledLLaVA, hop: Hop, sharpness: float) -> None:
    """The position that asks looks for the shape's word."""
    attention = model.blocks[hop.layer].attn
    asks, words = [_AXIS["kind", ASK]], _axes("word", SHAPES)
    _set_scores(attention, hop.head, sharpness, [*_away_from("word"), (3, asks, words)])
    if hop.carries == "shape":
        _set_copy(attention, hop.head, ("word", "memory"), SHAPES, NOTHING)
    else:
        _set_copy(attention, hop.head, ("memory", "answer"), COLORS, UNKNOWN)


def _set_match(model: CompiledLLaVA, hop: Hop, sharpness: float) -> None:
    """The position that knows a shape, as a word or in its memory, looks for the patch that shows it."""
    attention = model.blocks[hop.layer].attn
    known = "word" if hop.target == "word" else "memory"
    same = [(3, [_AXIS[known, shape]], [_AXIS["shape", shape]]) for shape in SHAPES]
    _set_scores(attention, hop.head, sharpness, [*_away_from("color"), *same])
    if hop.target == "word":
        _set_copy(attention, hop.head, ("color", "memory"), COLORS, NOTHING)
    else:
        _set_copy(attention, hop.head, ("color", "answer"), COLORS, UNKNOWN)


def _axes(slot: str, values: Iterable[str]) -> list[int]:
    return [_AXIS[slot, value] for value in values]


def _away_from(slot: str) -> list[_Reading]:
    """Every position looks at where the slot is empty unless something scores higher, and there at the beginning."""
    everybody = _axes("kind", _SLOTS["kind"])
    return [(1, everybody, [_AXIS[slot, NOTHING]]), (1, everybody, [_AXIS["kind", START]])]


def _set_scores(attention: Attention, head: int, sharpness: float, readings: Sequence[_Reading]) -> None:
    for i, (level, query, key) in enumerate(readings):
        attention.W_Q[head, query, i] = level * sharpness / attention.scale
        attention.W_K[head, key, i] = 1.0


def _set_copy(attention: Attention, head: int, slots: tuple[str, str], values: Iterable[str], instead_of: str) -> None:
    """Copy a value from one slot to another, in which it takes the place of another value."""
    source, target = slots
    for i, value in enumerate(values):
        attention.W_V[head, _AXIS[source, value], i] = 1.0
        attention.W_O[head, i, _AXIS[target, value]] = 1.0
        attention.W_O[head, i, _AXIS[target, instead_of]] = -1.0


# ---------------------------------------------------------------------- the image


def _set_patch_embedding(model: HookedLLaVA) -> None:
    """Feature 3 s + c is channel c of shape s, less the ground's; after those comes the constant pole."""
    masks = stamps().reshape(len(SHAPES), -1).astype(np.float64)
    uniform = np.ones((1, masks.shape[1]))
    duals = np.linalg.pinv(np.concatenate([masks, uniform]))[:, : len(SHAPES)]  # [pixel, shape]
    vision = model.vision
    for shape in range(len(SHAPES)):
        dual = torch.from_numpy(duals[:, shape]).reshape(PATCH_SIZE, PATCH_SIZE)
        for channel in range(vision.cfg.n_channels):
            vision.patch_embed.weight[vision.cfg.n_channels * shape + channel, channel] = dual
    vision.pos_embed.weight[:, -1] = _POLE


def _set_projector(model: HookedLLaVA) -> None:
    """A hidden unit for each pair of shape and color, which writes both into their slots in place of nothing."""
    names = [(color, shape) for shape in SHAPES for color in COLORS]
    features = _features(model, [{(0, 0): f"{color} {shape}"} for color, shape in names] + [{}])
    likeness = features @ features.T  # (content, content); the last content is the blank patch
    into, out = model.projector.linear_in, model.projector.linear_out
    for unit, (color, shape) in enumerate(names):
        own = float(likeness[unit, unit])
        nearest = float(likeness[unit, torch.arange(len(features)) != unit].max())
        steepness = 2 * _STEP / (own - nearest)
        into.weight[unit] = steepness * features[unit]
        into.bias[unit] = -steepness * (own + nearest) / 2
        change = _content(shape=shape, color=color) - _content()
        out.weight[: len(_AXIS), unit] = change / _STEP
    out.bias[: len(_AXIS)] = _content()


def _features(model: HookedLLaVA, contents: Sequence[Objects]) -> Float[Tensor, "content d_features"]:
    """What the tower makes of the first patch of each image."""
    shown = [image(objects) for objects in contents]
    pixels = model.processor.image_processor(images=shown, return_tensors="pt")["pixel_values"]
    return model.vision(pixels)[:, 0].double()
