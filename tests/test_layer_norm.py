"""A language tower with LayerNorm: centering and bias in everything that freezes the final norm.

Held against torch's LayerNorm inside Hugging Face's model, and against the naive loops of tests/oracles.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_llava.analysis import (
    attention_contribution,
    head_readings,
    head_scores,
    layer_scores,
    logit_attribution,
    logit_lens,
    position_scores,
)
from hooked_llava.model.components import LayerNorm, RMSNorm
from hooked_llava.readout.lens import lens, log_probabilities, log_probabilities_along, project, top_tokens
from hooked_llava.replay import Intervention, Replay
from tests.model.components.towers import with_weights
from tests.oracles.naive_scores import NaiveScores
from tests.pairs import Pair, layer_norm_pair, off

GEOMETRIES = ["plain", "grouped", "biases"]
X = torch.randn(2, 3, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1


@functools.cache
def naive(geometry: str, token: int = 7, at: int = -1) -> NaiveScores:
    models = layer_norm_pair(geometry)
    return NaiveScores(models.hf, models.slow.run(**models.prompt()), token, at)


def seen(geometry: str) -> dict[str, Tensor]:
    return naive(geometry).seen


def real_logits(models: Pair) -> Tensor:
    return models.hf_logits(models.prompt())


# ---------------------------------------------------------------------- the norm itself


@pytest.mark.parametrize("cls", [RMSNorm, LayerNorm])
def test_the_frozen_norm_with_its_own_scale_is_the_norm(cls: type) -> None:
    norm = with_weights(cls(48, 1e-2))
    assert off(norm.frozen(X, norm.scale_of(X)), norm.fused(X)) < 1e-12
    with_hooks: list[Tensor] = []
    norm.hook_scale.add_hook(lambda t, hook: with_hooks.append(t))
    assert torch.equal(norm.frozen(X, norm.scale_of(X)), norm(X))
    assert torch.equal(with_hooks[0], norm.scale_of(X))


@pytest.mark.parametrize("cls", [RMSNorm, LayerNorm])
def test_parts_through_the_frozen_norm_sum_to_the_whole_and_directions_read_them(cls: type) -> None:
    norm = with_weights(cls(48, 1e-2))
    whole, scale = X.sum((0, 1)), torch.tensor([2.5], dtype=torch.float64)
    bias = 0 if norm.bias is None else norm.bias
    assert off(norm.frozen(X, scale, bias=False).sum((0, 1)) + bias, norm.frozen(whole, scale)) < 1e-12
    reading = X[1, 2] * 0.3
    assert off(X @ norm.direction(reading) / 2.5, norm.frozen(X, scale, bias=False) @ reading) < 1e-12


# ---------------------------------------------------------------------- the lens


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_logits_are_those_of_torchs_layer_norm_and_so_is_the_frozen_lens(geometry: str) -> None:
    models = layer_norm_pair(geometry)
    logits, cache = models.ours.run_with_cache(models.prompt())
    assert off(logits, real_logits(models)) < 1e-12
    final, scale = cache["resid_post", -1], cache["ln_final.hook_scale"]
    assert torch.equal(lens(models.ours, final, norm="frozen", scale=scale), logits)
    assert off(lens(models.ours, final), logits) < 1e-12
    bias = models.hf.lm_head.weight @ models.hf.model.language_model.norm.bias
    parts = lens(models.ours, cache.decompose_resid(), norm="frozen", scale=scale, bias=False)
    assert off(parts.sum(0) + bias, logits) < 1e-12
    _, ids = top_tokens(models.ours, final, 3, norm="frozen", scale=scale)
    assert torch.equal(ids, logits.topk(3).indices)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_logit_lens_reads_the_whole_with_the_bias_and_parts_without(geometry: str) -> None:
    models, by_hand = layer_norm_pair(geometry), naive(geometry)
    read = logit_lens(models.ours, models.prompt(), norm="frozen", answers=[7, 8])
    real = real_logits(models)[0, -1].softmax(-1)[[7, 8]]
    np.testing.assert_allclose(read.answer_probability[-1, 0], real, rtol=1e-5)
    early = by_hand.lens(seen(geometry)["blocks.1.hook_resid_pre"][0, -1]).softmax(-1)[[7, 8]]
    np.testing.assert_allclose(read.answer_probability.sel(layer=1)[0], early, rtol=1e-5)
    middle = logit_lens(models.ours, models.prompt(), norm="frozen", answers=[7, 8], hook="resid_mid")
    expected = by_hand.lens(seen(geometry)["blocks.1.hook_resid_mid"][0, -1]).softmax(-1)[[7, 8]]
    np.testing.assert_allclose(middle.answer_probability.sel(layer=1)[0], expected, rtol=1e-5)
    part = logit_lens(models.ours, models.prompt(), norm="frozen", answers=[7, 8], hook="mlp_out")
    expected = by_hand.part(seen(geometry)["blocks.1.hook_mlp_out"][0, -1]).softmax(-1)[[7, 8]]
    np.testing.assert_allclose(part.answer_probability.sel(layer=1)[0], expected, rtol=1e-5)


# ---------------------------------------------------------------------- attributions


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("baseline", "position"), [(None, -1), (8, -1), (8, 4)])
def test_every_division_of_a_logit_is_by_hand_and_sums_with_the_bias(
    geometry: str, baseline: int | None, position: int
) -> None:
    models, by_hand = layer_norm_pair(geometry), naive(geometry, at=position)
    logits = real_logits(models)[0, position]
    total = float(logits[7] - (logits[baseline] if baseline is not None else 0))

    def of(vector: Tensor, logits_of: str = "part") -> float:
        found = getattr(by_hand, logits_of)(vector)
        return float(found[7] - (found[baseline] if baseline is not None else 0))

    found = logit_attribution(models.ours, models.prompt(), 7, baseline, position=position)
    assert found.logit == pytest.approx(total, abs=1e-6)
    assert float(found.sum()) == pytest.approx(total, abs=1e-6)
    held = seen(geometry)
    assert found.sel(component="ln_final_bias").item() == pytest.approx(
        of(held["hook_embed"][0, 0] * 0, "lens"), abs=1e-6
    )
    for name, hook in (
        ("embed", "hook_embed"),
        ("1_attn", "blocks.1.hook_attn_out"),
        ("2_mlp", "blocks.2.hook_mlp_out"),
    ):
        assert found.sel(component=name).item() == pytest.approx(of(held[hook][0, position]), abs=1e-6)
    for by in ("layer", "head", "neuron", "source", "patch"):
        parts = logit_attribution(models.ours, models.prompt(), 7, baseline, position=position, by=by)
        assert float(parts.sum()) + parts.rest == pytest.approx(total, abs=1e-6)
    heads = logit_attribution(models.ours, models.prompt(), 7, baseline, position=position, by="head")
    result = held["blocks.2.attn.hook_result"][0, position]
    np.testing.assert_allclose(heads.sel(layer=2), [of(row) for row in result], atol=1e-6)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_transformer_lens_attributions_sum_to_the_logit_with_the_bias(geometry: str) -> None:
    models, by_hand = layer_norm_pair(geometry), naive(geometry)
    logits, cache = models.ours.run_with_cache(models.prompt())
    stack, labels = cache.decompose_resid(return_labels=True)
    frozen = cache.apply_ln_to_stack(stack)  # (component, 1, pos, d_model)
    for i, label in enumerate(labels):
        layer, _, kind = label.partition("_")
        hook = "hook_embed" if label == "embed" else f"blocks.{layer}.hook_{kind}"
        expected = by_hand.centered(seen(geometry)[hook][0, -1]) / by_hand.sigma
        assert off(frozen[i, 0, -1], expected) < 1e-6, label
    parts = cache.logit_attrs(stack, tokens=7)  # (component, 1, pos)
    bias = models.ours.ln_final.b @ models.ours.W_U[:, 7]
    assert off(parts.sum(0) + bias, logits[..., 7]) < 1e-12
    assert off(cache.accumulated_resid(apply_ln=True)[-1] @ models.ours.W_U, logits) < 1e-12
    direction = models.ours.tokens_to_residual_directions(7)
    every = cache.get_full_resid_decomposition(apply_ln=True, pos_slice=-1, project_output_onto=direction)
    assert off(every.sum(0) + bias, logits[:, -1, 7]) < 1e-12


# ---------------------------------------------------------------------- log-probability increase


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_scores_of_layers_heads_and_positions_are_by_hand_and_telescope(geometry: str) -> None:
    models, by_hand = layer_norm_pair(geometry), naive(geometry)
    layers = layer_scores(models.ours, models.prompt(), 7)
    real = float(real_logits(models)[0, -1].log_softmax(-1)[7])
    assert layers.log_probability == pytest.approx(real, abs=1e-6)
    assert layers.log_probability_of_embedding == pytest.approx(by_hand.log_p(by_hand.stream(0)), abs=1e-6)
    assert float(layers.sum()) == pytest.approx(layers.log_probability - layers.log_probability_of_embedding, abs=1e-6)
    np.testing.assert_allclose(layers, [by_hand.layer(i) for i in range(3)], atol=1e-6)
    heads = head_scores(models.ours, models.prompt(), 7)
    by_head = [[by_hand.head(layer, head) for head in range(by_hand.n_heads)] for layer in range(3)]
    np.testing.assert_allclose(heads, by_head, atol=1e-6)
    read = position_scores(models.ours, models.prompt(), 7, heads=[(1, 3), (2, 0)])
    for row, pair in zip(read.score, [(1, 3), (2, 0)], strict=True):
        np.testing.assert_allclose(row, [by_hand.position(*pair, key) for key in read.position.values], atol=1e-6)


def test_probabilities_along_a_basis_are_those_of_the_vectors() -> None:
    model = layer_norm_pair("grouped").ours
    coordinates, basis = X[..., :5], torch.randn(5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scale, target, base = torch.tensor([2.5], dtype=torch.float64), torch.tensor([7, 9]), X[0, 1]
    along = log_probabilities_along(model, coordinates, basis, base, target, scale=scale)
    assert off(along, log_probabilities(model, base + coordinates @ basis, target, scale=scale)) < 1e-12


# ---------------------------------------------------------------------- messages and readings


def test_messages_in_logits_go_through_the_centered_direction() -> None:
    models, by_hand = layer_norm_pair("grouped"), naive("grouped")
    found = attention_contribution(models.ours, models.prompt(), [6, 7], measure="logit", by_head=True, answer=7)
    for head in range(by_hand.n_heads):
        expected = [float(by_hand.part(by_hand.message(1, head, key))[7]) for key in (6, 7)]
        np.testing.assert_allclose(found.constraint_to_last.sel(layer=1, head=head), expected, atol=1e-5)


def test_readings_of_the_stream_have_the_bias_and_those_of_its_parts_do_not() -> None:
    models, by_hand = layer_norm_pair("grouped"), naive("grouped")
    n_words = models.ours.cfg.d_vocab
    found = head_readings(models.ours, models.prompt(), 2, 3, 7, positions=[4, 6], k=n_words)
    assert found.value.sizes["rank"] == n_words
    held = seen("grouped")
    for position in (4, 6):
        expected = {
            "layer_input": by_hand.lens(held["blocks.2.hook_resid_pre"][0, position]),
            "key_input": by_hand.part(sum(held[f"blocks.{i}.hook_attn_out"][0, position] for i in range(2))),
            "value_input": by_hand.part(sum(held[f"blocks.{i}.hook_mlp_out"][0, position] for i in range(2))),
            "value_output": by_hand.part(by_hand.message(2, 3, position)),
        }
        for reading, logits in expected.items():
            here = found.sel(reading=reading, position=position)
            np.testing.assert_allclose(here.value, logits[here.token_id.values], atol=1e-6, err_msg=reading)
    assert off(project(models.ours, X, "embed"), X @ models.ours.W_E.T) < 1e-12


def test_replay_is_the_full_run() -> None:
    models = layer_norm_pair("grouped")
    inputs = models.ours.as_inputs(models.prompt())
    found = Replay(models.ours, inputs).run([[Intervention("blocks.1.hook_resid_pre", positions=[6], zero=True)]])

    def zero(resid: Tensor, hook: object) -> None:
        resid[:, 6] = 0.0

    full = models.ours.run_with_hooks(inputs, fwd_hooks=[("blocks.1.hook_resid_pre", zero)])
    edited = models.slow.run(**models.prompt(), edits={"blocks.1.hook_resid_pre": lambda t: _zeroed(t, 6)})
    assert off(found[0], full[0, -1]) < 1e-12
    assert off(found[0], edited["hook_logits"][0, -1]) < 1e-6


def _zeroed(tensor: Tensor, position: int) -> Tensor:
    tensor[:, position] = 0.0
    return tensor
