"""Every analysis on a model whose mechanism is known (`tests.compiled`): it must find that, and nothing else.

Here the tools that work on any hook; the papers' systems are in test_known_mechanism_papers.py.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch

from hooked_llava import Intervention, Replay
from hooked_llava.analysis import (
    activation_patching,
    attribution_patching,
    edge_attribution,
    image_attention,
    logit_attribution,
    logit_lens,
    path_patching,
)
from hooked_llava.readout.metrics import Answer, logit_difference, probability
from tests.compiled import SHARPNESS, CompiledLLaVA, compiled
from tests.known_mechanism import (
    ANSWERING,
    DIFFERING_HEADS,
    LOGIT,
    OBJECTS,
    ROUTED,
    ROUTES,
    VARIANTS,
    model_of,
    pair_of,
    places,
)
from tests.patch_world import UNKNOWN

SPANS = ("system", "image", "question", "rest", "last")
EDGES = [(source, target) for source, target in product(SPANS, SPANS) if SPANS.index(source) <= SPANS.index(target)]


@pytest.fixture(params=VARIANTS)
def model(request) -> CompiledLLaVA:
    return model_of(request.param)


def restored(result) -> np.ndarray:
    """0 as in the run that is patched, 1 as in the one the activation comes from."""
    ends = (result.corrupted, result.clean)
    here, there = ends if result.direction == "denoise" else ends[::-1]
    return (result.values - here) / (there - here)


# ---------------------------------------------------------------------- patching


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize(("variant", "datum"), ROUTED)
def test_patching_the_stream_finds_the_route_and_nothing_else(variant, datum, direction):
    model = model_of(variant)
    pair, at = pair_of(model, datum), places(model)
    found = activation_patching(model, *pair, direction=direction)
    expected = np.zeros(found.shape)
    for layer, place in enumerate(ROUTES[variant, datum]):
        expected[layer, at[place]] = 1
    assert found.dims == ("layer", "position")
    assert np.allclose(restored(found), expected, atol=1e-5)
    assert model.mechanism.route(datum) == list(ROUTES[variant, datum])


@pytest.mark.parametrize(("variant", "datum"), ROUTED)
def test_patching_heads_finds_those_of_the_mechanism(variant, datum):
    model = model_of(variant)
    at = places(model)
    chosen = ["object", "word", "last"]
    found = activation_patching(model, *pair_of(model, datum), hook="z", positions=[at[place] for place in chosen])
    expected = np.zeros(found.shape)
    for layer, head, place in DIFFERING_HEADS[variant, datum]:
        expected[layer, chosen.index(place), head] = 1
    assert found.dims == ("layer", "position", "head")
    assert np.allclose(restored(found), expected, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_patching_image_embeddings_finds_the_object(variant):
    model = model_of(variant)
    found = activation_patching(model, *pair_of(model, "color"), hook="hook_image_embed")
    decisive = restored(found).argmax()
    assert (int(found.patch_row[decisive]), int(found.patch_col[decisive])) == (2, 1)
    expected = np.eye(found.size)[decisive]
    assert np.allclose(restored(found), expected, atol=1e-5)


def test_queries_keys_and_values_of_the_match():
    """In the direct variant the shape reaches the match as its query, the color as its value, neither as its key."""
    model = model_of("direct")
    effects = {
        (datum, hook): restored(
            activation_patching(model, *pair_of(model, datum), hook=hook, layers=[3], positions="all", heads=[0])
        ).item()
        for datum, hook in product(("shape", "color"), ("q", "k", "v"))
    }
    expected = dict.fromkeys(effects, 0.0) | {("shape", "q"): 1.0, ("color", "v"): 1.0}
    assert effects == pytest.approx(expected, abs=1e-5)


# For each receiver the one sender that matters, if any; by variant, for the pair that differs in the shape.
PATHS = {
    "direct": {"logits": (3, 0), ("q", 3, 0): (1, 2), ("k", 3, 0): None, ("v", 3, 0): None, ("q", 3, 1): None},
    "two_hops": {"logits": (3, 3), ("q", 3, 3): None, ("k", 3, 3): None, ("v", 3, 3): (1, 1), ("v", 3, 2): None},
}


@pytest.mark.parametrize("variant", sorted(PATHS))
def test_path_patching_finds_the_connection_between_the_heads(variant):
    model = model_of(variant)
    found = path_patching(model, *pair_of(model, "shape"), receivers=list(PATHS[variant]))
    for effect, sender in zip(restored(found), PATHS[variant].values(), strict=True):
        expected = np.where(np.isnan(effect), np.nan, 0.0)
        if sender is not None:
            expected[sender] = 1
        assert np.allclose(effect, expected, atol=1e-5, equal_nan=True)


# ---------------------------------------------------------------------- estimates by gradient


@pytest.mark.parametrize(("variant", "datum"), ROUTED)
def test_gradients_see_the_way_of_values_and_not_that_of_queries(variant, datum):
    """Saturated attention has no gradient: a first-order estimate misses whatever goes through a query.

    What is left there comes from the norms alone (a change along the stream itself, which is a few of its six slots),
    and has the wrong sign. What is copied as a value has its effect, less the norms' part.
    """
    model = model_of(variant)
    at = places(model)
    found = attribution_patching(model, *pair_of(model, datum), hooks=["resid_pre"])
    estimate = found.resid_pre.values / (found.clean - found.corrupted)
    as_value_from = {"color": 0, "shape": 4 if variant == "direct" else 2}[datum]  # the layer behind the match
    for layer, place in enumerate(ROUTES[variant, datum]):
        low, high = (0.75, 1.0) if layer >= as_value_from else (-0.1, 0.0)
        assert low < estimate[layer, at[place]] < high
        estimate[layer, at[place]] = 0
    assert np.abs(estimate).max() < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_integrated_gradients_see_through_queries_where_attention_is_soft(variant):
    """The same mechanism with soft attention: its gradient at one end misses the effect, its mean along the way has it."""
    soft = compiled(variant, sharpness=4.0)
    at, pair = places(soft), pair_of(soft, "shape")
    shares = {}
    for steps in (0, 8):
        found = attribution_patching(soft, *pair, hooks=["resid_pre"], steps=steps)
        shares[steps] = found.resid_pre.values / (found.clean - found.corrupted)
    assert shares[0][0, at["word"]] < 0.15
    for layer, place in enumerate(ROUTES[variant, "shape"]):
        assert shares[8][layer, at[place]] == pytest.approx(1.0, abs=0.05)
        shares[8][layer, at[place]] = 0
    assert np.abs(shares[8]).max() < 0.01


def test_edges_between_heads_by_gradient():
    model = model_of("two_hops")
    found = edge_attribution(model, *pair_of(model, "color"))
    heads = found.heads / (found.clean - found.corrupted)
    connected = np.argwhere(np.abs(heads.values) > 1e-5)
    edges = [(str(heads.receiver.values[r]), layer, head) for r, layer, head in connected.tolist()]
    assert edges == [("L3H3 v", 1, 1), ("logits", 3, 3)]


# ---------------------------------------------------------------------- what is written


def test_the_answers_logit_comes_from_one_head_alone(model):
    inputs = model.ask(OBJECTS, "ring")
    heads = logit_attribution(model, inputs, "Blue", UNKNOWN, by="head")
    expected = np.zeros(heads.shape)
    expected[ANSWERING[model.mechanism.variant]] = 2 * LOGIT  # it writes the answer, and takes "Unknown" away
    assert np.allclose(heads.values, expected, atol=1e-4)
    assert heads.rest == pytest.approx(-LOGIT, abs=1e-4)
    components = logit_attribution(model, inputs, by="component")
    assert [str(c) for c in components.component.values[np.abs(components.values) > 1e-4]] == ["3_attn"]


def test_the_answers_logit_comes_from_one_position(model):
    inputs, at = model.ask(OBJECTS, "ring"), places(model)
    sources = logit_attribution(model, inputs, "Blue", by="source")
    expected = np.zeros(sources.shape)
    place = "object" if model.mechanism.variant == "direct" else "word"
    expected[(*ANSWERING[model.mechanism.variant], at[place])] = LOGIT
    assert np.allclose(sources.values, expected, atol=1e-4)


def test_the_direct_logit_map_is_one_hot_on_the_object_or_empty_if_color_comes_by_way_of_the_question(model):
    patches = logit_attribution(model, model.ask(OBJECTS, "ring"), "Blue", by="patch")
    expected = np.zeros(patches.shape)
    if model.mechanism.variant == "direct":
        expected[3, 0, 2, 1] = LOGIT
    assert np.allclose(patches.values, expected, atol=1e-4)


def test_the_lens_sees_the_answer_from_the_layer_on_that_writes_it(model):
    tokens = logit_lens(model, model.ask(OBJECTS, "ring")).token
    assert [row[0] for row in tokens.values[:, 0].tolist()] == [UNKNOWN] * 4 + ["Blue"] * 2


def test_attention_to_the_image_is_on_the_object(model):
    maps = image_attention(model, model.ask(OBJECTS, "ring"))[0]
    heads = model.mechanism.hops
    for hop in heads:
        expected = np.zeros(maps.shape[2:])
        if (hop.source, hop.target) == ("object", "last"):
            expected[2, 1] = 1
        assert np.array_equal(maps.values[hop.layer, hop.head], expected)


# ---------------------------------------------------------------------- knockout


def test_a_knockout_brings_unknown_on_the_mechanisms_edges_in_their_layers_and_changes_nothing_elsewhere(model):
    replay = Replay(model, model.ask(OBJECTS, "ring"))
    cells = list(product(range(model.cfg.n_layers), EDGES))
    logits = replay.run([[blocked(layer, *edge)] for layer, edge in cells])
    expected = {(layer, tuple(edge.split("->"))) for edge, layer in model.mechanism.edges.items()}
    assert len(expected) == 2
    assert_only(model, replay, logits, [cell in expected for cell in cells])


def test_a_knockout_of_single_positions_finds_word_and_object(model):
    replay, at = Replay(model, model.ask(OBJECTS, "ring")), places(model)
    cells = list(product(range(model.cfg.n_layers), range(at["last"] + 1), ("word", "last")))
    cells = [(layer, source, target) for layer, source, target in cells if source <= at[target]]
    logits = replay.run([[blocked(layer, [source], target)] for layer, source, target in cells])
    expected = {(hop.layer, at[hop.source], hop.target) for hop in model.mechanism.hops}
    assert_only(model, replay, logits, [cell in expected for cell in cells])


def test_a_knockout_of_one_head_is_enough(model):
    replay = Replay(model, model.ask(OBJECTS, "ring"))
    heads = list(product(range(model.cfg.n_layers), range(model.cfg.n_heads)))
    logits = replay.run([[Intervention(f"blocks.{layer}.attn.hook_z", heads=[h], zero=True)] for layer, h in heads])
    assert_only(model, replay, logits, [head in model.mechanism.heads for head in heads])


def test_where_the_shape_is_absent_no_knockout_of_the_image_matters(model):
    replay = Replay(model, model.ask(OBJECTS, "circle"))
    runs = [[blocked(layer, "image", to)] for layer in range(model.cfg.n_layers) for to in ("question", "last")]
    assert torch.allclose(replay.run(runs), replay.logits().expand(len(runs), -1), atol=1e-5)


def test_a_weighted_edge_has_the_weight_that_the_head_is_left_with(model):
    """The beginning holds the head where nothing is found, and e^-SHARPNESS is then as much as what was found."""
    inputs = model.ask(OBJECTS, "ring")
    replay, hop = Replay(model, inputs), model.mechanism.hops[-1]
    cells = list(product(range(model.cfg.n_layers), EDGES))
    elsewhere = [(layer, edge) for layer, edge in cells if (layer, edge) != (hop.layer, tuple(hop.edge.split("->")))]
    found = replay.run([[weighted(layer, edge, 0.5)] for layer, edge in elsewhere])
    assert torch.allclose(found, replay.logits().expand(len(found), -1), atol=1e-5)
    odds = [3.0, 1.0, 1 / 3]
    for edge in (tuple(hop.edge.split("->")), ([places(model)[hop.source]], [places(model)["last"]])):
        logits = replay.run([[weighted(hop.layer, edge, odd * math.exp(-SHARPNESS))] for odd in odds])
        blue, unknown = (logits[:, model.to_single_token(word)] for word in ("Blue", UNKNOWN))
        assert torch.allclose(blue / unknown, torch.tensor(odds), rtol=1e-3)


def test_a_temperature_of_every_head_is_a_softer_model(model):
    inputs, softer = model.ask(OBJECTS, "ring"), compiled(model.mechanism.variant, sharpness=SHARPNESS / 32)
    run = [Intervention(("attn_scores", layer), temperature=32.0) for layer in range(model.cfg.n_layers)]
    expected = softer(inputs)[0, -1]
    assert torch.allclose(Replay(model, inputs).run([run])[0], expected, atol=1e-4)
    assert (expected - model(inputs)[0, -1]).abs().max() > 0.3
    only = [
        Intervention(("attn_scores", layer), heads=[head], temperature=32.0) for layer, head in model.mechanism.heads
    ]
    assert torch.allclose(model.run_with_hooks(inputs, fwd_hooks=only)[0, -1], expected, atol=1e-4)


def weighted(layer: int, edge, factor: float) -> Intervention:
    return Intervention(f"blocks.{layer}.attn.hook_attn_scores", reweight=edge, factor=factor)


def blocked(layer: int, source, target) -> Intervention:
    return Intervention(f"blocks.{layer}.attn.hook_attn_scores", block=(source, target))


def assert_only(model: CompiledLLaVA, replay: Replay, logits: torch.Tensor, expected: list[bool]) -> None:
    """Where expected, the answer is "Unknown" as if there were no such shape; elsewhere all logits stay."""
    hit = torch.tensor(expected)
    absent = Replay(model, model.ask(OBJECTS, "circle")).logits()
    assert torch.allclose(logits[hit], absent.expand(int(hit.sum()), -1), atol=1e-5)
    assert torch.allclose(logits[~hit], replay.logits().expand(int((~hit).sum()), -1), atol=1e-5)
    p = probability(Answer.of(model, "Blue"))
    assert (100 * (p(logits[hit]) - p(replay.logits())) / p(replay.logits()) < -99.9).all()
    difference = logit_difference(Answer.of(model, "Blue"), Answer.of(model, UNKNOWN))
    assert torch.allclose(difference(logits), torch.where(hit, -LOGIT, LOGIT), atol=1e-4)
