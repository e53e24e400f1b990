"""Towers of different dtypes, and autocast: the logits of transformers, and everything that runs the model."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_llava.analysis.activation_patching import activation_patching
from hooked_llava.analysis.attribution_patching import attribution_patching, edge_attribution
from hooked_llava.analysis.logit_attribution import logit_attribution
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.readout.answer import answer_log_probability
from hooked_llava.readout.head_outputs import head_outputs
from hooked_llava.readout.lens import project
from hooked_llava.replay import Intervention, Replay
from hooked_llava.toy.images import image_path
from tests.analyses import CHOSEN_BY_ITSELF, all_analyses, numbers
from tests.builders import make_hf_model, make_prompt
from tests.fixtures_processor import make_processor
from tests.pairs import Pair, off

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
ROUNDED = 0.08  # bfloat16 has 8 bits, and the sums of two implementations are rounded in another order
MIXES = {  # vision tower and projector, language tower
    "fine images": (SINGLE, HALF),
    "coarse images": (HALF, SINGLE),
    "float16 images": (torch.float16, SINGLE),
    "double images": (DOUBLE, SINGLE),
    "double words": (SINGLE, DOUBLE),
}


@functools.cache
def mixed(name: str) -> Pair:
    """As transformers leaves them where a part is kept in another precision than the rest."""
    image_side, language = MIXES[name]
    hf = make_hf_model()
    hf.model.vision_tower.to(image_side)
    hf.model.multi_modal_projector.to(image_side)
    hf.model.language_model.to(language)
    hf.lm_head.to(language)
    return Pair(hf, HookedLLaVA.from_hf(hf, make_processor()))


def prompt_of(models: Pair, **options: Any) -> dict[str, Tensor]:
    prompt = make_prompt(models.hf, **options)
    return prompt | {name: prompt[name].float() for name in prompt if name == "pixel_values"}


@pytest.mark.parametrize("n_images", [0, 1, 2])
@pytest.mark.parametrize("name", MIXES)
def test_logits_are_those_of_transformers(name: str, n_images: int) -> None:
    models = mixed(name)
    prompt = prompt_of(models, n_images=n_images, batch=2)
    expected, found = models.hf_logits(prompt), models.ours(prompt)
    assert found.dtype == expected.dtype == MIXES[name][1]
    assert off(found.double(), expected.double()) < (ROUNDED if HALF in MIXES[name] else 1e-5)


@pytest.mark.parametrize("name", MIXES)
def test_pixels_are_not_rounded_to_the_language_tower(name: str) -> None:
    """The vision tower's features are bit for bit those of its own dtype."""
    models = mixed(name)
    image_side = MIXES[name][0]
    prompt = prompt_of(models)
    inputs = models.ours.as_inputs(prompt)
    assert inputs.pixel_values is not None
    assert torch.equal(inputs.pixel_values, prompt["pixel_values"].to(image_side))
    _, cache = models.ours.run_with_cache(inputs, names_filter=["vision.*", "projector.*", "hook_image_embed"])
    kinds = {hook: tensor.dtype for hook, tensor in cache.items() if not hook.endswith("hook_scale")}
    assert kinds.pop("hook_image_embed") == MIXES[name][1]
    assert set(kinds.values()) == {image_side}
    whole = HookedLLaVA.from_hf(make_hf_model(dtype=image_side))
    assert torch.equal(models.ours.vision(inputs.pixel_values), whole.vision(prompt["pixel_values"]))


@pytest.mark.parametrize("name", MIXES)
def test_a_projector_of_a_third_dtype(name: str) -> None:
    """transformers crashes there; ours is the same numbers in the projector's dtype."""
    models = mixed(name)
    prompt = prompt_of(models)
    expected = models.ours(prompt)
    other = HookedLLaVA.from_hf(models.hf)
    other.projector.to(DOUBLE)
    assert off(other(prompt).double(), expected.double()) < (ROUNDED if HALF in MIXES[name] else 2e-3)


@pytest.mark.parametrize("name", MIXES)
def test_what_a_cache_takes_is_forecast(name: str) -> None:
    models = mixed(name)
    _, cache = models.ours.run_with_cache(prompt := prompt_of(models))
    assert models.ours.cache_size(prompt) == sum(tensor.nbytes for tensor in cache.values())


