"""Attribution is the change times the gradient, and agrees with exact patching where that is first order."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from hooked_llava.analysis.activation_patching import activation_patching
from hooked_llava.analysis.attribution_patching import agreement, attribution_patching, edge_attribution
from hooked_llava.analysis.path_patching import path_patching
from hooked_llava.errors import InputError
from hooked_llava.readout.metrics import log_probability, rank, teacher_forced
from tests.analysis.test_activation_patching import metric, prompts
from tests.oracles.naive_patching import activations, edges, gradient_at
from tests.pairs import as_users_run, pair


def near_prompts(geometry: str = "plain", step: float = 1e-5) -> tuple[Any, Any, Any]:
    """Two images that hardly differ, in double precision: there first order is all there is."""
    models = pair(geometry, torch.float64)
    clean, near = models.prompt(seed=1, n_text=4), models.prompt(seed=1, n_text=4)
    noise = torch.randn(near["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    near["pixel_values"] = near["pixel_values"] + step * noise.double()
    return models.ours, models.ours.as_inputs(clean), models.ours.as_inputs(near)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_change_times_gradient_at_every_hook(direction: Any) -> None:
    model, clean, corrupted = prompts("grouped")
    source, base = (clean, corrupted) if direction == "denoise" else (corrupted, clean)
    hooks = ["resid_pre", "mlp_out", "z", "k", "q_input", "mlp.post", "hook_embed"]
    found = attribution_patching(model, clean, corrupted, hooks=hooks, metric=metric, direction=direction)
    assert found["z"].dims == ("layer", "position", "head")
    assert found["mlp_out"].dims == ("layer", "position")
    assert found["hook_embed"].dims == ("position",)
    for hook in hooks:
        for i, name in enumerate(model.hooks_table.resolve(hook)):
            there, here = (activations(model, inputs, [name])[name] for inputs in (source, base))
            if hook == "q_input":  # cut off there, the other branch of the fork would be, too
                continue
            expected = ((there - here) * gradient_at(model, base, name, metric)).sum(-1)[0].numpy()
            row = found[hook] if hook == "hook_embed" else found[hook][i]
            np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("hook", ["z", "mlp_out", "q_input", "v"])
def test_is_exact_to_first_order(hook: str) -> None:
    model, clean, near = near_prompts()
    exact = activation_patching(model, clean, near, hook=hook, positions=[3, -1], metric=lambda x: 1e5 * metric(x))
    estimate = attribution_patching(model, clean, near, hooks=[hook], metric=lambda x: 1e5 * metric(x))[hook]
    estimate = estimate.sel(position=exact.position.values)
    scale = float(abs(estimate).max())
    np.testing.assert_allclose(exact - exact.corrupted, estimate, atol=2e-3 * scale)
    assert scale > 1e-4


def test_integrated_gradients_are_complete() -> None:
    model, clean, near = near_prompts(step=0.3)
    found = attribution_patching(model, clean, near, hooks=["hook_embed"], metric=metric, steps=8)
    assert float(found["hook_embed"].sum()) == pytest.approx(found.clean - found.corrupted, rel=0.01)
    plain = attribution_patching(model, clean, near, hooks=["hook_embed"], metric=metric)
    assert float(plain["hook_embed"].sum()) != pytest.approx(plain.clean - plain.corrupted, rel=0.1)


@pytest.mark.parametrize(
    ("geometry", "steps"), [("plain", 0), ("grouped", 0), ("biases", 0), ("plain", 3), ("grouped", 2)]
)
def test_every_edge_is_the_change_times_the_gradient_at_the_readers_own_copy(geometry: str, steps: int) -> None:
    model, clean, corrupted = prompts(geometry)
    found = edge_attribution(model, clean, corrupted, metric=metric, steps=steps)
    assert (found.n_forward, found.n_backward) == (2 + steps, max(1, steps))
    expected = edges(model, clean, corrupted, metric, steps)
    for (sender, receiver), value in expected.items():
        row = found.sel(receiver=receiver)
        layer, _, head = sender.removesuffix(" mlp").removeprefix("L").partition("H")
        own = row.embed if sender == "embed" else row.heads[int(layer), int(head)] if head else row.mlps[int(layer)]
        assert float(own) == pytest.approx(value, rel=1e-3, abs=1e-5), (sender, receiver)
    numbers = sum(int(np.isfinite(found[name]).sum()) for name in ("heads", "mlps", "embed"))
    assert numbers == len(expected)


def test_edges_along_a_path_are_the_mean_over_its_points() -> None:
    model, clean, near = near_prompts(step=0.3)
    found = edge_attribution(model, clean, near, metric=metric, steps=4)
    nodes = attribution_patching(model, clean, near, hooks=["z", "hook_embed"], metric=metric, steps=4)
    np.testing.assert_allclose(found.heads.sum("receiver"), nodes["z"].sum("position"), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.embed.sum("receiver"), nodes["hook_embed"].sum("position"), rtol=1e-5, atol=1e-6)
    plain = edge_attribution(model, clean, near, metric=metric)
    assert not np.allclose(found.heads, plain.heads, rtol=1e-3, equal_nan=True)


def test_edges_hold_the_gradients_of_one_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clean, corrupted = prompts()
    module = sys.modules[edge_attribution.__module__]
    of_layer, made = module._reading, []

    def watched(*args: Any) -> torch.Tensor:
        assert not any(reference() is not None for reference in made)
        found = of_layer(*args)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(module, "_reading", watched)
    edge_attribution(model, clean, corrupted, metric=metric)
    assert len(made) == model.cfg.n_layers


def test_edges_of_a_sender_sum_to_the_sender() -> None:
    model, clean, corrupted = prompts("grouped")
    nodes = attribution_patching(model, clean, corrupted, hooks=["z", "mlp_out", "hook_embed"], metric=metric)
    edges = edge_attribution(model, clean, corrupted, metric=metric)
    assert edges.heads.dims == ("receiver", "layer", "head")
    close = {"rtol": 1e-3, "atol": 1e-3}
    np.testing.assert_allclose(edges.heads.sum("receiver"), nodes["z"].sum("position"), **close)
    np.testing.assert_allclose(edges.mlps.sum("receiver"), nodes["mlp_out"].sum("position"), **close)
    np.testing.assert_allclose(edges.embed.sum("receiver"), nodes["hook_embed"].sum("position"), **close)


@pytest.mark.parametrize("senders", ["heads", "mlps"])
def test_edges_are_path_patching_to_first_order(senders: Any) -> None:
    model, clean, near = near_prompts("grouped")
    receivers = ["logits", ("mlp", 1), ("q", 2, 3), ("k", 1, 1), ("v", 2, 0)]
    scaled = lambda logits: 1e5 * metric(logits)  # noqa: E731
    exact = path_patching(model, clean, near, receivers=receivers, senders=senders, metric=scaled)
    edges = edge_attribution(model, clean, near, metric=scaled)[senders].sel(receiver=exact.receiver)
    assert (np.isnan(exact) == np.isnan(edges)).all()
    scale = float(abs(edges).max())
    np.testing.assert_allclose(exact - exact.corrupted, edges, atol=2e-3 * scale)
    assert agreement(exact, edges) > 0.99


def test_pairs_and_text_only() -> None:
    model, clean, corrupted = prompts(n_images=0, batch=2)
    found = attribution_patching(model, clean, corrupted, hooks=["z"], metric=metric)
    assert found["z"].dims == ("pair", "layer", "position", "head")
    alone = attribution_patching(model, clean[1], corrupted[1], hooks=["z"], metric=metric)
    np.testing.assert_allclose(found["z"][1], alone["z"], rtol=1e-5, atol=1e-6)
    assert edge_attribution(model, clean, corrupted, metric=metric).mlps.dims == ("pair", "receiver", "layer")


def test_agreement_is_spearmans_correlation() -> None:
    coords = {"layer": range(5)}
    one = xr.DataArray([3.0, 1.0, 4.0, 1.0, np.nan], dims="layer", coords=coords)
    other = xr.DataArray([10.0, 2.0, 30.0, 40.0, 5.0], dims="layer", coords=coords)
    # ranks (3, 1.5, 4, 1.5) and (2, 1, 3, 4) over the four cells that both have
    assert agreement(one, other) == pytest.approx(np.corrcoef([3, 1.5, 4, 1.5], [2, 1, 3, 4])[0, 1])
    assert agreement(one, one[:3]) == pytest.approx(1.0)
    assert np.isnan(agreement(one, one * 0))
    with pytest.raises(InputError, match=r"axes \(.* and \(.*same axes"):
        agreement(one, one.rename(layer="head"))


def test_cells_that_differ_by_rounding_alone_tie() -> None:
    exact = xr.DataArray([2.0, 2.0 + 1e-7, 2.0 - 2e-7, 5.0, -1.0], dims="layer", coords={"layer": range(5)})
    estimate = exact.copy(data=[3.0, 1.0, 2.0, 9.0, -4.0])
    assert agreement(exact, estimate) == agreement(exact.round(3), estimate) != 1
    assert agreement(estimate, exact) == pytest.approx(agreement(exact, estimate))
    assert agreement(exact * 1e-8, estimate) == agreement(exact, estimate)  # it is the range that counts
    assert agreement(exact + 1e6, estimate + 1e9) == agreement(exact, estimate)
    tenth = exact.copy(data=[2.0, 2.1, 1.9, 5.0, -1.0])
    assert agreement(tenth, tenth) == pytest.approx(1.0)
    assert agreement(tenth, estimate) != agreement(exact, estimate)


def test_agreement_with_exact_patching_on_request() -> None:
    model, clean, near = near_prompts(step=1e-2)
    exact = activation_patching(model, clean, near, hook="mlp_out", metric=metric)
    estimate = attribution_patching(model, clean, near, hooks=["mlp_out"], metric=metric)["mlp_out"]
    assert agreement(exact, estimate) > 0.9


def test_what_does_not_fit_is_refused() -> None:
    model, clean, corrupted = prompts()
    for hook in ("hook_image_embed", "pattern", "ln_final.hook_normalized", "hook_text_embed"):
        with pytest.raises(InputError, match="use activation_patching"):
            attribution_patching(model, clean, corrupted, hooks=[hook])
    with pytest.raises(InputError, match="metric.*no gradient"):
        attribution_patching(model, clean, corrupted, metric=rank(4))
    with pytest.raises(InputError, match="metric.*no gradient"):
        attribution_patching(model, clean, corrupted, metric=lambda logits: logits[..., 4].detach())
    with pytest.raises(InputError, match="metric.*returned float"):
        attribution_patching(model, clean, corrupted, metric=lambda logits: float(logits[..., 4].detach()))
    with pytest.raises(InputError, match=r"shape \(2,\).*\(99,\).*run"):
        attribution_patching(model, clean, corrupted, metric=lambda logits: logits[..., :2])
    with pytest.raises(InputError, match="hooks=\\[\\] names no hook"):
        attribution_patching(model, clean, corrupted, hooks=[])
    for steps in (-1, 1.5):
        with as_users_run(), pytest.raises(InputError, match=f"steps={steps}"):
            attribution_patching(model, clean, corrupted, metric=log_probability(4), steps=steps)


def test_pairs_of_different_length_stack_as_edges_only() -> None:
    model, clean, corrupted = prompts()
    _, *longer = prompts(n_text=6)
    sides = [clean, longer[0]], [corrupted, longer[1]]
    with pytest.raises(InputError, match=r"'position': 9.*'position': 11.* do not stack"):
        attribution_patching(model, *sides, hooks="mlp_out", metric=metric)
    assert edge_attribution(model, *sides, metric=metric).sizes["pair"] == 2


@pytest.mark.parametrize("steps", [0, 2])
def test_reading_an_answer_of_several_tokens(steps: int) -> None:
    model, clean, corrupted = prompts()
    forced = [teacher_forced(model, inputs, [8, 9]) for inputs in (clean, corrupted)]
    bases, score, where = [f.inputs for f in forced], forced[0].metric, forced[0].positions
    options = {"metric": score, "logit_positions": where, "steps": steps}
    found = attribution_patching(model, *bases, hooks=["z", "mlp_out", "hook_embed"], **options)
    with torch.no_grad():
        assert found.clean == pytest.approx(float(score(model(bases[0])[0, where])), abs=1e-4)
    if not steps:
        name = "blocks.1.hook_mlp_out"
        there, here = (activations(model, inputs, [name])[name] for inputs in bases)
        expected = ((there - here) * gradient_at(model, bases[1], name, score, where)).sum(-1)[0]
        np.testing.assert_allclose(found["mlp_out"][1], expected, rtol=1e-3, atol=1e-4)
    edges = edge_attribution(model, *bases, **options)
    np.testing.assert_allclose(edges.heads.sum("receiver"), found["z"].sum("position"), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(edges.embed.sum("receiver"), found["hook_embed"].sum("position"), rtol=1e-3, atol=1e-5)


def test_one_hook_may_stand_by_itself() -> None:
    model, clean, corrupted = prompts()
    assert list(attribution_patching(model, clean, corrupted, hooks="resid_pre", metric=metric)) == ["resid_pre"]
