"""Attention in two parts with one softmax equals attention over prefix and suffix joined."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hooked_llava.model.components import prefix_attention
from hooked_llava.model.components.prefix_attention import (
    Prefix,
    attend_with_prefix,
    average_with_prefix,
    scores_with_prefix,
)


def joined(q: Tensor, k: Tensor, v: Tensor, prefix: Prefix, allowed: Tensor | None, scale: float) -> Tensor:
    """The definition, row by row and head by head."""
    each, groups = len(q) // len(prefix.k), q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for row in range(len(q)):
        prompt = row // each
        for head in range(q.shape[1]):
            keys = torch.cat([prefix.k[prompt, head // groups], k[row, head // groups]])
            values = torch.cat([prefix.v[prompt, head // groups], v[row, head // groups]])
            for query in range(q.shape[2]):
                n_before, n_own = prefix.k.shape[2], k.shape[2]
                seen = torch.ones(n_before + n_own, dtype=torch.bool)
                if prefix.allowed is not None:
                    seen[:n_before] = prefix.allowed[prompt, 0, 0]
                if allowed is not None:
                    seen[n_before:] = allowed[row % len(allowed), 0, query]
                if seen.any():
                    weights = (scale * q[row, head, query] @ keys[seen].T).softmax(-1)
                    out[row, head, query] = weights @ values[seen]
    return out


def case(n_key_value_heads: int, masked: bool) -> tuple[Tensor, Tensor, Tensor, Prefix, Tensor]:
    """Queries, keys, values and prefix of three rows for each of two prompts, and a causal mask."""
    generator = torch.Generator().manual_seed(n_key_value_heads)

    def random(*shape: int) -> Tensor:
        return 3 * torch.randn(*shape, generator=generator)

    q = random(6, 4, 3, 5)
    k, v = random(6, n_key_value_heads, 3, 5), random(6, n_key_value_heads, 3, 5)
    seen = torch.rand(2, 1, 1, 7, generator=generator) < 0.6 if masked else None
    prefix = Prefix(random(2, n_key_value_heads, 7, 5), random(2, n_key_value_heads, 7, 5), seen)
    return q, k, v, prefix, torch.ones(3, 3, dtype=torch.bool).tril()[None, None]


@pytest.mark.parametrize("n_key_value_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_equals_one_softmax_over_both_parts(
    n_key_value_heads: int, masked: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v, prefix, causal = case(n_key_value_heads, masked)
    if not fused:  # as on a device that has no such kernel
        monkeypatch.setattr(prefix_attention, "_FLASH_ON_CPU", None)
    for allowed in (causal, causal.expand(6, 1, 3, 3), None):
        found = attend_with_prefix(q.clone(), k, v, prefix, allowed, 0.4)
        torch.testing.assert_close(found, joined(q, k, v, prefix, allowed, 0.4), rtol=1e-5, atol=1e-5)


def test_the_kernel_that_gives_the_log_sum_exp_is_there() -> None:
    """A private name of torch: a version without it would fall back to the slower sums unnoticed."""
    assert prefix_attention._FLASH_ON_CPU is not None


@pytest.mark.parametrize("n_key_value_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_explicit_scores_give_the_same(n_key_value_heads: int, masked: bool) -> None:
    q, k, v, prefix, causal = case(n_key_value_heads, masked)
    for allowed in (causal, causal.expand(6, 1, 3, 3), None):
        scores = scores_with_prefix(0.4 * q, k, prefix, allowed)
        assert scores.shape == (6, 4, 3, 10)
        if prefix.allowed is not None:
            blocked = ~prefix.allowed.repeat_interleave(3, 0).expand(6, 4, 3, 7)
            assert torch.equal(scores[..., :7].isinf(), blocked)
        found = average_with_prefix(scores.softmax(-1), v, prefix)
        torch.testing.assert_close(found, joined(q, k, v, prefix, allowed, 0.4), rtol=1e-5, atol=1e-5)


def test_a_query_that_may_see_nothing_gets_zero_and_no_nan() -> None:
    nothing = torch.zeros(1, 1, 1, 4, dtype=torch.bool)
    prefix = Prefix(torch.ones(1, 2, 4, 3), torch.ones(1, 2, 4, 3), nothing)
    own = torch.ones(1, 2, 2, 3)
    allowed = torch.tensor([[False, False], [True, True]])[None, None]
    found = attend_with_prefix(own.clone(), own, own, prefix, allowed, 1.0)
    assert (found[:, :, 0] == 0).all()
    torch.testing.assert_close(found[:, :, 1], torch.ones(1, 2, 3))


def test_large_scores_do_not_overflow() -> None:
    prefix = Prefix(torch.full((1, 1, 2, 2), 100.0), torch.ones(1, 1, 2, 2))
    q = torch.full((1, 1, 1, 2), 100.0)
    found = attend_with_prefix(q, torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), prefix, None, 1.0)
    torch.testing.assert_close(found, torch.ones(1, 1, 1, 2))
