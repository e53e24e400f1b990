"""Generation: greedy as Hugging Face's, sampling as the formulas, hooks by phase, caches over new tokens, stopping."""

from __future__ import annotations

import functools
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from hooked_llava.errors import HookNameError, HookValueError, InputError
from hooked_llava.model.components import HookPoint
from hooked_llava.model.generation import Sampling
from hooked_llava.model.llava import HookedLLaVA
from tests.fixtures_processor import make_processor
from tests.oracles.plain import warped_distribution
from tests.pairs import Pair, as_users_run, batch, counted_positions, fresh_pair, off, pair

N_NEW = 6


def hf_tokens(models: Pair, prompt: dict[str, Tensor], **options: Any) -> Tensor:
    """Hugging Face's greedy continuation."""
    tokens = models.hf.generate(**prompt, max_new_tokens=N_NEW, do_sample=False, **options)
    return tokens[:, prompt["input_ids"].shape[1] :]


def tokens_of(models: Pair, prompt: Any, **options: Any) -> Any:
    return models.ours.generate(prompt, **{"max_new_tokens": N_NEW, "return_type": "tokens"} | options)


def greedy_without_a_cache(models: Pair, prompt: dict[str, Tensor]) -> Tensor:
    """One full forward for each token."""
    prompt = dict(prompt)
    for _ in range(N_NEW):
        token = models.ours(**prompt)[:, -1].argmax(-1, keepdim=True)
        prompt["input_ids"] = torch.cat([prompt["input_ids"], token], 1)
        prompt["attention_mask"] = torch.cat([prompt["attention_mask"], torch.ones_like(token)], 1)
    return prompt["input_ids"][:, -N_NEW:]


def mixed_rows(models: Pair) -> list[dict[str, Tensor]]:
    return [models.prompt(n_images=n, n_text=t, seed=n) for n, t in ((2, 4), (0, 6), (1, 9))]


# ---------------------------------------------------------------------- greedy


@pytest.mark.parametrize("geometry", ["plain", "grouped", "full"])
@pytest.mark.parametrize("n_images", [0, 1, 2])
def test_greedy_is_hugging_faces_token_by_token(geometry: str, n_images: int) -> None:
    models = pair(geometry)
    prompt = models.prompt(n_images=n_images, batch=2)
    ours = tokens_of(models, prompt)
    assert torch.equal(ours, hf_tokens(models, prompt))
    ours = tokens_of(models, prompt, stop_at_eos=False)
    assert torch.equal(ours, greedy_without_a_cache(models, prompt))
    assert len(set(ours[0].tolist())) > 1, "a constant answer would prove little"


