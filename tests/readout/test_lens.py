"""Vectors to words: the three lenses, the best tokens in chunks, names of tokens."""

from __future__ import annotations

import pytest
import torch

from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.readout import lens as readout
from hooked_llava.readout.lens import (
    lens,
    log_probabilities,
    log_probabilities_along,
    log_probability_increase,
    top_tokens,
)
from hooked_llava.readout.vocabulary import decode_tokens, token_id
from tests.fixtures_processor import make_processor
from tests.pairs import as_users_run, off, pair

MODELS = pair("grouped", torch.float64)
OURS = MODELS.ours
VECTORS = torch.randn(2, 3, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4


def talking() -> HookedLLaVA:
    return HookedLLaVA.from_hf(pair().hf, processor=make_processor())


def test_the_three_lenses_are_their_formulas() -> None:
    weight, unembed = MODELS.hf.model.language_model.norm.weight, MODELS.hf.lm_head.weight.T
    rms = (VECTORS.square().mean(-1, keepdim=True) + OURS.cfg.eps).sqrt()
    assert off(lens(OURS, VECTORS), (VECTORS / rms * weight) @ unembed) < 1e-12
    assert off(lens(OURS, VECTORS, norm="none"), VECTORS @ unembed) < 1e-12
    scale = torch.tensor([2.5], dtype=torch.float64)
    assert off(lens(OURS, VECTORS, norm="frozen", scale=scale), (VECTORS / 2.5 * weight) @ unembed) < 1e-12


def test_the_final_lens_on_the_final_stream_gives_the_models_logits() -> None:
    logits, cache = OURS.run_with_cache(MODELS.prompt())
    assert off(lens(OURS, cache["resid_post", -1]), logits) < 1e-12
    frozen = lens(OURS, cache.decompose_resid(), norm="frozen", scale=cache["ln_final.hook_scale"])
    assert off(frozen.sum(0), logits) < 1e-12, "with the frozen scale parts add up"


def test_no_hook_fires() -> None:
    with OURS.hooks([("*", lambda x, hook: pytest.fail("a hook fired"))]):
        lens(OURS, VECTORS)


def test_unknown_lenses_and_missing_scales_are_refused() -> None:
    with as_users_run(), pytest.raises(InputError, match="norm='std'.*'final', 'frozen'.*'none'"):
        lens(OURS, VECTORS, norm="std")
    with pytest.raises(InputError, match="norm='frozen' needs scale="):
        lens(OURS, VECTORS, norm="frozen")


@pytest.mark.parametrize("chunk", [1, 250, 2**24])
def test_top_tokens_are_those_of_the_whole_in_any_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readout, "_CHUNK", chunk)
    probability, ids = top_tokens(OURS, VECTORS, 4)
    expected = lens(OURS, VECTORS).softmax(-1)
    assert probability.shape == ids.shape == (2, 3, 4)
    assert off(probability.double(), expected.gather(-1, ids)) < 1e-6
    assert torch.equal(ids, expected.topk(4).indices)


@pytest.mark.parametrize("k", [0, 100])
def test_more_words_than_there_are_is_refused(k: int) -> None:
    with pytest.raises(InputError, match=f"k={k} words; expected 1 to 99"):
        top_tokens(OURS, VECTORS, k)


def test_words_of_tokens() -> None:
    assert decode_tokens(OURS, torch.tensor([[7, 8]])).tolist() == [["#7", "#8"]]
    model = talking()
    ids = torch.tensor([[model.to_single_token("star")], [model.to_single_token("red")]])
    assert decode_tokens(model, ids).tolist() == [["star"], ["red"]]
    assert decode_tokens(model, ids).dtype.kind == "U"


def test_ids_of_words() -> None:
    model = talking()
    assert token_id(model, "star") == model.to_single_token("star")
    assert token_id(model, 0) == 0
    assert token_id(model, 98) == 98
    for wrong in (99, -1):
        with pytest.raises(InputError, match=f"Token.*{wrong}.*0..98"):
            token_id(model, wrong)
    with pytest.raises(InputError, match=r"'.*'.*single token.*\["):
        token_id(model, "red star")
    with pytest.raises(InputError, match="no processor"):
        token_id(OURS, "star")


# ---------------------------------------------------------------------- log-probability increase


def increase_by_hand(v: torch.Tensor, u: torch.Tensor, token: int, scale: float) -> float:
    """log softmax(((u + v) / scale * weight) W_U)_w less the same of u."""
    weight, unembed = MODELS.hf.model.language_model.norm.weight, MODELS.hf.lm_head.weight.T
    after, before = ((stream / scale * weight) @ unembed for stream in (u + v, u))
    return float(after.log_softmax(-1)[token] - before.log_softmax(-1)[token])


