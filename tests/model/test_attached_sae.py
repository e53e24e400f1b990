"""An autoencoder in the place of a hook: its features are hooks like any other, and without a change nothing changes."""

from __future__ import annotations

import pytest
import torch

from hooked_llava import HookedLLaVA, Intervention, Replay
from hooked_llava.errors import HookNameError, InputError, StaleReplayError
from tests.builders import make_hf_model, make_prompt
from tests.sae.test_autoencoder import make_sae

D_MODEL, HOOK = 48, "blocks.1.hook_resid_post"


@pytest.fixture
def model() -> HookedLLaVA:
    return HookedLLaVA.from_hf(make_hf_model())


@pytest.fixture
def inputs(model):
    return model.as_inputs(make_prompt(make_hf_model()))


def at(hook: str, d_in: int = D_MODEL, **options):
    return make_sae(d_in=d_in, d_sae=3 * d_in, k=5, hook=hook, **options)


@pytest.mark.parametrize(
    ("hook", "d_in"),
    [(HOOK, 48), ("blocks.0.attn.hook_z", 48), ("blocks.2.mlp.hook_post", 74), ("projector.hook_out", 48),
     ("vision.blocks.0.hook_resid_post", 32), ("hook_embed", 48), ("blocks.1.hook_mlp_out", 48)],
)  # fmt: skip
def test_with_its_error_nothing_changes_bit_for_bit(model, inputs, hook, d_in):
    plain = model(inputs)
    with model.attach_sae(at(hook, d_in)):
        assert torch.equal(model(inputs), plain)
        logits, cache = model.run_with_cache(inputs, names_filter=[hook, "sae_acts", "sae_error"] if "vision" not in hook
                                             else [hook, f"{hook}.hook_sae_acts", f"{hook}.hook_sae_error"])  # fmt: skip
        assert torch.equal(logits, plain)
        sae = at(hook, d_in)
        acts, error = cache[f"{hook}.hook_sae_acts"], cache[f"{hook}.hook_sae_error"]
        x = cache[hook]
        torch.testing.assert_close((acts @ sae.W_dec + sae.b_dec).view_as(x) + error, x)
        assert (acts.count_nonzero(-1) <= 5).all()
    assert torch.equal(model(inputs), plain)
    assert not [name for name in model.hook_dict if "sae" in name]


def test_a_changed_feature_adds_what_it_writes(model, inputs):
    sae = at(HOOK)
    with model.attach_sae(sae):
        _, cache = model.run_with_cache(inputs, names_filter=[HOOK, "sae_acts"])
        clamp = Intervention(f"{HOOK}.hook_sae_acts", positions=[4], features=[7], value=3.0)
        clamped = model.run_with_hooks(inputs, fwd_hooks=[clamp])
    written = (3.0 - cache[f"{HOOK}.hook_sae_acts"][0, 4, 7]) * sae.W_dec[7]
    by_hand = model.run_with_hooks(inputs, fwd_hooks=[Intervention(HOOK, positions=[4], add=written)])
    torch.testing.assert_close(clamped, by_hand, rtol=1e-4, atol=1e-4)
    assert (clamped - model(inputs)).abs().max() > 1e-2
    assert torch.equal(clamped[0, :4], model(inputs)[0, :4])


@pytest.mark.parametrize("keep_error", [True, False])
@pytest.mark.parametrize(("hook", "d_in"), [(HOOK, 48), ("blocks.2.hook_resid_post", 48), ("blocks.0.attn.hook_z", 48),
                                            ("projector.hook_out", 48), ("blocks.2.mlp.hook_post", 74)])  # fmt: skip
def test_replay_equals_the_full_run(model, inputs, hook, d_in, keep_error):
    acts, on_image = f"{hook}.hook_sae_acts", "projector" in hook
    runs = [
        [Intervention(acts, positions=[1] if on_image else [-1], features=[2, 9], value=2.0)],
        [
            Intervention(acts, positions=None if on_image else [3, -1], scale=2.0),
            Intervention("blocks.1.hook_mlp_out", positions=[6], zero=True),
        ],
        [Intervention(f"{hook}.hook_sae_error", zero=True)] if keep_error else [],
        [Intervention(hook, positions=[1] if on_image else "last", add=0.7)],
    ]
    with model.attach_sae(at(hook, d_in), keep_error=keep_error):
        found = Replay(model, inputs).run(runs)
        for run, logits in zip(runs, found, strict=True):
            expected = model.run_with_hooks(inputs, fwd_hooks=run)[0, -1]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
            assert not run or (expected - model(inputs)[0, -1]).abs().max() > 1e-4


def test_the_reconstruction_takes_the_place_of_the_activation(model, inputs):
    sae = at(HOOK)
    with model.attach_sae(sae, keep_error=False):
        replaced = model(inputs)
    by_hand = model.run_with_hooks(inputs, fwd_hooks=[(HOOK, sae)])
    torch.testing.assert_close(replaced, by_hand)
    assert (replaced - model(inputs)).abs().max() > 1e-2


