"""The language tower: positions, masks, entering and leaving at a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hooked_llava.model.components import AttentionContext, KVCache
from tests.pairs import off, pair

MODELS = pair("grouped")
TOWER = MODELS.ours.language
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def context(n: int, mask: Any = None, past: int = 0, position_ids: Any = None) -> AttentionContext:
    kv_cache = KVCache(TOWER.cfg, batch=2, capacity=8, dtype=CPU["dtype"]) if past else None
    if kv_cache is not None:
        kv_cache.advance(past)
    return TOWER.context(n, attention_mask=mask, position_ids=position_ids, kv_cache=kv_cache, **CPU)


def angles(made: AttentionContext) -> torch.Tensor:
    assert made.rotation is not None
    return made.rotation[0]


def at(positions: list[list[int]]) -> torch.Tensor:
    assert TOWER.rotary is not None
    return TOWER.rotary(torch.tensor(positions), torch.float32)[0]


LEFT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()


def test_without_padding_attention_is_causal_without_a_mask() -> None:
    made = context(4)
    assert made.causal
    assert made.allowed is None
    assert torch.equal(angles(made), at([[0, 1, 2, 3]]))


def test_with_padding_real_tokens_are_counted_and_padding_is_no_key() -> None:
    made = context(4, LEFT)
    assert not made.causal
    assert torch.equal(angles(made), at([[0, 0, 0, 1], [0, 1, 2, 3]]))
    assert made.allowed is not None
    assert made.allowed[0, 0].int().tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert made.allowed[1, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_one_new_token_sees_everything_before_it() -> None:
    made = context(1, past=4)
    assert not made.causal
    assert made.allowed is None
    assert torch.equal(angles(made), at([[4]]))
    padded = context(1, torch.cat([LEFT, torch.ones(2, 1).bool()], 1), past=4)
    assert padded.allowed is not None
    assert padded.allowed[:, 0].int().tolist() == [[[0, 0, 1, 1, 1]], [[1, 1, 1, 1, 1]]]
    assert torch.equal(angles(padded), at([[2], [4]]))


def test_several_new_tokens_behind_kept_ones() -> None:
    made = context(2, past=3)
    assert made.allowed is not None
    assert made.allowed[0, 0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_given_positions_are_taken() -> None:
    assert torch.equal(angles(context(2, position_ids=torch.tensor([[5, 9]]))), at([[5, 9]]))


def test_logits_are_the_norm_and_the_unembedding() -> None:
    stream = torch.randn(1, 2, TOWER.cfg.d_model)
    with torch.no_grad():
        expected = MODELS.hf.lm_head(MODELS.hf.model.language_model.norm(stream))
    assert off(TOWER.to_logits(stream), expected) < 1e-6


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_tower_run_in_two_parts(layer: int) -> None:
    stream = torch.randn(2, 4, TOWER.cfg.d_model)
    whole = TOWER(stream, context(4))
    half = TOWER(stream, context(4), stop_at_layer=layer)
    assert torch.equal(TOWER(half, context(4), start_at_layer=layer), whole)


def test_a_run_entered_above_the_embedding_has_none() -> None:
    fired: list[str] = []
    with MODELS.ours.hooks([("hook_embed", lambda x, hook: fired.append(hook.name))]):
        TOWER(torch.randn(2, 4, TOWER.cfg.d_model), context(4), start_at_layer=1)
        assert fired == []
        TOWER(torch.randn(2, 4, TOWER.cfg.d_model), context(4))
    assert fired == ["hook_embed"]


def test_tied_embeddings_are_one_parameter() -> None:
    tied = pair("tied").ours.language
    assert tied.unembed.weight is tied.embed.weight
    assert MODELS.ours.language.unembed.weight is not MODELS.ours.language.embed.weight
