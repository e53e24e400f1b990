"""Attention: fused and explicit are the same, grouped queries, masks, fully masked queries, views of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hooked_llava.architecture.sizes import TowerConfig
from hooked_llava.model.components import Attention, AttentionContext, KVCache, RotaryEmbedding, make_norm
from hooked_llava.model.components.attention import softmax_or_zero
from tests.model.components.towers import LANGUAGE, VISION, tower, with_weights
from tests.pairs import off

N_POS = 5


def run(attention: Attention, x: Tensor, context: AttentionContext, *listened: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and what the listened hooks saw. The norm before it is left out: x is given as both."""
    seen: dict[str, Tensor] = {}
    points = [getattr(attention, f"hook_{name}") for name in listened]
    for name, point in zip(listened, points, strict=True):
        point.add_hook(lambda t, hook, name=name: seen.__setitem__(name, t))
    norm = with_weights(make_norm(attention.cfg))
    out = attention(x, context, pre_norm=(x, norm))
    for point in points:
        point.remove_hooks()
    return out, seen


def allowed_by(mask: Tensor) -> Tensor:
    """Causal, and only real keys: [batch 1 query key]."""
    n = mask.shape[1]
    return (torch.arange(n) <= torch.arange(n)[:, None])[None, None] & mask[:, None, None, :]


