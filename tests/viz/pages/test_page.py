from __future__ import annotations

import jinja2
import pytest

from hooked_llava.errors import InputError
from hooked_llava.viz.pages.page import Page, fill_template, make_page, run_footer, steps_reported


@pytest.fixture
def page() -> Page:
    return Page(question="?", answer="é", html="<!doctype html><style>p {}</style><p>é</p>", results={})


def test_saving_is_all_or_nothing(page, tmp_path, monkeypatch):
    path = page.save(tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == page.html
    path.write_text("older")
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(InputError, match=r"report.*'.*' \(No space.*\).*another place"):
        page.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "older"


def test_saving_where_it_cannot_be_done_says_so(page, tmp_path):
    with pytest.raises(InputError, match=r"a folder.*file name"):
        page.save(tmp_path)
    with pytest.raises(InputError, match=r"no folder '.*nowhere'.*Make"):
        page.save(tmp_path / "nowhere" / "report.html")


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(page):
    shown = page._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert "<style>" not in shown


def test_a_template_without_one_of_its_variables_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="footer"):
        fill_template("page", {})


def test_a_page_says_where_it_comes_from(model, inputs):
    about = run_footer(model, inputs, "3 passes & more")
    footer = make_page(Page, "page", {}, about, {}, question="?", answer="").html.split("<footer>")[1]
    assert "<dt>Cost</dt><dd>3 passes &amp; more</dd>" in footer
    assert "USER: &lt;image&gt;" in footer
    assert "images of 4 x 4 patches" in footer
    assert "transformer_lens" in footer


def test_steps_go_to_whoever_asked_for_them():
    steps: list[str] = []
    with steps_reported(("one", "two"), steps.append, "working") as begin:
        begin("one")
    with steps_reported(("one", "two"), None, "working") as begin:
        begin("one")
    assert steps == ["one"]
