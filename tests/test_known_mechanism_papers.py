"""The papers' systems on models whose mechanism is known: what they find, and what they cannot see.

The general tools are in test_known_mechanism.py. Where a method misses a part of the mechanism by its nature, that is
stated here as well.
"""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hooked_llava.analysis.answer_probability import answer_probability
from hooked_llava.analysis.answer_signs import answer_signs, predict_wrong
from hooked_llava.analysis.attention_contribution import attention_contribution
from hooked_llava.analysis.causal_trace import by_role, causal_trace
from hooked_llava.analysis.deletion import deletion_curves
from hooked_llava.analysis.head_ablation import ablate_heads
from hooked_llava.analysis.head_readings import attention_to_object, head_readings
from hooked_llava.analysis.head_scores import head_scores, heads_by_attention, layer_scores, position_scores, top_heads
from hooked_llava.analysis.information_storage import information_storage
from hooked_llava.analysis.knockout import attention_knockout, flow_summary
from hooked_llava.analysis.next_tokens import next_tokens
from hooked_llava.analysis.output_knockout import output_knockout
from hooked_llava.analysis.patch_importance import patch_importance
from hooked_llava.analysis.studies.knockout import knockout_study
from hooked_llava.datasets import StudyRow, by_kind
from hooked_llava.experiments.corruptions import MeanEmbedding, OtherImage
from hooked_llava.readout.metrics import logit_difference
from tests.compiled import CompiledLLaVA
from tests.known_mechanism import ANSWERING, LOGIT, OBJECTS, RECOLORED, ROUTES, VARIANTS, model_of, places
from tests.patch_world import GRID, UNKNOWN, image, questions

ROUTES_BY_SPAN = {
    "direct": {"question->last": 1, "image->last": 3, "word->last": 1, "object->last": 3},
    "two_hops": {"image->question": 1, "question->last": 3, "object->question": 1, "object->word": 1, "word->last": 3},
}
EDGES = (
    *("question->last", "image->last", "rest->last", "last->last", "system->last", "image->question", "image->rest"),
    *("object->question", "other->question", "random->question", "object->last", "other->last", "random->last"),
    *("object->word", "word->last", "other->word", "question-word->last"),
)


@pytest.fixture(params=VARIANTS)
def model(request) -> CompiledLLaVA:
    return model_of(request.param)


@pytest.fixture
def variant(model) -> str:
    return model.mechanism.variant


def one_hot(shape, place, value=1.0) -> np.ndarray:
    expected = np.zeros(shape)
    expected[place] = value
    return expected


# ---------------------------------------------------------------------- Yu & Ananiadou: heads, positions, patches


def test_the_head_that_writes_the_answer_has_the_whole_score(model, variant):
    """The other head of the mechanism scores 0: what it writes is read by the next head, not by the unembedding."""
    inputs = model.ask(OBJECTS, "ring")
    scores = head_scores(model, inputs)
    assert top_heads(scores, 1) == [ANSWERING[variant]]
    assert np.allclose(scores.values, one_hot(scores.shape, ANSWERING[variant], LOGIT), atol=1e-4)
    layers = layer_scores(model, inputs)
    assert np.allclose(layers.values, one_hot(layers.shape, (3, 0), LOGIT), atol=1e-4)


def test_heads_attend_to_what_they_read_and_others_to_their_share(model, variant):
    """The head that reads the word or the patch has all its attention there; idle heads spread it evenly."""
    inputs = model.ask(OBJECTS, "ring")
    n = len(inputs.token_map)
    for span, readers in {
        "word": {"direct": [(1, 2)], "two_hops": [(3, 3)]},
        "object": {"direct": [(3, 0)], "two_hops": []},
    }.items():
        mass = heads_by_attention(model, inputs, span)
        expected = sum((one_hot(mass.shape, pair) for pair in readers[variant]), np.zeros(mass.shape))
        assert np.allclose(mass.values[expected == 1], 1, atol=1e-6)
        assert mass.values[expected == 0].max() < 2 / n
    if variant == "direct":
        assert top_heads(heads_by_attention(model, inputs, "object"), 1) == [ANSWERING[variant]]


def test_the_next_token_is_the_color_and_all_others_are_equal(model):
    found = next_tokens(model, model.ask(OBJECTS, "ring"), k=5)
    assert found.token.values[0, 0] == "Blue"
    certain = np.exp(LOGIT) / (np.exp(LOGIT) + model.cfg.d_vocab - 1)
    assert float(found.probability[0, 0]) == pytest.approx(certain, abs=1e-4)
    assert np.allclose(found.probability[0, 1:], certain / np.exp(LOGIT), rtol=1e-2)


