"""Vectors to words: the three lenses, the best tokens in chunks, names of tokens."""

from __future__ import annotations

import pytest
import torch

from hooked_llava import readout
from hooked_llava.errors import InputError
from hooked_llava.model import HookedLLaVA
from hooked_llava.readout import lens, token_id, top_tokens, words
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
    with as_users_run(), pytest.raises(InputError, match="norm='std' is no lens; expected 'final', 'frozen' or 'none'"):
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


def test_words_of_tokens() -> None:
    assert words(OURS, torch.tensor([[7, 8]])).tolist() == [["#7", "#8"]]
    model = talking()
    ids = torch.tensor([[model.to_single_token("star")], [model.to_single_token("red")]])
    assert words(model, ids).tolist() == [["star"], ["red"]]
    assert words(model, ids).dtype.kind == "U"


def test_ids_of_words() -> None:
    model = talking()
    assert token_id(model, "star") == model.to_single_token("star")
    assert token_id(model, 0) == 0
    assert token_id(model, 98) == 98
    for wrong in (99, -1):
        with pytest.raises(InputError, match=f"Token id {wrong} is not in the vocabulary; expected 0..98"):
            token_id(model, wrong)
    with pytest.raises(InputError, match="not a single token"):
        token_id(model, "red star")
    with pytest.raises(InputError, match="no processor"):
        token_id(OURS, "star")
