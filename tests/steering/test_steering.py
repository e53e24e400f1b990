"""Steering, against plain hook functions: in one pass, in Replay and in generation; no trace is left."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from hooked_llava import Replay
from hooked_llava.errors import HookNameError, InputError, SpanError
from hooked_llava.options.steering_modes import STEERING_MODES
from hooked_llava.readout.answer import append_tokens
from hooked_llava.steering import steer
from tests.oracles.naive_steering import along, as_hook, by_features, generated
from tests.pairs import as_users_run
from tests.replay.test_attached import clean
from tests.replay.test_replay import model_of, prompts
from tests.sae.test_autoencoder import make_sae

HOOK = "blocks.1.hook_resid_post"
D_MODEL = 48
TOKENS: dict[str, Any] = {"return_type": "tokens", "stop_at_eos": False}
MODEL = model_of(0)
VALUES = {3: 8.0, 40: 5.0}


def direction(d: int = D_MODEL, seed: int = 3) -> torch.Tensor:
    return torch.randn(d, generator=torch.Generator().manual_seed(seed)) * 0.4


def autoencoder(**more: Any) -> Any:
    return make_sae(d_in=D_MODEL, d_sae=3 * D_MODEL, k=5, hook=HOOK, **more)


def two_prompts(padding: str = "left") -> Any:
    return prompts(MODEL, 0, batch=2, n_images=1, padding=padding)


def rows(inputs: Any, span: str) -> list[list[int]]:
    return [list(token_map[span]) for token_map in inputs.token_maps]


def steered_by_hand(inputs: Any, hook: str, function: Any) -> Any:
    return MODEL.run_with_hooks(inputs, fwd_hooks=[(hook, function)])


def check(steering: Any, inputs: Any, expected: torch.Tensor) -> None:
    """In a block, as interventions, and in Replay."""
    mask = inputs.attention_mask
    with steering as steered:
        torch.testing.assert_close(steered(inputs)[mask], expected[mask], rtol=1e-4, atol=1e-4)
    assert (expected[mask] - MODEL(inputs)[mask]).abs().max() > 1e-2
    with steering.attached():
        found = Replay(MODEL, inputs).run([steering.interventions])[0]
    last = expected[torch.arange(len(inputs)), inputs.last]
    torch.testing.assert_close(found, last, rtol=1e-4, atol=1e-4)
    assert clean(MODEL)


@pytest.mark.parametrize("hook", [HOOK, "blocks.1.attn.hook_z"])
@pytest.mark.parametrize("mode", STEERING_MODES)
def test_along_a_direction(mode, hook):
    inputs, vector = two_prompts(), direction()
    steering = steer(MODEL, vector, hook=hook, positions="image|last", mode=mode, strength=1.5)
    by_hand = as_hook(partial(along, mode, direction=vector, strength=1.5), rows(inputs, "image|last"))
    check(steering, inputs, steered_by_hand(inputs, hook, by_hand))


@pytest.mark.parametrize("mode", ["clamp", "replace"])
@pytest.mark.parametrize("positions", ["image|last", None])
def test_by_features(mode, positions):
    inputs, sae = two_prompts(), autoencoder()
    where = [list(m.real) if positions is None else list(m[positions]) for m in inputs.token_maps]
    elsewhere = partial(by_features, mode, sae=sae, values={}) if mode == "replace" else None
    by_hand = as_hook(partial(by_features, mode, sae=sae, values=VALUES), where, elsewhere)
    check(steer(MODEL, VALUES, sae=sae, positions=positions, mode=mode), inputs, steered_by_hand(inputs, HOOK, by_hand))


def test_features_are_chosen_after_they_are_set():
    """A feature that is set below others that are chosen does not appear; the paper's clamp is before the choice."""
    inputs, sae = two_prompts(), autoencoder()
    tiny = dict.fromkeys(VALUES, 0.0001)
    by_hand = as_hook(partial(by_features, "replace", sae=sae, values=tiny), [range(99), range(99)])
    check(steer(MODEL, tiny, sae=sae, mode="replace"), inputs, steered_by_hand(inputs, HOOK, by_hand))
    with MODEL.attach_sae(sae):
        cache: Any = MODEL.run_with_cache(inputs, names_filter=["sae_pre", "sae_acts"])[1]
        chosen = cache["sae_acts", 1] > 0
        assert torch.equal(cache["sae_pre", 1][chosen], cache["sae_acts", 1][chosen])
        assert (cache["sae_pre", 1] > 0).sum() > chosen.sum()