def test_the_position_it_reads_has_the_whole_score(model, variant):
    read = position_scores(model, model.ask(OBJECTS, "ring"), heads=1)
    place = places(model)["object" if variant == "direct" else "word"]
    assert np.allclose(read.score.values[0], one_hot(read.sizes["position"], place, LOGIT), atol=1e-4)
    assert np.allclose(read.attention.values[0], one_hot(read.sizes["position"], place), atol=1e-6)


@pytest.mark.parametrize("heads", [1, "all"])
def test_the_patch_map_is_one_hot_on_the_queried_object_or_empty_where_another_head_reads_the_image(
    model, variant, heads
):
    for (row, column), name in OBJECTS.items():
        found = patch_importance(model, model.ask(OBJECTS, name.split()[1]), heads=heads)[0]
        expected = one_hot((GRID, GRID), (row, column), LOGIT if variant == "direct" else 0.0)
        assert np.allclose(found.values, expected, atol=1e-4)


@pytest.mark.parametrize("method", ["occlusion", "token_ablation"])
def test_taking_the_object_away_costs_the_answer_in_either_variant(model, method):
    found = patch_importance(model, model.ask(OBJECTS, "ring"), method=method)[0]
    assert np.allclose(found.values, one_hot((GRID, GRID), (2, 1), LOGIT), atol=1e-4)


def test_deletion_falls_and_insertion_rises_when_the_object_has_its_turn(model):
    """Each map's curve is a step: at the patch's place in the order of the map."""
    inputs = model.ask(OBJECTS, "ring")
    first = one_hot((GRID, GRID), (2, 1))
    shares = [n / GRID**2 for n in (0, 1, GRID**2 - 1, GRID**2)]
    found = deletion_curves(model, inputs, {"object first": first, "object last": -first}, shares=shares)
    certain = np.exp(LOGIT) / (np.exp(LOGIT) + model.cfg.d_vocab - 1)
    there = {
        ("deletion", "object first"): [1, 0, 0, 0],
        ("deletion", "object last"): [1, 1, 1, 0],
        ("insertion", "object first"): [0, 1, 1, 1],
        ("insertion", "object last"): [0, 0, 0, 1],
    }
    for (way, name), steps in there.items():
        curve = found.probability.sel(direction=way, map=name).values
        assert np.allclose(curve, np.array(steps) * certain, atol=1e-3)
        area = found.area.sel(direction=way, map=name).item()
        assert area == pytest.approx(certain * {1: 0.02, 3: 0.98}[sum(steps)], abs=2e-3)


def test_made_up_answers_are_seen_by_where_the_map_lies(model, variant):
    """The model says "Unknown" of an absent shape with the same certainty: only the map of the image's reader tells."""
    asked = [model.ask(OBJECTS, shape) for shape in ("ring", "star", "circle", "square")]
    wrong = [False, False, True, True]  # to say anything of a shape that is not there would be made up
    covered = np.zeros((GRID, GRID))
    for place in OBJECTS:
        covered[place] = 1
    signs = xr.concat(
        [answer_signs(model, one, patch_importance(model, one, heads="all"), covered) for one in asked], "prompt"
    )
    assert np.ptp(signs.confidence.values) < 1e-4
    on = [1.0, 1.0, 0.0, 0.0] if variant == "direct" else [0.0] * 4
    found = np.where(signs.map_peak.values > 1, signs.mass_on_objects.values, 0)
    assert np.allclose(found, on, atol=1e-3)
    assert np.allclose(signs.map_peak.values, [LOGIT * x for x in on], atol=1e-3)
    if variant == "direct":
        assert float(predict_wrong(signs, wrong).sel(sign="map_peak")) == 1.0


def test_integrated_gradients_are_one_hot_on_the_object_but_add_up_only_with_many_steps(model):
    """Attention switches at one point of the path, which few steps miss or count too often."""
    inputs = model.ask(OBJECTS, "ring")
    for steps, tolerance in ((16, np.inf), (256, 0.01)):
        found = patch_importance(model, inputs, method="integrated_gradients", steps=steps)[0].values
        assert found.argmax() == 2 * GRID + 1
        assert np.abs(np.delete(found, found.argmax())).max() < 1e-4
        assert found.max() == pytest.approx(LOGIT, abs=tolerance)
        assert steps != 16 or abs(found.max() - LOGIT) > LOGIT


