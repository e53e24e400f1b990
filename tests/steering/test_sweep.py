"""Sweeps of strengths: every cell is the model steered at that strength, and the controls are what they are called."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava import HookedLLaVA
from hooked_llava.errors import InputError
from hooked_llava.readout.answer import teacher_forced
from hooked_llava.results import load, save
from hooked_llava.sae import SAEConfig, SparseAutoencoder
from hooked_llava.steering import mean_difference, random_direction, steer, steering_sweep
from hooked_llava.toy.images import image_path
from tests.pairs import as_users_run

THERE: dict[str, Any] = {"hook": "hook_embed", "positions": "image"}


@pytest.fixture(scope="module")
def model() -> HookedLLaVA:
    return HookedLLaVA.from_pretrained("tiny-shapes")


@pytest.fixture(scope="module")
def inputs(model):
    return model.prepare("What color is the star?", images=image_path("demo"))


@pytest.fixture(scope="module")
def other(model):
    return model.prepare("What shape is it?", images=image_path("one-shape"))


@pytest.fixture(scope="module")
def sae():
    return (
        SparseAutoencoder(SAEConfig(d_in=128, d_sae=256, k=8, hook="blocks.1.hook_resid_post"))
        .reset(seed=0)
        .requires_grad_(False)
    )


@torch.no_grad()
def log_p(model, inputs, steering, answer):
    """log P of an answer in one full pass."""
    forced = teacher_forced(model, inputs, answer)
    with steering:
        logits = model(forced.inputs)[0, forced.positions]
    return float(forced.metric(logits))


@torch.no_grad()
def last(model, inputs, steering):
    with steering:
        return model(inputs)[0, -1].log_softmax(-1)


@pytest.mark.parametrize("answer", ["Blue", "Blue star"])
def test_every_cell_is_the_steered_model(model, inputs, other, answer):
    blue = model.prepare("What color is the star?", images=image_path("demo-blue-star"))
    direction = mean_difference(model, blue, inputs, **THERE)
    strengths = [0.0, 2.0, -1.0]
    sweep = steering_sweep(
        model, inputs, direction, strengths, answer=answer, others=other, contrast=(blue, other), seed=3, **THERE
    )
    means = mean_difference(model, blue, other, **THERE)
    ways = {
        "steered": direction,
        "random_direction": random_direction(direction, seed=3),
        "mean_difference": means * direction.norm() / means.norm(),
    }
    assert sweep.steered_by.values.tolist() == list(ways)
    plain = model(other).detach()[0, -1].log_softmax(-1)
    for name, vector in ways.items():
        for strength in strengths:
            cell = sweep.sel(steered_by=name, strength=strength)
            steering = steer(model, vector, strength=strength, **THERE)
            np.testing.assert_allclose(
                cell.log_probability, log_p(model, inputs, steering, answer), rtol=1e-3, atol=1e-3
            )
            there = last(model, other, steering)
            kl = float((plain.exp() * (plain - there)).sum())
            np.testing.assert_allclose(cell.other_kl.item(), kl, rtol=1e-2, atol=1e-4)
            assert bool(cell.other_changed) == bool(there.argmax() != plain.argmax())
    unchanged = sweep.sel(strength=0.0)
    np.testing.assert_allclose(unchanged.log_probability, float(sweep.unsteered), rtol=1e-5)
    assert not unchanged.other_changed.any()


def test_features_and_their_controls(model, inputs, other, sae, tmp_path):
    both = model.prepare(["What color is the star?", "What shape is it?"], images=[image_path("demo")] * 2)
    sweep = steering_sweep(
        model, both, {5: 2.0, 9: 1.0}, [1.0, 4.0], sae=sae, others=other, answer="Blue", mode="replace"
    )
    assert sweep.log_probability.dims == ("steered_by", "strength", "prompt")
    assert sweep.steered_by.values.tolist() == ["steered", "reconstruction", "random_feature", "random_direction"]
    rebuilt = steer(model, {}, sae=sae, mode="replace")
    steered = steer(model, {5: 2.0, 9: 1.0}, sae=sae, mode="replace", strength=4.0)
    norm = float((2 * sae.W_dec[5] + sae.W_dec[9]).norm())
    drawn = random_direction(2 * sae.W_dec[5] + sae.W_dec[9], seed=0)
    assert abs(float(drawn.norm()) - norm) < 1e-4
    added = steer(model, drawn, hook=sae.cfg.hook, strength=4.0)
    for name, steering in (("steered", steered), ("reconstruction", rebuilt), ("random_direction", added)):
        expected = [log_p(model, both[i], steering, "Blue") for i in range(2)]
        np.testing.assert_allclose(
            sweep.log_probability.sel(steered_by=name, strength=4.0), expected, rtol=1e-3, atol=1e-3
        )
    rebuilt_alone = sweep.log_probability.sel(steered_by="reconstruction")
    np.testing.assert_array_equal(rebuilt_alone.sel(strength=1.0), rebuilt_alone.sel(strength=4.0))
    assert (
        sweep.log_probability.sel(steered_by="random_feature") != sweep.log_probability.sel(steered_by="steered")
    ).all()
    assert sweep.attrs["features"] == {"5": 2.0, "9": 1.0}
    assert sweep.attrs["n_forward"] == 4, "two runs of each side: plain, and with the reconstruction"
    save(sweep, tmp_path / "sweep")
    kept: Any = load(tmp_path / "sweep")
    assert sweep.equals(kept)
    assert not [name for name in model.hook_dict if "sae" in name]


def test_steering_what_is_generated(model, inputs):
    direction = torch.linspace(-1, 1, 128)
    found = steering_sweep(
        model, inputs, direction, [5.0], hook=("resid_post", 1), phases="decode", answer="Blue star", controls=[]
    )
    steering = steer(model, direction, hook=("resid_post", 1), phases="decode", strength=5.0)
    np.testing.assert_allclose(found.log_probability.item(), log_p(model, inputs, steering, "Blue star"), rtol=1e-4)
    assert found.log_probability.item() != found.unsteered.item()
    with pytest.raises(InputError, match="phases='decode'"):
        steering_sweep(model, inputs, direction, [5.0], hook=("resid_post", 1), phases="decode", answer="Blue")


def test_what_cannot_be_is_refused(model, inputs, sae):
    direction = torch.ones(128)
    with as_users_run():
        for wrong, says in (
            ({"strengths": []}, "strengths"),
            ({"controls": ["random_feature"]}, "random_feature.*features"),
            ({"controls": ["mean_difference"]}, "mean_difference.*contrast"),
            ({"controls": ["nothing"]}, "controls='nothing'.*reconstruction"),
        ):
            given = {"strengths": [1.0], **wrong}
            with pytest.raises(InputError, match=says):
                steering_sweep(model, inputs, direction, given.pop("strengths"), hook=("resid_post", 1), **given)


def test_the_first_token_is_the_most_probable_under_each_steering():
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    inputs = model.prepare(["Who made the star?", "Who made the ring?"])
    there: dict[str, Any] = {"hook": ("resid_post", 2), "positions": "last"}
    direction = mean_difference(
        model, model.prepare("Who made the ring?"), model.prepare("Who made the star?"), **there
    )
    sweep = steering_sweep(model, inputs, direction, [0, 2], **there)
    assert sweep.first_token.dims == ("steered_by", "strength", "prompt")
    for strength in (0, 2):
        with steer(model, direction, strength=strength, **there):
            said = [model.tokenizer.decode([i]) for i in model(inputs)[:, -1].argmax(-1).tolist()]
        assert sweep.first_token.sel(steered_by="steered", strength=strength).values.tolist() == said


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"strengths": 3}, "strengths=3"),
        ({"strengths": [1, float("nan")]}, "strengths=nan"),
        ({"strength": 2.0}, r"no strength="),
        ({"controls": "random_feature"}, "random_feature.*direction"),
        ({"controls": "mean_difference"}, "contrast="),
    ],
)
def test_numbers_and_controls_that_do_not_fit_are_named(model, inputs, wrong, says):
    given = {"direction": torch.ones(128), "strengths": [1]} | THERE | wrong
    with as_users_run(), pytest.raises(InputError, match=says):
        steering_sweep(model, inputs, **given)


def test_one_control_can_be_named_alone(model, inputs):
    sweep = steering_sweep(model, inputs, torch.ones(128), [1], controls="random_direction", **THERE)
    assert sweep.steered_by.values.tolist() == ["steered", "random_direction"]