@pytest.mark.parametrize("mode", ["add", "add_keep_norm", "project_out"])
def test_features_stand_for_what_they_write(mode):
    inputs, sae = two_prompts(), autoencoder()
    feature = {3: 8.0}
    by_direction = steer(MODEL, 8.0 * sae.W_dec[3], hook=HOOK, positions="image", mode=mode, strength=0.5)
    with by_direction:
        expected = MODEL(inputs)
    check(steer(MODEL, feature, sae=sae, positions="image", mode=mode, strength=0.5), inputs, expected)
    with steer(MODEL, VALUES, sae=sae, mode="project_out"):
        cache: Any = MODEL.run_with_cache(inputs, names_filter=("resid_pre", 2))[1]
    along_them = cache["resid_pre", 2][inputs.attention_mask] @ sae.W_dec[list(VALUES)].T
    assert along_them.abs().max() < 1e-4


@pytest.mark.parametrize("mode", ["add", "clamp", "replace"])
@pytest.mark.parametrize("phases", ["prefill", "decode", "both"])
def test_generation_along_a_direction(mode, phases):
    inputs, vector = two_prompts("right"), 3 * direction()
    steering = steer(MODEL, vector, hook=HOOK, positions="text|answer", phases=phases, mode=mode)
    expected = generated(
        MODEL,
        inputs,
        HOOK,
        partial(along, mode, direction=vector, strength=1.0),
        rows(inputs.padded_left(), "text"),
        phases,
        4,
    )
    found = MODEL.generate(inputs, 4, steering=steering, **TOKENS)
    assert torch.equal(found, expected)
    assert not torch.equal(found, MODEL.generate(inputs, 4, **TOKENS))
    with steering:
        assert torch.equal(MODEL.generate(inputs, 4, **TOKENS), expected)
    assert clean(MODEL)


@pytest.mark.parametrize("mode", ["clamp", "replace"])
@pytest.mark.parametrize("phases", ["prefill", "decode", "both"])
def test_generation_by_features(mode, phases):
    """The paper's: set in the prefill only, and the reconstruction replaces the residual stream in every pass."""
    inputs, sae = two_prompts(), autoencoder()
    values = {feature: 4 * value for feature, value in VALUES.items()}
    elsewhere = partial(by_features, mode, sae=sae, values={}) if mode == "replace" else None
    change = partial(by_features, mode, sae=sae, values=values)
    prompt = inputs.padded_left()
    expected = generated(MODEL, inputs, HOOK, change, [list(m.real) for m in prompt.token_maps], phases, 3,
                         elsewhere=elsewhere)  # fmt: skip
    steering = steer(MODEL, values, sae=sae, mode=mode, phases=phases)
    found = MODEL.generate(inputs, 3, steering=steering, **TOKENS)
    assert torch.equal(found, expected)
    assert not torch.equal(found, MODEL.generate(inputs, 3, **TOKENS))
    with steering:
        assert torch.equal(MODEL.generate(inputs, 3, **TOKENS), expected)
    assert clean(MODEL)


@pytest.mark.parametrize("phases", ["prefill", "decode", "both"])
def test_an_appended_answer_is_what_was_generated(phases):
    inputs = two_prompts("none")
    answer = torch.tensor([[11, 12, 13], [14, 15, 16]])
    longer = append_tokens(MODEL, inputs, answer)
    steering = steer(MODEL, direction(), hook=HOOK, phases=phases)
    n, end = inputs.shape[1], longer.shape[1]
    where = {"prefill": range(n), "decode": range(n, end), "both": range(end)}[phases]
    by_hand = as_hook(partial(along, "add", direction=direction(), strength=1.0), [where, where])
    check(steering, longer, steered_by_hand(longer, HOOK, by_hand))


def test_on_the_image_side_and_several_at_once():
    inputs = two_prompts()
    vector = direction()
    seen = steer(MODEL, vector, hook="projector.hook_out", positions=[1, 2], image=0)
    by_hand = as_hook(partial(along, "add", direction=vector, strength=1.0), [[1, 2], [1, 2]])
    check(seen, inputs, steered_by_hand(inputs, "projector.hook_out", by_hand))
    with pytest.raises(InputError, match=r"projector.hook_out.*decode"):
        MODEL.generate(inputs, 2, steering=steer(MODEL, vector, hook="projector.hook_out", phases="decode"), **TOKENS)
    other = steer(MODEL, VALUES, sae=autoencoder(), mode="replace")
    with seen, other:
        both = MODEL.generate(inputs, 4, **TOKENS)
    assert torch.equal(MODEL.generate(inputs, 4, steering=[seen, other], **TOKENS), both)
    assert clean(MODEL)


