"""The page about a pair: what it measures, what it says, and what it refuses."""

from __future__ import annotations

import re

import numpy as np
import pytest

from hooked_llava.analysis import activation_patching
from hooked_llava.errors import InputError
from hooked_llava.readout.metrics import logit_difference
from hooked_llava.toy.images import image_path
from hooked_llava.viz import PatchingReport, patching_report
from hooked_llava.viz.pages.patching import STEPS
from tests.pairs import as_users_run
from tests.viz.browser import Page, check_self_contained

QUESTION = "What color is the star?"


@pytest.fixture(scope="module")
def star(tiny_shapes):
    """The bundled image, and the same with a blue star."""
    return tuple(tiny_shapes.prepare(QUESTION, image_path(name)) for name in ("demo", "demo-blue-star"))


@pytest.fixture(scope="module")
def steps() -> list[str]:
    return []


@pytest.fixture(scope="module")
def report(tiny_shapes, star, steps) -> PatchingReport:
    return patching_report(tiny_shapes, *star, max_new_tokens=2, on_step=steps.append)


@pytest.fixture(scope="module")
def text_report(tiny_shapes) -> PatchingReport:
    pair = [tiny_shapes.prepare(f"Who made the {shape}?") for shape in ("star", "ring")]
    return patching_report(tiny_shapes, *pair, direction="noise", max_new_tokens=1)


def words(html: str) -> str:
    """The page's text, without tags and figures."""
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.S))


def test_both_answers_are_given(report, steps):
    assert (report.question, report.answer, report.corrupted_answer) == (QUESTION, "Orange", "Blue")
    assert "logit of “Orange” minus that of “Blue”, clean run" in report.html
    assert steps == list(STEPS)


def test_pages_are_whole(report, text_report):
    check_self_contained(report.html)
    check_self_contained(text_report.html)
    assert Page(report.html).sections == ["pair", "stream", "image", "heads", "attribution"]
    assert Page(text_report.html).sections == ["pair", "stream", "heads", "attribution"]


def test_results_are_those_of_the_analyses(report, tiny_shapes, star):
    tokens = [tiny_shapes.to_single_token(word) for word in ("Orange", "Blue")]
    metric = logit_difference(*tokens)
    heads = activation_patching(tiny_shapes, *star, hook="z", positions="last", metric=metric)
    np.testing.assert_array_equal(report.results["heads"], heads)
    embed = activation_patching(tiny_shapes, *star, hook="hook_image_embed", metric=metric)
    np.testing.assert_allclose(report.results["patches"].sel(layer=0), embed, rtol=1e-4, atol=1e-4)
    assert report.results["resid_pre"]["label"].values.tolist()[:3] == ["image", "What", "color"]


def test_the_sentences_say_what_the_map_of_the_stream_shows(report, text_report):
    """Read off the arrays again, by hand."""
    stream = report.results["resid_pre"]
    share = (stream.values - stream.corrupted) / (stream.clean - stream.corrupted)
    first = int(np.flatnonzero(share[:, -1] >= 0.5)[0])
    last = int(np.flatnonzero(share[:, 0] >= 0.5)[-1])
    said = words(report.html)
    assert (share[first:, -1] >= 0.5).all()
    assert f"From layer {first} on, the residual stream at the last position alone decides more than half." in said
    assert f"Up to layer {last}, all positions of the image together decide more than half." in said
    between = share[:, 1:-1]
    layer, column = np.unravel_index(between.argmax(), between.shape)
    word = stream["label"].values[1 + column]
    assert f"Of the other words, “{word}” decides most: {between.max():.2f}, entering layer {layer}." in said
    assert "White is 1: the answer does not need the activation." in words(text_report.html)


def test_the_page_says_what_was_done(report):
    runs = sum(result.attrs["runs"] for name, result in report.results.items() if name != "estimate")
    said = words(report.html)
    assert f"Measured here: {runs} interventions" in said
    assert "1 backward pass" in said.split("Cost")[1]
    assert "patches in which the images differ 6 of 64" in said
    assert re.search(r"resid_pre, layer x patch 384 0\.\d\d", said)


def test_maps_that_are_too_large_are_estimated(tiny_shapes, star):
    first = patching_report(tiny_shapes, *star, max_new_tokens=1, max_runs=100)
    assert first.results["patches"].sizes["layer"] == 1
    assert "estimated by attribution patching, because it has too many cells" in first.html
    check_self_contained(first.html)


def test_tokens_before_the_first_difference_are_left_out(text_report):
    assert text_report.results["resid_pre"]["label"].values.tolist()[:2] == ["star", "?"]
    assert "against" in words(text_report.html).split("Two runs")[0]


def test_prompts_given_as_tensors_make_a_page_too(model, inputs, tensor_inputs):
    other = model.as_inputs({"input_ids": inputs.input_ids, "pixel_values": -inputs.pixel_values})
    page = patching_report(model, tensor_inputs, other, answer="red", baseline="blue", max_new_tokens=1)
    check_self_contained(page.html)


def test_two_images_have_sections_each(model, wide_image):
    dark = np.zeros((50, 50, 3), np.uint8)
    pair = [model.prepare("Which two?", images) for images in ([wide_image, dark], [dark, wide_image])]
    page = patching_report(model, *pair, answer="red", baseline="blue", max_new_tokens=1)
    assert [section for section in Page(page.html).sections if "image" in section] == ["image", "image-2"]


def test_pairs_without_a_difference_are_refused(tiny_shapes, star):
    with pytest.raises(InputError, match="Both prompts.*'Orange'"):
        patching_report(tiny_shapes, star[0], star[0])
    with pytest.raises(InputError, match="both 'Blue'.*answer.*baseline"):
        patching_report(tiny_shapes, *star, answer="Blue")
    with pytest.raises(InputError, match=r"(?s)clean.*corrupted.*Word them alike.*clean:\n.*corrupted:\n"):
        patching_report(tiny_shapes, star[0], tiny_shapes.prepare(QUESTION))
    with as_users_run(), pytest.raises(InputError, match="direction='both'; expected 'denoise'"):
        patching_report(tiny_shapes, *star, direction="both")  # type: ignore[arg-type]
