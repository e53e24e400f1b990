from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from hooked_llava.errors import InputError
from hooked_llava.model import HookedLLaVA
from hooked_llava.viz import Report, explain
from hooked_llava.viz.report import STEPS
from tests.builders import make_hf_model


class Page(HTMLParser):
    """Sections, what is referred to, and tags left open."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.references: list[str] = []
        self.texts_instead: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "section":
            self.sections.append(values["id"] or "")
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag == "img":
            self.texts_instead.append(values.get("alt") or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report(model, inputs) -> Report:
    return explain(model, inputs, max_new_tokens=2)


@pytest.fixture(scope="module")
def text_report(model, text_inputs) -> Report:
    return explain(model, text_inputs, answer="red", baseline="blue", max_new_tokens=2, k=3)


def test_a_report_has_every_section(report):
    assert Page(report.html).sections == ["answer", "picture", "lens", "contributions", "heads", "attention"]


def test_a_text_only_report_has_no_section_about_pictures(text_report):
    page = Page(text_report.html)
    assert page.sections == ["answer", "lens", "contributions", "heads"]
    assert (
        "picture" not in re.sub(r"<style>.*?</style>|data:[^\"]*", "", text_report.html, flags=re.S).split("<main>")[0]
    )
    assert "attention" not in text_report.results


def test_a_report_needs_nothing_from_outside(report, text_report):
    for html in (report.html, text_report.html):
        page = Page(html)
        assert page.open == []
        assert page.references
        assert all(reference.startswith("data:image/") for reference in page.references)
        assert all(page.texts_instead)
        outside = re.findall(r"https?://|@import|url\(|<script|<link", html)
        assert outside == []
        assert len(html) < 2_000_000


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
    assert report.html.count("<b>Not shown:</b>") == 5
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


def test_two_pictures_have_sections_each(model, wide_picture):
    two = model.prepare("Which two?", [wide_picture, np.zeros((50, 50, 3), np.uint8)])
    sections = Page(explain(model, two, max_new_tokens=1).html).sections
    assert [s for s in sections if "picture" in s or "attention" in s] == [
        "picture",
        "picture-2",
        "attention",
        "attention-2",
    ]


def test_tensors_without_the_original_are_explained_too(model, tensor_inputs):
    html = explain(model, tensor_inputs, max_new_tokens=1).html
    assert "The original is not known" in html
    assert Page(html).sections == ["answer", "picture", "lens", "contributions", "heads", "attention"]


def test_a_model_without_a_processor_is_explained_too(inputs):
    bare = HookedLLaVA.from_hf(make_hf_model(image_size=32))
    report = explain(bare, {"input_ids": inputs.input_ids, "pixel_values": inputs.pixel_values}, max_new_tokens=2)
    assert report.answer.startswith("#")
    assert "stretched to the visible range" in report.html


def test_steps_are_reported_in_order(model, text_inputs):
    steps: list[str] = []
    explain(model, text_inputs, max_new_tokens=1, on_step=steps.append)
    assert steps == [step for step in STEPS if step != "attention to the picture"]


def test_saving_is_all_or_nothing(report, tmp_path, monkeypatch):
    path = report.save(tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == report.html
    path.write_text("older")
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(InputError, match=r"cannot be written to .*\(No space left on device\); choose another place"):
        report.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "older"


def test_saving_where_it_cannot_be_done_says_so(report, tmp_path):
    with pytest.raises(InputError, match=r"which is a folder; give a file name in it"):
        report.save(tmp_path)
    with pytest.raises(InputError, match=r"there is no folder .*nowhere.*Make it first"):
        report.save(tmp_path / "nowhere" / "report.html")


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(text_report):
    shown = text_report._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert "<style>" not in shown


def test_several_prompts_are_refused(model):
    with pytest.raises(InputError, match=r"explain takes one prompt, got 2; call it once for each"):
        explain(model, model.prepare(["Who?", "What?"]))
