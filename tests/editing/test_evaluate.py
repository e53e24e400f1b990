"""Measures are what they say, on plain forwards of the edited model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hooked_llava.editing import (
    Change,
    Edit,
    EditRequest,
    Probe,
    TargetNotReached,
    evaluate_edit,
    keep_prompts,
    multedit,
    sequential_edits,
    summary,
)
from hooked_llava.editing.magnitude import generated_answers
from hooked_llava.editing.request import prepare_request
from hooked_llava.editing.rows import make_rows
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.readout.answer_tokens import answer_tokens
from hooked_llava.readout.metrics import teacher_forced
from hooked_llava.results.arrays import load, save
from tests.builders import make_hf_model, make_prompt
from tests.fixtures_tokenizers import KINDS, talking
from tests.oracles import naive_edit
from tests.pairs import as_users_run

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
        with pytest.raises(InputError, match="probe '.*other edits"):
            evaluate_edit(model, edit, probes(model))
        assert torch.equal(weight, edited)
    assert torch.equal(weight, original)
    for name in free:
        assert free[name].equals(under[name])


def test_an_edit_of_nothing_changes_nothing(model):
    with pytest.warns(TargetNotReached, match="'Clara'.*'Boris'"):
        edit = multedit(model, EditRequest(WORDS[0], "Boris"), layer=3, position="last", lam=1e7)
    result = evaluate_edit(model, edit, probes(model))
    assert result.changed.values.tolist() == [0.0] * 4
    assert float(result.kl.max()) < 1e-8
    found = summary(result)
    assert (found["efficacy"], found["specificity_drop"]) == (0.0, 0.0)


def test_a_summary_has_one_number_for_each_role(model, edit):
    result = evaluate_edit(model, edit, probes(model))
    found = summary(result)
    magnitudes = {"efficacy_magnitude", "efficacy_first_token_magnitude"}
    assert set(found) == {"efficacy", "generalisation", "specificity_drop", "locality_kl"} | magnitudes
    assert found["efficacy_magnitude"] == float(result.magnitude[0]) > 0.6
    assert found["efficacy"] == 1.0
    assert found["specificity_drop"] == pytest.approx(100 * (1 - float(result.sel(probe="other facts").accuracy)))
    assert "locality_kl" not in summary(result.isel(probe=[0]))


@pytest.mark.parametrize(
    "name",
    [
        "language.embed.weight",
        "language.unembed.weight",
        "projector.linear_in.weight",
        "vision.blocks.0.mlp.down.weight",
        "language.blocks.1.attn.query.weight",
    ],
)
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_an_edit_of_any_weight_is_measured_from_where_it_acts(name, tied):
    hf_model = make_hf_model(tied=tied)
    small, prompt = HookedLLaVA.from_hf(hf_model), make_prompt(hf_model)
    weight = small.get_parameter(name)
    edit = Edit(
        small, {name: Change.dense(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))}
    )
    before = small(prompt)[:, -1]
    with edit.applied():
        after = small(prompt)[:, -1]
    expected = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum()
    assert float(expected) > 1e-4
    probe = Probe("x", "locality", prompt)
    assert float(evaluate_edit(small, edit, [probe]).kl[0]) == pytest.approx(float(expected), rel=1e-3)
    kept = replace(probe, prompts=keep_prompts(small, prompt, range(4)))
    feeds_the_stream = not name.startswith(("language.blocks", "language.unembed")) or (tied and "unembed" in name)
    if feeds_the_stream:
        with pytest.raises(InputError, match=f"layer .{name}.*prompts"):
            evaluate_edit(small, edit, [kept])
    else:
        assert float(evaluate_edit(small, edit, [kept]).kl[0]) == pytest.approx(float(expected), rel=1e-3)


def test_prompts_that_were_kept_otherwise_are_refused():
    hf_model = make_hf_model()
    one, other, prompt = (
        HookedLLaVA.from_hf(hf_model),
        HookedLLaVA.from_hf(make_hf_model(seed=1)),
        make_prompt(hf_model),
    )
    name = "language.blocks.1.mlp.down.weight"
    kept = [Probe("x", "locality", keep_prompts(one, prompt, [1]))]
    edit = Edit(other, {name: Change.dense(torch.ones(48, 74))})
    with pytest.raises(InputError, match="probe '.*another model object"):
        evaluate_edit(other, edit, kept)
    edit = Edit(one, {name: Change.dense(torch.ones(48, 74))})
    for _ in range(2):  # edits come and go, and leave the prompts as good as they were
        evaluate_edit(one, edit, kept)
    with torch.no_grad():
        one.get_parameter("language.blocks.0.mlp.down.weight").mul_(1.5)
    with pytest.raises(InputError, match="probe 'x'.*weights.*than an edit"):
        evaluate_edit(one, edit, kept)


def test_an_answer_of_several_tokens_must_be_given_as_a_whole(model, edit):
    """The model says "Boris" and no more: an answer that begins like that is not right."""
    boris = model.to_single_token("Boris")
    for expected, right in (
        ("Boris", 1.0),
        (["Boris"], 1.0),
        (np.int64(boris), 1.0),
        ([[boris]], 1.0),
        ("Boris Clara", 0.0),
        (["Boris Clara"], 0.0),
        ([[boris, model.to_single_token("Clara")]], 0.0),
    ):
        with as_users_run():
            result = evaluate_edit(model, edit, [Probe("x", "efficacy", model.prepare(WORDS[0]), expected)])
        assert result.accuracy.item() == right, expected
        assert result.measured.item() == "whole answer"
    assert evaluate_edit(model, edit, [Probe("x", "specificity", model.prepare(OTHERS))]).measured == "first token"


@torch.no_grad()
@pytest.mark.parametrize("layer", [None, 1, 2])
def test_whole_answers_are_measured_as_they_are_generated(layer):
    """Right is what greedy decoding says token by token; P is the product over the tokens; padding changes nothing."""
    hf_model = make_hf_model(n_key_value_heads=2)
    small = HookedLLaVA.from_hf(hf_model)
    prompt = make_prompt(hf_model, batch=4)
    for row in range(4):
        prompt["attention_mask"][row, len(prompt["attention_mask"][row]) - row :] = 0
    inputs = small.as_inputs(prompt)
    name = "language.embed.weight" if layer is None else f"language.blocks.{layer}.mlp.down.weight"
    noise = torch.randn(small.get_parameter(name).shape, generator=torch.Generator().manual_seed(1))
    edit = Edit(small, {name: Change.dense(0.2 * noise)})
    options = {"max_new_tokens": 3, "return_type": "tokens", "stop_at_eos": False}
    before = small.generate(inputs, **options)
    with edit.applied():
        after = small.generate(inputs, **options)
    # What is said after, the same with another end, what is said before, and one token of what is said after.
    expected = [after[0].tolist(), [*after[1, :2].tolist(), 7], before[2].tolist(), after[3, :1].tolist()]
    probes_ = [Probe("x", "efficacy", inputs, expected)]
    if layer is not None:
        probes_.append(Probe("kept", "efficacy", keep_prompts(small, inputs, [1, 2]), expected))
        probes_.append(Probe("turned", "efficacy", keep_prompts(small, inputs, [1])[[3, 2, 1, 0]], expected[::-1]))

    def of(said: torch.Tensor) -> tuple[float, float]:
        right, p = [], []
        for row, answer in enumerate(expected):
            right.append(said[row, : len(answer)].tolist() == answer)
            forced = teacher_forced(small, inputs[row], answer)
            logits = small(forced.inputs)[0, forced.positions].double().softmax(-1)
            p.append(float(logits[range(len(answer)), answer].prod()))
        return float(np.mean(right)), float(np.mean(p))

    without = of(before)
    with edit.applied():
        under = of(after)
    result = evaluate_edit(small, edit, probes_)
    for probe in range(len(probes_)):
        one = result.isel(probe=probe)
        assert (float(one.accuracy_before), float(one.accuracy)) == (without[0], under[0])
        assert float(one.probability_before) == pytest.approx(without[1], rel=1e-3)
        assert float(one.probability) == pytest.approx(under[1], rel=1e-3)
    assert under[0] in (0.5, 0.75)


@pytest.mark.parametrize(("seed", "n_new"), [(0, 1), (1, 3)])
@torch.no_grad()
def test_magnitudes_are_of_whole_answers_and_of_first_tokens(seed, n_new):
    """P(target) - P(answer before), the answer generated without the edit: plain forwards, a token at a time."""
    hf_model = make_hf_model(seed)
    small = HookedLLaVA.from_hf(hf_model)
    asked = [make_prompt(hf_model, seed=row) for row in range(3)]
    inputs = small.as_inputs({name: torch.cat([one[name] for one in asked]) for name in asked[0]})
    targets = [[17, 4], [9], [33, 2, 5]]
    weight = naive_edit.down_proj(hf_model, 1).weight
    noise = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    edit = Edit(small, {"language.blocks.1.mlp.down.weight": Change.dense(noise)})
    told = [naive_edit.greedy_answer(hf_model, one, n_new) for one in asked]
    expected: dict[str, list[float]] = {}
    for state, change in (("_before", 0.0), ("", 1.0)):
        weight += change * noise
        for row in zip(asked, targets, told, strict=True):
            expected.setdefault(f"magnitude{state}", []).append(naive_edit.magnitude(hf_model, *row))
            prompt, target, answer = row
            first = naive_edit.magnitude(hf_model, prompt, target[:1], answer[:1])
            expected.setdefault(f"first_token_magnitude{state}", []).append(first)
        weight -= change * noise
    probe = Probe("x", "generalisation", inputs, targets)
    kept = replace(probe, prompts=keep_prompts(small, inputs, [1], batch_size=2, max_new_tokens=n_new))
    for one in (probe, kept):
        found = evaluate_edit(small, edit, [one], max_new_tokens=n_new)
        for name, values in expected.items():
            assert found[name].item() == pytest.approx(np.mean(values), rel=1e-3, abs=1e-6), name
    assert found.n_forward == 3 * (3 if n_new == 1 else 5)
    turned = replace(kept, prompts=kept.prompts[[2, 1, 0]], expected=targets[::-1])
    assert evaluate_edit(small, edit, [turned]).magnitude.item() == pytest.approx(found.magnitude.item(), rel=1e-3)


def test_magnitudes_are_unknown_where_no_answer_is_to_change(model, edit):
    kept = keep_prompts(model, model.prepare(WORDS[0]), [3])
    result = evaluate_edit(model, edit, [*probes(model), Probe("kept", "efficacy", kept, "Boris")])
    assert np.isfinite(result.magnitude.values).tolist() == [True, True, False, False, False]
    assert np.isfinite(result.first_token_magnitude.values).tolist() == [True, True, False, False, False]
    assert "efficacy_magnitude" not in summary(result.isel(probe=[4]))
    # The end token is no part of an answer, and its own only where nothing is said.
    assert generated_answers(model, model.prepare(WORDS[0])).tolist() == [[model.to_single_token("Clara")]]
    says_nothing = Edit(model, {"language.unembed.weight": Change.dense(torch.zeros(217, 128))})
    with torch.no_grad(), says_nothing.applied():
        end = model.config.eos_token_ids[0]
        hook = [("hook_logits", lambda x, hook: torch.nn.functional.one_hot(torch.full(x.shape[:2], end), 217).float())]
        with model.hooks(fwd_hooks=hook):
            assert generated_answers(model, model.prepare(WORDS[:2])).tolist() == [[end], [end]]
    full = make_hf_model()
    small = HookedLLaVA.from_hf(full)
    long = make_prompt(full, n_images=0, n_text=small.config.language.n_ctx - 1)
    assert generated_answers(small, small.as_inputs(long)).shape == (1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_expected_answers_and_targets_are_cut_after_the_prompt(kind):
    talks = talking(kind)
    asked = talks.prepare(["What color is the star?", "Who made the red star?"])
    for word in ("2", " red", "Red star", "Red"):
        found = answer_tokens(talks, asked, word)
        prepared = prepare_request(talks, EditRequest(asked, word), "last")
        assert prepared.targets == tuple(one.ids for one in found)
        one = evaluate_edit(talks, Edit(talks, {}), [Probe("x", "efficacy", asked, word)])
        by_ids = evaluate_edit(talks, Edit(talks, {}), [Probe("x", "efficacy", asked, [list(f.ids) for f in found])])
        assert one.probability.item() == by_ids.probability.item() > 0
        rows = make_rows(talks, [prepared])
        assert [ids[ids >= 0].tolist() for ids in rows.ids[..., 0]] == [list(one.ids) for one in found]


def test_measures_have_the_same_names_every_time(model):
    before = model.language.blocks[3].mlp.down.weight.clone()
    requests = [EditRequest(f"Who made the {shape}?", "Boris") for shape in ("star", "ring")]

    def make(edited, request):
        return multedit(edited, request, layer=3, position="last")

    with pytest.raises(InputError, match=r"measure\(2\) returned \['n2'\] and measure\(1\) \['n1'\]"):
        sequential_edits(model, requests, make, lambda n: {f"n{n}": 1.0}, at=(1, 2))
    assert torch.equal(model.language.blocks[3].mlp.down.weight, before)


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
