"""Interventions beside functions: in run_with_hooks, hooks(), run_with_cache and generate, as in Replay."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hooked_llava.errors import HookNameError, InputError, SpanError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.readout.answer import append_tokens
from hooked_llava.replay import Intervention, Replay
from hooked_llava.replay.attached import AttachedIntervention
from tests.oracles.naive_interventions import run_naively
from tests.pairs import as_users_run
from tests.replay.test_replay import CONFIGS, model_of, prompts, random_intervention

SETTINGS: dict[str, Any] = {"suppress_health_check": list(HealthCheck)}
Z = "blocks.1.attn.hook_z"


def clean(model: HookedLLaVA) -> bool:
    """Whether nothing is attached, and nothing remembered of any prompt."""
    points = model.hook_dict.values()
    return not model._prompt_hooks and not any(p.hooked or p.fwd_hooks for p in points)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# ---------------------------------------------------------------------- one forward pass


@settings(max_examples=15, **SETTINGS)
@given(
    config=st.integers(0, len(CONFIGS) - 1),
    batch=st.integers(1, 3),
    n_images=st.integers(1, 2),
    padding=st.sampled_from(["none", "left", "right"]),
    unequal=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_as_replay_and_as_plain_functions(
    config: int, batch: int, n_images: int, padding: str, unequal: bool, seed: int
) -> None:
    model, rng = model_of(config), random.Random(seed)
    inputs = prompts(model, config, batch=batch, n_images=n_images, padding=padding, unequal=unequal)
    names = model.hooks_table.names
    run = [random_intervention(model, inputs, rng.choice(names), rng) for _ in range(rng.randrange(1, 4))]
    expected = run_naively(model, inputs, [run])[0]
    with torch.no_grad():
        found = model.run_with_hooks(inputs, fwd_hooks=run)
        cached, _ = model.run_with_cache(inputs, names_filter="resid_post", fwd_hooks=run)
        with model.hooks(run):
            attached = model(inputs)
    mask = inputs.attention_mask
    assert found is not None
    assert off(found[mask], expected[mask]) < 1e-5
    assert torch.equal(cached, found)
    assert torch.equal(attached, found)
    replayed = Replay(model, inputs).run([run])[0]
    last = found[torch.arange(len(inputs)), inputs.last]
    assert off(replayed, last[0] if len(inputs) == 1 else last) < 1e-4
    assert clean(model)


def test_the_cache_sees_what_was_changed_and_functions_stand_beside() -> None:
    model = model_of(0)
    inputs = prompts(model, 0, batch=2, n_images=1, padding="left")
    change = Intervention(("z", 1), positions="last", zero=True)
    seen: list[torch.Tensor] = []
    hooks: list[Any] = [change, (("z", 1), lambda z: seen.append(z.clone())), (("mlp_out", 0), lambda x, hook: 2 * x)]
    _, cache = model.run_with_cache(inputs, names_filter=["z", "mlp_out"], fwd_hooks=hooks)
    _, before = model.run_with_cache(inputs, names_filter="mlp_out")
    rows = torch.arange(2)
    assert not cache["z", 1][rows, inputs.last].any()
    assert not seen[0][rows, inputs.last].any(), "in the order in which they are given"
    assert torch.equal(cache["mlp_out", 0], 2 * before["mlp_out", 0])


def test_gradients_pass_through() -> None:
    model = model_of(0)
    inputs = prompts(model, 0, batch=1, n_images=1, padding="none")
    options: dict[str, Any] = {"names_filter": "resid_pre", "incl_bwd": True, "metric": lambda x: x[0, -1, 7]}
    plain = [(("attn_out", 1), lambda x: torch.cat([x[:, :-1], 0.5 * x[:, -1:]], 1))]
    scaled = [Intervention(("attn_out", 1), positions="last", scale=0.5)]
    grads = [model.run_with_cache(inputs, fwd_hooks=hooks, **options)[1] for hooks in (plain, scaled)]
    for name in ("blocks.0.hook_resid_pre_grad", "blocks.1.hook_resid_pre_grad"):
        torch.testing.assert_close(grads[0][name], grads[1][name])
        assert grads[0][name].any()


def test_placed_anew_in_every_prompt_of_a_context() -> None:
    model = model_of(0)
    several = [prompts(model, 0, batch=b, n_images=n, padding="right") for b, n in ((1, 1), (2, 2), (3, 1))]
    change = Intervention(("resid_mid", 1), positions="image|last", scale=0.3)
    expected = [model.run_with_hooks(inputs, fwd_hooks=[change]) for inputs in several]
    with model.hooks([change]):
        found = [model(inputs) for inputs in several]
        with model.hooks([Intervention("hook_embed", zero=True)]):
            both = model(several[0])
        again = model(several[0])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(again, found[0])
    assert torch.equal(
        both, model.run_with_hooks(several[0], fwd_hooks=[change, Intervention("hook_embed", zero=True)])
    )
    assert clean(model)


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_post", "blocks.1.attn.hook_z"])
@pytest.mark.parametrize("where", [{}, {"positions": "last"}, {"phases": "prefill"}, {"positions": [2]}])
def test_a_vector_added_everywhere_is_added_as_anywhere_else(padding: str, hook: str, where: Any) -> None:
    model = model_of(1)
    inputs = prompts(model, 1, batch=2, n_images=1, padding=padding)
    _, clean = model.run_with_cache(inputs, names_filter=hook)
    vector = torch.randn(clean[hook].shape[-1], generator=torch.Generator().manual_seed(0))
    found = {}
    for way in ({"add": vector}, {"fn": lambda cut: cut + vector}):
        change = Intervention(hook, **way, **where)
        _, cache = model.run_with_cache(inputs, fwd_hooks=[change], names_filter=hook)
        options = {"return_cache": True, "names_filter": "*", "return_type": "tokens", "stop_at_eos": False}
        tokens, generated = model.generate(inputs, 3, fwd_hooks=[change], **options)
        found[next(iter(way))] = {"run": cache[hook], "tokens": tokens, **dict(generated.items())}
    assert not torch.equal(found["add"]["run"], clean[hook])
    for name, tensor in found["add"].items():
        assert torch.equal(tensor, found["fn"][name]), name


def test_no_trace_is_left_even_after_exceptions() -> None:
    model = model_of(0)
    inputs, text = (prompts(model, 0, batch=1, n_images=n, padding="none") for n in (1, 0))
    before = model(inputs)

    def fails(cut: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    broken = Intervention(("z", 1), fn=fails)
    calls: list[Any] = [
        lambda: model.run_with_hooks(inputs, fwd_hooks=[broken]),
        lambda: model.run_with_cache(inputs, fwd_hooks=[broken]),
        lambda: model.generate(inputs, 3, fwd_hooks=[broken], return_type="tokens"),
    ]
    for call in calls:
        with pytest.raises(ZeroDivisionError):
            call()
        assert clean(model)
    misplaced: list[tuple[Any, type[Exception]]] = [
        (Intervention(("z", 1), positions="imge", zero=True), SpanError),
        (Intervention(("z", 1), positions=[99], zero=True), InputError),
        (Intervention(("z", 1), heads=9, zero=True), InputError),
        (Intervention("rezid", zero=True), HookNameError),
        (Intervention("resid_pre", zero=True), InputError),
        (Intervention("hook_embed", value=torch.zeros(3)), InputError),
        (Intervention(("z", 1), positions="last", position_mean=True), InputError),
        (Intervention("vision.hook_embed", zero=True), HookNameError),
        (("z", 1), InputError),
        (3, InputError),
    ]
    ran: list[Any] = []
    for wrong, error in misplaced:
        for call in (
            lambda w=wrong: model.run_with_hooks(text, fwd_hooks=[("hook_embed", ran.append), w]),
            lambda w=wrong: model.run_with_cache(text, fwd_hooks=[("hook_embed", ran.append), w]),
            lambda w=wrong: model.generate(text, 2, fwd_hooks=[("hook_embed", ran.append), w], return_type="tokens"),
        ):
            with as_users_run(), pytest.raises(error):
                call()
            assert clean(model)
    assert not ran, "refused before anything was computed"
    with pytest.raises(SpanError), model.hooks([misplaced[0][0]]):
        model(inputs)
    assert clean(model)
    assert torch.equal(model(inputs), before)


def test_left_attached_until_reset() -> None:
    model = model_of(0)
    inputs = prompts(model, 0, batch=1, n_images=1, padding="none")
    change = Intervention(("resid_mid", 1), positions="last", scale=0.3)
    changed = model.run_with_hooks(inputs, fwd_hooks=[change], reset_hooks_end=False)
    assert torch.equal(model(inputs), changed)
    model.reset_hooks()
    assert not torch.equal(model(inputs), changed)
    with model.hooks([change]):
        pass
    assert clean(model)


def test_runs_without_a_prompt_say_so() -> None:
    model = model_of(0)
    inputs = prompts(model, 0, batch=1, n_images=1, padding="none")
    stream = model(inputs, stop_at_layer=1)
    change = Intervention(("z", 1), positions="last", zero=True)
    with pytest.raises(InputError, match="residual stream"):
        model.run_with_hooks(stream, start_at_layer=1, fwd_hooks=[change])
    with model.hooks([change]), pytest.raises(InputError, match="by its parts"):
        model.language(stream, model.context(stream))
    with pytest.raises(HookNameError, match=r"'blocks\.1\.attn\.hook_z'.*start_at_layer.*stop_at_layer"):
        model.run_with_hooks(inputs, stop_at_layer=1, fwd_hooks=[change])
    with model.hooks([change]), pytest.raises(InputError, match="Functions are attached"):
        Replay(model, inputs)
    assert clean(model)


# ---------------------------------------------------------------------- functions with and without the hook


def test_a_function_may_ask_for_the_hook_or_not_in_both_places() -> None:
    model = model_of(0)
    inputs = prompts(model, 0, batch=1, n_images=1, padding="none")
    seen: list[str] = []

    def asks(x: torch.Tensor, hook: Any) -> torch.Tensor:
        seen.append(hook.name)
        return torch.tanh(x)

    def asks_by_another_name(x: torch.Tensor, point: Any) -> torch.Tensor:
        return asks(x, point)

    class Method:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x)

    functions: list[Any] = [torch.tanh, lambda x: x.tanh(), lambda x, by=1.0: by * x.tanh(), torch.nn.Tanh(), Method()]
    functions += [asks, asks_by_another_name]
    functions += [lambda *given: asks(*given), lambda x, **more: asks(x, **more)]  # noqa: PLW0108 (their signatures)
    expected = model.run_with_hooks(inputs, fwd_hooks=[(Z, lambda x, hook: torch.tanh(x))])
    assert expected is not None
    replay = Replay(model, inputs)
    for fn in functions:
        assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=[(Z, fn)]), expected), fn
        attached = model.run_with_hooks(inputs, fwd_hooks=[Intervention(Z, fn=fn)])
        torch.testing.assert_close(attached, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(replay.run([[Intervention(Z, fn=fn)]])[0], expected[0, -1], rtol=1e-4, atol=1e-4)
    assert seen == [Z] * 12


# ---------------------------------------------------------------------- generation


def generated_naively(model: HookedLLaVA, inputs: Any, run: list[Intervention], n_new: int) -> torch.Tensor:
    """One full pass for each token over prompt and answer so far, one token more standing for the one to be predicted."""
    prompt = inputs.padded_left()
    tokens = prompt.input_ids.new_zeros(len(prompt), 0)
    for _ in range(n_new):
        longer = append_tokens(model, prompt, torch.cat([tokens, torch.full((len(prompt), 1), 9)], 1))
        changed = [_as_of_the_prompt(change, prompt.shape[1]) for change in run]
        logits = model.run_with_hooks(longer, fwd_hooks=changed)
        assert logits is not None
        tokens = torch.cat([tokens, logits[:, -2].argmax(-1, keepdim=True)], 1)
    return tokens


def _as_of_the_prompt(change: Intervention, n: int) -> Any:
    """Negative numbers count from the prompt's end, not from the answer's."""
    if isinstance(change.positions, int):
        return Intervention(change.hook, positions=change.positions % n, scale=change.scale)
    return change


CHANGES: dict[str, list[Intervention]] = {
    "everywhere": [Intervention(("resid_mid", 1), scale=0.2)],
    "image": [Intervention(("resid_mid", 0), positions="image", zero=True)],
    "image and answer": [Intervention(("attn_out", 1), positions="image|answer", scale=-1.5)],
    "answer alone": [Intervention(("mlp_out", 1), positions="answer", fn=lambda x: -2 * x)],
    "last": [Intervention(("resid_pre", 1), positions="last", scale=-1.0)],
    "from the end": [Intervention(("resid_pre", 1), positions=-3, scale=-2.0)],
    "text without last": [Intervention("hook_embed", positions="text-last", position_mean=True)],
    "an edge into where the answer is read": [
        Intervention(("attn_scores", layer), block="image->last") for layer in range(3)
    ],
    "an edge out of the answer": [
        Intervention(("attn_scores", layer), block="image|answer->answer", heads=[0, 2]) for layer in range(3)
    ],
    "a weighted edge into where the answer is read": [
        Intervention(("attn_scores", layer), reweight="image|answer->last", factor=6.0) for layer in range(3)
    ],
    "temperature": [Intervention(("attn_scores", layer), heads=[0, 3], temperature=0.2) for layer in range(3)],
    "everything but itself": [Intervention(("attn_scores", 1), block=("text", None))],
    "heads": [Intervention(("z", layer), heads=[1, 3], zero=True) for layer in range(3)],
    "neurons": [Intervention(("mlp.post", 2), neurons=[0, 5, 7], value=1.5)],
    "the image side": [Intervention("vision.blocks.0.hook_mlp_out", positions=[1, 2], scale=3.0)],
    "several": [
        Intervention("hook_image_embed", scale=0.5),
        Intervention(("resid_post", 0), add=torch.full((48,), 0.3)),
        Intervention("ln_final.hook_normalized", positions="answer|last", scale=-1.0),
    ],
}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", CHANGES)
def test_generating_is_full_passes_over_prompt_and_answer(name: str, padding: str) -> None:
    model = model_of(0)
    inputs = prompts(model, 0, batch=2, n_images=1, padding=padding)
    options: dict[str, Any] = {"return_type": "tokens", "stop_at_eos": False}
    found = model.generate(inputs, 5, fwd_hooks=CHANGES[name], **options)
    assert torch.equal(found, generated_naively(model, inputs, CHANGES[name], 5))
    with model.hooks(CHANGES[name]):
        assert torch.equal(model.generate(inputs, 5, **options), found)
    assert clean(model)


def test_phases() -> None:
    model = model_of(0)
    inputs = prompts(model, 0, batch=1, n_images=1, padding="none")
    options: dict[str, Any] = {"return_type": "tokens", "stop_at_eos": False}
    change = Intervention(("mlp_out", 1), fn=lambda x: -2 * x)
    on_prompt, on_answer = (
        Intervention(("mlp_out", 1), positions=where, fn=lambda x: -2 * x) for where in ("text|image", "answer")
    )
    both = [model.generate(inputs, 6, fwd_hooks=h, **options) for h in ([change], [on_prompt, on_answer])]
    assert torch.equal(*both)
    for phase, same in (("prefill", on_prompt), ("decode", on_answer)):
        found = [model.generate(inputs, 6, fwd_hooks=[c], hook_phase=phase, **options) for c in (change, same)]
        assert torch.equal(*found)
        assert torch.equal(found[0], model.generate(inputs, 6, fwd_hooks=[same], **options))
    in_image, in_tower = Intervention(Z, positions="image", zero=True), Intervention("vision.hook_embed", zero=True)
    with pytest.raises(InputError, match=r"'image'.*nothing would change"):
        model.generate(inputs, 6, fwd_hooks=[in_image], hook_phase="decode", **options)
    with pytest.raises(HookNameError, match="Hook '.*'.*new tokens.*hook_phase='prefill'"):
        model.generate(inputs, 6, fwd_hooks=[in_tower], hook_phase="decode", **options)


def test_what_generated_tokens_cannot_have_is_refused_beforehand() -> None:
    model = model_of(0)
    inputs = prompts(model, 0, batch=1, n_images=1, padding="none")
    ran: list[Any] = []
    watch = ("hook_embed", ran.append)
    with pytest.raises(InputError, match="position_mean.*one at"):
        model.generate(inputs, 3, fwd_hooks=[watch, Intervention(("z", 1), position_mean=True)], return_type="tokens")
    each = torch.randn(inputs.shape[1], model.cfg.d_model)
    for_each = Intervention(("mlp_out", 1), value=each)
    with pytest.raises(InputError, match=r"shape \(12, 48\).*shape \(1, 48\)"):
        model.generate(inputs, 3, fwd_hooks=[watch, for_each], return_type="tokens")
    assert not ran
    assert model.generate(inputs, 3, fwd_hooks=[for_each], hook_phase="prefill", return_type="tokens").shape[1] == 3


def test_a_cache_of_generation_sees_changes() -> None:
    model = model_of(0)
    inputs = prompts(model, 0, batch=1, n_images=1, padding="none")
    change = Intervention(("mlp_out", 1), positions="image|answer", zero=True)
    _, cache = model.generate(
        inputs,
        4,
        fwd_hooks=[change],
        return_cache=True,
        names_filter="mlp_out",
        return_type="tokens",
        stop_at_eos=False,
    )
    zeroed = (cache["mlp_out", 1][0] == 0).all(-1).nonzero()[:, 0].tolist()
    n = inputs.shape[1]
    assert zeroed == [*inputs.token_map["image"], *range(n, n + 3)]


def test_shown_as_the_intervention() -> None:
    change = Intervention(("z", 1), positions="last", zero=True)
    assert repr(AttachedIntervention(change, model_of(0))) == repr(change)
