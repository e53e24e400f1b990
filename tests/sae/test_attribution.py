"""Attribution to features, against a full forward pass for every feature at every token."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from hooked_llava import HookedLLaVA
from hooked_llava.errors import InputError
from hooked_llava.readout.answer import append_tokens
from hooked_llava.results import load, save
from hooked_llava.sae import SAEConfig, SparseAutoencoder, feature_attribution, feature_maps, pooled
from hooked_llava.toy.images import image_path
from tests.builders import make_hf_model, make_prompt
from tests.oracles.naive_attribution import all_features, lost_without, preference
from tests.pairs import as_users_run
from tests.sae.test_autoencoder import make_sae

HOOK = "blocks.1.hook_resid_post"
ANSWERS: dict[str, tuple[Any, Any, tuple[list[int], list[int]]]] = {
    "one token each": (31, 44, ([31], [44])),
    "without a baseline": (31, None, ([31], [])),
    "several tokens": ([31, 7, 50], [44, 12], ([31, 7, 50], [44, 12])),
}


@cache
def model() -> HookedLLaVA:
    return HookedLLaVA.from_hf(make_hf_model(dtype=torch.float64))


@cache
def inputs(seed: int = 0) -> Any:
    return model().as_inputs(make_prompt(make_hf_model(dtype=torch.float64), seed=seed))


def autoencoder(hook: str = HOOK, **more: Any) -> Any:
    return make_sae(d_in=48, d_sae=96, k=3, hook=hook, **more).to(torch.float64)


def features_at(sae: Any, prompt: Any) -> torch.Tensor:
    held: Any = model().run_with_cache(prompt, names_filter=sae.cfg.hook)[1]
    return all_features(sae, held[sae.cfg.hook][0].flatten(1))


def by_place(found: xr.Dataset, name: str = "attribution") -> dict[tuple[int, int], float]:
    places = zip(found.position.values.tolist(), found.sae_feature.values.tolist(), strict=True)
    return dict(zip(places, found[name].values.tolist(), strict=True))


@pytest.mark.parametrize(
    ("kind", "hook"),
    [*((kind, HOOK) for kind in ANSWERS), ("one token each", "blocks.0.attn.hook_z"), ("several tokens", "hook_embed")],
)
def test_every_feature_at_every_token(kind, hook):
    """Exact: a pass without it. Gradient: the slope of a pass with a little less of it."""
    answer, baseline, ids = ANSWERS[kind]
    sae = autoencoder(hook)
    active = features_at(sae, inputs())
    exact = feature_attribution(model(), sae, inputs(), answer, baseline, method="exact", top=10)
    measured, slopes = by_place(exact), by_place(exact, "gradient")
    little = 1e-5
    for place in list(measured)[::4]:
        z = float(active[place])
        assert z > 0
        lost = lost_without(model(), inputs(), hook, sae, place, z, *ids)
        slope = lost_without(model(), inputs(), hook, sae, place, little * z, *ids) / little
        assert measured[place] == pytest.approx(lost, rel=1e-6, abs=1e-8)
        assert slopes[place] == pytest.approx(slope, rel=1e-3, abs=1e-5)
    everything = feature_attribution(model(), sae, inputs(), answer, baseline)
    found = by_place(everything)
    assert sorted(found) == sorted(map(tuple, active.nonzero().tolist()))
    assert all(found[place] == pytest.approx(value) for place, value in slopes.items())
    activations = by_place(everything, "activation")
    assert all(activations[place] == pytest.approx(float(active[place])) for place in activations)
    sizes = np.abs(everything.attribution.values)
    assert (np.diff(sizes) <= 0).all()
    assert set(slopes) == set(list(found)[:10])
    assert everything.attrs["preference"] == pytest.approx(preference(model(), inputs(), hook, lambda x: None, *ids))


def test_a_reference_is_what_off_means():
    """A feature that the reference has, and the prompt has not, argues by its absence."""
    sae, other = autoencoder(), inputs(seed=3)
    change = features_at(sae, inputs()) - features_at(sae, other)
    found = feature_attribution(model(), sae, inputs(), 31, 44, method="exact", top=30, reference=other)
    measured = by_place(found)
    for place in list(measured)[::10]:
        lost = lost_without(model(), inputs(), HOOK, sae, place, float(change[place]), [31], [44])
        assert measured[place] == pytest.approx(lost, rel=1e-6, abs=1e-8)
    everything = feature_attribution(model(), sae, inputs(), 31, 44, reference=other)
    assert sorted(by_place(everything)) == sorted(map(tuple, (change != 0).nonzero().tolist()))
    assert (everything.activation.values == 0).any()


def test_integrated_attributions_sum_to_what_all_features_do():
    sae = autoencoder()
    active = features_at(sae, inputs())

    def take_all(x: torch.Tensor) -> None:
        x[: len(active)] -= active @ sae.W_dec

    for answer, baseline, ids in (ANSWERS["one token each"], ANSWERS["several tokens"]):
        found = feature_attribution(model(), sae, inputs(), answer, baseline, method="integrated", steps=12)
        full, without = (preference(model(), inputs(), HOOK, change, *ids) for change in (lambda x: None, take_all))
        assert float(found.attribution.sum()) == pytest.approx(full - without, rel=5e-3)
        assert float(found.gradient.sum()) != pytest.approx(full - without, rel=5e-2)
        assert -1 <= found.attrs["rank_correlation"] < 1


def test_what_it_costs_and_says(tmp_path):
    sae = autoencoder()
    one = feature_attribution(model(), sae, inputs(), 31, 44)
    assert (one.attrs["n_forward"], one.attrs["n_backward"]) == (1, 1)
    assert one.attrs["metric"] == "logit_difference"
    own = feature_attribution(model(), sae, inputs())
    best = int(model()(inputs())[0, -1].argmax())
    assert by_place(own) == pytest.approx(by_place(feature_attribution(model(), sae, inputs(), best)))
    appended = append_tokens(model(), inputs(), torch.tensor([[31, 7]]))
    there = feature_attribution(model(), sae, appended)
    assert by_place(there) == pytest.approx(by_place(feature_attribution(model(), sae, inputs(), [31, 7])))
    save(one, tmp_path / "found")
    kept: Any = load(tmp_path / "found")
    assert one.equals(kept)
    assert not model()._prompt_hooks
    assert all(weight.grad is None for weight in model().parameters())


def test_kinds_with_thresholds_and_nothing_active():
    relu = make_sae("relu", d_in=48, d_sae=96, k=None, hook=HOOK).to(torch.float64)
    assert feature_attribution(model(), relu, inputs(), 31).sizes["entry"] > 12 * 20
    relu.encoder.bias.fill_(-1e6)
    assert feature_attribution(model(), relu, inputs(), 31).sizes["entry"] == 0


def test_pooled_over_image_and_text():
    sae = autoencoder()
    found = feature_attribution(model(), sae, inputs(), 31, 44)
    dense = np.zeros((inputs().shape[1], 96))
    dense[found.position.values, found.sae_feature.values] = found.attribution.values
    token_map = inputs().token_map
    functions: dict[Any, Any] = {"mean": np.mean, "max": np.max, "sum": np.sum}
    for by, function in functions.items():
        result = pooled(found, by)
        for group in ("image", "text"):
            expected = function(dense[list(token_map[group])], axis=0)[result.sae_feature.values]
            np.testing.assert_allclose(result[group].values, expected, atol=1e-12)
        assert (np.diff(np.abs(result.image.values + result.text.values)) <= 1e-12).all()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"method": "fast"}, "method='fast'.*gradient"),
        ({"steps": 0}, "steps=0"),
        ({"top": 0}, "top=0"),
        ({"hook": ("resid_post", 0)}, "trained on"),
        ({"sae": autoencoder("projector.hook_out")}, "projector.hook_out.*hook_embed"),
        ({"reference": torch.tensor([[1, 7, 8]])}, "reference has 3 positions"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, says):
    given = {"sae": autoencoder(), **wrong}
    with as_users_run(), pytest.raises(InputError, match=says):
        feature_attribution(model(), given.pop("sae"), inputs(), 31, **given)


# ---------------------------------------------------------------------- where the answer is known


def test_features_of_the_star_argue_for_its_color():
    """Decoder rows along which the image of an orange star differs from that of a blue one, and random ones beside them."""
    shapes = HookedLLaVA.from_pretrained("tiny-shapes")
    question = "What color is the star?"
    orange, blue = (shapes.prepare(question, images=image_path(name)) for name in ("demo", "demo-blue-star"))
    held: list[Any] = [shapes.run_with_cache(one, names_filter="hook_embed")[1] for one in (orange, blue)]
    difference = held[0]["hook_embed"][0] - held[1]["hook_embed"][0]
    star = difference.norm(dim=-1).argsort(descending=True)[:4].tolist()
    sae = SparseAutoencoder(SAEConfig(d_in=128, d_sae=64, k=4, hook="hook_embed")).reset(seed=0).requires_grad_(False)
    for feature, position in enumerate(star):
        row = difference[position] / difference[position].norm()
        sae.W_dec[feature] = sae.encoder.weight[feature] = row
    found = feature_attribution(shapes, sae, orange, "Orange", "Blue", method="exact", top=60, reference=blue)
    assert found.attrs["rank_correlation"] > 0.8
    best = found.isel(entry=0)
    assert float(best.attribution) > 0
    assert int(best.position) in star
    assert int(best.sae_feature) < 4
    maps = feature_maps(orange, found, 3)
    assert maps.dims == ("sae_feature", "image", "patch_row", "patch_col")
    first = maps.sel(sae_feature=int(best.sae_feature)).isel(image=0)
    row, col = np.unravel_index(np.argmax(first.values), first.shape)
    assert orange.token_map.patch_to_position(int(row), int(col)) in star


def test_an_autoencoder_that_replaces_the_activation_is_refused():
    sae = autoencoder()
    expected = feature_attribution(model(), sae, inputs(), 31)
    with model().attach_sae(sae):
        assert feature_attribution(model(), sae, inputs(), 31).equals(expected)
    with model().attach_sae(sae, keep_error=False), pytest.raises(InputError, match=r"blocks.1.*keep_error=False"):
        feature_attribution(model(), sae, inputs(), 31)


def test_the_pass_that_finds_the_models_own_answer_is_counted():
    found = feature_attribution(model(), autoencoder(), inputs())
    assert (found.attrs["n_forward"], found.attrs["n_backward"]) == (2, 1)


def test_maps_take_numbers_of_any_kind_and_need_one(tiny_shapes):
    prompt = tiny_shapes.prepare("What color is the star?", images=image_path("demo"))
    sae = SparseAutoencoder(SAEConfig(d_in=128, d_sae=256, k=8, hook="hook_embed")).reset(seed=0)
    found = feature_attribution(tiny_shapes, sae, prompt, "Orange")
    listed = feature_maps(prompt, found, [3, 5])
    with as_users_run():
        assert listed.equals(feature_maps(prompt, found, np.array([3, 5])))
    for wrong, says in (([], "No feature"), ([-1], "features=-1"), (["3"], "'3'")):
        with as_users_run(), pytest.raises(InputError, match=says):
            feature_maps(prompt, found, wrong)
    with pytest.raises(InputError, match="none is active"):
        feature_maps(prompt, found.isel(entry=slice(0)))
