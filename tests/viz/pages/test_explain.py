from __future__ import annotations

import re

import numpy as np
import pytest

from hooked_llava.analysis.head_scores import top_heads
from hooked_llava.analysis.maps.answer_maps import answer_maps
from hooked_llava.analysis.patch_importance import patch_importance
from hooked_llava.editing.magnitude import generated_answers
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.toy.images import image_path
from hooked_llava.viz.pages import explain as explain_module
from hooked_llava.viz.pages.explain import STEPS, Report, explain
from tests.builders import make_hf_model
from tests.pairs import as_users_run
from tests.tiled import with_processor
from tests.viz.browser import Page, check_self_contained


@pytest.fixture(scope="module")
def report(model, inputs) -> Report:
    return explain(model, inputs, max_new_tokens=2)


@pytest.fixture(scope="module")
def text_report(model, text_inputs) -> Report:
    return explain(model, text_inputs, answer="red", baseline="blue", max_new_tokens=2, k=3)


def test_a_report_has_every_section(report):
    assert Page(report.html).sections == [
        "summary",
        "answer",
        "image",
        "lens",
        "contributions",
        "heads",
        "layers",
        "patches",
        "attention",
    ]


def test_an_answer_of_several_tokens_has_a_map_for_each(report, model, inputs):
    maps = report.results["answer_maps"]
    tokens = model.generate(inputs, max_new_tokens=2, return_type="tokens")[0]
    assert maps.word.values.tolist() == [model.to_string([i]) or f"#{i}" for i in tokens.tolist()]
    assert maps.n_forward == 1
    assert "map of every token of the answer" in report.html
    one = explain(model, inputs, max_new_tokens=1, occlusion=False)
    assert "answer_maps" not in one.results
    assert "map of every token of the answer" not in one.html


def test_an_answer_is_read_up_to_a_token_that_stands_for_an_image():
    model = with_processor("onevision")
    inputs = model.prepare("What color is the star?", images=image_path("demo"))
    said = model.generate(inputs, return_type="tokens")[0].tolist()
    image = said.index(model.config.image_token_id)  # random weights say anything
    assert explain(model, inputs, occlusion=False).results["answer_maps"].sizes["token"] == min(image, 24)
    assert answer_maps(model, inputs).sizes["token"] == image
    assert generated_answers(model, inputs).shape[1] == image


def test_a_text_only_report_has_no_section_about_images(text_report):
    shown = Page(text_report.html)
    assert shown.sections == ["summary", "answer", "lens", "contributions", "heads", "layers"]
    assert "image" not in re.sub(r"<style>.*?</style>|data:[^\"]*", "", text_report.html, flags=re.S).split("<main>")[0]
    assert "attention" not in text_report.results


def test_a_report_needs_nothing_from_outside(report, text_report):
    for html in (report.html, text_report.html):
        check_self_contained(html)


def test_a_report_says_what_was_asked_and_answered(report, model, inputs):
    assert report.question == "What color is the star?"
    assert report.answer == model.generate(inputs, max_new_tokens=2)
    assert f"<h1>{report.question}</h1>" in report.html
    best = str(report.results["next_tokens"]["token"].values[0, 0])
    assert report.results["components"].attrs["answer"] == best


def test_the_sum_of_contributions_is_stated_beside_the_logit(report):
    parts = report.results["components"]
    assert f"{float(parts.sum()):.4f}"[:-1] in report.html
    assert f"{parts.attrs['logit']:.4f}" in report.html


def test_answer_and_baseline_are_followed(text_report):
    parts = text_report.results["components"]
    assert (parts.attrs["answer"], parts.attrs["baseline"]) == ("red", "blue")
    assert text_report.results["lens"]["answer"].values[0] == "red"
    assert "logit difference in the model" in text_report.html


def test_captions_say_what_is_not_shown(report):
    assert report.html.count("<b>Not shown") == 7
    assert "Attention says where a head reads from" in report.html
    assert "what the model believes in an early layer" in report.html