@pytest.mark.parametrize("name", MIXES)
def test_generation_and_verify(name: str) -> None:
    models = mixed(name)
    prompt = prompt_of(models)
    theirs = models.hf.generate(**prompt, max_new_tokens=4, do_sample=False)[:, prompt["input_ids"].shape[1] :]
    ours = models.ours.generate(prompt, 4, return_type="tokens")
    assert ours.tolist() == theirs.tolist()
    assert models.ours.verify(models.hf, prompt).ok


CHANGES = [
    Intervention("blocks.1.attn.hook_z", positions="last", zero=True),
    Intervention("blocks.0.hook_resid_pre", positions="image", zero=True),
    Intervention("vision.blocks.0.hook_mlp_out", zero=True),
    Intervention("projector.hook_out", zero=True),
    Intervention("blocks.1.attn.hook_pattern", positions="last", zero=True),
]


def by_hand(model: HookedLLaVA, inputs: Any, change: Intervention) -> Tensor:
    """The full run with the same change."""

    def function(tensor: Tensor, hook: Any) -> Tensor:
        if change.positions is None:
            return torch.zeros_like(tensor)
        where = inputs.token_map[change.positions]
        if "pattern" in hook.name:
            tensor[:, :, list(where)] = 0
        else:
            tensor[:, list(where)] = 0
        return tensor

    return model.run_with_hooks(inputs, fwd_hooks=[(change.hook, function)])[0, -1]


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("name", MIXES)
def test_replay_equals_the_full_run(name: str, change: Intervention) -> None:
    model = mixed(name).ours
    inputs = model.as_inputs(prompt_of(mixed(name)))
    found = Replay(model, inputs).run([[change]])[0]
    assert off(found.double(), by_hand(model, inputs, change).double()) < (ROUNDED if HALF in MIXES[name] else 1e-5)


# --- autocast


@functools.cache
def plain() -> Pair:
    hf = make_hf_model()
    return Pair(hf, HookedLLaVA.from_hf(hf, make_processor()))


@pytest.mark.parametrize("dtype", [HALF, torch.float16])
@pytest.mark.parametrize("n_images", [0, 1, 2])
def test_autocast_gives_the_logits_of_transformers(dtype: torch.dtype, n_images: int) -> None:
    prompt = prompt_of(plain(), n_images=n_images, batch=2)
    with torch.autocast("cpu", dtype):
        expected, found = plain().hf_logits(prompt), plain().ours(prompt)
        every, cache = plain().ours.run_with_cache(
            prompt, names_filter=list(plain().ours.hook_dict) if n_images else "*"
        )
    assert found.dtype == expected.dtype == dtype
    assert off(found, expected) < 0.01
    assert off(every, expected) < ROUNDED
    assert all(tensor.isfinite().all() for name, tensor in cache.items() if "scores" not in name)


@pytest.mark.parametrize("dtype", [HALF, torch.float16])
def test_generation_under_autocast(dtype: torch.dtype) -> None:
    prompt = prompt_of(plain())
    with torch.autocast("cpu", dtype):
        theirs = plain().hf.generate(**prompt, max_new_tokens=4, do_sample=False)[:, prompt["input_ids"].shape[1] :]
        assert plain().ours.generate(prompt, 4, return_type="tokens").tolist() == theirs.tolist()


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("dtype", [HALF, torch.float16])
def test_replay_under_autocast(dtype: torch.dtype, change: Intervention) -> None:
    model = plain().ours
    inputs = model.as_inputs(prompt_of(plain()))
    with torch.autocast("cpu", dtype):
        found, expected = Replay(model, inputs).run([[change]])[0], by_hand(model, inputs, change)
    assert off(found.float(), expected.float()) < ROUNDED