@pytest.mark.parametrize("scored", [1, 100, 2**22])
def test_the_log_probability_increase_is_its_formula_in_any_pieces(
    scored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readout, "_SCORED", scored)
    base, scale = VECTORS[1, 2], torch.tensor([2.5], dtype=torch.float64)
    found = log_probability_increase(OURS, VECTORS, base, 7, scale=scale)
    expected = [[increase_by_hand(v, base, 7, 2.5) for v in row] for row in VECTORS]
    assert found.shape == (2, 3)
    assert off(found, torch.tensor(expected, dtype=torch.float64)) < 1e-12


def test_each_vector_may_have_a_base_a_target_and_a_scale_of_its_own() -> None:
    scale = torch.tensor([[2.0], [3.0]], dtype=torch.float64)[:, None]
    target = torch.tensor([[[7]], [[8]]])  # (2, 1, spelling)
    found = log_probability_increase(OURS, VECTORS, VECTORS.flip(1), target, scale=scale)
    expected = [
        [increase_by_hand(VECTORS[i, j], VECTORS[i, 2 - j], 7 + i, 2.0 + i) for j in range(3)] for i in range(2)
    ]
    assert off(found, torch.tensor(expected, dtype=torch.float64)) < 1e-12


def test_spellings_of_a_target_add_up() -> None:
    scale, base = torch.tensor([2.5], dtype=torch.float64), VECTORS[1, 2]
    p = (lens(OURS, torch.stack([base, base + VECTORS[0, 0]]), norm="frozen", scale=scale)).softmax(-1)[:, [7, 9]]
    expected = (p.sum(-1)[1] / p.sum(-1)[0]).log()
    assert off(log_probability_increase(OURS, VECTORS[0, 0], base, [7, 9], scale=scale), expected) < 1e-12


@pytest.mark.parametrize("scored", [1, 100, 2**22])
def test_where_the_model_is_sure_small_changes_still_show(scored: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 log P is right to its own size, not only to that of the logits, which are thousands of times larger."""
    monkeypatch.setattr(readout, "_SCORED", scored)
    single, target = pair("grouped"), torch.tensor([[7, 9]])
    direction = OURS.tokens_to_residual_directions(7)
    sure = direction * torch.tensor([[30.0], [33.0], [36.0]], dtype=torch.float64) / direction.square().sum()
    one = torch.ones(1, dtype=torch.float64)
    expected = log_probabilities(OURS, sure, target, scale=one)
    assert bool((expected.abs() < 1e-6).all()), "the model must be sure"
    found = log_probabilities(single.ours, sure.float(), target, scale=one.float())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)
    basis, along = direction[None].float(), (sure @ direction / direction.square().sum())[:, None].float()
    base = torch.zeros_like(direction).float()
    found = log_probabilities_along(single.ours, along, basis, base, target, scale=one.float())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)


def test_one_base_serves_vectors_with_different_targets() -> None:
    scale, base = torch.tensor([2.5], dtype=torch.float64), VECTORS[1, 2]
    found = log_probability_increase(OURS, VECTORS[0, :2], base, torch.tensor([[7], [8]]), scale=scale)
    expected = [increase_by_hand(VECTORS[0, i], base, 7 + i, 2.5) for i in range(2)]
    assert off(found, torch.tensor(expected, dtype=torch.float64)) < 1e-12


def test_nothing_increases_nothing_and_increases_telescope() -> None:
    scale = torch.tensor([2.5], dtype=torch.float64)
    assert log_probability_increase(OURS, VECTORS * 0, VECTORS, 7, scale=scale).abs().max() < 1e-14
    parts = VECTORS.reshape(6, -1)
    before = parts.cumsum(0) - parts
    whole = log_probability_increase(OURS, parts.sum(0), parts[0] * 0, 7, scale=scale)
    steps = log_probability_increase(OURS, parts, before, 7, scale=scale)
    assert off(steps.sum(), whole) < 1e-12


def test_half_precision_is_scored_in_single() -> None:
    half, single = pair("grouped", torch.bfloat16), pair("grouped")
    vectors, scale = VECTORS.bfloat16(), torch.tensor([2.5])
    found = log_probability_increase(half.ours, vectors, vectors[0, 0] * 0, 7, scale=scale)
    assert found.dtype == torch.float32
    exact = log_probability_increase(single.ours, vectors.float(), vectors[0, 0].float() * 0, 7, scale=scale)
    assert off(found, exact) < 0.02  # what remains is the rounding of the weights


def test_top_tokens_through_the_frozen_lens() -> None:
    scale = torch.tensor([[0.5], [2.0], [1.0]], dtype=torch.float64)  # of each of the three positions
    probability, ids = top_tokens(OURS, VECTORS, 4, norm="frozen", scale=scale)
    expected = lens(OURS, VECTORS, norm="frozen", scale=scale).float().softmax(-1).topk(4, dim=-1)
    torch.testing.assert_close(probability, expected.values)
    assert ids.tolist() == expected.indices.tolist()
    with pytest.raises(InputError, match="needs scale="):
        top_tokens(OURS, VECTORS, 4, norm="frozen")