def test_gradient_times_input_is_blind(model):
    """Nothing is added to the stream at a patch, so it is only read through norms, which do not see its length."""
    found = patch_importance(model, model.ask(OBJECTS, "ring"), method="grad_x_input")[0]
    assert np.abs(found.values).max() < 1e-5


def test_relevancy_finds_the_object_and_rollout_the_first_patches(model):
    """Rollout multiplies all heads' attention, most of which is idle here, and prefers what stands early."""
    inputs = model.ask(OBJECTS, "ring")
    relevant = patch_importance(model, inputs, method="relevancy")[0].values
    assert relevant.argmax() == 2 * GRID + 1
    assert np.delete(relevant, relevant.argmax()).max() < 1e-3 * relevant.max()
    rolled = patch_importance(model, inputs, method="rollout")[0].values
    assert rolled.argmax() == 0
    earlier = rolled.ravel()[: 2 * GRID + 1]
    assert (rolled[2, 1] < earlier).sum() >= 3


def test_grad_cam_of_words_sees_what_looks_like_the_object_but_not_the_object_itself(model, variant):
    """A place that is read through a norm has a gradient at a right angle to its residual stream; its twin has not."""
    reading = 3 if variant == "direct" else 1
    for layer in range(model.cfg.n_layers):
        for objects, seen in ((OBJECTS, False), ({**OBJECTS, (4, 4): "blue cross"}, layer <= reading)):
            inputs = model.ask(objects, "ring")
            found = patch_importance(model, inputs, method="grad_cam", layer=layer)[0].values
            assert np.argwhere(found > 1e-4).tolist() == ([[4, 4]] if seen else [])


def test_grad_cam_of_the_vision_tower_is_largest_on_the_object(model):
    found = patch_importance(model, model.ask(OBJECTS, "ring"), method="grad_cam", vision=True)[0].values
    assert found.argmax() == 2 * GRID + 1
    assert np.delete(found, found.argmax()).max() < 0.5 * found.max()


def test_mean_attention_lies_on_the_object_only_if_the_last_position_looks_at_it(model, variant):
    found = patch_importance(model, model.ask(OBJECTS, "ring"), method="attention")[0].values
    others = np.delete(found.ravel(), 2 * GRID + 1)
    assert np.ptp(others) < 1e-6
    assert (found[2, 1] - others[0] > 0.01) == (variant == "direct")


def test_the_matching_head_looks_at_the_object_only_if_it_is_asked_about(model, variant):
    asked = [model.ask(OBJECTS, shape) for shape in ("ring", "star")]
    mass = attention_to_object(model, *asked, [places(model)["object"]]).values
    changed = np.argwhere(np.abs(mass[0] - mass[1]) > 1e-6).tolist()
    assert changed == ([[3, 0]] if variant == "direct" else [])
    if variant == "direct":
        assert mass[:, 3, 0].tolist() == [1.0, 0.0]


def test_only_what_the_answering_head_takes_reads_as_the_color(model, variant):
    inputs, at = model.ask(OBJECTS, "ring"), places(model)
    chosen = [at["object"], at["word"], at["last"]]
    stored = information_storage(model, inputs, "Blue", "Red", positions=chosen, spaces=["unembed"])
    stream = stored.logit_difference[0].values  # (layer, position)
    expected = np.zeros(stream.shape)
    expected[4:, 2] = LOGIT  # the last position, behind the answering head
    assert np.allclose(stream, expected, atol=1e-4)
    read = chosen.index(at["object" if variant == "direct" else "word"])
    assert np.allclose(stored.head_output_logit_difference[0, 0].values, one_hot(3, read, LOGIT), atol=1e-4)
    words = head_readings(model, inputs, *ANSWERING[variant], top=1, k=1).token
    assert words.sel(reading="value_output").values.item() == "Blue"


def test_ablation_names_the_heads_that_matter_where_the_answer_is_read(model, variant):
    inputs = model.ask(OBJECTS, "ring")
    every = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    lost = ablate_heads(model, inputs, {f"{layer}.{head}": [(layer, head)] for layer, head in every}, replace="zero")
    needed = [str(name) for name in lost["set"].values[~lost.correct.values[:, 0]]]
    assert needed == {"direct": ["1.2", "3.0"], "two_hops": ["3.3"]}[variant]
    assert float(lost.log_probability.min()) == pytest.approx(-LOGIT, abs=0.01)


