"""Fine-tuning as an edit: gradients of the weights as torch's own, and no trace on the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hooked_llava.editing import EditRequest, finetune
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from tests.builders import make_hf_model, make_prompt
from tests.pairs import as_users_run

# Few steps, on purpose: whether an edit landed is tested in test_multedit.py.
pytestmark = pytest.mark.filterwarnings("ignore::hooked_llava.editing.TargetNotReached")


@pytest.mark.parametrize(
    ("layers", "weights", "max_change"), [(1, "W_out", None), ([0, 2], "W_out", 0.003), ("all", "all", None)]
)
@pytest.mark.parametrize("n_images", [0, 1])
def test_it_is_adam_on_the_weights(layers, weights, max_change, n_images):
    hf_model, reference = make_hf_model(seed=2), make_hf_model(seed=2)
    prompt, target = make_prompt(hf_model, n_images=n_images), [17, 23]
    model = HookedLLaVA.from_hf(hf_model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    options = {"layers": layers, "weights": weights, "max_change": max_change}
    edit = finetune(model, EditRequest(model.as_inputs(prompt), target), **options, steps=4, lr=0.002, stop=1.1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())

    chosen = [layers] if isinstance(layers, int) else range(3) if layers == "all" else layers
    blocks = reference.model.language_model.layers
    if weights == "W_out":
        tuned = [blocks[i].mlp.down_proj.weight for i in chosen]
    else:
        tuned = [p for i in chosen for p in blocks[i].parameters() if p.ndim == 2]
    originals = [p.clone() for p in tuned]
    for p in tuned:
        p.requires_grad_()
    adam = torch.optim.Adam(tuned, lr=0.002)
    ids = torch.cat([prompt["input_ids"], torch.tensor([target])], dim=1)
    first = prompt["input_ids"].shape[1] - 1
    for _ in range(4):
        logits = reference(**{**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0]
        loss = -sum(logits.log_softmax(-1)[first + i, token] for i, token in enumerate(target))
        adam.zero_grad()
        loss.backward()
        adam.step()
        if max_change is not None:
            with torch.no_grad():
                for p, original in zip(tuned, originals, strict=True):
                    p.copy_(original + (p - original).clamp(-max_change, max_change))
    # Adam's first steps are lr long wherever there is a gradient at all, so one of 1e-9 may turn by rounding: few do
    turned = []
    for name, change in edit.changes.items():
        difference = HookedLLaVA.from_hf(reference).get_parameter(name) - before[name] - change.matrix()
        turned.append(float((difference.abs() > 2e-5).float().mean()))
    assert len(edit.changes) == len(tuned)
    assert max(turned) < 0.03
    with edit.applied(), torch.no_grad():
        torch.testing.assert_close(hf_model(**prompt).logits, reference(**prompt).logits, rtol=2e-2, atol=5e-2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_it_ends_when_the_answer_is_there():
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    ask = model.prepare("Who made the star?")
    before = model.generate(ask)
    edit = finetune(model, EditRequest("Who made the star?", "Boris"), layers=3, lr=1e-2, steps=60, stop=0.9)
    assert 1 < edit.method["steps"] < 60
    assert edit.requests[0]["target_probability"] >= 0.9
    with edit.applied():
        assert model.generate(ask) == "Boris"
    assert model.generate(ask) == before


def test_numbers_of_numpy_and_torch_are_numbers():
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    request = EditRequest("Who made the star?", "Boris")
    for layers in (np.int64(1), np.array([1]), torch.tensor([1]), torch.tensor(1), range(1, 2)):
        with as_users_run():
            edit = finetune(model, request, layers=layers, steps=np.int64(1), lr=np.float32(1e-3))
        assert (edit.layers, edit.method["layers"], type(edit.method["lr"])) == ([1], [1], float)


def test_in_inference_mode():
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    with torch.inference_mode():
        ask = model.prepare(["Who made the star?", "By whom was the star made?"])
        assert finetune(model, EditRequest(ask, "Boris"), layers=3, steps=2).layers == [3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 1.5}, r"layers=1\.5"),
        ({"layers": 1, "steps": 2.5}, r"steps.*2\.5.*whole number"),
        ({"layers": 6}, r"6.*layers.*5"),
        ({"layers": []}, r"\[\].*layers.*0\.\.5"),
        ({"layers": 1, "max_change": 0.0}, r"max_change=0\.0.*positive"),
        ({"layers": 1, "steps": 0}, "steps=0.*positive"),
    ],
)
def test_bad_options_are_refused(options, message):
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    with as_users_run(), pytest.raises(InputError, match=message):
        finetune(model, EditRequest("Who made the star?", "Boris"), **options)