MASK = torch.tensor([[True] * N_POS, [False, False, True, True, True]])
CONTEXTS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "padded": {"allowed": allowed_by(MASK)},
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("n_kv", [6, 2, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_and_explicit_are_the_same(context: str, n_kv: int, bias: bool) -> None:
    cfg = tower(LANGUAGE, n_key_value_heads=n_kv, qkv_bias=bias, out_bias=bias)
    attention, x = with_weights(Attention(cfg, 0)), torch.randn(2, N_POS, cfg.d_model, dtype=torch.float64)
    rotation = RotaryEmbedding(cfg.rotary)(torch.arange(N_POS)[None], torch.float64)  # type: ignore[arg-type]
    given_context = AttentionContext(rotation=rotation, **CONTEXTS[context])
    fused, _ = run(attention, x, given_context)
    for listened in (
        ["pattern"],
        ["attn_scores"],
        ["result"],
        ["q_input", "k_input", "v_input"],
        ["pattern", "result"],
    ):
        explicit, _ = run(attention, x, given_context, *listened)
        assert off(explicit, fused) < 1e-12, listened


def test_queries_of_a_group_read_the_same_keys_and_values() -> None:
    cfg = tower(LANGUAGE, n_key_value_heads=2, rotary=None)
    attention = with_weights(Attention(cfg, 0))
    x = torch.randn(1, N_POS, cfg.d_model, dtype=torch.float64)
    _, seen = run(attention, x, AttentionContext(causal=True), "q", "k", "v", "pattern", "z")
    for head in range(6):
        q, k, v = seen["q"][0, :, head], seen["k"][0, :, head // 3], seen["v"][0, :, head // 3]
        scores = (q @ k.T / cfg.d_head**0.5).masked_fill(torch.ones(N_POS, N_POS).triu(1).bool(), -torch.inf)
        pattern = scores.softmax(-1)
        assert off(seen["pattern"][0, head], pattern) < 1e-12
        assert off(seen["z"][0, :, head], pattern @ v) < 1e-12


@pytest.mark.parametrize("listened", [[], ["pattern"], ["attn_scores"]])
def test_fully_masked_queries_read_nothing_and_pass_no_nan(listened: list[str]) -> None:
    attention = with_weights(Attention(tower(LANGUAGE, rotary=None), 0))
    x = torch.randn(2, N_POS, LANGUAGE.d_model, dtype=torch.float64, requires_grad=True)
    out, seen = run(attention, x, AttentionContext(**CONTEXTS["padded"]), "z", *listened)
    assert seen["z"][1, :2].eq(0).all()
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    if "pattern" in listened:
        assert seen["pattern"][1, :, :2].eq(0).all()
        assert off(seen["pattern"][1, :, 2:].sum(-1), torch.ones(6, 3, dtype=torch.float64)) < 1e-12
    if "attn_scores" in listened:
        assert torch.equal(seen["attn_scores"][1, 0] == -torch.inf, ~CONTEXTS["padded"]["allowed"][1, 0])


def test_a_mask_without_fully_masked_queries_has_none() -> None:
    right_padded = AttentionContext(allowed=allowed_by(MASK.flip(1)))
    assert right_padded.fully_masked is not None, "whether there are any is not asked of the device"
    assert not right_padded.fully_masked.any()
    assert AttentionContext(allowed=allowed_by(MASK), never_fully_masked=True).fully_masked is None
    assert AttentionContext(causal=True).fully_masked is None
    fully_masked = AttentionContext(allowed=allowed_by(MASK)).fully_masked
    assert fully_masked is not None
    assert fully_masked.flatten().nonzero().flatten().tolist() == [5, 6]
    opened = AttentionContext(allowed=allowed_by(MASK)).allowed_in_softmax
    assert opened is not None
    assert opened.any(-1).all(), "no row of nothing but -inf enters a softmax"


@settings(max_examples=50)
@given(st.lists(st.floats(-30, 30) | st.just(-torch.inf), min_size=1, max_size=6))
def test_softmax_or_zero(scores: list[float]) -> None:
    x = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    pattern = softmax_or_zero(x[None, None, None])[0, 0, 0]
    if all(score == -torch.inf for score in scores):
        assert pattern.eq(0).all()
    else:
        torch.testing.assert_close(pattern, x.softmax(-1))
    (pattern * torch.arange(len(scores))).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_the_softmax_runs_in_float32() -> None:
    scores = torch.randn(1, 1, 1, 64).bfloat16()
    pattern = softmax_or_zero(scores)
    assert pattern.dtype == torch.float32
    assert torch.equal(pattern, scores.float().softmax(-1))


@pytest.mark.parametrize("listened", [[], ["pattern"]])
def test_one_position_at_a_time_with_a_cache_is_the_whole_run(listened: list[str]) -> None:
    attention = with_weights(Attention(tower(LANGUAGE, rotary=None), 0))
    x = torch.randn(2, N_POS, LANGUAGE.d_model, dtype=torch.float64)
    whole, _ = run(attention, x, AttentionContext(causal=True))
    kv_cache = KVCache(LANGUAGE, batch=2, capacity=N_POS, dtype=torch.float64)
    parts = [run(attention, x[:, :2], AttentionContext(causal=True, kv_cache=kv_cache), *listened)[0]]
    kv_cache.advance(2)
    for position in range(2, N_POS):
        step = AttentionContext(kv_cache=kv_cache)
        parts.append(run(attention, x[:, position : position + 1], step, *listened)[0])
        kv_cache.advance(1)
    assert off(torch.cat(parts, 1), whole) < 1e-12


@pytest.mark.parametrize("cfg", [tower(LANGUAGE, qkv_bias=True, out_bias=True), LANGUAGE, VISION])
def test_weights_are_views_in_transformer_lenss_orientation(cfg: TowerConfig) -> None:
    attention = with_weights(Attention(cfg, 0))
    for view, linear in (
        (attention.W_Q, attention.query), (attention.W_K, attention.key), (attention.W_V, attention.value),
        (attention.W_O, attention.output),
    ):  # fmt: skip
        assert view.untyped_storage().data_ptr() == linear.weight.untyped_storage().data_ptr()
    x = torch.randn(1, 2, cfg.d_model, dtype=torch.float64)
    _, seen = run(attention, x, AttentionContext(), "q", "k", "v", "z", "result")
    assert off(torch.einsum("bpm,hmd->bphd", x, attention.W_Q) + attention.b_Q, seen["q"]) < 1e-12
    assert off(torch.einsum("bpm,hmd->bphd", x, attention.W_K) + attention.b_K, seen["k"]) < 1e-12
    assert off(torch.einsum("bpm,hmd->bphd", x, attention.W_V) + attention.b_V, seen["v"]) < 1e-12
    assert off(torch.einsum("bphd,hdm->bphm", seen["z"], attention.W_O), seen["result"]) < 1e-12
    assert attention.b_O.shape == (cfg.d_model,)
    assert bool(attention.b_Q.eq(0).all()) != cfg.qkv_bias


def test_an_input_hook_works_beside_an_edit_within_the_norm() -> None:
    """x was changed after the norm; `pre_norm` adds what was changed before it, for its own head only."""
    attention, norm = with_weights(Attention(tower(LANGUAGE, rotary=None), 0)), with_weights(make_norm(LANGUAGE))
    resid = torch.randn(1, 3, LANGUAGE.d_model, dtype=torch.float64)
    edited = norm(resid) + 1
    seen: list[Tensor] = []
    attention.hook_q.add_hook(lambda t, hook: seen.append(t))
    attention(edited, AttentionContext(), pre_norm=(resid, norm))

    def shift_head_two(t: Tensor, hook: object) -> None:
        t[:, :, 2] += 0.5

    attention.hook_q_input.add_hook(shift_head_two)
    attention(edited, AttentionContext(), pre_norm=(resid, norm))
    assert off(seen[1][:, :, :2], seen[0][:, :, :2]) < 1e-12
    x = edited + norm(resid + 0.5) - norm(resid)
    assert off(seen[1][:, :, 2], x @ attention.W_Q[2] + attention.b_Q[2]) < 1e-12