@pytest.mark.parametrize("where", ["word", "last"])
def test_each_head_is_needed_only_at_the_position_where_it_reads(model, variant, where):
    """The head that copies the color into the question is needed there, not where the answer is read."""
    inputs = model.ask(OBJECTS, "ring")
    every = {
        f"{layer}.{head}": [(layer, head)] for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)
    }
    to_blue = logit_difference(model.to_single_token("Blue"), model.to_single_token("Red"))
    lost = ablate_heads(model, inputs, every, replace="zero", positions=where, metric=to_blue)
    needed = {
        name for name, value in zip(lost["set"].values, lost["metric"].values[:, 0], strict=True) if value < LOGIT / 2
    }
    expected = {f"{hop.layer}.{hop.head}" for hop in model.mechanism.hops if hop.target == where}
    assert needed == expected
    assert np.allclose(
        lost["metric"].values, np.where(np.isin(lost["set"].values, list(expected)), 0, LOGIT)[:, None], atol=1e-3
    )


# ---------------------------------------------------------------------- Zhang et al.: flow of information


def test_knockout_finds_each_edge_in_its_layer_and_nothing_else(model, variant):
    found = attention_knockout(model, model.ask(OBJECTS, "ring"), EDGES, window=1)
    expected = np.zeros(found.effect.shape)
    for edge, layer in ROUTES_BY_SPAN[variant].items():
        expected[EDGES.index(edge), layer] = -100
    assert np.allclose(found.effect.values, expected, atol=0.01)
    assert np.array_equal(found.answer_kept.values, expected == 0)


def test_a_window_hits_from_every_center_that_covers_the_layer(model, variant):
    edges = list(model.mechanism.edges)
    found = attention_knockout(model, model.ask(OBJECTS, "ring"), edges, window=3, total=True)
    for edge, layer in model.mechanism.edges.items():
        hit = [abs(center - layer) <= 1 for center in range(model.cfg.n_layers)]
        assert (found.effect.sel(edge=edge).values < -99).tolist() == hit
        assert (found.effect.sel(edge=edge).values > -0.01).tolist() == [not h for h in hit]
    assert (found.total_effect.values < -99).all()


def test_the_summary_of_the_flow(model, variant):
    edges = ["image->last", "image->question", "question->last"]
    found = flow_summary(attention_knockout(model, model.ask(OBJECTS, "ring"), edges, window=1))
    for edge in edges:
        layer = model.mechanism.edges.get(edge)
        numbers = [float(found[name].sel(edge=edge)) for name in ("peak_layer", "half_width", "stages")]
        assert numbers == pytest.approx([layer, 1, 1] if layer is not None else [np.nan, 0, 0], nan_ok=True)


def test_a_study_finds_the_same_in_every_question(model, variant, tmp_path):
    """By kind: about a shape that is there every question loses its answer, about one that is not, none."""
    asked = questions(OBJECTS, shapes=["ring", "star", "circle"])
    rows = [
        StudyRow(id=str(i), question=q.text, answer=q.answer, image=image(OBJECTS), boxes=q.answer_boxes,
                 kind="there" if q.answer != UNKNOWN else "absent", objects=q.objects)
        for i, q in enumerate(asked)
    ]  # fmt: skip
    edges = ["image->last", "image->question", "question->last", "object_word->last", "object->last", "random->last"]
    known = {**ROUTES_BY_SPAN[variant], "object_word->last": ROUTES_BY_SPAN[variant]["word->last"]}
    found = knockout_study(model, rows, edges, window=1, out=tmp_path / "flow", batch_size=2)
    assert found.attrs["correct"] == {"there": 4, "absent": 2}, "it knows all answers"
    means = by_kind(found, n_boot=50)
    expected = np.zeros((len(edges), model.cfg.n_layers))
    for edge, layer in known.items():
        if edge in edges:
            expected[edges.index(edge), layer] = -100
    for statistic in ("mean", "low", "high"):
        effect = means.effect.sel(statistic=statistic)
        assert np.allclose(effect.sel(kind="there"), expected, atol=0.01)
        assert np.allclose(effect.sel(kind="absent", edge=edges[:4]), 0, atol=0.01)
        assert np.isnan(effect.sel(kind="absent", edge=edges[4:])).all(), "no object, no such edge"


def test_outputs_are_needed_where_a_head_writes(model, variant):
    """Attention at the place that takes something up, in the layer where it does; MLPs nowhere."""
    names = ["attn at word", "attn at last", "attn at object", "mlp at word", "mlp at last"]
    found = output_knockout(model, model.ask(OBJECTS, "ring"), names, window=1, total=True)
    expected = np.zeros(found.effect.shape)
    for hop in model.mechanism.hops:
        expected[names.index(f"attn at {hop.target}"), hop.layer] = -100
    assert np.allclose(found.effect.values, expected, atol=0.01)
    assert np.allclose(found.total_effect.values, expected.min(1), atol=0.01)


