from __future__ import annotations

import numpy as np
import pytest

from hooked_llava.analysis import answer_probability, attention_knockout, flow_study, knockout_study
from hooked_llava.datasets import StudyRow
from hooked_llava.errors import InputError, SpanError
from hooked_llava.results.arrays import load, save
from hooked_llava.viz.pages.knockout import STEPS, knockout_page, page_edges, study_page
from tests.pairs import as_users_run
from tests.viz.browser import table_rows


@pytest.fixture(scope="module")
def table(model):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    boxes = ((0, 0, 8, 8),)
    return [
        StudyRow(id=str(i), question=q, answer="red", false_option="blue", kind=kind, image=image, boxes=boxes)
        for i, (q, kind) in enumerate([("Is the star red or blue?", "A"), ("What color is it?", "B<i>")] * 2)
    ]


def test_a_page_of_one_question(model, inputs):
    steps = []
    marked = inputs.with_boxes(object=[(80, 20, 100, 40)])
    page = knockout_page(model, marked, window=1, max_new_tokens=2, on_step=steps.append)
    assert sorted(steps) == sorted(STEPS)
    assert page.question == "What color is the star?"
    knockout = page.results["knockout"]
    assert knockout.edge.values.tolist() == page_edges(marked)
    assert "random->question" in page_edges(marked)
    assert "random->question" not in page_edges(inputs)
    table = table_rows(page.html, "totals")
    assert [row[0] for row in table[1:]] == [e.replace("->", " → ").replace("|", ", ") for e in page_edges(marked)]
    for row, total in zip(table[1:], knockout.total_effect.values, strict=True):
        assert float(row[1].split()[0].replace("\u2212", "-")) == pytest.approx(total, abs=0.051)
    assert page.html.count("data:image/svg+xml") == 2
    assert "http://" not in page.html.replace("http://www.w3.org", "")
    assert "as many other patches as the object has" in page.html
    assert "as many other patches" not in knockout_page(model, inputs, ["image->last"], max_new_tokens=1).html


def test_without_an_image_the_edges_of_text_remain(model, text_inputs):
    page = knockout_page(model, text_inputs, max_new_tokens=1)
    assert page.results["knockout"].edge.values.tolist() == ["question->last", "last->last", "question|rest->last"]
    with pytest.raises(SpanError, match="no span 'image'"):
        knockout_page(model, text_inputs, ["image->last"])


def test_a_page_of_two_prompts_is_refused(model):
    two = model.prepare(["Is the star red?", "What color is it?"])
    with pytest.raises(InputError, match="knockout_page.*prompt, got 2"):
        knockout_page(model, two)


def test_another_metric_is_given_in_its_own_units(model, inputs, table):
    page = knockout_page(model, inputs, ["image->last"], 1, metric="probability", max_new_tokens=1)
    total = float(page.results["knockout"].total_effect[0])
    assert float(table_rows(page.html, "totals")[1][1].split()[0].replace("\u2212", "-")) == pytest.approx(
        total, abs=0.00051
    )
    assert "The change (probability) with" in page.html
    result = flow_study(model, table, ["image->last"], 1, metric="log_probability", only_correct=False)
    assert "The change (nats) with" in study_page(result, n_boot=5).html


def test_a_page_of_weighted_edges_does_not_call_them_blocked(model, inputs, table):
    page = knockout_page(model, inputs, ["image->last"], 1, factor=0.3, max_new_tokens=1)
    expected = attention_knockout(model, inputs, ["image->last"], 1, factor=0.3, total=True)
    np.testing.assert_array_equal(page.results["knockout"].total_effect, expected.total_effect)
    study = study_page(flow_study(model, table[:2], ["image->last"], 1, factor=0.3, only_correct=False), n_boot=5)
    for html in (page.html, study.html):
        assert table_rows(html, "totals")[0][0] == "weighted by 0.3"
        assert "What happens when an edge is weighted by 0.3" in html
        assert "is multiplied by 0.3 (log 0.3 is added" in html
        assert "−∞" not in html
        assert "edge blocked" not in html
    assert "weighted" not in knockout_page(model, inputs, ["image->last"], 1, max_new_tokens=1).html


def test_a_page_of_a_table(model, table, tmp_path):
    result = flow_study(model, table, ["image->last", "object->question"], 1, only_correct=False, batch_size=3)
    save(result, tmp_path / "flow")
    page = study_page(load(tmp_path / "flow"), n_boot=20)
    assert page.question == "Information flow over 4 questions"
    assert page.answer == ""
    counts = table_rows(page.html, "questions")
    assert counts[1:] == [["A", "2", "0", "2"], ["B&lt;i&gt;", "2", "0", "2"]]
    totals = table_rows(page.html, "totals")
    assert totals[0] == ["blocked", "all", "A", "B&lt;i&gt;"]
    means = result.total_effect.mean("question").values
    for row, mean in zip(totals[1:3], means, strict=True):
        assert float(row[1].split()[0].replace("\u2212", "-")) == pytest.approx(mean, abs=0.051)
    assert "4 asked, 0 answered correctly, 4 measured<" in page.html
    runs, forwards = result.attrs["runs"], result.attrs["n_forward"] + result.attrs["work"]
    assert runs == 2 * 2 * (result.sizes["layer"] + 1), "two batches, two edges"
    assert f"{runs} runs for {forwards:.1f} forward passes, each of a batch of questions" in page.html
    unseen = result.assign_coords(boxes_lost=("question", [0, 1, 0, 2]))
    assert "; 2 with an object that the model does not see" in study_page(unseen, n_boot=5).html
    assert "<i>&" not in page.html
    assert page.save(tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_a_table_without_probabilities_has_a_page_too(model, table):
    result = flow_study(model, table[:2], ["image->last"], only_correct=False).drop_vars("answer_probability")
    assert study_page(result, n_boot=5, title="Mine").html.count("data:image/svg+xml") == 1


def test_results_that_make_no_page_say_what_to_do(model, table, inputs):
    how = {"only_correct": False}
    with pytest.raises(InputError, match=r"total_effect.*total=True"):
        study_page(knockout_study(model, table[:2], ["image->last"], total=False, **how))
    with pytest.raises(InputError, match=r"window='all'"):
        study_page(knockout_study(model, table[:2], ["image->last"], "all", **how))
    with pytest.raises(InputError, match=r"knockout_page makes a page"):
        study_page(attention_knockout(model, inputs, ["image->last"], total=True))
    with as_users_run(), pytest.raises(InputError, match=r"study_page draws 'effect' .* got the array"):
        study_page(answer_probability(model, inputs))  # type: ignore[arg-type]