def test_a_steering_can_be_entered_again_and_leaves_no_trace_after_an_error():
    inputs = two_prompts()
    plain = MODEL(inputs)
    steering = steer(MODEL, VALUES, sae=autoencoder(), positions="image", mode="replace")
    twice = steer(MODEL, direction(), hook=HOOK)
    with twice, twice:
        assert (MODEL(inputs) - plain).abs().max() > 1e-2
    for _ in range(2):
        with pytest.raises(RuntimeError), steering:
            raise RuntimeError
        assert clean(MODEL)
    misplaced = steer(MODEL, VALUES, sae=autoencoder(), positions="imge", mode="replace")
    with pytest.raises(SpanError), misplaced:
        MODEL(inputs)
    with pytest.raises(SpanError):
        MODEL.generate(inputs, 2, steering=misplaced, **TOKENS)
    assert clean(MODEL)
    assert torch.equal(MODEL(inputs), plain)


def test_an_attached_autoencoder_is_found_and_its_error_kept():
    inputs, sae = two_prompts(), autoencoder()
    named = steer(MODEL, VALUES, sae=sae)
    with named:
        expected = MODEL(inputs)
    with MODEL.attach_sae(sae):
        with steer(MODEL, VALUES):
            assert torch.equal(MODEL(inputs), expected)
        with pytest.raises(InputError, match=r"replace.*blocks.1.hook_resid_post.*keep_error=False"):
            steer(MODEL, VALUES, mode="replace")
    with MODEL.attach_sae(sae, keep_error=False), steer(MODEL, VALUES, mode="replace"):
        inside = MODEL(inputs)
    with steer(MODEL, VALUES, sae=sae, mode="replace"):
        assert torch.equal(MODEL(inputs), inside)


def test_in_half_precision_the_dtype_stays():
    model = model_of(0).to(torch.float32)
    inputs = two_prompts()
    steering = steer(model, direction().to(torch.bfloat16), hook=HOOK, mode="add_keep_norm")
    with steering:
        assert model(inputs).dtype == torch.float32
    half = autoencoder().to(torch.bfloat16)
    with steer(model, VALUES, sae=half):
        assert model(inputs).dtype == torch.float32


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"direction": torch.ones(7)}, InputError, r"shape \(7,\).*\(48,\)"),
        ({"direction": torch.ones(48, dtype=torch.long)}, InputError, r"int64.*floating"),
        ({"direction": torch.full((48,), torch.nan)}, InputError, "NaN"),
        ({"direction": "north"}, InputError, "north"),
        ({"direction": torch.zeros(48), "mode": "clamp"}, InputError, "0 everywhere.*clamp"),
        ({"mode": "push"}, InputError, "mode='push'.*add"),
        ({"phases": "later"}, InputError, "phases='later'.*prefill"),
        ({"hook": None}, InputError, "hook="),
        ({"hook": "blocks.1.attn.hook_pattern"}, InputError, "hook_pattern.*vector"),
        ({"hook": "resid"}, HookNameError, "resid"),
        ({"direction": {3: 1.0}}, InputError, "sae=None, and 0"),
        ({"direction": {144: 1.0}, "sae": autoencoder()}, InputError, "feature.*144.*143"),
        ({"direction": {3: "much"}, "sae": autoencoder()}, InputError, r"direction\[3\]='much'"),
        ({"direction": {3: float("nan")}, "sae": autoencoder()}, InputError, r"direction\[3\]=nan"),
        ({"strength": float("nan")}, InputError, "strength=nan"),
        ({"strength": "high"}, InputError, "strength='high'"),
        ({"direction": 3, "sae": autoencoder()}, InputError, r"\{feature: value\}.*int"),
        ({"direction": {3: 1.0}, "sae": torch.nn.Linear(2, 2)}, InputError, "Linear.*SparseAutoencoder"),
        ({"direction": {}, "sae": autoencoder()}, InputError, "sets no feature"),
        ({"direction": {3: 1.0}, "sae": autoencoder(), "hook": ("resid_post", 0)}, InputError, "trained on"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, error, says):
    given = {"direction": direction(), "hook": HOOK} | wrong
    with as_users_run(), pytest.raises(error, match=says):
        steer(MODEL, given.pop("direction"), **given)


def test_generation_takes_only_steerings_of_its_own_model():
    inputs, steering = two_prompts(), steer(MODEL, direction(), hook=HOOK)
    with as_users_run(), pytest.raises(InputError, match=r"steering=.*Tensor.*steer"):
        MODEL.generate(inputs, steering=direction(), return_type="tokens")
    with pytest.raises(InputError, match="another model"):
        model_of(1).generate(
            prompts(model_of(1), 1, batch=1, n_images=1, padding="none"), steering=steering, return_type="tokens"
        )


def test_a_reconstruction_that_is_not_attached_says_how_it_is():
    steering = steer(MODEL, VALUES, sae=autoencoder(), mode="replace")
    with pytest.raises(HookNameError, match=r"hook_sae_pre.*attached\(\)"):
        Replay(MODEL, two_prompts()).run([steering.interventions])