def test_the_footer_says_how_the_page_came_about(report, inputs):
    footer = report.html.split("<footer>")[1]
    assert "forward passes" in footer
    assert "transformer_lens" in footer
    assert "USER: &lt;image&gt;" in footer


def test_text_in_a_page_is_escaped(model):
    html = explain(model, model.prepare("What is <b>this</b> & that?"), max_new_tokens=1).html
    assert "<h1>What is &lt;b&gt;this&lt;/b&gt; &amp; that?</h1>" in html


def test_two_images_have_sections_each(model, wide_image):
    two = model.prepare("Which two?", [wide_image, np.zeros((50, 50, 3), np.uint8)])
    sections = Page(explain(model, two, max_new_tokens=1).html).sections
    assert [s for s in sections if "image" in s or "attention" in s] == [
        "image",
        "image-2",
        "attention",
        "attention-2",
    ]


def test_tensors_without_the_original_are_explained_too(model, tensor_inputs):
    html = explain(model, tensor_inputs, max_new_tokens=1).html
    assert "The original is not known" in html
    assert Page(html).sections == [
        "summary",
        "answer",
        "image",
        "lens",
        "contributions",
        "heads",
        "layers",
        "patches",
        "attention",
    ]


def test_a_model_without_a_processor_is_explained_too(inputs):
    bare = HookedLLaVA.from_hf(make_hf_model(image_size=32))
    report = explain(bare, {"input_ids": inputs.input_ids, "pixel_values": inputs.pixel_values}, max_new_tokens=2)
    assert report.answer.startswith("#")
    assert "stretched to the visible range" in report.html


def test_steps_are_reported_in_order(model, text_inputs):
    steps: list[str] = []
    explain(model, text_inputs, max_new_tokens=1, on_step=steps.append)
    assert steps == [step for step in STEPS if step not in ("attention to the image", "patches", "occlusion")]


def test_patch_map_and_occlusion_stand_side_by_side(report, model, inputs):
    drawn = report.html.split('<section id="patches">')[1].split("</section>")[0]
    assert drawn.count("<figure>") == 2
    best = top_heads(report.results["head_scores"], 1)[0]
    assert f"<h3>Log-probability increase, head {best[0]}.{best[1]}</h3>" in drawn
    assert "<h3>Occlusion</h3>" in drawn
    assert "rank correlation" in drawn
    scored = report.results["components"].attrs["answer"]
    assert report.results["patches"].attrs["target"] == report.results["occlusion"].attrs["target"] == scored
    assert report.results["patches"].equals(patch_importance(model, inputs))


def test_the_method_of_the_patch_map_can_be_chosen(model, inputs):
    chosen = explain(model, inputs, max_new_tokens=1, patches="relevancy", occlusion=False)
    assert "occlusion" not in chosen.results
    assert "<h3>Relevancy</h3>" in chosen.html
    assert "Occlusion, the comparison by intervention, was left out" in chosen.html
    with as_users_run(), pytest.raises(InputError, match=r"patches='relevance'; expected one of .* mean: relevancy"):
        explain(model, inputs, patches="relevance")


@pytest.mark.parametrize(
    ("method", "asked", "most", "drawn"),
    [
        ("attention", None, 16, True),
        ("attention", None, 15, False),
        ("attention", True, 15, True),
        ("attention", False, 16, False),
        ("occlusion", True, 16, False),
    ],
)
def test_occlusion_is_drawn_beside_unless_it_takes_long_or_is_the_map_itself(
    model, inputs, monkeypatch, method, asked, most, drawn
):
    monkeypatch.setattr(explain_module, "OCCLUDED_UNASKED", most)
    options = explain_module._Options(answer=None, baseline=None, k=1, patches=method, occlusion=asked)
    maps = explain_module._patch_maps(model, inputs, 7, options, lambda step: None)
    assert list(maps) == ["patches", *(["occlusion"] if drawn else [])]
    assert maps["patches"].attrs["method"] == method


def test_several_prompts_are_refused(model):
    with pytest.raises(InputError, match="prompt, got 2"):
        explain(model, model.prepare(["Who?", "What?"]))
