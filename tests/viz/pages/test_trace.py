"""The page of a causal trace."""

from __future__ import annotations

import pytest

from hooked_llava.errors import SpanError
from hooked_llava.viz.pages.trace import STEPS, TracePage, trace_page
from tests.viz.browser import Page, check_self_contained


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
