"""Tables of questions on models whose mechanism is known: traces by role, probabilities by layer, the words of options.

What single questions show is in test_known_mechanism_papers.py; here a study must find it in every question, by names alone.
"""

from __future__ import annotations

import numpy as np
import pytest

from hooked_llava.analysis import (
    best_effects,
    knockout_study,
    probability_study,
    probability_summary,
    trace_means,
    trace_study,
)
from hooked_llava.datasets import StudyRow, by_kind
from hooked_llava.editing import EditRequest, multedit
from hooked_llava.errors import InputError
from hooked_llava.experiments import Replace
from tests.compiled import CompiledLLaVA
from tests.known_mechanism import OBJECTS, ROUTES, VARIANTS, model_of
from tests.patch_world import UNKNOWN, image, questions

THERE, ABSENT = ("ring", "star"), ("circle",)
OTHER = {"ring": "star", "star": "ring", "circle": "cross"}


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> CompiledLLaVA:
    return model_of(request.param)


def table(question: str | None = None) -> list[StudyRow]:
    """Every phrasing about shapes that are there, and about one that is not."""
    rows = []
    for i, asked in enumerate(questions(OBJECTS, shapes=[*THERE, *ABSENT])):
        (shape,) = asked.objects
        rows.append(
            StudyRow(
                id=str(i), question=question.format(shape=shape) if question else asked.text, answer=asked.answer,
                image=image(OBJECTS), kind="absent" if asked.answer == UNKNOWN else "there", objects=asked.objects,
                constraint=shape, true_option="red", false_option="blue",
            )
        )  # fmt: skip
    return rows


def test_traces_of_a_table_are_the_route_by_role(model: CompiledLLaVA) -> None:
    """Another shape that is there brings its own color; asked about one that is not, the answer was never at the word."""
    study = trace_study(model, table(), corruption=lambda row: Replace(OTHER[row.constraint]))
    means = trace_means(study, n_boot=20)
    assert means.lowered.sel(statistic="mean").sel(kind=["there", "absent"]).values.tolist() == [1.0, 1.0]
    route = [*ROUTES[model.mechanism.variant, "shape"][1:], "last"]
    effect = means.indirect_effect.sel(kind="there", statistic="mean")
    for role, place in (("constraint last", "word"), ("last", "last")):
        found = effect.sel(role=role, output="resid").values
        np.testing.assert_allclose(found, [float(at == place) for at in route], atol=5e-3)
    np.testing.assert_allclose(effect.sel(output="mlp"), 0, atol=1e-3)
    wrote = [(hop.layer, "constraint last" if hop.target == "word" else "last") for hop in model.mechanism.hops]
    expected = [[float((layer, role) in wrote) for role in effect.role.values] for layer in effect.layer.values]
    np.testing.assert_allclose(effect.sel(output="attn").transpose("layer", "role"), expected, atol=5e-3)
    best = best_effects(means).sel(kind="there", statistic="mean")
    assert int(best.layer.sel(output="attn")) == wrote[0][0]
    assert str(best.role.sel(output="attn").values) == wrote[0][1]


def test_probabilities_of_a_table_rise_in_the_layer_that_writes_the_answer(model: CompiledLLaVA) -> None:
    study = probability_study(model, table())
    found = probability_summary(by_kind(study, n_boot=5).answer_probability).sel(norm="final", form="capitalised")
    writes = model.mechanism.hops[-1].layer + 1  # the residual stream entering the layer after it
    assert found.half_layer.sel(kind="there").item() == writes
    assert found.peak.sel(kind="there").item() > 0.95
    assert found.half_layer.sel(kind="absent").item() == 0, "ASSISTANT: stands for Unknown from the beginning"


def test_the_words_of_options_are_not_read_where_the_mechanism_does_not(model: CompiledLLaVA) -> None:
    rows = table("Is the {shape} red or blue?")
    edges = ["true_option->last", "false_option->last", "object_word->last"]
    study = knockout_study(model, rows, edges, 1, only_correct=False)
    effect = by_kind(study, n_boot=5).effect.sel(kind="there", statistic="mean")
    reads = next(hop.layer for hop in model.mechanism.hops if (hop.source, hop.target) == ("word", "last"))
    expected = np.zeros((3, model.cfg.n_layers))
    expected[2, reads] = -100
    np.testing.assert_allclose(effect.sel(edge=edges), expected, atol=0.01)


def test_no_layer_is_chosen_where_no_mlp_restores_anything(model: CompiledLLaVA) -> None:
    """The mechanism has no MLP: a trace that chose a layer to edit would have made it up."""
    asked = model.ask(OBJECTS, "ring")
    for position in ("last", "constraint"):
        with pytest.raises(InputError, match=r"no MLP restores.*position \d+ \(best: "):
            multedit(model, EditRequest(asked, "Green", constraint="ring"), layer="auto", position=position)
