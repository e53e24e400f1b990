"""MEMIT is its algorithm, written out prompt by prompt on Hugging Face's model, and reverts like any other edit."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from hooked_llava.editing import Edit, EditRequest, key_covariance, key_covariances, memit, multedit, rome
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from tests.builders import make_hf_model, make_prompt
from tests.oracles import naive_edit
from tests.pairs import FAMILY, as_users_run

# Random models are searched in with few steps.
pytestmark = pytest.mark.filterwarnings("ignore::hooked_llava.editing.TargetNotReached")
SEARCH = {"steps": 6, "lr": 0.3, "clamp": 0.7, "weight_decay": 0.05}
LAYERS, LAM = [0, 1], 0.5


@cache
def pair(name: str = "llama-clip") -> tuple[Any, HookedLLaVA]:
    hf_model = make_hf_model(**FAMILY[name])
    return hf_model, HookedLLaVA.from_hf(hf_model)


@cache
def covariances(name: str = "llama-clip") -> list[Any]:
    hf_model, model = pair(name)
    return key_covariances(model, [make_prompt(hf_model, n_text=12, batch=3, seed=5)], LAYERS, damping=0.1)


@pytest.mark.parametrize(("name", "backs"), [("llama-clip", (1, 3)), ("phi-clip", (3, 1))])
def test_it_is_the_papers_algorithm(name, backs):
    hf_model, model = pair(name)
    prompts = [make_prompt(hf_model, n_images=n, n_text=8 + n, seed=n) for n in (1, 0)]
    places = [prompt["input_ids"].shape[1] - back for prompt, back in zip(prompts, backs, strict=True)]
    answers, z = [[17], [40, 41]], []
    for prompt, place, target in zip(prompts, places, answers, strict=True):
        hidden = naive_edit.leaving(hf_model, prompt, LAYERS[-1], place)
        how = {**SEARCH, "size": hidden.norm()}
        z.append(hidden + naive_edit.value_difference(hf_model, [prompt], LAYERS[-1], [place], target, **how))
    damped = [c.moment + 0.1 * c.moment.diagonal().mean() * torch.eye(len(c.moment)) for c in covariances(name)]
    expected = naive_edit.memit_changes(hf_model, prompts, places, z, LAYERS, damped, LAM)

    requests = []
    for prompt, place, target in zip(prompts, places, answers, strict=True):
        requests.append(EditRequest(model.as_inputs(prompt).with_spans(subject=[place]), target))
    edit = memit(model, requests, covariances(name)[::-1], position="subject", lam=LAM, stop=1.1, **SEARCH)
    assert edit.layers == edit.method["layers"] == LAYERS
    for change, theirs in zip(edit.changes.values(), expected, strict=True):
        assert change.rank == 2
        assert float((change.matrix() - theirs).abs().max()) <= 5e-3 * float(theirs.abs().max())
    # Half of what is missing is written first, and then the rest, so that z is nearly reached.
    hidden = [naive_edit.leaving(hf_model, one, LAYERS[-1], at) for one, at in zip(prompts, places, strict=True)]
    with edit.applied():
        after = [naive_edit.leaving(hf_model, one, LAYERS[-1], at) for one, at in zip(prompts, places, strict=True)]
    for before, now, target in zip(hidden, after, z, strict=True):
        assert float((target - now).norm()) < 0.5 * float((target - before).norm())


def test_one_layer_is_the_closed_form_of_rome():
    _, model = pair()
    hf_model, _ = pair()
    request = EditRequest(model.as_inputs(make_prompt(hf_model, seed=3)), [17])
    how = {"position": "last", "steps": 4, "weight_decay": 0.0, "clamp": 1e6, "lam": LAM}
    one = covariances()[1]
    both = [memit(model, request, [one], **how), rome(model, request, one, **how)]
    (ours,), (theirs,) = (edit.changes.values() for edit in both)
    torch.testing.assert_close(ours.matrix(), theirs.matrix(), rtol=1e-3, atol=1e-5)


def test_covariances_of_several_layers_are_each_layers_own():
    hf_model, model = pair()
    prompts = [make_prompt(hf_model, n_text=5, batch=2, seed=seed) for seed in (1, 2)]
    for layer, one in zip((2, 0), key_covariances(model, prompts, [2, 0]), strict=True):
        alone = key_covariance(model, prompts, layer)
        assert (one.layer, one.n_keys) == (layer, alone.n_keys)
        torch.testing.assert_close(one.moment, alone.moment)
    with pytest.raises(InputError, match=r"\[\].*0\.\.2"):
        key_covariances(model, prompts, [])
    with pytest.raises(InputError, match=r"\[7\].*-3\.\.2"):
        key_covariances(model, prompts, [1, 7])


def test_facts_are_changed_together_and_all_edits_revert_in_any_order(tmp_path):
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    seen = key_covariances(model, [model.prepare([f"Who made the {s}?" for s in ("ring", "moon")])], [2, 3, 4])
    requests = [EditRequest("Who made the star?", "Boris"), EditRequest("Who owns the ring?", "Hugo")]
    edit = memit(model, requests, seen, position="last", lam=1.0)
    assert (edit.layers, edit.landed, len(edit.requests)) == ([2, 3, 4], True, 2)
    edit.save(tmp_path / "memit.safetensors")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    ask = model.prepare(["Who made the star?", "Who owns the ring?"])
    with Edit.load(tmp_path / "memit.safetensors", model).applied():
        assert model.generate(ask) == ["Boris", "Hugo"]
    other = multedit(model, EditRequest("Who made the moon?", "Clara"), layer=3, position="last")
    for order in ((edit, other), (other, edit)):
        edit.apply(), other.apply()
        for one in order:
            one.revert()
        assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    with other.applied():  # and is computed on what other edits left
        third = memit(model, requests[0], seen[:2], position="last", lam=1.0)
    assert third.layers == [2, 3]


def test_what_does_not_fit_is_refused():
    hf_model, model = pair()
    request = EditRequest(model.as_inputs(make_prompt(hf_model)), 17)
    first, second = covariances()
    last = key_covariance(model, [make_prompt(hf_model)], 2)
    two_tokens = EditRequest(request.question, [17, 4])
    for asked, given, options, message in (
        (request, [], {}, r"covariance=.*\[\]"),
        (request, [first, second, first], {}, r"covariance=.*\[0, 1, 0\]"),
        (request, [first], {"lam": -1.0}, "lam=-1.0"),
        (request, [first], {"keys": "all"}, "keys.*'all'"),
        (request, [first], {"clamp": 0.0}, "clamp=0.0"),
        (two_tokens, [second, last], {}, "2 tokens.*last layer, 2"),
    ):
        with as_users_run(), pytest.raises(InputError, match=message):
            memit(model, asked, given, position="last", **{"steps": 1, **options})
    other = HookedLLaVA.from_hf(make_hf_model(seed=9))
    with pytest.raises(InputError, match="covariance"):
        memit(other, request, [first], position="last")
