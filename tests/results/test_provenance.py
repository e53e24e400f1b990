"""Every result says what it is: of which model, prompts and images, how it was made, by which version."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import hooked_llava
from hooked_llava import analysis
from hooked_llava.analysis import head_scores, logit_lens
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.weights_id import weights_stamp
from hooked_llava.readout.metric_names import about_metric
from hooked_llava.readout.metrics import (
    Answer,
    from_transformer_lens,
    kl_divergence,
    log_probability,
    logit_difference,
    probability,
    rank,
    relative_change,
    teacher_forced,
)
from hooked_llava.results.arrays import load, recovered, save, stack
from hooked_llava.results.provenance import described, image_hashes
from tests.builders import make_hf_model
from tests.fixtures_processor import make_processor

QUESTION = "What color is the star?"


@pytest.fixture(scope="module")
def model() -> HookedLLaVA:
    return HookedLLaVA.from_hf(make_hf_model(image_size=32), make_processor(image_size=32))


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return [np.random.default_rng(seed).integers(0, 256, (40, 40, 3)).astype(np.uint8) for seed in (0, 1)]


@pytest.fixture(scope="module")
def pair(model, images):
    return tuple(model.prepare(QUESTION, image) for image in images)


def metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[..., 7] - logits[..., 9]


_DENOISE = {"direction": "denoise", "metric": "a function of your own, metric"}
MADE: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "activation_patching": (
        lambda m, a, b: analysis.activation_patching(m, a, b, hook="z", positions="last", heads=[0, 2], metric=metric),
        {"hook": "z", "positions": "last", "heads": [0, 2], "layers": None, **_DENOISE},
    ),
    "attribution_patching": (
        lambda m, a, b: analysis.attribution_patching(m, a, b, hooks=["z"], metric=metric),
        {"hooks": ["z"], **_DENOISE},
    ),
    "edge_attribution": (lambda m, a, b: analysis.edge_attribution(m, a, b, metric=metric), _DENOISE),
    "path_patching": (
        lambda m, a, b: analysis.path_patching(m, a, b, senders="mlps", positions="question", metric=metric),
        {"senders": "mlps", "positions": "question", **_DENOISE},
    ),
    "logit_lens": (lambda m, a, b: logit_lens(m, a, hook="attn_out"), {"hook": "attn_out", "positions": "last"}),
    "logit_attribution": (
        lambda m, a, b: analysis.logit_attribution(m, a, "red", "blue", by="head"),
        {"answer": "red", "baseline": "blue", "by": "head"},
    ),
    "head_scores": (lambda m, a, b: head_scores(m, a, "red"), {"target": "red"}),
    "layer_scores": (lambda m, a, b: analysis.layer_scores(m, a, "red"), {"target": "red"}),
    "position_scores": (
        lambda m, a, b: analysis.position_scores(m, a, "red", heads=[(1, 2)], positions="question"),
        {"target": "red", "heads": [[1, 2]], "positions": "question"},
    ),
    "heads_by_attention": (lambda m, a, b: analysis.heads_by_attention(m, a, "image"), {"span": "image"}),
    "head_readings": (
        lambda m, a, b: analysis.head_readings(m, a, 1, 2, "red"),
        {"layer": 1, "head": 2, "target": "red"},
    ),
    "attention_to_object": (
        lambda m, a, b: analysis.attention_to_object(m, a, b, [5], heads=[(0, 1)]),
        {"heads": [[0, 1]], "positions": [5]},
    ),
    "neuron_scores": (
        lambda m, a, b: analysis.neuron_scores(m, a, "red", top=2, layers=1),
        {"target": "red", "layers": [1]},
    ),
    "information_storage": (
        lambda m, a, b: analysis.information_storage(m, a, "red", "blue", positions="question"),
        {"correct": "red", "distractor": "blue"},
    ),
    "patch_importance": (
        lambda m, a, b: analysis.patch_importance(m, a, "red", method="grad_x_input"),
        {"method": "grad_x_input", "target": "red"},
    ),
    "deletion_curves": (
        lambda m, a, b: analysis.deletion_curves(m, a, {"rows": np.arange(16).reshape(4, 4)}, "red", shares=(0, 1)),
        {"target": "red", "where": "image"},
    ),
    "ablate_heads": (
        lambda m, a, b: analysis.ablate_heads(m, a, {"one": [(1, 0)]}, "red", replace="zero"),
        {"heads": {"none": [], "one": [[1, 0]]}, "replace": "zero", "positions": "last"},
    ),
    "attention_knockout": (
        lambda m, a, b: analysis.attention_knockout(m, a, ["image->last"], 1, answer="red"),
        {"metric": "relative_change", "answer": "red", "window": 1},
    ),
    "output_knockout": (
        lambda m, a, b: analysis.output_knockout(m, a, "mlp at last", 1, answer="red"),
        {"metric": "relative_change", "answer": "red", "window": 1},
    ),
    "answer_probability": (lambda m, a, b: analysis.answer_probability(m, a, "red"), {"answer": "red"}),
    "causal_trace": (
        lambda m, a, b: analysis.causal_trace(m, a, "star", corruption="circle"),
        {"metric": "probability", "constraint": ["star"]},
    ),
    "attention_contribution": (
        lambda m, a, b: analysis.attention_contribution(m, a, "star", measure="logit", answer="red"),
        {"measure": "logit", "answer": "red"},
    ),
    "image_attention": (lambda m, a, b: analysis.image_attention(m, a), {}),
    "next_tokens": (lambda m, a, b: analysis.next_tokens(m, a, k=2), {}),
    "answer_signs": (lambda m, a, b: analysis.answer_signs(m, a, np.eye(4)[None], np.ones((1, 4, 4))), {}),
}
OF_PAIRS = ("activation_patching", "attribution_patching", "edge_attribution", "path_patching")


@pytest.mark.parametrize("name", MADE)
def test_a_result_says_what_it_is(model, pair, name, tmp_path):
    make, said = MADE[name]
    result = make(model, *pair)
    attrs = result.attrs
    assert attrs["analysis"] == name
    assert (attrs["model"], attrs["version"]) == (model.config.model_name, hooked_llava.__version__)
    assert attrs["weights"] == weights_stamp(model)
    assert QUESTION in attrs["prompt"]
    assert attrs["images"] == image_hashes(pair[0])
    if name in OF_PAIRS:
        assert QUESTION in attrs["corrupted_prompt"]
        assert attrs["corrupted_images"] == image_hashes(pair[1]) != attrs["images"]
    assert {key: attrs[key] for key in said} == said
    json.dumps(attrs)
    save(result, tmp_path / "result")
    back = load(tmp_path / "result")
    assert back.attrs == attrs
    numeric = (
        result if isinstance(result, xr.DataArray) else result[[n for n, v in result.items() if v.dtype.kind in "fi"]]
    )
    (numeric * 2 - back[list(numeric)] if isinstance(result, xr.Dataset) else numeric * 2 - back).mean()
    xr.concat([result, back], "run")
    assert stack([result, back], "run").attrs["images"] == [attrs["images"]] * 2


def test_pairs_say_both_prompts_and_shares_keep_it(model):
    two = [model.prepare(f"What color is the {shape}?") for shape in ("star", "circle")]
    made = analysis.activation_patching(model, *two, positions="last", metric=logit_difference(7, 9), direction="noise")
    assert ("star" in made.prompt, "circle" in made.corrupted_prompt, made.images) == (True, True, [])
    assert (made.direction, made.metric, made.answer_ids, made.baseline_ids) == ("noise", "logit_difference", [7], [9])
    kept = {"weights", "prompt", "corrupted_prompt", "metric", "answer", "baseline", "version", "hook"}
    assert kept <= set(recovered(made).attrs)
    both = analysis.activation_patching(model, two, two[::-1], positions="last", metric=metric)
    assert len(both.attrs["prompt"]) == len(both.attrs["corrupted_prompt"]) == 2
    assert both.attrs["prompt"] == both.attrs["corrupted_prompt"][::-1]


def test_metrics_say_their_name_and_tokens(model):
    red = Answer("Red", (7, 8))
    logits = torch.zeros(99)
    named = {
        "probability": probability(red),
        "log_probability": log_probability(red),
        "rank": rank(red),
        "relative_change": relative_change(red, logits),
        "logit_difference": logit_difference(red, 9),
        "kl_divergence": kl_divergence(logits),
        "from_transformer_lens(metric)": from_transformer_lens(metric),
    }
    for name, one in named.items():
        about = about_metric(model, one)
        assert about["metric"] == name
        if name not in ("kl_divergence", "from_transformer_lens(metric)"):
            assert about["answer_ids"] == [7, 8]
            assert about["answer"] == model.to_string(7)
    assert about_metric(model, named["logit_difference"])["baseline"] == model.to_string(9)
    forced = teacher_forced(model, model.prepare("Who?"), "red star")
    assert "whole answer" in about_metric(model, forced.metric)["metric"]


def test_the_stamp_of_the_weights_changes_with_them(model):
    before = weights_stamp(model)
    weight = model.blocks[1].mlp.down.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight += 0.5
        assert weights_stamp(model) != before
        weight.copy_(kept)
    assert weights_stamp(model) == before
    other = HookedLLaVA.from_hf(make_hf_model(1, image_size=32), make_processor(image_size=32))
    assert weights_stamp(other) != before


def test_hashes_tell_images_apart(model, images):
    first, second = (model.prepare(QUESTION, image) for image in images)
    assert image_hashes(first) == image_hashes(model.prepare("Another question?", images[0]))
    assert image_hashes(first) != image_hashes(second)
    both = model.prepare([QUESTION, QUESTION], list(images))
    assert image_hashes(both) == image_hashes(first) + image_hashes(second)
    bare = [model.as_inputs({"input_ids": i.input_ids, "pixel_values": i.pixel_values}) for i in (first, second)]
    assert len({*image_hashes(bare[0]), *image_hashes(bare[1])}) == 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (np.float32(0.5), 0.5),
        (np.arange(2), [0, 1]),
        (range(2), [0, 1]),
        ({"a": (1, 2)}, {"a": [1, 2]}),
        (slice(1, None), "slice(1, None, None)"),
        (("z", 3), ["z", 3]),
    ],
)
def test_arguments_become_plain_values(value, expected):
    assert described(value) == expected