def test_analyses_under_autocast() -> None:
    """Close to those without; none stops at a dtype that NumPy does not have."""
    model = plain().ours
    clean, other = (model.as_inputs(prompt_of(plain(), seed=seed)) for seed in (1, 2))

    def results() -> list[Any]:
        options: dict[str, Any] = {"metric": lambda logits: logits[..., 7]}
        return [
            activation_patching(model, clean, other, **options).values,
            attribution_patching(model, clean, other, **options).to_array().values,
            edge_attribution(model, clean, other, **options).mlps.fillna(0).values,
            logit_attribution(model, clean, 7, 9).values,
        ]

    expected = results()
    with torch.autocast("cpu", HALF):
        found = results()
    for own, right in zip(found, expected, strict=True):
        assert abs(own - right).max() < 0.1 * abs(right).max()


# --- bfloat16 against float32, as docs/howto/precision.md says it

FROM_GRADIENTS, FROM_SMALL_DIFFERENCES, FROM_DIFFERENCES = 0.25, 0.3, 0.1
BOUNDS = {
    **dict.fromkeys(
        ("map {'method': 'grad_x_input'", "map {'method': 'integrated", "estimate", "deleted"), FROM_GRADIENTS
    ),
    **dict.fromkeys(("trace", "ablated tokens", "occlusion", "signs", "knockouts"), FROM_SMALL_DIFFERENCES),
    **dict.fromkeys(("circuit", "yes and no", "curves", "flow"), FROM_DIFFERENCES),
    "deleted patches": 0.05,
    "deleted tokens": 0.05,
}
"""Largest difference as a share of the largest value, by the beginning of an analysis's name; the longest fits. Others: 5 %."""


@functools.cache
def embedded(dtype: torch.dtype) -> HookedLLaVA:
    return HookedLLaVA.from_pretrained("tiny-shapes", dtype=dtype)


def analyses_in(dtype: torch.dtype) -> dict[str, Any]:
    model = embedded(dtype)
    asked = [model.prepare("What color is the star?", images=image_path(name)) for name in ("demo", "five-shapes")]
    return all_analyses(model, *asked)


def test_every_analysis_in_bfloat16_is_near_the_one_in_float32() -> None:
    fine, coarse = analyses_in(SINGLE), analyses_in(HALF)
    assert len(fine) > 55
    for what, run in fine.items():
        bound = BOUNDS[max((key for key in BOUNDS if what.startswith(key)), key=len)] if _named(what) else 0.05
        found = numbers(coarse[what]())
        for key, expected in numbers(run()).items():
            assert found[key].dtype.itemsize >= 4, (what, key)
            assert np.array_equal(np.isnan(found[key]), np.isnan(expected)), (what, key)
            if (what, key) in CHOSEN_BY_ITSELF:
                continue
            largest = float(np.nanmax(np.abs(expected), initial=0.0)) or 1.0
            assert float(np.nanmax(np.abs(found[key] - expected), initial=0.0)) <= bound * largest, (what, key)


def _named(what: str) -> bool:
    return any(what.startswith(key) for key in BOUNDS)


def test_what_adds_up_is_in_float32_in_a_model_in_bfloat16() -> None:
    model = embedded(HALF)
    inputs = model.prepare("What color is the star?", images=image_path("demo"))
    logits, cache = model.run_with_cache(inputs, names_filter=["pattern", "scale", "resid_post", "attn_scores"])
    assert logits is not None
    assert {cache[name, 1].dtype for name in ("pattern", "resid_post", "attn_scores")} == {logits.dtype} == {HALF}
    assert {tensor.dtype for name, tensor in cache.items() if name.endswith("hook_scale")} == {SINGLE}
    exact = cache["attn_scores", 1].float().softmax(-1)
    assert torch.equal(cache["pattern", 1], exact.to(HALF)), "rounded once, after the softmax"
    ids = torch.tensor([[model.to_single_token("Red")]])
    assert answer_log_probability(logits[0, -1:], ids).dtype == SINGLE
    assert project(model, cache["resid_post", 1][0, -1], "unembed", cache["ln_final.hook_scale"][0, -1]).dtype == SINGLE
    values = head_outputs(
        model,
        1,
        torch.ones(1, model.cfg.n_heads, 1, 2, dtype=HALF),
        torch.ones(1, 2, model.cfg.n_heads, model.cfg.d_head, dtype=HALF),
    )
    assert values.dtype == SINGLE