def test_gradients_reach_the_features(model, inputs):
    sae = at(HOOK)
    with model.attach_sae(sae):
        logits, cache = model.run_with_cache(
            inputs, names_filter=[HOOK, "sae_acts"], incl_bwd=True, metric=lambda logits: logits[0, -1, 3]
        )
    through = cache[f"{HOOK}_grad"]
    torch.testing.assert_close(cache[f"{HOOK}.hook_sae_acts_grad"], through @ sae.W_dec.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, model(inputs))
    _, plain = model.run_with_cache(inputs, names_filter=HOOK, incl_bwd=True, metric=lambda logits: logits[0, -1, 3])
    torch.testing.assert_close(through, plain[f"{HOOK}_grad"], rtol=1e-4, atol=1e-5)


def test_several_at_once_and_no_trace_after_an_error(model, inputs):
    names = list(model.hook_dict)
    with model.attach_sae(at(HOOK)), model.attach_sae(at("blocks.0.hook_resid_post")):
        assert len(model.hooks_table.resolve("sae_acts")) == 2
        assert model.hooks_table.resolve(("sae_acts", 0)) == ["blocks.0.hook_resid_post.hook_sae_acts"]
        assert list(model.hook_dict) == model.hooks_table.names
    with pytest.raises(RuntimeError), model.attach_sae(at(HOOK)):
        raise RuntimeError
    assert list(model.hook_dict) == names == model.hooks_table.names
    assert model.hook_dict[HOOK].then is None


def test_what_does_not_belong_is_refused(model, inputs):
    unnamed = make_sae(d_in=48)
    with (
        pytest.raises(InputError, match=r"blocks.1.mlp.hook_post.*74.*d_in=48"),
        model.attach_sae(unnamed, ("post", 1)),
    ):
        pass
    with pytest.raises(InputError, match=r"hook=None"), model.attach_sae(unnamed):
        pass
    with pytest.raises(InputError, match=r"'resid_post', 0.*blocks.1.hook_resid_post"):  # noqa: SIM117
        with model.attach_sae(at(HOOK), ("resid_post", 0)):
            pass
    with pytest.raises(InputError, match=r"'other'.*any_model"), model.attach_sae(at(HOOK, model_name="other")):
        pass
    with model.attach_sae(at(HOOK, model_name="other"), any_model=True):
        with pytest.raises(InputError, match=r"blocks.1.hook_resid_post.*attached"), model.attach_sae(at(HOOK)):
            pass
        with pytest.raises(InputError, match=r"features=\[144\].*143"):
            model.run_with_hooks(inputs, fwd_hooks=[Intervention(("sae_acts", 1), features=144, zero=True)])
        with pytest.raises(InputError, match=r"features=3.*hook_resid_post"):
            model.run_with_hooks(inputs, fwd_hooks=[Intervention(HOOK, features=3, zero=True)])
    with pytest.raises(HookNameError, match=r"hook_sae_acts"):
        model.hooks_table.resolve(f"{HOOK}.hook_sae_acts")


def test_a_replay_knows_when_reconstructions_come_and_go(model, inputs):
    replay = Replay(model, inputs)
    run = [[Intervention(HOOK, positions="last", zero=True)]]
    with model.attach_sae(at(HOOK)):
        assert torch.isfinite(replay.run(run)).all()
    with model.attach_sae(at(HOOK), keep_error=False), pytest.raises(StaleReplayError, match="keep_error=False"):
        replay.run(run)


def test_a_cache_outlives_the_autoencoder(model, inputs, tmp_path):
    acts, error = f"{HOOK}.hook_sae_acts", f"{HOOK}.hook_sae_error"
    with model.attach_sae(at(HOOK)):
        _, cache = model.run_with_cache(inputs, names_filter=["sae_acts", "sae_error", "projector.hook_out"])
        image, text = cache.image[acts], cache.text[error]
        cache.save(tmp_path / "cache")
        first = cache[acts][0]
    loaded = type(cache).load(tmp_path / "cache", model)
    for kept in (cache, loaded):
        assert torch.equal(kept.image[acts], image)
        assert torch.equal(kept.text[error], text)
        assert torch.equal(kept.apply_slice_to_batch_dim(0)[acts], first)
        tiles = kept["projector.hook_out"]
        one = kept.remove_batch_dim()
        assert torch.equal(one[acts], first)
        assert torch.equal(one["projector.hook_out"], tiles)


def test_a_cache_takes_the_short_names_that_filters_take(model, inputs):
    with model.attach_sae(at(HOOK)), model.attach_sae(at("vision.blocks.1.hook_resid_post", 32)):
        _, cache = model.run_with_cache(inputs, names_filter=["sae_acts", "sae_error", "vision.sae_acts"])
    assert torch.equal(cache["sae_acts", 1], cache[f"{HOOK}.hook_sae_acts"])
    assert torch.equal(cache["sae_error", -2], cache[f"{HOOK}.hook_sae_error"])
    assert torch.equal(cache["sae_acts"], cache["sae_acts", 1])
    assert torch.equal(cache.vision["sae_acts", 1], cache["vision.blocks.1.hook_resid_post.hook_sae_acts"])
    with pytest.raises(HookNameError, match=r"sae_acts 0"):
        cache["sae_acts", 0]
    with model.attach_sae(at(HOOK)), model.attach_sae(at("blocks.1.hook_mlp_out")):
        _, cache = model.run_with_cache(inputs, names_filter="sae_acts")
    with pytest.raises(HookNameError, match=r"sae_acts 1.*2 activations.*hook_mlp_out.*hook_resid_post"):
        cache["sae_acts", 1]
