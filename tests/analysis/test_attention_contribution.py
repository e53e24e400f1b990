"""Attention contributions against A v W_O written out with loops, and the AUROC of low scores for wrong answers."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_llava.analysis.attention_contribution import attention_contribution, error_auroc
from hooked_llava.errors import InputError, SpanError
from hooked_llava.results.arrays import load, save
from tests.pairs import as_users_run, pair

CONSTRAINT = [6, 7]


def messages(model: Any, inputs: Any, layer: int, query: int) -> torch.Tensor:
    """Head by head and key by key, pattern times value times output weights, [head, key, d_model]."""
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=["pattern", "v"])
    pattern, value = cache["pattern", layer][0], cache["v", layer][0]
    n_heads, n = pattern.shape[0], inputs.shape[1]
    per_group = n_heads // value.shape[1]
    out = torch.zeros(n_heads, n, model.cfg.d_model)
    for h, k in product(range(n_heads), range(n)):
        out[h, k] = pattern[h, query, k] * (value[k, h // per_group] @ model.blocks[layer].attn.W_O[h])
    return out


def setting(geometry: str = "grouped", **options: Any) -> tuple[Any, Any]:
    models = pair(geometry)
    return models.ours, models.ours.as_inputs(models.prompt(**options))


@pytest.mark.parametrize("by_head", [False, True])
def test_norms_of_messages(by_head: bool) -> None:
    model, inputs = setting()
    found = attention_contribution(model, inputs, CONSTRAINT, by_head=by_head)
    last, image = inputs.shape[1] - 1, list(inputs.token_map["image"])
    head = ("head",) * by_head
    assert found.constraint_to_last.dims == ("layer", *head, "source")
    assert found.image_to_constraint.dims == ("layer", *head, "image", "patch_row", "patch_col")
    assert found.source.values.tolist() == CONSTRAINT
    for layer in range(model.cfg.n_layers):
        to_last, to_constraint = (messages(model, inputs, layer, query) for query in (last, CONSTRAINT[-1]))
        if not by_head:
            to_last, to_constraint = to_last.sum(0), to_constraint.sum(0)
        wanted = to_last[..., CONSTRAINT, :].norm(dim=-1).detach()
        np.testing.assert_allclose(found.constraint_to_last.sel(layer=layer), wanted, rtol=1e-4, atol=1e-5)
        wanted = to_constraint[..., image, :].norm(dim=-1).detach()
        patches = found.image_to_constraint.sel(layer=layer).values.reshape(wanted.shape)
        np.testing.assert_allclose(patches, wanted, rtol=1e-4, atol=1e-5)


def test_signed_logits_of_messages_add_up_over_heads() -> None:
    model, inputs = setting()
    found = attention_contribution(model, inputs, CONSTRAINT, measure="logit", answer=17)
    heads = attention_contribution(model, inputs, CONSTRAINT, measure="logit", answer=17, by_head=True)
    for name in ("constraint_to_last", "image_to_constraint"):
        np.testing.assert_allclose(heads[name].sum("head"), found[name], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter="ln_final.hook_scale")
    direction = model.ln_final.weight * model.W_U[:, 17] / cache["ln_final.hook_scale"][0, -1]
    wanted = (messages(model, inputs, 1, inputs.shape[1] - 1).sum(0) @ direction)[CONSTRAINT].detach()
    np.testing.assert_allclose(found.constraint_to_last.sel(layer=1), wanted, rtol=1e-4, atol=1e-5)
    assert (found.constraint_to_last < 0).any()


def test_confidence_is_the_probability_of_the_models_own_answer(tmp_path: Any) -> None:
    model, inputs = setting("plain")
    found = attention_contribution(model, inputs, [[6], [7, 8]])
    assert found.confidence == pytest.approx(float(model(inputs)[0, -1].detach().softmax(-1).max()), abs=1e-6)
    assert found.constraint_positions == [[6], [7, 8]]
    save(found, tmp_path / "c.safetensors")
    assert load(tmp_path / "c.safetensors").identical(found)


def test_text_only_and_several_images() -> None:
    model, inputs = setting("plain", n_images=0)
    assert list(attention_contribution(model, inputs, [2]).data_vars) == ["constraint_to_last"]
    model, inputs = setting("full", n_images=2)
    found = attention_contribution(model, inputs, [inputs.shape[1] - 2])
    assert found.image_to_constraint.sizes["image"] == 2
    second = messages(model, inputs, 0, inputs.shape[1] - 2).sum(0)[inputs.token_map.patches(1).tolist()]
    np.testing.assert_allclose(
        found.image_to_constraint.sel(layer=0).values[1].ravel(), second.norm(dim=-1).detach(), rtol=1e-4
    )


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=12))
def test_auroc_is_the_share_of_pairs_in_the_right_order(answers: list[tuple[int, bool]]) -> None:
    scores, correct = zip(*answers, strict=True)
    right, wrong = ([s for s, ok in answers if ok is which] for which in (True, False))
    if not right or not wrong:
        with pytest.raises(InputError, match=f"{len(right)} right and {len(wrong)} wrong"):
            error_auroc(scores, correct)
        return
    pairs = [1.0 if r > w else 0.5 if r == w else 0.0 for r in right for w in wrong]
    assert error_auroc(scores, correct) == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"measure": "size"}, InputError, "measure='size'.*'norm'.*'logit'"),
        ({"constraint": [99]}, InputError, r"positions \[99\].*prompt; expected 0 to"),
        ({"constraint": "star"}, SpanError, "no tokenizer"),
        ({"answer": 999}, InputError, "999.*vocabulary"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model, inputs = setting("plain")
    with as_users_run(), pytest.raises(error, match=message):
        attention_contribution(model, inputs, **{"constraint": CONSTRAINT, **options})


def test_several_prompts_are_refused() -> None:
    model, inputs = setting("plain", batch=2)
    with pytest.raises(InputError, match="attention_contribution.*one prompt, got 2"):
        attention_contribution(model, inputs, CONSTRAINT)