def test_without_an_answer_to_lose_nothing_is_lost(model):
    found = attention_knockout(model, model.ask(OBJECTS, "circle"), ["image->last", "image->question"], window=1)
    assert np.abs(found.effect.values).max() < 0.01
    assert found.answer == UNKNOWN


def test_the_answer_appears_behind_the_layer_that_writes_it(model):
    found = answer_probability(model, model.ask(OBJECTS, "ring"), "Blue", "Red")
    said = found.sel(form="capitalised").values  # (norm, layer)
    assert (said[:, :4] < 0.05).all()
    assert (said[:, 4:] > 0.95).all()
    assert float(found.sel(form=["lower", "false lower", "false capitalised"]).max()) < 0.05


# ---------------------------------------------------------------------- Basu et al.: causal trace, contributions


def cells(trace, kind) -> list[tuple[int, int]]:
    """(layer, position) of what restores the answer in full; nothing may restore it in part."""
    effect = trace.indirect_effect.sel(kind=kind).transpose("layer", "position").values
    full = float(trace.p_clean - trace.p_corrupted)
    restored = effect / full
    assert ((np.abs(restored) < 1e-4) | (np.abs(restored - 1) < 1e-4)).all()
    return [(layer, int(trace.position[i])) for layer, i in np.argwhere(restored > 0.5).tolist()]


def test_the_trace_peaks_on_the_route_of_the_constraint(model, variant):
    at = places(model)
    trace = causal_trace(model, model.ask(OBJECTS, "ring"), "ring", corruption="star")
    assert (trace.answer, trace.corrupted_answer) == ("Blue", "Red")
    route = [*ROUTES[variant, "shape"][1:], "last"]  # the trace restores what leaves a layer
    assert cells(trace, "resid") == [(layer, at[place]) for layer, place in enumerate(route)]
    first = "last" if variant == "direct" else "word"
    assert cells(trace, "attn") == [(1, at[first]), (3, at["last"])]
    assert cells(trace, "mlp") == []


def test_a_word_that_is_no_shape_at_all_cannot_be_found_again(model, variant):
    """With a mean embedding the word also loses the mark by which the second head of `two_hops` finds it."""
    at = places(model)
    trace = causal_trace(model, model.ask(OBJECTS, "ring"), "ring", corruption=MeanEmbedding(), kinds=["attn"])
    assert trace.corrupted_answer == UNKNOWN
    early = [(1, at["last"])] if variant == "direct" else []
    assert cells(trace, "attn") == [*early, (3, at["last"])]


def test_the_trace_of_another_image_follows_the_color(model, variant):
    at = places(model)
    other = OtherImage(image(RECOLORED))
    everywhere = list(range(at["last"] + 1))
    trace = causal_trace(
        model, model.ask(OBJECTS, "ring"), "ring", corruption=other, kinds=["resid"], positions=everywhere
    )
    route = [*ROUTES[variant, "color"][1:], "last"]
    assert cells(trace, "resid") == [(layer, at[place]) for layer, place in enumerate(route)]
    roles = by_role(trace).indirect_effect.sel(kind="resid")
    assert float(roles.sel(role="last")[-1]) == pytest.approx(float(trace.p_clean - trace.p_corrupted), abs=1e-4)


def test_contributions_are_the_messages_of_the_mechanism(model, variant):
    found = attention_contribution(model, model.ask(OBJECTS, "ring"), "ring", by_head=True)
    length = np.sqrt(2)  # a message writes one value and takes one away
    to_last = {"direct": (1, 2, 0), "two_hops": (3, 3, 0)}[variant]
    to_last_found = found.constraint_to_last.values
    assert np.allclose(to_last_found, one_hot(to_last_found.shape, to_last, length), atol=1e-4)
    images = found.image_to_constraint.values
    expected = np.zeros(images.shape) if variant == "direct" else one_hot(images.shape, (1, 1, 0, 2, 1), length)
    assert np.allclose(images, expected, atol=1e-4)
    logits = attention_contribution(
        model, model.ask(OBJECTS, "ring"), "ring", measure="logit"
    ).constraint_to_last.values
    written = one_hot(logits.shape, (3, 0), LOGIT if variant == "two_hops" else 0.0)
    assert np.allclose(logits, written, atol=1e-4)