@pytest.mark.parametrize("geometry", ["plain", "grouped"])
def test_padded_batches_continue_as_each_prompt_alone(geometry: str) -> None:
    models = pair(geometry)
    rows = mixed_rows(models)
    left, right = batch(rows, "left"), batch(rows, "right")
    ours = tokens_of(models, left)
    assert torch.equal(ours, hf_tokens(models, left))
    assert torch.equal(tokens_of(models, right), ours), "padding on the right is moved to the left"
    for row, alone in zip(ours, rows, strict=True):
        assert torch.equal(row, tokens_of(models, alone)[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_position_ids_go_on_from_the_last(side: Literal["left", "right"]) -> None:
    models = pair()
    prompt = batch(mixed_rows(models), side)
    counted = prompt | {"position_ids": counted_positions(prompt["attention_mask"])}
    assert torch.equal(tokens_of(models, counted), tokens_of(models, prompt))
    single = models.prompt()
    stretched = single | {"position_ids": 4 * torch.arange(single["input_ids"].shape[1])[None]}
    ours = tokens_of(models, stretched)
    tokens, positions = single["input_ids"], stretched["position_ids"]
    for step in range(N_NEW):
        logits = models.ours(input_ids=tokens, pixel_values=single["pixel_values"], position_ids=positions)
        assert logits[0, -1].argmax() == ours[0, step]
        tokens = torch.cat([tokens, ours[:, step : step + 1]], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)


def test_one_token_and_many() -> None:
    models = pair()
    prompt = models.prompt()
    many = tokens_of(models, prompt, max_new_tokens=10)
    for n in (1, 2, 5):
        assert torch.equal(tokens_of(models, prompt, max_new_tokens=n), many[:, :n])


# ---------------------------------------------------------------------- stopping


@functools.cache
def ending(ends: str) -> tuple[Pair, list[dict[str, Tensor]], Tensor]:
    """A model whose end token is one that the first row says third; the answers without stopping."""
    models = fresh_pair()
    rows = mixed_rows(models)
    free = tokens_of(models, batch(rows, "left"), stop_at_eos=False)
    end = int(free[0, 2])
    models.ours.generation_config.eos_token_id = [98, end] if ends == "several" else end
    return models, rows, free


@pytest.mark.parametrize("ends", ["one", "several"])
def test_rows_end_at_the_end_token_and_are_filled_with_padding(ends: str) -> None:
    models, rows, free = ending(ends)
    prompt = batch(rows, "left")
    ours = tokens_of(models, prompt)
    assert torch.equal(ours, hf_tokens(models, prompt))
    ends_at = models.ours.generation_config.eos_token_id
    ends_at = ends_at if isinstance(ends_at, list) else [ends_at]
    for row, unstopped in zip(ours.tolist(), free.tolist(), strict=True):
        stop = next((i + 1 for i, token in enumerate(unstopped) if token in ends_at), len(unstopped))
        assert row[:stop] == unstopped[:stop]
        assert set(row[stop:]) <= {models.ours.config.pad_token_id}
    assert ours[0].tolist()[3:] == [0] * (ours.shape[1] - 3)
    assert tokens_of(models, rows[0]).shape == (1, 3), "nothing is run once every row has ended"
    assert torch.equal(tokens_of(models, prompt, stop_at_eos=False), free)


def test_the_models_own_end_token_counts_where_the_generation_config_has_none() -> None:
    models = fresh_pair()
    models.ours.generation_config = None
    assert models.ours.config.eos_token_ids == (2,)
    prompt = models.prompt()
    assert torch.equal(tokens_of(models, prompt), hf_tokens(models, prompt))


@functools.cache
def talking() -> Pair:
    hf = pair().hf
    return Pair(hf, HookedLLaVA.from_hf(hf, processor=make_processor()))


def only(words: list[str]) -> Any:
    """A hook on the logits after which the model says these words, one a step, and then the last again."""
    model = talking().ours
    ids, step = [model.to_single_token(word) for word in words], [0]

    def say(logits: Tensor, hook: HookPoint) -> None:
        logits.fill_(-100)
        logits[..., ids[min(step[0], len(ids) - 1)]] = 100
        step[0] += 1

    return [("hook_logits", say)]


def test_text_comes_back_without_the_end_token_and_without_padding() -> None:
    models = talking()
    prompt = models.prompt()
    spoken = models.ours.generate(prompt, max_new_tokens=5, fwd_hooks=only(["the", "star", "</s>", "red"]))
    assert spoken == "the star"
    on = models.ours.generate(prompt, 5, fwd_hooks=only(["the", "star", "</s>", "red"]), stop_at_eos=False)
    assert on == "the star red red"
    assert models.ours.generate(models.prompt(batch=2), 1, fwd_hooks=only(["red"])) == ["red", "red"]


@pytest.mark.parametrize("stop", ["star", ["nothing", "the star"], "r"])
def test_a_stop_string_ends_the_row_and_stays(stop: Any) -> None:
    models = talking()
    words = ["the", "star", "red", "blue"]
    assert models.ours.generate(models.prompt(), 8, fwd_hooks=only(words), stop_strings=stop) == "the star"
    tokens = models.ours.generate(models.prompt(), 8, fwd_hooks=only(words), stop_strings=stop, return_type="tokens")
    assert tokens.shape == (1, 2)


def test_rows_stop_at_their_own_strings() -> None:
    models = talking()
    model = models.ours
    first, second = (
        torch.tensor([model.to_single_token(w) for w in row]) for row in (["the", "star", "blue"], ["a", "the", "star"])
    )
    step = [0]

    def say(logits: Tensor, hook: HookPoint) -> None:
        logits.fill_(-100)
        for row, ids in enumerate((first, second)):
            logits[row, :, ids[min(step[0], 2)]] = 100
        step[0] += 1

    tokens = model.generate(
        models.prompt(batch=2), 8, fwd_hooks=[("hook_logits", say)], stop_strings="star", return_type="tokens"
    )
    assert tokens.tolist() == [[*first[:2].tolist(), 0], second.tolist()]


# ---------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.7, None, None), (1.0, 5, None), (1.3, None, 0.6), (0.8, 7, 0.5)],
)
def test_sampling_draws_from_the_warped_distribution(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    n = 20_000
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 1.5
    expected = warped_distribution(logits, temperature, top_k, top_p)
    sampling = Sampling(True, temperature, top_k, top_p, torch.Generator().manual_seed(0))
    drawn = sampling.pick(logits.expand(n, -1)).bincount(minlength=12) / n
    assert drawn[expected == 0].eq(0).all(), "a token that was cut off was drawn"
    spread = (expected * (1 - expected) / n).sqrt()
    assert ((drawn - expected).abs() <= 5 * spread + 1e-12).all()


def test_the_support_is_cut_exactly() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()
    for top_k, top_p, kept in (
        (2, None, {0, 1}),
        (None, 0.6, {0, 1}),
        (None, 0.86, {0, 1, 2, 3}),
        (3, 0.99, {0, 1, 2}),
        (None, 0.01, {0}),
    ):
        sampling = Sampling(True, 1.0, top_k, top_p, torch.Generator().manual_seed(0))
        assert set(sampling.pick(logits.expand(400, -1)).tolist()) == kept


def test_sampled_tokens_are_multinomial_over_the_models_distribution() -> None:
    models = pair()
    prompt = models.prompt()
    ours = tokens_of(models, prompt, do_sample=True, temperature=0.9, top_k=20, top_p=0.9, seed=4)
    generator, tokens = torch.Generator().manual_seed(4), prompt["input_ids"]
    assert 5 not in ours, "choose a seed that draws no image token"
    for step in range(N_NEW):
        logits = models.ours(input_ids=tokens, pixel_values=prompt["pixel_values"])[0, -1]
        probabilities = warped_distribution(logits, 0.9, 20, 0.9).float()
        assert torch.multinomial(probabilities, 1, generator=generator).item() == ours[0, step]
        tokens = torch.cat([tokens, ours[:, step : step + 1]], 1)


def test_seeds_repeat_and_generators_go_on() -> None:
    models = pair()
    prompt = models.prompt(batch=2)
    draw = functools.partial(tokens_of, models, prompt, do_sample=True, temperature=2.0)
    assert torch.equal(draw(seed=1), draw(seed=1))
    assert not torch.equal(draw(seed=1), draw(seed=2))
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(draw(generator=generator), draw(seed=1))
    assert not torch.equal(draw(generator=generator), draw(seed=1))
    state = torch.get_rng_state()
    draw(seed=1)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


# ---------------------------------------------------------------------- hooks by phase


@pytest.mark.parametrize("phase", ["prefill", "decode", "both"])
def test_hooks_see_the_shapes_of_their_phase(phase: Literal["prefill", "decode", "both"]) -> None:
    models = pair("grouped")
    prompt = models.prompt(batch=2)
    n = prompt["input_ids"].shape[1]
    seen: dict[str, list[tuple[int, ...]]] = {}

    def note(x: Tensor, hook: HookPoint) -> None:
        seen.setdefault(str(hook.name), []).append(tuple(x.shape))

    names = [
        "blocks.1.hook_resid_pre",
        "blocks.1.attn.hook_pattern",
        "hook_logits",
        "vision.hook_out",
        "hook_text_embed",
    ]
    phases = {"fwd_hooks": [(names[:3] + names[4:], note)] + ([("vision.hook_out", note)] if phase != "decode" else [])}
    tokens_of(models, prompt, max_new_tokens=3, hook_phase=phase, **phases)
    first = {
        "blocks.1.hook_resid_pre": (2, n, 48), "blocks.1.attn.hook_pattern": (2, 6, n, n), "hook_logits": (2, n, 99),
        "hook_text_embed": (2, n, 48), "vision.hook_out": (2, 4, 32),
    }  # fmt: skip
    later = {
        name: [(2, 6, 1, n + 1), (2, 6, 1, n + 2)] if "pattern" in name else [(2, 1, shape[-1])] * 2
        for name, shape in first.items()
        if not name.startswith("vision.")
    }
    expected = {name: [shape] for name, shape in first.items()} if phase != "decode" else {}
    if phase != "prefill":
        expected = {name: expected.get(name, []) + later.get(name, []) for name in {**expected, **later}}
    assert seen == expected


def test_hooks_have_effect_in_their_phase_only() -> None:
    models = pair()
    prompt = models.prompt()
    plain = tokens_of(models, prompt)

    def say_nine(logits: Tensor, hook: HookPoint) -> None:
        logits[..., 9] = 1000

    def run(phase: Any) -> list[int]:
        return tokens_of(models, prompt, fwd_hooks=[("hook_logits", say_nine)], hook_phase=phase)[0].tolist()

    assert run("both") == [9] * N_NEW
    assert run("prefill")[0] == 9
    assert run("prefill")[1:] != [9] * (N_NEW - 1)
    assert run("decode") == [plain[0, 0].item()] + [9] * (N_NEW - 1)
    assert not any(point.has_hooks() for point in models.ours.hook_points())


def test_an_edit_in_the_prefill_lives_on_in_keys_and_values() -> None:
    models = pair()
    prompt = models.prompt()

    def edit(x: Tensor, hook: HookPoint) -> None:
        if x.shape[1] > 1:
            x[:, 2] += 3

    hooks = [("blocks.0.hook_resid_pre", edit)]
    ours = tokens_of(models, prompt, fwd_hooks=hooks, hook_phase="prefill", stop_at_eos=False)
    tokens = prompt["input_ids"]
    for step in range(N_NEW):
        inputs = {"input_ids": tokens, "pixel_values": prompt["pixel_values"]}
        assert models.ours.run_with_hooks(inputs, fwd_hooks=hooks)[0, -1].argmax() == ours[0, step]
        tokens = torch.cat([tokens, ours[:, step : step + 1]], 1)


@pytest.mark.parametrize("padded", [False, True])
def test_the_last_block_is_read_at_one_position_unless_somebody_hooks_it(padded: bool, monkeypatch: Any) -> None:
    models = pair()
    ours, prompt = models.ours, batch(mixed_rows(models), "left") if padded else models.prompt()
    plain, entered = tokens_of(models, prompt), []
    to_logits = type(ours.language).to_logits

    def counted(language: Any, resid: Tensor) -> Tensor:
        entered.append(resid.shape[1])
        return to_logits(language, resid)

    monkeypatch.setattr(type(ours.language), "to_logits", counted)
    n = prompt["input_ids"].shape[1]
    last = ours.cfg.n_layers - 1
    whole = [f"blocks.{last}.hook_resid_pre", f"blocks.{last}.attn.hook_k", "ln_final.hook_scale", "hook_logits"]
    for name, expected in [(f"blocks.{last - 1}.hook_resid_post", 1), *((name, n) for name in whole)]:
        seen: list[int] = []
        hook = (name, lambda x, hook, seen=seen: seen.append(x.shape[1]))
        assert torch.equal(tokens_of(models, prompt, fwd_hooks=[hook], hook_phase="prefill"), plain)
        assert (seen, entered[:2]) == ([n], [expected, 1]), name
        entered.clear()
    handle = ours.language.blocks[last].mlp.register_forward_hook(
        lambda module, args, out: entered.append(out.shape[1])
    )
    assert torch.equal(tokens_of(models, prompt), plain)
    handle.remove()
    assert entered[:2] == [n, n]  # torch's own hooks count too


def test_an_error_in_a_hook_leaves_no_trace() -> None:
    models = pair()
    with pytest.raises(HookValueError, match="returned int"):
        tokens_of(models, models.prompt(), fwd_hooks=[("z", lambda x, hook: 3)], hook_phase="decode")
    assert not any(point.has_hooks() for point in models.ours.hook_points())


# ---------------------------------------------------------------------- caches over new tokens


@pytest.mark.parametrize("geometry", ["plain", "grouped"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_cache_is_that_of_a_run_over_prompt_and_answer(geometry: str, padded: bool) -> None:
    models = pair(geometry)
    prompt = batch(mixed_rows(models), "left") if padded else models.prompt(batch=2)
    tokens, cache = tokens_of(models, prompt, return_cache=True, names_filter="*", stop_at_eos=False)
    run = prompt | {
        "input_ids": torch.cat([prompt["input_ids"], tokens[:, :-1]], 1),
        "attention_mask": torch.cat([prompt["attention_mask"], torch.ones_like(tokens[:, :-1])], 1),
    }
    _, expected = models.ours.run_with_cache(run, names_filter="*")
    assert list(cache) == list(expected)
    for name in expected:
        finite = expected[name].isfinite()
        assert torch.equal(cache[name].isfinite(), finite), name
        assert off(cache[name][finite], expected[name][finite]) < 1e-5, name


def test_rows_that_have_ended_are_fed_padding() -> None:
    models, rows, _ = ending("one")
    tokens, cache = tokens_of(models, batch(rows, "left"), return_cache=True, names_filter="hook_text_embed")
    assert tokens[0, 3:].eq(0).all()
    fed = cache["hook_text_embed"][0, 1 - tokens.shape[1] :]
    assert torch.equal(fed, models.ours.W_E[tokens[0, :-1]])


def test_the_cache_has_views_and_decompositions() -> None:
    models = pair()
    prompt = models.prompt()
    tokens, cache = tokens_of(models, prompt, return_cache=True)
    n = prompt["input_ids"].shape[1] + tokens.shape[1] - 1
    assert "blocks.0.attn.hook_result" not in cache
    assert cache["resid_post", -1].shape[1] == n
    assert cache.image["resid_post", -1].shape[1] == 4
    assert cache.text["resid_post", -1].shape[1] == n - 4
    attributions = cache.logit_attrs(cache.decompose_resid(), int(tokens[0, -1])).sum(0)
    assert off(attributions[0], cache["hook_logits"][0, :, tokens[0, -1]]) < 1e-4


def test_cache_and_text_together_and_one_token_only() -> None:
    models = talking()
    text, cache = models.ours.generate(
        models.prompt(), 1, return_cache=True, names_filter=("z", 0), fwd_hooks=only(["red"])
    )
    assert text == "red"
    assert cache["z", 0].shape[1] == models.prompt()["input_ids"].shape[1]


def test_the_cache_sees_edits() -> None:
    models = pair()
    _, cache = tokens_of(
        models, models.prompt(), return_cache=True, names_filter=("z", 1), fwd_hooks=[("z", lambda x, hook: 0 * x)]
    )
    assert cache["z", 1].eq(0).all()


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"max_new_tokens": 0}, InputError, "max_new_tokens=0; expected at least 1"),
        ({"temperature": 0.0}, InputError, "temperature=0.0; expected.*positive"),
        ({"top_k": 0}, InputError, "top_k=0; expected at least 1"),
        ({"top_p": 1.5}, InputError, "top_p=1.5; expected a probability"),
        ({"hook_phase": "predill"}, InputError, "hook_phase='predill'; expected 'prefill', 'decode' or 'both'"),
        ({"return_type": "token"}, InputError, "return_type='token'; expected 'text' or 'tokens'"),
        ({"max_new_tokens": 245}, InputError, "12 positions.*max_new_tokens.*245.*256 positions"),
        ({"fwd_hooks": [("patern", print)], "hook_phase": "decode"}, HookNameError, "No hook is called 'patern'"),
        (
            {"fwd_hooks": [("vision.hook_out", print)], "hook_phase": "decode"},
            HookNameError,
            "'vision.hook_out'.*new tokens.*hook_phase='prefill'",
        ),
        ({"return_cache": True, "names_filter": "patern"}, HookNameError, "No hook is called 'patern'"),
        ({"return_type": "text"}, InputError, "no processor"),
        ({"stop_strings": "."}, InputError, "no processor"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_run(
    options: dict[str, Any], error: type[Exception], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = pair()
    monkeypatch.setattr(HookedLLaVA, "embed", lambda *_: pytest.fail("the model was run"))
    with as_users_run(), pytest.raises(error, match=match):
        tokens_of(models, models.prompt(), **options)


def test_image_hooks_and_caches_on_text_are_refused() -> None:
    models = pair()
    text = models.prompt(n_images=0)
    with pytest.raises(HookNameError, match="Hook '.*no image"):
        tokens_of(models, text, fwd_hooks=[("vision.hook_out", lambda x, hook: None)])
    with pytest.raises(HookNameError, match="Hook '.*no image"):
        tokens_of(models, text, return_cache=True, names_filter="projector.*")
    assert torch.equal(tokens_of(models, text, fwd_hooks=[("*", lambda x, hook: None)]), tokens_of(models, text))
