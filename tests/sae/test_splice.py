"""What is recovered with an autoencoder spliced in, against plain runs with hooks."""

from __future__ import annotations

import math

import pytest
import torch

from hooked_llava.errors import InputError
from hooked_llava.sae.autoencoder import SAEConfig, SparseAutoencoder
from hooked_llava.sae.splice import loss_recovered
from hooked_llava.toy.evaluate import held_out, prepare_examples

HOOK = "blocks.0.hook_resid_post"


def make_sae(scale: float = 1.0, bias: torch.Tensor | None = None) -> SparseAutoencoder:
    """Each coordinate's positive and negative part are features: with scale 1 the reconstruction is exact."""
    sae = SparseAutoencoder(SAEConfig(d_in=128, d_sae=256, kind="relu", hook=HOOK)).reset(0).requires_grad_(False)
    both = torch.cat([torch.eye(128), -torch.eye(128)])
    sae.encoder.weight.copy_(both)
    sae.W_dec.copy_(scale * both)
    if bias is not None:
        sae.b_dec.copy_(bias)
    return sae


@pytest.fixture(scope="module")
def asked(tiny_shapes):
    """Held-out questions about images, and their answers."""
    examples = held_out("query_color", 6, seed=3)
    return prepare_examples(tiny_shapes, examples), [one.question.answer for one in examples]


@torch.no_grad()
def by_hand(model, inputs, answers, change, tokens):
    """Mean cross-entropy of the answers' tokens and the first tokens said, with a function at the positions of a span."""

    def hook(resid):
        resid = resid.clone()
        for row, token_map in enumerate(inputs.token_maps):
            at = list(token_map.real if tokens == "all" else token_map[tokens])
            resid[row, at] = change(resid[row, at])
        return resid

    logits = model.run_with_hooks(inputs, fwd_hooks=[(HOOK, hook)])[:, -1]
    ids = torch.tensor([model.to_single_token(answer) for answer in answers])
    return float(-logits.log_softmax(-1)[torch.arange(len(ids)), ids].mean()), logits.argmax(-1)


@pytest.mark.parametrize("tokens", ["all", "image"])
def test_the_four_losses_and_the_answers_kept_are_those_of_plain_runs(tiny_shapes, asked, tokens):
    inputs, answers = asked
    sae = make_sae(0.9, bias=0.1 * torch.randn(128, generator=torch.Generator().manual_seed(0)))
    found = loss_recovered(tiny_shapes, sae, [inputs[:4], inputs[4:]], answers, tokens=tokens)
    _, cache = tiny_shapes.run_with_cache(inputs, names_filter=HOOK)
    at = [list(m.real if tokens == "all" else m[tokens]) for m in inputs.token_maps]
    mean = torch.cat([cache[HOOK][row, where] for row, where in enumerate(at)]).mean(0)
    changes = (lambda x: x, sae, lambda x: mean.expand(len(x), -1), torch.zeros_like)
    plain = [by_hand(tiny_shapes, inputs, answers, change, tokens) for change in changes]
    assert [found.clean, found.spliced, found.mean_ablated, found.zero_ablated] == [
        pytest.approx(loss, rel=1e-3, abs=1e-4) for loss, _ in plain
    ]
    kept = [float((said == plain[0][1]).float().mean()) for _, said in plain[1:]]
    assert [found.answers_kept, found.answers_kept_mean, found.answers_kept_zero] == pytest.approx(kept)
    assert found.recovered == pytest.approx((plain[2][0] - plain[1][0]) / (plain[2][0] - plain[0][0]), rel=1e-2)


def test_a_perfect_autoencoder_recovers_everything_and_a_constant_one_nothing(tiny_shapes, asked):
    inputs, answers = asked
    perfect = loss_recovered(tiny_shapes, make_sae(), inputs, answers, tokens="image")
    assert perfect.recovered == pytest.approx(1, abs=1e-3)
    assert perfect.answers_kept == 1
    nothing = loss_recovered(tiny_shapes, make_sae(0.0), inputs, answers, tokens="image")
    assert nothing.recovered_from_zero == pytest.approx(0, abs=1e-6)
    assert nothing.answers_kept == nothing.answers_kept_zero


def test_where_ablation_costs_nothing_there_is_nothing_to_recover(tiny_shapes, asked):
    sae = make_sae(0.0)
    late = SparseAutoencoder(SAEConfig(d_in=128, d_sae=256, kind="relu", hook="blocks.5.hook_resid_post"))
    late.load_state_dict(sae.state_dict())
    assert tiny_shapes.cfg.n_layers == 6  # after the last block no position reads the image any more
    found = loss_recovered(tiny_shapes, late, asked[0], tokens="image")
    assert (found.clean, found.answers_kept_mean) == (found.mean_ablated, 1)
    assert math.isnan(found.recovered)


def test_one_answer_may_be_given_as_it_is(tiny_shapes, asked):
    inputs, answers = asked
    one, listed = (loss_recovered(tiny_shapes, make_sae(0.5), inputs[0], given) for given in (answers[0], answers[:1]))
    assert one == listed


def test_another_number_of_answers_is_refused(tiny_shapes, asked):
    with pytest.raises(InputError, match="2 answers for 6 prompts"):
        loss_recovered(tiny_shapes, make_sae(), asked[0], ["Red", "Blue"])
