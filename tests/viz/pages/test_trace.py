"""The page of a causal trace."""

from __future__ import annotations

import re

import pytest
import xarray as xr

from hooked_llava.analysis import trace_means, trace_study
from hooked_llava.datasets import StudyRow
from hooked_llava.errors import InputError, SpanError
from hooked_llava.results.arrays import load, save
from hooked_llava.viz.pages.trace import STEPS, TracePage, trace_page, trace_study_page
from tests.viz.browser import Page, check_self_contained, table_rows


@pytest.fixture(scope="module")
def page(model, inputs) -> TracePage:
    return trace_page(model, inputs, "the star", corruption="a circle", window=2, max_new_tokens=2)


def test_the_page_shows_runs_maps_roles_and_contributions(page):
    check_self_contained(page.html)
    assert Page(page.html).sections == ["runs", "map", "restored", "roles", "contributions"]
    assert set(page.results) == {"trace", "roles", "contribution", "next_tokens"}
    assert "replaced by &#39;a circle&#39;" in page.html
    assert "2 layers at a time" in page.html
    assert page.html.count("<b>Not shown:</b>") == 2
    assert f"{float(page.results['trace'].p_corrupted):.3f}" in page.html
    assert "restored runs for" in page.html.split("<footer>")[1]


def test_a_corruption_that_changes_nothing_is_said(model, text_inputs):
    page = trace_page(model, text_inputs, "star", corruption="star", max_new_tokens=1)
    assert "The corruption does not lower the answer" in page.html
    assert Page(page.html).sections == ["runs", "map", "restored", "roles", "contributions"]
    assert "From the image" not in page.html


def test_steps_are_reported_and_errors_come_first(model, text_inputs):
    steps: list[str] = []
    trace_page(model, text_inputs, "star", max_new_tokens=1, on_step=steps.append)
    assert sorted(steps) == sorted(STEPS)
    with pytest.raises(SpanError, match="'square' does not occur"):
        trace_page(model, text_inputs, "square")


# ---------------------------------------------------------------------- a table of questions


@pytest.fixture(scope="module")
def study(model) -> xr.Dataset:
    """Four questions, of which the corruption is said to lower three."""
    asked = [
        ("What color is the star?", "A"),
        ("Is the star red?", "A"),
        ("Is the star red?", "B<i>"),
        ("The star?", "B<i>"),
    ]
    rows = [
        StudyRow(id=str(i), question=question, answer="red", kind=kind, constraint="star")
        for i, (question, kind) in enumerate(asked)
    ]
    found = trace_study(model, rows, corruption="circle", only_correct=False, window=2, window_reading="released")
    return found.assign(lowered_by=("question", [0.5, 0.05, 0.2, 0.9]))


def test_the_page_of_a_table_shows_shares_curves_and_all_effects(study, tmp_path):
    save(study, tmp_path / "study")
    kept = load(tmp_path / "study")
    assert isinstance(kept, xr.Dataset)
    page = trace_study_page(kept, n_boot=20)
    check_self_contained(page.html)
    assert (page.question, page.answer) == ("Causal traces of 4 questions", "")
    assert Page(page.html).sections == ["questions", "lowered", "curves", "best", "effects"]
    assert table_rows(page.html, "questions")[1:] == [["A", "2", "0", "2"], ["B&lt;i&gt;", "2", "0", "2"]]
    lowered = table_rows(page.html, "lowered")[1:]
    assert [row[:2] for row in lowered] == [["all", "3 of 4"], ["A", "1 of 2"], ["B&lt;i&gt;", "2 of 2"]]
    assert [row[2].split()[0] for row in lowered] == ["75%", "50%", "100%"]
    for text, p in zip(lowered[0][3].split(" → "), (study.p_clean, study.p_corrupted), strict=True):
        assert float(text) == pytest.approx(float(p.mean()), abs=0.0051)
    shown = table_rows(page.html, "effects")
    means = study.indirect_effect.isel(question=[0, 2, 3]).mean("question").sel(output="mlp")
    at = {row[0]: row[1:] for row in shown[1 : 1 + len(trace_means(study, n_boot=2).role)]}
    for role, cells in at.items():
        for layer, cell in enumerate(cells):
            found = float(cell.split()[0].replace("\u2212", "-"))
            assert found == pytest.approx(float(means.sel(role=role, layer=layer)), abs=0.0051)
    best = table_rows(page.html, "best")
    assert best[0] == ["kind", "MLP output", "attention output", "residual stream"]
    assert re.fullmatch(r".?\d\.\d\d +layer \d, [a-z ]+", best[2][1]), "of one lowered question there is no interval"
    assert "5 layers at a time (window 2 as the released code counts)" in page.html
    assert "4 asked, 0 answered correctly, 4 measured<" in page.html
    assert "each of one question" in page.html


def test_a_table_of_which_nothing_is_lowered_says_so(study):
    page = trace_study_page(study.assign(lowered_by=study.lowered_by * 0), n_boot=5, title="Mine")
    assert page.question == "Mine"
    assert Page(page.html).sections == ["questions", "lowered", "curves"]
    assert "The corruption lowers no answer" in page.html


def test_results_that_make_no_page_of_a_table_say_what_to_do(model, text_inputs, study):
    one = trace_page(model, text_inputs, "star", max_new_tokens=1).results["trace"]
    with pytest.raises(InputError, match="trace_page makes a page"):
        trace_study_page(one)
    with pytest.raises(InputError, match="trace_study_page draws 'indirect_effect'.*'lowered_by'"):
        trace_study_page(study.drop_vars("lowered_by"))
