"""The page of an edit says what evaluate_edit found, and leaves the weights as they were."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from hooked_llava.analysis import causal_trace
from hooked_llava.editing import Edit, EditRequest, Probe, edit_sweep, evaluate_edit, finetune, keep_prompts, multedit
from hooked_llava.editing.change import Change
from hooked_llava.editing.sweep import EDITED
from hooked_llava.errors import InputError
from hooked_llava.viz.pages.edit import STEPS, EditPage, edit_page
from tests.viz.browser import Page, check_self_contained

# Untrained weights: most edits do not reach their target.
pytestmark = pytest.mark.filterwarnings("ignore::hooked_llava.editing.values.TargetNotReached")
WEIGHT = "language.blocks.1.mlp.down.weight"


@pytest.fixture(scope="module")
def request_(inputs) -> EditRequest:
    return EditRequest(inputs, "red", constraint="the star")


@pytest.fixture(scope="module")
def edit(model, request_) -> Edit:
    return multedit(model, request_, layer=1, position="last", clamp=50.0)


@pytest.fixture(scope="module")
def probes(model, wide_image) -> list[Probe]:
    words = model.prepare(["What color is the circle?", "Is the star red or blue?"], [wide_image] * 2)
    return [
        Probe("rewording", "generalisation", words, "red"),
        Probe("<others>", "specificity", model.prepare("Who made the star?")),
    ]


@pytest.fixture(scope="module")
def page(model, inputs, edit, probes) -> EditPage:
    return edit_page(model, inputs, edit, probes=probes, max_new_tokens=2)


def rows(html: str, section: str) -> list[list[str]]:
    part = html.partition(f'<section id="{section}">')[2].partition("</section>")[0]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in re.findall(r"<tr.*?</tr>", part)]
    return [[re.sub(r"<[^>]+>", "", cell).strip() for cell in row] for row in cells]


def test_the_page_is_whole_and_says_what_it_does_not_show(page):
    check_self_contained(page.html)
    assert Page(page.html).sections == ["answer", "edit", "elsewhere"]
    assert page.html.count("<b>Not shown:</b>") == 2
    assert "can</em> write" in page.html
    assert "4 questions, asked without the edit and with it" in page.html.split("<footer>")[1]
    assert "<others>" not in page.html


def test_answers_and_probabilities_are_the_models(model, inputs, edit, page):
    red = model.to_single_token("red")
    before = model(inputs)[0, -1].detach().softmax(-1)
    with edit.applied():
        after = model(inputs)[0, -1].detach().softmax(-1)
        said = model.generate(inputs, max_new_tokens=2)
    assert (page.answer_before, page.answer) == (model.generate(inputs, max_new_tokens=2), said)
    assert page.answer != page.answer_before
    old = int(before.argmax())
    first = page.results["answers"]
    assert first.token_id.values[:2].tolist() == [old, red]
    for state, p in (("before", before), ("after", after)):
        shown = first.sel(state=state).values[:2]
        np.testing.assert_allclose(shown, [float(p[old]), float(p[red])], rtol=1e-3, atol=1e-6)
    table = rows(page.html, "answer")
    assert table[1][1:] == [f"{float(p[red]):.3f}" for p in (before, after)]
    assert table[2][1:] == [f"{float(p[old]):.3f}" for p in (before, after)]
    own = page.results["questions"].isel(question=0)
    assert table[3][0] == "P(target) − P(answer before), whole answers"
    assert table[3][1:] == [f"{float(own[name]):.3f}" for name in ("magnitude_before", "magnitude")]
    assert table[4][0] == "P(target) − P(answer before), first tokens"
    assert table[4][1:] == [f"{float(p[red] - p[old]):.3f}" for p in (before, after)]
    assert float(own.magnitude) != pytest.approx(float(own.first_token_magnitude))  # the answer before has two tokens


def test_every_question_is_asked_before_and_after(model, edit, probes, page):
    found = evaluate_edit(model, edit, probes, max_new_tokens=2)
    shown = page.results["probes"]
    assert shown.probe.values.tolist() == [EDITED, "rewording", "<others>"]
    for name in found:
        np.testing.assert_allclose(shown[name].values[1:], found[name].values, rtol=1e-4, atol=1e-6)
    questions = page.results["questions"]
    assert questions.text.values.tolist()[1:] == [
        "What color is the circle?",
        "Is the star red or blue?",
        "Who made the star?",
    ]
    alone = model.prepare("Who made the star?")
    with edit.applied():
        after = model(alone)[0, -1].argmax()
    assert str(questions.after.values[3]).strip() == model.to_string(after).strip()
    assert str(questions.before.values[3]).strip() == model.to_string(model(alone)[0, -1].argmax()).strip()
    by_probe = [questions.probability.values[questions.probe.values == name].mean() for name in found.probe.values]
    np.testing.assert_allclose(by_probe, found.probability.values, rtol=1e-3)
    listed = [row for row in rows(page.html, "elsewhere") if len(row) == 7 and row[1].endswith("?")]
    assert [row[1] for row in listed] == questions.text.values.tolist()[1:]


def test_what_is_not_as_it_should_be_stands_out(model, inputs, edit, probes):
    other = int(model(inputs)[0, -1].argmin())
    wrong = Probe("missed", "generalisation", model.prepare("Who made the star?"), other)
    html = edit_page(model, inputs, edit, probes=[wrong], max_new_tokens=1).html
    assert html.count('<tr class="wrong">') == 1
    assert "1 of 1 are not as they should be" in html
    assert rows(html, "elsewhere")[-1][4] == "not the target"
    right = Probe("kept", "specificity", model.prepare("Who made the star?"))
    nothing = multedit(model, EditRequest(inputs, "red"), layer=1, position="last", clamp=1e-4)
    html = edit_page(model, inputs, nothing, probes=[right], max_new_tokens=1).html
    assert '<tr class="wrong">' not in html
    assert "The edit did not take:" in html
    assert rows(html, "elsewhere")[-1][4] == "the same"


def test_without_probes_it_says_that_nothing_else_was_asked(model, inputs, edit):
    page = edit_page(model, inputs, edit, max_new_tokens=1)
    assert "no other question was asked" in page.html
    assert rows(page.html, "elsewhere") == []


def test_an_answer_that_was_there_before_is_said(model, text_inputs):
    said = int(model(text_inputs)[0, -1].argmax())
    edit = multedit(model, EditRequest(text_inputs, said), layer=1, position="last")
    html = edit_page(model, text_inputs, edit, max_new_tokens=1).html
    assert "The model said this already:" in html
    assert ", the answer before" not in html


def test_place_and_method_are_named(model, inputs, request_, edit, page):
    facts = dict(rows(page.html, "edit"))
    assert facts["weights"] == WEIGHT
    assert (facts["method"], facts["layer"], facts["constraint"]) == ("multedit", "1", "the star")
    assert facts["position"] == f"last (“ASSISTANT:”, position {inputs.shape[1] - 1})"
    assert facts["longest value difference"] == "50 times the MLP&#39;s own output"
    at = inputs.token_map.find("the star")[-1]
    there = multedit(model, request_, layer=0, position="constraint")
    facts = dict(rows(edit_page(model, inputs, there, max_new_tokens=1).html, "edit"))
    assert facts["position"] == f"constraint (“star”, position {at})"
    tuned = finetune(model, request_, layers=[0, 1], weights="all", steps=1)
    page = edit_page(model, inputs, tuned, max_new_tokens=1)
    facts = dict(rows(page.html, "edit"))
    assert facts["layers"] == "0, 1"
    assert facts["weights"] == "14 matrices"
    assert "position" not in facts
    assert "changed by gradient descent" in page.html


def test_a_prompt_of_several_has_its_own_constraint(model, inputs, text_inputs):
    both = EditRequest(["Who made the star?", "Who owns it?"], "red", constraint=["the star", "it"])
    edit = multedit(model, both, layer=0, position="constraint")
    page = edit_page(model, model.prepare("Who owns it?"), edit, max_new_tokens=1)
    assert dict(rows(page.html, "edit"))["constraint"] == "it"
    with pytest.raises(InputError, match="(?s)edit.*prompt '.*for .*inputs"):
        edit_page(model, inputs, edit)


def test_targets_of_several_tokens_are_judged_by_their_first(model, text_inputs):
    edit = multedit(model, EditRequest(text_inputs, "red star"), layer=1, position="last", clamp=50.0)
    page = edit_page(model, text_inputs, edit, max_new_tokens=2)
    assert page.results["probes"].n.values.tolist() == [1]
    assert page.results["answers"].token_id.values[1] == model.to_single_token("red")
    assert "the target&#39;s first of 2 tokens" in page.html


def test_edits_of_what_enters_the_first_layer_are_shown_too(model, text_inputs):
    name = "language.embed.weight"
    weight = model.get_parameter(name)
    full = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    asked = multedit(model, EditRequest(text_inputs, "red"), layer=1, position="last").requests
    edit = Edit(model, {name: Change.dense(full)}, asked)
    assert edit.first_affected_layer is None
    page = edit_page(model, text_inputs, edit, max_new_tokens=1)
    with edit.applied():
        after = model(text_inputs)[0, -1].detach().softmax(-1)
    shown = page.results["answers"].sel(state="after")
    np.testing.assert_allclose(shown.values, after[shown.token_id.values], rtol=1e-3, atol=1e-6)


def test_weights_are_left_as_they_were(model, inputs, request_, edit, probes):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    edit_page(model, inputs, edit, probes=probes, max_new_tokens=1)
    edit_sweep(model, request_, probes)
    bad = Probe("bad", "specificity", model.prepare("Who made the star?"), ["red", "blue"])
    with pytest.raises(InputError, match="1 prompts and 2 expected answers"):
        edit_page(model, inputs, edit, probes=[bad])
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert not edit.is_applied


def test_what_does_not_fit_is_refused(model, inputs, edit, probes, text_inputs):
    with edit.applied(), pytest.raises(InputError, match="edit is applied.*revert"):
        edit_page(model, inputs, edit)
    with pytest.raises(InputError, match="(?s)edit.*prompt '.*for .*inputs"):
        edit_page(model, text_inputs, edit)
    with pytest.raises(InputError, match="(?s)edit.*prompt '.*'.*nothing.*inputs"):
        edit_page(model, inputs, Edit(model, {}))
    with pytest.raises(InputError, match="there are 2 prompts"):
        edit_page(model, probes[0].prompts, edit)
    kept = Probe("kept", "specificity", keep_prompts(model, text_inputs))
    with pytest.raises(InputError, match="Probe '.*' .*kept prompts"):
        edit_page(model, inputs, edit, probes=[kept])


def test_steps_are_reported(model, inputs, edit):
    steps: list[str] = []
    edit_page(model, inputs, edit, max_new_tokens=1, on_step=steps.append)
    assert steps == list(STEPS)


def test_a_sweep_is_shown_with_its_trace(model, inputs, request_, probes, edit):
    trace = causal_trace(model, inputs, "the star", corruption="a circle", kinds=("mlp",))
    sweep = edit_sweep(model, request_, probes, positions=["last"], trace=trace)
    page = edit_page(model, inputs, edit, sweep=sweep, max_new_tokens=1)
    assert Page(page.html).sections == ["answer", "edit", "elsewhere", "layers"]
    assert "Dashed: the causal trace" in page.html
    assert page.results["sweep"] is sweep
    check_self_contained(page.html)
