"""The embedded model's sizes, and an initialisation from which it learns within an hour on one core."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from hooked_llava.toy.objects import PATCH_SIZE
from hooked_llava.toy.processor import BOS, CASED_WORDS, EOS, IMAGE, PAD, vocabulary
from hooked_llava.toy.scenes import IMAGE_SIZE, PATCH_GRID

D_MODEL = 128
# A token first attends to its like with a score of about this, and to a patch that shares its shape with about half.
_MATCH_SCORE = 5.0
_OV_GAIN = 0.06  # a value read from one position adds about 0.06 * sqrt(d_model) = 0.7 embedding lengths per layer
_COMMON_LENGTH = 0.5  # of the direction that all embeddings share
_N_POSITIONAL_LAYERS = 2
_POSITION_SCORE = 6.0  # per rotary pair, at the right distance
_POSITIONAL_COPY = 4.0  # one head alone copies 16 of 128 dimensions, so it copies them louder
_SLOW_ROTARY = 3  # rotary frequencies from this index on turn little over the length of a prompt


def build_config() -> LlavaConfig:
    """The configuration of `tiny-shapes`: 5 vision layers, 6 language layers, 64 patches, every word a token."""
    vocab = vocabulary()
    special: dict[str, Any] = {"bos_token_id": vocab[BOS], "eos_token_id": vocab[EOS], "pad_token_id": vocab[PAD]}
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=D_MODEL,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        **special,
        initializer_range=0.05,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocab[IMAGE],
        image_seq_length=PATCH_GRID**2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **special,
    )


@torch.no_grad()
def build_model(seed: int) -> LlavaForConditionalGeneration:
    """A new model with seeded weights; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(build_config())
        _init_vision(model)
        _init_embedding(model)
        for index, layer in enumerate(model.model.language_model.layers):
            _init_attention(layer.self_attn)
            if index < _N_POSITIONAL_LAYERS:
                _init_positional_heads(model, layer.self_attn)
            nn.init.normal_(layer.mlp.down_proj.weight, std=0.01)
    ids = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
    model.generation_config.update(**ids, pad_token_id=model.config.pad_token_id)
    return model.float()


def _init_vision(model: LlavaForConditionalGeneration) -> None:
    """Plain Xavier weights for tower and projector: CLIP's own initialisation is too small at this width."""
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
    # Image embeddings start no longer than words: shrinking them would waste steps and can kill the projector's units.
    model.model.multi_modal_projector.linear_2.weight *= 0.1
    embeddings = next(m for n, m in model.model.vision_tower.named_modules() if n.endswith("embeddings"))
    nn.init.normal_(embeddings.patch_embedding.weight, std=1 / math.sqrt(3 * PATCH_SIZE**2))
    nn.init.normal_(embeddings.position_embedding.weight, std=0.02)
    embeddings.position_embedding.weight[1:] += _smooth_positions(embeddings.position_embedding.weight.shape[1])
    for module in model.model.vision_tower.modules():
        if hasattr(
            module, "q_proj"
        ):  # as in the language tower: attend to what is alike, here near and of the same look
            module.k_proj.weight.copy_(module.q_proj.weight + 0.1 * torch.randn_like(module.q_proj.weight) / 8)


