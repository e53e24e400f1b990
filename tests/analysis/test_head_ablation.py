"""Heads taken away at the answer's position, against plain hooks and full forward passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava.analysis import ablate_heads, heads_by_layer, nested_sets, random_heads
from hooked_llava.errors import InputError, SpanError
from hooked_llava.readout import metrics
from tests.pairs import as_users_run, batch, pair


def exact() -> Any:
    return pair("grouped", torch.float64)


def by_hooks(models: Any, prompts: Any, heads: list[tuple[int, int]], means: Any, where: Any = None) -> torch.Tensor:
    """Logits at the last position with the heads' z replaced there, or at the rows of `where`, [prompt, d_vocab]."""
    inputs = models.ours.as_inputs(prompts)

    def swap(layer: int, head: int) -> Any:
        def fn(z: torch.Tensor, hook: Any) -> None:
            for row, last in enumerate(inputs.last.tolist()):
                z[row, last if where is None else where[row], head] = 0 if means is None else means[layer][head]

        return (f"blocks.{layer}.attn.hook_z", fn)

    logits = models.ours.run_with_hooks(inputs, fwd_hooks=[swap(*pair) for pair in heads])
    return logits[torch.arange(len(inputs)), inputs.last]


@pytest.mark.parametrize("replace", ["mean", "zero"])
def test_sets_of_heads_are_replaced_at_the_last_position(replace: Any) -> None:
    models = exact()
    prompts = batch([models.prompt(), models.prompt(n_text=4, seed=1), models.prompt(n_text=5, seed=2)], "right")
    inputs = models.ours.as_inputs(prompts)
    _, cache = models.ours.run_with_cache(inputs, names_filter="z")
    rows = torch.arange(3)
    means = [cache["z", i][rows, inputs.last].mean(0) for i in range(3)] if replace == "mean" else None
    sets = {"one": [(1, 2)], "three": [(0, 0), (1, 2), (2, 5)]}
    found = ablate_heads(models.ours, prompts, sets, [7, 8, 9], replace=replace)
    assert found["set"].values.tolist() == ["none", "one", "three"]
    assert found.n_heads.values.tolist() == [0, 1, 3]
    for name, heads in {"none": [], **sets}.items():
        logits = by_hooks(models, prompts, heads, means)
        expected = logits.log_softmax(-1)[rows, torch.tensor([7, 8, 9])]
        np.testing.assert_allclose(found.log_probability.sel(set=name), expected.detach(), atol=1e-6)
        right = logits.argmax(-1) == torch.tensor([7, 8, 9])
        np.testing.assert_array_equal(found.correct.sel(set=name), right)


@pytest.mark.parametrize("replace", ["mean", "zero"])
def test_heads_are_replaced_at_a_span_of_each_prompt_and_a_metric_is_read_beside(replace: Any) -> None:
    models = exact()
    prompts = batch([models.prompt(), models.prompt(n_text=4, seed=1), models.prompt(n_text=5, seed=2)], "right")
    inputs = models.ours.as_inputs(prompts)
    where = [m.span("image|last").tolist() for m in inputs.token_maps]
    _, cache = models.ours.run_with_cache(inputs, names_filter="z")
    taken = [torch.cat([cache["z", i][row, at].detach() for row, at in enumerate(where)]) for i in range(3)]
    means = [z.mean(0) for z in taken] if replace == "mean" else None
    heads = [(0, 0), (1, 2)]
    own = [metrics.logit_difference(token, 3) for token in (7, 8, 9)]
    how: dict[str, Any] = {"replace": replace, "positions": "image|last"}
    found = ablate_heads(models.ours, prompts, {"two": heads}, [7, 8, 9], metric=own, **how)
    for name, pairs in {"none": [], "two": heads}.items():
        logits = by_hooks(models, prompts, pairs, means, where).detach()
        expected = [float(row[token] - row[3]) for row, token in zip(logits, (7, 8, 9), strict=True)]
        np.testing.assert_allclose(found.metric.sel(set=name), expected, atol=1e-6)
        log_p = logits.log_softmax(-1)[torch.arange(3), torch.tensor([7, 8, 9])]
        np.testing.assert_allclose(found.log_probability.sel(set=name), log_p.detach(), atol=1e-6)
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
