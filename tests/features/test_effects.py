"""What features write and change: against the unembedding and against steering done by hand."""

from __future__ import annotations

import pytest
import torch

from hooked_llava.errors import InputError
from hooked_llava.features import steered_answers, written_words
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.sae import SAEConfig, SparseAutoencoder, load_sae
from hooked_llava.toy.images import image_path

GREEN, RED = 60, 106


@pytest.fixture(scope="module")
def model() -> HookedLLaVA:
    return HookedLLaVA.from_pretrained("tiny-shapes")


@pytest.fixture(scope="module")
def sae() -> SparseAutoencoder:
    return load_sae("tiny-shapes").requires_grad_(False)


def test_words_are_the_largest_entries_of_the_decoder_row_times_the_unembedding(model, sae):
    found = written_words(model, sae, [RED, 7], k=3)
    for feature in (RED, 7):
        row = sae.W_dec[feature]
        scaled = row / (row.pow(2).mean() + model.cfg.eps).sqrt() * model.ln_final.weight
        probabilities, ids = (scaled @ model.W_U).softmax(-1).topk(3)
        one = found.sel(feature=feature)
        assert one.word.values.tolist() == [model.tokenizer.decode([i]) for i in ids.tolist()]
        torch.testing.assert_close(torch.tensor(one.probability.values), probabilities.detach())
    assert found.word.sel(feature=RED).values[0] == "red"


def test_answers_are_those_of_the_model_with_the_decoder_direction_added_by_hand(model, sae):
    questions = ["What color is the star?", "Is the star solid or striped?"]
    inputs = model.prepare(questions, [image_path("demo")] * 2)
    found = steered_answers(model, sae, {GREEN: 1.5, RED: 1.2}, inputs, max_new_tokens=3)
    assert found.question.values.tolist() == questions
    assert found.unsteered.values.tolist() == [model.generate(one, max_new_tokens=3) for one in (inputs[0], inputs[1])]
    assert found.steered.sel(feature=GREEN).values[0] == "Green"

    def set_red(resid, hook):
        acts = sae.encoder(resid[:, image] - sae.b_dec).relu()
        kept = acts.topk(sae.cfg.k, dim=-1)
        now = torch.zeros_like(acts).scatter(-1, kept.indices, kept.values)[..., RED]
        resid[:, image] += (1.2 - now)[..., None] * sae.W_dec[RED]

    one = inputs[0]
    image = torch.tensor(list(one.token_map["image"]))
    said = model.generate(one, max_new_tokens=3, fwd_hooks=[(sae.cfg.hook, set_red)], hook_phase="prefill")
    assert found.steered.sel(feature=RED).values[0] == said == "Red"


def test_random_directions_are_drawn_for_each_feature_and_again_the_same(model, sae):
    inputs = model.prepare("What color is the star?", image_path("demo"))
    first, again = (steered_answers(model, sae, {GREEN: 40.0}, inputs, seed=3) for _ in range(2))
    assert first.identical(again.assign_attrs(first.attrs))
    assert first.random_direction.shape == first.steered.shape == (1, 1)


def test_wrong_input_is_refused(model, sae):
    inputs = model.prepare("What color is the star?", image_path("demo"))
    with pytest.raises(InputError, match=r"values=\{\}"):
        steered_answers(model, sae, {}, inputs)
    with pytest.raises(InputError, match=r"feature.*128"):
        steered_answers(model, sae, {128: 1.0}, inputs)
    with pytest.raises(InputError, match=r"features.*128"):
        written_words(model, sae, [128])
    narrow = SparseAutoencoder(SAEConfig(d_in=64, d_sae=8, k=2, hook="vision.blocks.0.hook_resid_post"))
    with pytest.raises(InputError, match=r"64.*d_model=128"):
        written_words(model, narrow, 0)
