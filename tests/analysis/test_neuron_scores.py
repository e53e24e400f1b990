"""Scores of single neurons, held against all of them read one by one on the slow model's activations."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava.analysis import layer_scores, neuron_scores, top_neurons
from hooked_llava.errors import InputError
from hooked_llava.readout.answer_cache import cache_answer
from hooked_llava.readout.metrics import Answer
from tests.compiled import compiled
from tests.known_mechanism import LOGIT, OBJECTS
from tests.oracles.naive_scores import NaiveScores
from tests.pairs import as_users_run, batch, pair

MODULE = importlib.import_module("hooked_llava.analysis.neuron_scores")


@pytest.fixture
def unlimited(monkeypatch: Any) -> None:
    """These prompts are so short that half a forward pass is soon spent."""
    monkeypatch.setattr(MODULE, "_SHARE", 100.0)


def exact(geometry: str = "grouped") -> Any:
    return pair(geometry, torch.float64)


@functools.cache
def naive(geometry: str) -> tuple[NaiveScores, np.ndarray]:
    """The oracle, and its score of every neuron [layer, neuron]."""
    models = exact(geometry)
    by_hand = NaiveScores(models.hf, models.slow.run(**models.prompt()), 7)
    n_neurons = models.ours.cfg.d_mlp
    return by_hand, np.array(
        [[by_hand.neuron(layer, n) for n in range(n_neurons)] for layer in range(by_hand.n_layers)]
    )


@pytest.mark.parametrize("geometry", ["grouped", "biases"])
@pytest.mark.parametrize("top", [3, 16])
@pytest.mark.usefixtures("unlimited")
def test_the_best_neurons_of_all_are_found_and_scored(geometry: str, top: int) -> None:
    models = exact(geometry)
    by_hand, every = naive(geometry)
    found = neuron_scores(models.ours, models.prompt(), 7, top=top, k=2)
    assert found.certain.all()
    for layer in range(by_hand.n_layers):
        expected = np.argsort(-every[layer])[:top]
        assert found.neuron.values[layer].tolist() == expected.tolist()
        np.testing.assert_allclose(found.score.values[layer], every[layer][expected], atol=1e-6)
        for rank, neuron in enumerate(expected[:2]):
            written = by_hand.neuron_output(layer, int(neuron))
            logits = by_hand.part(written)
            assert found.token_id.values[layer, rank].tolist() == logits.topk(2).indices.tolist()
            np.testing.assert_allclose(found["value"].values[layer, rank], logits.topk(2).values.detach(), atol=1e-5)
    assert (found.score <= found.first_order + 1e-6).all(), "a score is never above its first-order part"
    best = np.dstack(np.unravel_index(np.argsort(-every, axis=None)[:3], every.shape))[0]
    assert top_neurons(found, 3) == [tuple(pair) for pair in best.tolist()]


@pytest.mark.usefixtures("unlimited")
def test_bounds_hold_for_large_steps_and_several_variants() -> None:
    """With activations ten times as large scores are far from linear; the best are found all the same."""
    models = exact()
    scaled = cache_answer(models.ours, models.prompt(), Answer("two", (7, 9)), parts=("attn_out", "post"))
    for name in scaled.held:
        if name.endswith("hook_post"):
            scaled.held[name] *= 10
    found = neuron_scores(models.ours, scaled, top=4)
    for layer in range(scaled.n_layers):
        m = scaled.part(layer, "post")[0, 0]
        written = m[:, None] * models.ours.blocks[layer].mlp.W_out
        base = scaled.resid[layer] + scaled.part(layer, "attn_out")
        every = scaled.score(written[None, None], base)[0].detach()
        assert found.neuron.values[layer].tolist() == every.topk(4).indices.tolist()
        np.testing.assert_allclose(found.score.values[layer], every.topk(4).values, atol=1e-5)
    assert float((found.first_order - found.score).max()) > 0.1, "not linear"


def test_several_tokens_and_several_prompts() -> None:
    models = exact()
    prompts = batch([models.prompt(), models.prompt(n_text=4, seed=1)], "right")
    both = neuron_scores(models.ours, prompts, [7, 8], top=3)
    assert both.sizes["prompt"] == 2
    assert both.n_forward == 1
    for row, (one, token) in enumerate(((models.prompt(), 7), (models.prompt(n_text=4, seed=1), 8))):
        alone = neuron_scores(models.ours, one, token, top=3)
        np.testing.assert_array_equal(both.neuron[row], alone.neuron)
        np.testing.assert_allclose(both.score[row], alone.score, atol=1e-6)
    shared = cache_answer(models.ours, models.prompt(), 7, parts=("attn_out", "mlp_out", "post"))
    again = neuron_scores(models.ours, shared, layers=[-1], top=3)
    np.testing.assert_allclose(again.score, both.score[0, -1:], atol=1e-6)
    assert again.layer.values.tolist() == [2]
    assert again.n_forward == 0
    assert np.isfinite(layer_scores(models.ours, shared)).all()


def test_the_neuron_that_writes_the_answer_has_the_whole_score() -> None:
    """One neuron, set by hand, turns Blue into Red at the last layer; all others of the compiled model are zero."""
    model = compiled("direct")
    blue, red = (model.language.unembed.weight[model.to_single_token(word)].argmax() for word in ("Blue", "Red"))
    mlp = model.blocks[4].mlp
    assert mlp.gate is not None
    with torch.no_grad():
        mlp.gate.weight[5, blue] = mlp.up.weight[5, blue] = 2.0
        mlp.down.weight[red, 5] = 1.0
    inputs = model.ask(OBJECTS, "ring")
    assert model.generate(inputs) == "Red"
    found = neuron_scores(model, inputs, top=2)
    assert found.target == "Red"
    assert top_neurons(found, 1) == [(4, 5)]
    activation = float(found.activation.sel(layer=4, rank=0))
    assert activation == pytest.approx(4 / (1 + np.exp(-2.0)), abs=1e-4)  # silu(2) * 2
    scale = float(model.run_with_cache(inputs, names_filter="ln_final.hook_scale")[1]["ln_final.hook_scale"][0, -1])
    unit = float(model.ln_final.weight[0]) / scale * LOGIT
    logits = torch.zeros(model.cfg.d_vocab, dtype=torch.float64)
    logits[model.to_single_token("Blue")] = unit
    raised = logits.clone()
    raised[(token := model.to_single_token("Red"))] = unit * activation
    expected = float(raised.log_softmax(-1)[token] - logits.log_softmax(-1)[token])
    assert float(found.score.sel(layer=4, rank=0)) == pytest.approx(expected, abs=1e-3)
    assert found.token.sel(layer=4, rank=0, word=0).item() == "Red"
    others = found.score.values.copy()
    others[4, 0] = 0
    assert np.allclose(others, 0, atol=1e-5)


def test_it_says_where_half_a_pass_did_not_suffice(monkeypatch: Any) -> None:
    models = exact()
    found = neuron_scores(models.ours, models.prompt(), 7, top=1)
    assert 0 < found.work < 2
    assert found.n_forward == 1
    monkeypatch.setattr(MODULE, "_SHARE", 0.0)
    monkeypatch.setattr(MODULE, "_AT_ONCE", 1)
    cut = neuron_scores(models.ours, models.prompt(), 7, top=2)
    assert cut.work <= found.work
    assert not cut.certain.all()
    _, every = naive("grouped")
    for layer, row in enumerate(cut.neuron.values):
        np.testing.assert_allclose(cut.score.values[layer], every[layer][row], atol=1e-6)


def test_no_array_of_the_vocabulary_is_held_for_every_neuron(monkeypatch: Any) -> None:
    """At most the neurons that are read together, one piece of the vocabulary at a time, meet the unembedding."""
    models, seen = exact(), []
    from hooked_llava.readout import lens

    original = lens.log_probability_increase
    monkeypatch.setattr(
        "hooked_llava.readout.answer_cache.log_probability_increase",
        lambda model, vectors, *rest, **how: seen.append(vectors.shape[2]) or original(model, vectors, *rest, **how),
    )
    neuron_scores(models.ours, models.prompt(), 7, top=2)
    assert max(seen) <= 32 < models.ours.cfg.d_mlp


def test_what_does_not_fit_is_refused() -> None:
    models = exact()
    with pytest.raises(InputError, match=r"layers.*3"):
        neuron_scores(models.ours, models.prompt(), layers=3)
    with as_users_run(), pytest.raises(InputError, match=r"top=0"):
        neuron_scores(models.ours, models.prompt(), top=0)
    with pytest.raises(InputError, match=r"k=0"):
        neuron_scores(models.ours, models.prompt(), k=0)
    with pytest.raises(InputError, match="'post'"):
        neuron_scores(models.ours, cache_answer(models.ours, models.prompt()))
    with pytest.raises(InputError, match="k=4"):
        top_neurons(neuron_scores(models.ours, models.prompt(), top=3), 4)
    with pytest.raises(InputError, match="prompt.*layer and rank"):
        top_neurons(neuron_scores(models.ours, models.prompt(batch=2), top=3), 1)
