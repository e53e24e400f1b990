"""Heads taken away, against full forward passes of Hugging Face's model with hooks on its output projections."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava.analysis import ablate_heads, heads_by_layer, nested_sets, random_heads
from hooked_llava.errors import InputError, SpanError
from hooked_llava.readout import metrics
from tests.oracles.plain_outputs import head_values, without_heads
from tests.pairs import as_users_run, batch, pair


def exact() -> Any:
    return pair("grouped", torch.float64)


def three() -> list[dict[str, torch.Tensor]]:
    return [exact().prompt(), exact().prompt(n_text=4, seed=1), exact().prompt(n_text=5, seed=2)]


def in_transformers(heads: list[tuple[int, int]], replace: str, where: list[list[int]]) -> torch.Tensor:
    """Logits [prompt, d_vocab] of Hugging Face's model, prompt by prompt; a mean is over the positions of all prompts."""
    hf, values = exact().hf, None
    if replace == "mean":
        held = [head_values(hf, prompt) for prompt in three()]
        values = {
            (layer, head): torch.cat([one[layer][at, head] for one, at in zip(held, where, strict=True)]).mean(0)
            for layer, head in heads
        }
    return torch.stack([without_heads(hf, p, heads, at, values) for p, at in zip(three(), where, strict=True)])


@pytest.mark.parametrize("replace", ["mean", "zero"])
def test_sets_of_heads_are_replaced_at_the_last_position(replace: Any) -> None:
    models = exact()
    prompts, rows = batch(three(), "right"), torch.arange(3)
    last = [[prompt["input_ids"].shape[1] - 1] for prompt in three()]
    sets = {"one": [(1, 2)], "three": [(0, 0), (1, 2), (2, 5)]}
    found = ablate_heads(models.ours, prompts, sets, [7, 8, 9], replace=replace)
    assert found["set"].values.tolist() == ["none", "one", "three"]
    assert found.n_heads.values.tolist() == [0, 1, 3]
    for name, heads in {"none": [], **sets}.items():
        logits = in_transformers(heads, replace, last)
        expected = logits.log_softmax(-1)[rows, torch.tensor([7, 8, 9])]
        np.testing.assert_allclose(found.log_probability.sel(set=name), expected, atol=2e-5)
        right = logits.argmax(-1) == torch.tensor([7, 8, 9])
        np.testing.assert_array_equal(found.correct.sel(set=name), right)


@pytest.mark.parametrize("replace", ["mean", "zero"])
def test_heads_are_replaced_at_a_span_of_each_prompt_and_a_metric_is_read_beside(replace: Any) -> None:
    models = exact()
    prompts = batch(three(), "right")
    where = [[1, 2, 3, 4, prompt["input_ids"].shape[1] - 1] for prompt in three()]  # <s> and four patches
    heads = [(0, 0), (1, 2)]
    own = [metrics.logit_difference(token, 3) for token in (7, 8, 9)]
    how: dict[str, Any] = {"replace": replace, "positions": "image|last"}
    found = ablate_heads(models.ours, prompts, {"two": heads}, [7, 8, 9], metric=own, **how)
    for name, pairs in {"none": [], "two": heads}.items():
        logits = in_transformers(pairs, replace, where)
        expected = [float(row[token] - row[3]) for row, token in zip(logits, (7, 8, 9), strict=True)]
        np.testing.assert_allclose(found.metric.sel(set=name), expected, atol=2e-5)
        log_p = logits.log_softmax(-1)[torch.arange(3), torch.tensor([7, 8, 9])]
        np.testing.assert_allclose(found.log_probability.sel(set=name), log_p, atol=2e-5)
    one = ablate_heads(models.ours, prompts, {"two": heads}, [7, 8, 9], metric=own[1], **how)
    np.testing.assert_allclose(one.metric[:, 1], found.metric[:, 1], atol=1e-6)
    assert found.attrs["metric"] == one.attrs["metric"] == "logit_difference"
    assert (found.attrs["answer_ids"], one.attrs["answer_ids"]) == ([[7], [8], [9]], [8])


def test_a_set_costs_a_forward_pass_at_most() -> None:
    models = exact()
    sets = heads_by_layer(models.ours)
    assert list(sets) == ["layer 0", "layer 1", "layer 2"]
    assert sets["layer 1"] == [(1, head) for head in range(6)]
    everywhere = ablate_heads(models.ours, models.prompt(), sets, replace="zero", positions=slice(None))
    at_last = ablate_heads(models.ours, models.prompt(), sets, replace="zero")
    assert everywhere.n_forward == at_last.n_forward == 1
    assert 0 < at_last.work < everywhere.work < len(sets)
    assert ablate_heads(models.ours, models.prompt(), sets, positions="image").n_forward == 2, "one for the mean"


def test_the_models_own_answers_are_right_without_ablation_and_the_mean_may_come_from_elsewhere() -> None:
    models = exact()
    found = ablate_heads(models.ours, models.prompt(batch=3), [(1, 2)])
    assert found.correct.sel(set="none").all()
    one = models.prompt()
    with_reference = ablate_heads(models.ours, one, [(1, 2)], reference=models.prompt(batch=3, seed=5))
    assert with_reference.sizes["prompt"] == 1
    own = ablate_heads(
        models.ours, one, [(1, 2)], reference={k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in one.items()}
    )
    change = own.log_probability.sel(set="heads") - own.log_probability.sel(set="none")
    assert abs(change).item() < 1e-6, "its own mean changes nothing"
    assert abs((with_reference.log_probability - own.log_probability).sel(set="heads")).item() > 1e-4


def test_rankings() -> None:
    model = exact().ours
    ranking = random_heads(model, 3)
    assert sorted(ranking) == [(layer, head) for layer in range(3) for head in range(6)]
    assert ranking == random_heads(model, 3) != random_heads(model, 4)
    assert nested_sets("top", ranking, (1, 3))["top 3"] == ranking[:3]
    with pytest.raises(InputError, match=r"Sizes \[19\].*18 heads.*1 to 18"):
        nested_sets("top", ranking, (1, 19))


def test_what_does_not_fit_is_refused() -> None:
    models = exact()
    with pytest.raises(InputError, match="replace='mean'.*1 prompt.*reference="):
        ablate_heads(models.ours, models.prompt(), [(1, 2)])
    with pytest.raises(InputError, match="heads.*'none'.*another name"):
        ablate_heads(models.ours, models.prompt(batch=2), {"none": [(1, 0)], "a": [(1, 1)]})
    with pytest.raises(InputError, match=r"heads \[\(.*\)\]; expected"):
        ablate_heads(models.ours, models.prompt(batch=2), {"a": [(3, 0)]})
    with pytest.raises(SpanError, match="questoin"):
        ablate_heads(models.ours, models.prompt(batch=2), [(1, 0)], positions="questoin")
    three = [metrics.probability(token) for token in (1, 2, 3)]
    with pytest.raises(InputError, match=r"metric= has 3 metrics for 2 prompts"):
        ablate_heads(models.ours, models.prompt(batch=2), [(1, 0)], metric=three)
    with pytest.raises(InputError, match=r"metric returned shape \(2,\)"):
        ablate_heads(models.ours, models.prompt(batch=2), [(1, 0)], metric=lambda logits: logits.mean((0, 2)))
    with as_users_run(), pytest.raises(InputError, match="replace='median'"):
        ablate_heads(models.ours, models.prompt(batch=2), [(1, 2)], replace="median")
