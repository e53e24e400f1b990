from __future__ import annotations

import numpy as np
import pytest

from hooked_llava.analysis import answer_probability, flow_study, probability_study, probability_summary
from hooked_llava.errors import InputError
from hooked_llava.results.arrays import load, save
from hooked_llava.toy.gqa_tables import gqa_rows
from hooked_llava.viz import probability_page, probability_study_page
from hooked_llava.viz.pages.probability import STEPS
from tests.pairs import as_users_run
from tests.viz.browser import table_rows

KINDS = ["ChooseAttr", "QueryAttr"]


def test_a_page_of_one_question(model, inputs):
    steps = []
    page = probability_page(model, inputs, "red", "blue", max_new_tokens=2, on_step=steps.append)
    assert sorted(steps) == sorted(STEPS)
    assert page.question == "What color is the star?"
    found = answer_probability(model, inputs, "red", "blue")
    np.testing.assert_array_equal(page.results["answer_probability"], found)
    summary = probability_summary(found).sel(norm="none")
    (header, own) = table_rows(page.html, "numbers")
    forms = [form for form in found.form.values.tolist() if np.isfinite(summary.peak.sel(form=form))]
    assert header[:-1] == forms
    for cell, form in zip(own, forms, strict=False):
        peak, said = cell.split(maxsplit=1)
        one = summary.sel(form=form)
        assert float(peak) == pytest.approx(float(one.peak), abs=0.00051)
        assert said.split() == ["at", "layer", f"{int(one.peak_layer)},", "half", "from", f"{int(one.half_layer)}"]
    assert page.html.count("data:image/svg+xml") == 3
    assert "the false option" in page.html
    assert "the false option" not in probability_page(model, inputs, "red", max_new_tokens=1).html
    assert "http://" not in page.html.replace("http://www.w3.org", "")


def test_a_page_of_a_table(tiny_shapes, tmp_path):
    result = probability_study(tiny_shapes, gqa_rows(2, kinds=KINDS), only_correct=False, batch_size=3)
    save(result, tmp_path / "probability")
    page = probability_study_page(load(tmp_path / "probability"), n_boot=5, title="Mine")
    assert (page.question, page.answer) == ("Mine", "")
    correct = result.attrs["correct"]
    assert table_rows(page.html, "questions")[1:] == [[kind, "2", str(correct.get(kind, 0)), "2"] for kind in KINDS]
    table = table_rows(page.html, "numbers")
    assert [row[0] for row in table] == ["kind", "all", *KINDS]
    mean = result.answer_probability.sel(norm="none", form="capitalised").mean("question")
    assert float(table[1][2].split()[0]) == pytest.approx(float(mean.max()), abs=0.00051)
    assert f"{result.attrs['n_forward']:.1f} forward passes, each of a batch" in page.html
    flow = flow_study(tiny_shapes, gqa_rows(2, kinds=KINDS), ["image->last"], "all", only_correct=False, batch_size=3)
    assert table_rows(probability_study_page(flow, n_boot=5).html, "numbers") == table


def test_what_does_not_fit_is_said(model, inputs):
    with pytest.raises(InputError, match="probability_page.*prompt, got 2"):
        probability_page(model, model.prepare(["Is the star red?", "What color is it?"]))
    one = answer_probability(model, inputs, "red").to_dataset(name="answer_probability")
    with as_users_run(), pytest.raises(InputError, match="probability_study_page.*probability_page"):
        probability_study_page(one)
