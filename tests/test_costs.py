"""What each analysis and edit costs, in forward passes: multiplications that torch counts while it runs, and a bound for each.

The library's own counts (`n_forward`, `work`) are tested where they are made; here nothing of them is believed. The geometry is
that of a real model as far as costs go: most positions are patches, blocks are wider than the prompt is long, and the vocabulary
is small beside them, as it is beside billions of weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hooked_llava import Intervention, Replay, analysis
from hooked_llava.datasets import prepare_rows
from hooked_llava.editing import ROME_RELEASED, EditRequest, key_covariances, memit, multedit, rome
from hooked_llava.experiments import Noise
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.toy.constraint_tables import constraint_rows, other_shape
from hooked_llava.toy.gqa_tables import gqa_rows
from hooked_llava.toy.pope_tables import pope_rows
from tests.builders import make_hf_model, make_prompt
from tests.work import forwards, multiplications

N_LAYERS, QUESTION, OTHER = 8, 13, 16  # tokens of the question, and of what follows it up to the end
ONE_PASS = 1.06  # what is read off a pass comes on top of it


@functools.cache
def model() -> HookedLLaVA:
    return HookedLLaVA.from_hf(
        make_hf_model(
            image_size=48, patch_size=4, n_layers=N_LAYERS, d_model=128, n_heads=8, n_key_value_heads=8, d_mlp=344, d_vision=64,
            d_vision_mlp=128, n_vision_layers=2,
        )
    )  # fmt: skip


@functools.cache
def asked() -> Any:
    """144 patches and 40 words; the question begins 29 positions before the end."""
    hf = make_hf_model(image_size=48, patch_size=4, n_layers=1)
    inputs = model().as_inputs(make_prompt(hf, n_text=40))
    first = inputs.shape[1] - QUESTION - OTHER
    return inputs.with_spans(question=range(first, first + QUESTION), object=range(40, 60), word=[first + 9])


@functools.cache
def other_image() -> Any:
    return replace(asked(), pixel_values=asked().pixel_values.flip(-1))


def share(n_positions: int) -> float:
    """Of all positions of the prompt."""
    return n_positions / asked().shape[1]


CONES = (N_LAYERS + 1) / 2
"""Forward passes that a change in every layer by itself costs at all positions: each runs the layers from its own on."""
FROM_QUESTION = share(QUESTION + OTHER)
EDGES = ["question->last", "image->last", "last->last", "image->question", "object->question", "word->last"]
OUTPUTS = ["attn at question", "mlp at question", "attn at last", "mlp at last"]


def logit_of_seven(logits: torch.Tensor) -> torch.Tensor:
    return logits[..., 7] - logits[..., 9]


ONE: dict[str, Callable[[], Any]] = {
    "head_scores": lambda: analysis.head_scores(model(), asked(), 7),
    "layer_scores": lambda: analysis.layer_scores(model(), asked(), 7),
    "position_scores": lambda: analysis.position_scores(model(), asked(), 7, heads=3),
    "information_storage": lambda: analysis.information_storage(model(), asked(), 7, 9, positions="image", top=20),
    "head_readings": lambda: analysis.head_readings(model(), asked(), 3, 1, 7),
    "logit_lens": lambda: analysis.logit_lens(model(), asked(), positions="image"),
    "lens_kl": lambda: analysis.lens_kl(model(), [asked()], lens=analysis.TunedLens.identity(model())),
    "sink_positions": lambda: analysis.sink_positions(model(), asked()),
    "answer_maps": lambda: analysis.answer_maps(model(), asked(), [7, 9, 8]),
    "answer_maps, TAM": lambda: analysis.answer_maps(model(), asked(), [7, 9, 8], method="tam"),
    "ablate_heads at the last position": lambda: analysis.ablate_heads(
        model(), asked(), analysis.heads_by_layer(model()), 7, replace="zero"
    ),
    **{
        f"patch_importance, {name}": functools.partial(lambda m: analysis.patch_importance(model(), asked(), 7, method=m), name)
        for name in ("log_increase", "attention", "tam")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ONE)
def test_one_pass_is_enough(name: str) -> None:
    assert forwards(ONE[name], model(), asked()) <= ONE_PASS


BOUNDED: dict[str, tuple[Callable[[], Any], float]] = {
    "neuron_scores": (lambda: analysis.neuron_scores(model(), asked(), 7), 1.5),
    "neuron_scores, many": (lambda: analysis.neuron_scores(model(), asked(), 7, top=64, k=20), 1.5),
    "Grad-CAM: forward to the logits, back to the layer": (
        lambda: analysis.patch_importance(model(), asked(), 7, method="grad_cam", layer=4),
        1 + 0.5 + 0.1,
    ),
    "ablate_heads of every layer at the question": (
        lambda: analysis.ablate_heads(
            model(), asked(), analysis.heads_by_layer(model()), 7, replace="zero", positions="question"
        ),
        1 + CONES * FROM_QUESTION,
    ),
    "attention_knockout, six edges, every window": (
        lambda: analysis.attention_knockout(model(), asked(), EDGES, 1),
        1 + CONES * (4 * share(1) + 2 * FROM_QUESTION),
    ),
    "the same, weighted": (
        lambda: analysis.attention_knockout(model(), asked(), EDGES, 1, factor=0.3),
        1 + CONES * (4 * share(1) + 2 * FROM_QUESTION),
    ),
    "output_knockout, every window": (
        lambda: analysis.output_knockout(model(), asked(), OUTPUTS, 1),
        1 + CONES * (2 * share(1) + 2 * FROM_QUESTION),
    ),
    "temperature of every layer's heads in the text": (
        lambda: Replay(model(), asked()).run(
            [
                [Intervention(("attn_scores", layer), positions="question|last", temperature=2.0)]
                for layer in range(N_LAYERS)
            ]
        ),
        1 + CONES * FROM_QUESTION,
    ),
    "causal_trace, three kinds, text after the image": (
        lambda: analysis.causal_trace(model(), asked(), asked().token_map["word"], corruption=Noise()),
        1 + 3 * CONES * sum(share(n) for n in range(QUESTION + OTHER - 8)),
    ),
    "attribution_patching": (
        lambda: analysis.attribution_patching(model(), asked(), other_image(), metric=logit_of_seven),
        3.0,
    ),
    "edge_attribution (EAP)": (
        lambda: analysis.edge_attribution(model(), asked(), other_image(), metric=logit_of_seven),
        2 + 1 + 1,
    ),
    "edge_attribution, 4 steps (EAP-IG)": (
        lambda: analysis.edge_attribution(model(), asked(), other_image(), metric=logit_of_seven, steps=4),
        2 + 4 * (2 + 1),
    ),
    "patchscope of the question's positions, every layer": (
        lambda: analysis.patchscope(
            model(), asked(), positions="question", target=asked(), target_position=asked().token_map["word"][0], max_new_tokens=1
        ),
        2 + QUESTION * CONES * share(QUESTION + OTHER - 9),
    ),
    "train_tuned_lens, 4 steps": (
        lambda: analysis.train_tuned_lens(model(), [asked()], steps=4, progress=False),
        4 * 1.1,
    ),
}  # fmt: skip
"""A call, and its bound: one pass for the kept run, and what every changed run can reach."""


@pytest.mark.parametrize("name", BOUNDED)
def test_runs_cost_what_they_can_reach(name: str) -> None:
    call, bound = BOUNDED[name]
    assert forwards(call, model(), asked()) <= 1.03 * bound


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
