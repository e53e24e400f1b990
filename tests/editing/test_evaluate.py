"""Measures are what they say, on plain forwards of the edited model."""

from __future__ import annotations

import pytest
import torch

from hooked_llava.editing import EditRequest, Probe, evaluate_edit, keep_prompts, multedit, sequential_edits, summary
from hooked_llava.errors import InputError
from hooked_llava.model import HookedLLaVA
from hooked_llava.results import load, save

WORDS = ["Who made the star?", "Who is the maker of the star?", "By whom was the star made?"]
OTHERS = ["Who made the ring?", "Who made the moon?", "Who owns the star?"]


@pytest.fixture(scope="module")
def model() -> HookedLLaVA:
    return HookedLLaVA.from_pretrained("tiny-shapes")


@pytest.fixture(scope="module")
def edit(model):
    return multedit(model, EditRequest(WORDS[0], "Boris"), layer=3, position="last")


def probes(model) -> list[Probe]:
    return [
        Probe("the question", "efficacy", model.prepare(WORDS[0]), "Boris"),
        Probe("other words", "generalisation", model.prepare(WORDS[1:]), ["Boris", "Boris"]),
        Probe("other facts", "specificity", keep_prompts(model, model.prepare(OTHERS), [3])),
        Probe("unrelated", "locality", model.prepare(["The star is red. What color is the star?"])),
    ]


@torch.no_grad()
def test_measures_are_those_of_plain_forwards(model, edit):
    result = evaluate_edit(model, edit, probes(model))
    boris = model.to_single_token("Boris")
    asked = model.prepare(WORDS[1:])
    before = model(asked)[:, -1]
    with edit.applied():
        after = model(asked)[:, -1]
    row = result.sel(probe="other words")
    assert float(row.accuracy) == float((after.argmax(-1) == boris).float().mean())
    assert float(row.probability) == pytest.approx(float(after.softmax(-1)[:, boris].mean()), rel=1e-3)
    assert float(row.probability_before) == pytest.approx(
        float(before.softmax(-1)[:, boris].mean()), rel=1e-3, abs=1e-7
    )
    kl = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1).mean()
    assert float(row.kl) == pytest.approx(float(kl), rel=1e-3)
    assert float(row.changed) == float((before.argmax(-1) != after.argmax(-1)).float().mean())
    assert int(row.n) == 2
    assert result.role.values.tolist() == ["efficacy", "generalisation", "specificity", "locality"]
    assert float(result.sel(probe="other facts").accuracy_before) == 1.0  # what the model answers without the edit


def test_an_edit_is_left_as_it_was_found(model, edit):
    weight = model.language.blocks[3].mlp.down.weight
    original = weight.clone()
    asked = probes(model)
    free = evaluate_edit(model, edit, asked)
    assert torch.equal(weight, original)
    with edit.applied():
        edited = weight.clone()
        under = evaluate_edit(model, edit, asked)
        with pytest.raises(InputError, match="kept while other edits were active"):
            evaluate_edit(model, edit, probes(model))
        assert torch.equal(weight, edited)
    assert torch.equal(weight, original)
    for name in free:
        assert free[name].equals(under[name])


def test_an_edit_of_nothing_changes_nothing(model):
    edit = multedit(model, EditRequest(WORDS[0], "Boris"), layer=3, position="last", lam=1e12)
    result = evaluate_edit(model, edit, probes(model))
    assert result.changed.values.tolist() == [0.0] * 4
    assert float(result.kl.max()) < 1e-9
    found = summary(result)
    assert (found["efficacy"], found["specificity_drop"]) == (0.0, 0.0)


def test_a_summary_has_one_number_for_each_role(model, edit):
    result = evaluate_edit(model, edit, probes(model))
    found = summary(result)
    assert set(found) == {"efficacy", "generalisation", "specificity_drop", "locality_kl"}
    assert found["efficacy"] == 1.0
    assert found["specificity_drop"] == pytest.approx(100 * (1 - float(result.sel(probe="other facts").accuracy)))
    assert "locality_kl" not in summary(result.isel(probe=[0]))


def test_results_are_saved_and_loaded(model, edit, tmp_path):
    result = evaluate_edit(model, edit, probes(model))
    save(result, tmp_path / "result.safetensors")
    assert load(tmp_path / "result.safetensors").identical(result)
    assert result.attrs["prompt"].endswith("-> Boris")


def test_edits_one_after_the_other_are_all_reverted(model):
    before = model.language.blocks[3].mlp.down.weight.clone()
    requests = [EditRequest(f"Who made the {shape}?", "Boris") for shape in ("star", "ring", "heart", "moon")]
    asked = [model.prepare(request.question) for request in requests]

    def measure(n: int) -> dict[str, float]:
        return {"held": sum(model.generate(inputs) == "Boris" for inputs in asked[:n]) / n}

    def make(edited, request):
        return multedit(edited, request, layer=3, position="last")

    result = sequential_edits(model, requests, make, measure, at=(1, 3, 9))
    assert result.n_edits.values.tolist() == [1, 3]
    assert result.held.values.tolist()[0] == 1.0
    assert torch.equal(model.language.blocks[3].mlp.down.weight, before)
    with pytest.raises(ZeroDivisionError):
        sequential_edits(model, requests, make, lambda n: {"x": 1 / 0}, at=(2,))
    assert torch.equal(model.language.blocks[3].mlp.down.weight, before)
    with pytest.raises(InputError, match="from 1 to 4"):
        sequential_edits(model, requests, make, measure, at=(9,))


def test_what_does_not_fit_is_refused(model, edit):
    ask = model.prepare(WORDS[1:])
    for probe, message in (
        (Probe("x", "generalisation", ask), "needs expected="),
        (Probe("x", "specificity", ask, ["Boris"]), "2 prompts and 1 expected"),
        (Probe("x", "generalisation", ask, "no such word"), "no such word"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate_edit(model, edit, [probe])
    with pytest.raises(InputError, match="no probes"):
        evaluate_edit(model, edit, [])
    with pytest.raises(InputError, match="another model object"):
        evaluate_edit(HookedLLaVA.from_pretrained("tiny-shapes"), edit, [Probe("x", "efficacy", ask, "Boris")])
    assert not edit.is_applied