def _smooth_positions(width: int) -> Tensor:
    """Two-dimensional sinusoids, so that neighboring patches start with like embeddings, [64, width]."""
    frequency = torch.linspace(0.25, 1.5, width // 4)
    axis = torch.arange(PATCH_GRID)[:, None] * frequency
    waves = torch.cat([axis.sin(), axis.cos()], dim=1)  # [8, width / 2]
    rows = waves[:, None].expand(-1, PATCH_GRID, -1)
    columns = waves[None].expand(PATCH_GRID, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def _init_embedding(model: LlavaForConditionalGeneration) -> None:
    """Embedding rows of length about 1; the unembedding starts as their copy.

    `Red` starts as `red` plus noise (cosine about 0.7): a mild prior that the two variants of a word have to do with
    each other, which a tokenizer's case variants acquire in pre-training.
    """
    vocab, embed = vocabulary(), model.model.language_model.embed_tokens.weight
    nn.init.normal_(embed, std=D_MODEL**-0.5)
    common = torch.randn(D_MODEL) * (_COMMON_LENGTH * D_MODEL**-0.5)
    for word in CASED_WORDS:
        lower, capital = vocab[word], vocab[word.capitalize()]
        embed[capital] = math.sqrt(0.5) * (embed[lower] + embed[capital])
    model.lm_head.weight.copy_(embed)
    embed += common


def _init_attention(attention: LlamaAttention) -> None:
    """Mimetic initialisation (Trockman and Kolter 2023, arXiv 2305.09828): attend to what is alike, and copy it.

    Each head's keys start as its queries, so a score starts as a measure of likeness; the output starts as the
    transpose of the values, so what is read is passed on. Rotary pairs that turn fast with distance get smaller
    weights than slow ones.
    """
    query, key = attention.q_proj.weight, attention.k_proj.weight
    heads, d_head = query.shape[0] // attention.head_dim, attention.head_dim
    frequency = torch.arange(d_head) % (d_head // 2)  # Llama pairs dimension i with i + d_head / 2
    weight = torch.where(frequency >= _SLOW_ROTARY, 1.0, 0.35)
    # A normalised token x has |x|^2 = d, so x.Q^T Q.x / sqrt(d_head) is about std^2 * sum(weight^2) * d / sqrt(d_head).
    std = math.sqrt(_MATCH_SCORE * math.sqrt(d_head) / (D_MODEL * weight.square().sum()))
    rows = (weight * std).repeat(heads).unsqueeze(1)  # [head * d_head, 1]
    query.copy_(torch.randn_like(query) * rows)
    key.copy_(query + 0.1 * torch.randn_like(key) * rows)
    values = nn.init.orthogonal_(torch.empty_like(attention.v_proj.weight)) * math.sqrt(_OV_GAIN * heads)
    attention.v_proj.weight.copy_(values + 0.1 * torch.randn_like(values) * values.std())
    attention.o_proj.weight.copy_(values.T / heads + 0.1 * torch.randn_like(values) * values.std() / heads)


def _init_positional_heads(model: LlavaForConditionalGeneration, attention: LlamaAttention) -> None:
    """Makes the last heads of a layer look one and two tokens back, as heads of trained models do.

    All embeddings share one direction; queries and keys read it alone, and the key is turned by the angle that the
    rotary embedding lacks at that distance. What they copy tells "red" in "the star is red" that it is about the star.
    """
    common = model.model.language_model.embed_tokens.weight.mean(0)
    d_head, pairs = attention.head_dim, attention.head_dim // 2
    theta = model.config.get_text_config().rope_parameters["rope_theta"] ** -(torch.arange(pairs) / pairs)
    heads = [w.unflatten(0, (-1, d_head)) for w in (attention.q_proj.weight, attention.k_proj.weight)]
    # After normalisation the shared direction has a length of about sqrt(d) * c / sqrt(1 + c^2).
    seen = math.sqrt(D_MODEL) * _COMMON_LENGTH / math.sqrt(1 + _COMMON_LENGTH**2)
    row = common / common.norm() * math.sqrt(_POSITION_SCORE * math.sqrt(d_head)) / seen
    for back, head in ((1, len(heads[0]) - 2), (2, len(heads[0]) - 1)):
        query, key = (w[head] for w in heads)
        for part in (query, key):
            part *= 0.2
        for pair in range(_SLOW_ROTARY):
            query[pair] += row
            key[pair] += row * math.cos(back * theta[pair])
            key[pair + pairs] += row * math.sin(back * theta[pair])
        attention.o_proj.weight[:, head * d_head : (head + 1) * d_head] *= _POSITIONAL_COPY


def trainable_parameters(model: LlavaForConditionalGeneration | LlavaNextForConditionalGeneration) -> dict[str, Tensor]:
    """The parameters that the loss can reach, by name: what lies above the vision feature layer is left out."""
    last = model.model.vision_tower.config.num_hidden_layers - 1
    skipped = (f"encoder.layers.{last}.", "post_layernorm")
    return {n: p for n, p in model.named_parameters() if not any(s in n for s in skipped)}
