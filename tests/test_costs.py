"""What each analysis and edit costs, in forward passes: multiplications that torch counts while it runs, and a bound for each.

The library's own counts (`n_forward`, `work`) are tested where they are made; here nothing of them is believed. The geometry is
that of a real model as far as costs go: most positions are patches, blocks are wider than the prompt is long, and the vocabulary
is small beside them, as it is beside billions of weights.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.analysis_costs import CALLS, STEPS, Subject, forwards, multiplications, subject_of
from hooked_llava import analysis
from hooked_llava.datasets import prepare_rows
from hooked_llava.editing import ROME_RELEASED, EditRequest, key_covariances, memit, multedit, rome
from hooked_llava.experiments import Noise
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.toy.constraint_tables import constraint_rows, other_shape
from hooked_llava.toy.gqa_tables import gqa_rows
from hooked_llava.toy.pope_tables import pope_rows
from tests.builders import make_hf_model, make_prompt

ONE_PASS = 1.06  # what is read off a pass comes on top of it


@functools.cache
def subject() -> Subject:
    """144 patches and 45 positions of text."""
    hf = make_hf_model(
        image_size=48, patch_size=4, n_layers=8, d_model=128, n_heads=8, n_key_value_heads=8, d_mlp=344, d_vision=64,
        d_vision_mlp=128, n_vision_layers=2,
    )  # fmt: skip
    return subject_of(hf, make_prompt(hf, n_text=44))


def share(first: int) -> float:
    """Positions from one on, of all."""
    n = subject().inputs.shape[1]
    return (n - first) / n


def bounds() -> dict[str, float]:
    """One pass for the kept run, and what every changed run can reach: the layers and positions from the first change on."""
    inputs, n_layers = subject().inputs, len(subject().layers)
    cones = (n_layers + 1) / 2  # passes that a change in every layer by itself costs at all positions
    last, question = share(inputs.shape[1] - 1), inputs.token_map["question"]
    from_question, from_named = share(question[0]), share(subject().named)
    traced = sum(share(p) for p in range(subject().named, inputs.shape[1]))
    edges = 1 + cones * (3 * last + 3 * from_question)
    return {
        **dict.fromkeys(
            [
                *("head_scores", "layer_scores", "position_scores, 3 heads", "information_storage, 20 patches"),
                *("head_readings", "patch_importance, log increase", "patch_importance, attention"),
                *("patch_importance, TAM", "answer_maps, 3 tokens", "sink_positions", "logit_lens at every patch"),
                *("lens_kl, three lenses", "ablate_heads, every layer, last position", "next_tokens"),
                *("image_attention", "heads_by_attention", "logit_attribution, neurons", "answer_without, two heads"),
            ],
            ONE_PASS,
        ),
        "neuron_scores": 1.5,
        "attention_contribution": 1.15,
        "attention_to_object, two prompts": 2,
        "activation_patching, every head, last position": 2 + cones * subject().model.cfg.n_heads * last,
        "activation_patching, residual stream, question": 2 + cones * sum(share(p) for p in question),
        "path_patching, every head to the logits": 3.1,
        "patch_importance, Grad-CAM": 1 + 0.5 + 0.1,
        f"train_tuned_lens, {STEPS} steps": STEPS * 1.1,
        "ablate_heads, every layer, question": 1 + cones * from_question,
        "attention_knockout, six edges, every window": edges,
        "the same edges, weighted": edges,
        "output_knockout, four outputs, every window": 1 + cones * (2 * last + 2 * from_question),
        "temperature of every layer, question and last": 1 + cones * from_question,
        "causal_trace, three kinds": 1 + 3 * cones * traced,
        "patchscope of the question, every layer": 2 + len(question) * cones * from_named,
        "attribution_patching": 2 + 1,
        "edge_attribution (EAP)": 2 + 1 + 1,
        f"edge_attribution, {STEPS} steps (EAP-IG)": 2 + STEPS * (2 + 1),
        "EAP, and 4 circuits of its edges or random ones": 4 + 2 + 4 * 1.7,
        "a map, deletion and insertion of half its patches": 1 + 1 + 3,
        "probe_linear, 4 prompts": 4,
    }


def test_every_call_has_a_bound_and_every_analysis_a_call() -> None:
    assert bounds().keys() == CALLS.keys()
    sources = "".join(Path(inspect.getfile(of)).read_text(encoding="utf-8") for of in (subject_of, share))
    takes_a_model = {
        name
        for name in analysis.__all__
        if inspect.isfunction(function := getattr(analysis, name))
        and next(iter(inspect.signature(function).parameters)) == "model"
    }
    elsewhere = {"heads_by_layer", "random_heads"}  # run nothing
    elsewhere |= {
        "answer_probability",
        "probability_study",
        "pope_study",
        "flow_study",
    }  # of tables, below, and both at once
    elsewhere |= {"answer_signs"}  # of a map that is there: the model's own answer, as next_tokens has it
    assert {name for name in takes_a_model if f"analysis.{name}(" not in sources} <= elsewhere


@pytest.mark.parametrize("name", CALLS)
def test_a_call_costs_no_more_than_its_bound(name: str) -> None:
    model, inputs = subject().model, subject().inputs
    found = forwards(lambda: CALLS[name](subject()), model, inputs)
    assert found <= 1.03 * bounds()[name]
    assert found > 0.8, "a pass at least"


# ---------------------------------------------------------------------- tables of questions


@pytest.mark.parametrize("name", ["probability_study", "pope_study"])
def test_probabilities_of_a_table_cost_the_answers_and_a_pass(tiny_shapes: HookedLLaVA, name: str) -> None:
    rows = pope_rows(2) if name == "pope_study" else gqa_rows(3, kinds=["ChooseAttr", "QueryAttr"])
    inputs = prepare_rows(tiny_shapes, rows)
    answers = forwards(lambda: tiny_shapes.generate(inputs), tiny_shapes, inputs)
    study = forwards(lambda: getattr(analysis, name)(tiny_shapes, rows), tiny_shapes, inputs)
    assert study <= answers + ONE_PASS


def test_an_edge_of_a_tables_word_costs_less_than_that_of_the_question(tiny_shapes: HookedLLaVA) -> None:
    rows = gqa_rows(3, kinds=["ChooseAttr"])

    def study(edge: str) -> int:
        return multiplications(lambda: analysis.knockout_study(tiny_shapes, rows, [edge], 1, only_correct=False))

    whole = study("image->question")
    for word in ("object_word", "true_option", "false_option"):
        assert study(f"image->{word}") < whole, "it begins later"
        assert study(f"{word}->last") <= 1.001 * study("question->last")


def test_traces_of_a_table_cost_the_answers_and_the_traces(tiny_shapes: HookedLLaVA) -> None:
    rows = constraint_rows(2, kinds=["Known"])
    inputs = prepare_rows(tiny_shapes, rows)
    alone = [
        multiplications(
            lambda one=one, row=row: analysis.causal_trace(
                tiny_shapes, one, one.token_map["constraint"], corruption=other_shape(row)
            )
        )
        for one, row in zip(inputs, rows, strict=True)
    ]
    answers = multiplications(lambda: tiny_shapes.generate(inputs))
    study = multiplications(lambda: analysis.trace_study(tiny_shapes, rows, corruption=other_shape))
    assert study <= 1.02 * (answers + sum(alone))


# ---------------------------------------------------------------------- edits

FACT = EditRequest("Who made the star?", "Boris", constraint="the star")


@pytest.fixture(scope="module")
def covariances(tiny_shapes: HookedLLaVA) -> list[Any]:
    seen = [tiny_shapes.prepare([f"Who made the {shape}?" for shape in ("ring", "moon")])]
    return key_covariances(tiny_shapes, seen, [1, 2, 3])


def cost(tiny_shapes: HookedLLaVA, call: Callable[[], Any]) -> float:
    return forwards(call, tiny_shapes, tiny_shapes.prepare(FACT.question))


@pytest.mark.filterwarnings("ignore::hooked_llava.editing.TargetNotReached")
def test_a_step_of_rome_runs_one_position_through_the_layers_above(
    tiny_shapes: HookedLLaVA, covariances: list[Any]
) -> None:
    """Forward and back, for every prompt: with the authors' options that is the question, two contexts, and "the star is a"."""
    n_positions, above = tiny_shapes.prepare(FACT.question).shape[1], tiny_shapes.cfg.n_layers - 3
    step = 3 * above / tiny_shapes.cfg.n_layers / n_positions
    released = {**ROME_RELEASED, "contexts": ["The star.", "The ring is red."], "stop_loss": 1e-9}
    for how, n_prompts in (({"stop": 2.0}, 1), (released, 4)):
        few, more = (
            cost(
                tiny_shapes,
                lambda n=n, how=how: rome(tiny_shapes, FACT, covariances[2], position="last", **{**how, "steps": n}),
            )
            for n in (1, 9)
        )
        assert 0 < (more - few) / 8 <= n_prompts * step


@pytest.mark.filterwarnings("ignore::hooked_llava.editing.TargetNotReached")
def test_each_further_layer_of_memit_costs_a_pass_over_its_requests(
    tiny_shapes: HookedLLaVA, covariances: list[Any]
) -> None:
    one, two, three = (
        cost(
            tiny_shapes,
            lambda n=n: memit(tiny_shapes, FACT, covariances[-n:], position="last", steps=5, stop=2.0),
        )
        for n in (1, 2, 3)
    )
    assert 0 < two - one <= ONE_PASS
    assert 0 < three - two <= ONE_PASS


def test_a_layer_that_a_trace_chooses_costs_two_traces_of_mlps_at_most(tiny_shapes: HookedLLaVA) -> None:
    inputs = tiny_shapes.prepare(FACT.question)
    auto, given = (
        cost(tiny_shapes, lambda at=at: multedit(tiny_shapes, FACT, layer=at, position="last")) for at in ("auto", 3)
    )
    trace = cost(
        tiny_shapes, lambda: analysis.causal_trace(tiny_shapes, inputs, "the star", corruption=Noise(), kinds=("mlp",))
    )
    assert given < auto <= given + 2 * trace
