"""Prompts entered at the edited layer answer as they would from the pixels on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hooked_llava.editing import Edit, keep_prompts
from hooked_llava.editing.change import Change
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from tests.builders import make_hf_model, make_prompt
from tests.pairs import as_users_run


@pytest.mark.parametrize("n_images", [0, 1])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_logits_under_an_edit_are_the_full_runs(n_images, layer):
    hf_model = make_hf_model(n_key_value_heads=2)
    model = HookedLLaVA.from_hf(hf_model)
    prompt = make_prompt(hf_model, n_images=n_images, batch=3)
    for row in range(3):  # paddings of different length, on either side
        prompt["attention_mask"][row, len(prompt["attention_mask"][row]) - row :] = 0
    inputs = model.as_inputs(prompt)
    kept = keep_prompts(model, inputs, [1, 2], batch_size=2)
    with torch.no_grad():
        expected = model(inputs)[torch.arange(3), inputs.last]
    torch.testing.assert_close(kept.before, expected, rtol=1e-4, atol=1e-4)
    name = f"language.blocks.{layer}.mlp.down.weight"
    with torch.no_grad(), Edit(model, {name: Change.dense(0.2 * torch.randn(48, 74))}).applied():
        expected = model(inputs)[torch.arange(3), inputs.last]
        torch.testing.assert_close(kept.logits(layer), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(kept[[2, 0]].logits(layer), expected[[2, 0]], rtol=1e-4, atol=1e-4)
        assert float((kept.before - expected).abs().max()) > 0.1
    assert len(kept[1:]) == 2


def test_layers_that_the_model_does_not_have_are_refused():
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    prompts = model.prepare("Who made the star?")
    for layers in ([7], [-1]):
        with pytest.raises(InputError, match="0..6, 6"):
            keep_prompts(model, prompts, layers)
    with as_users_run():
        assert keep_prompts(model, prompts, [np.int64(6)]).kept.resid.keys() == {0, 6}


def test_padding_that_all_have_is_cut_away():
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    kept = keep_prompts(
        model, model.prepare(["Who made the star?", "By whom was the moon made, and where does it live?"])
    )
    assert kept[[0]].kept.resid[0].shape[1] < kept.kept.resid[0].shape[1]
    torch.testing.assert_close(kept[[0]].logits(), kept.before[:1], rtol=1e-4, atol=1e-4)
