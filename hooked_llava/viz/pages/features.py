"""Pages of features of a sparse autoencoder: which argue for an answer, and what steering by them does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, SupportsFloat

import numpy as np
import xarray as xr

from hooked_llava.model.attached_sae import Autoencoder
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.options.attribution_methods import ATTRIBUTION_METHODS, AttributionMethod
from hooked_llava.options.steering_modes import CONTROLS
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.prompt.question import question_text
from hooked_llava.readout.answer_tokens import AnswerLike
from hooked_llava.sae.attribution import feature_attribution, pooled
from hooked_llava.steering.steering import DirectionLike
from hooked_llava.steering.sweep import STEERED, steering_sweep
from hooked_llava.viz.figures.features import dose_response, feature_overlays
from hooked_llava.viz.pages.page import Page, make_page, run_footer, steps_reported
from hooked_llava.viz.pages.parts import about_model, answered

_NOTICED = 0.001
"""Nats below which an attribution says nothing."""
ATTRIBUTION_STEPS = ("attributing", "answering", "drawing")
STEERING_STEPS = ("steering", "answering", "drawing")
"""The parts of the work, as progress is reported."""


@dataclass(frozen=True, kw_only=True)
class FeaturePage(Page):
    """Features of an autoencoder as a page; `page.results` hold attribution and pooled, or sweep, or scores, words and steered.

    Of explained features `page.question` says which, and `page.answer` what one stands for, or nothing.
    """


def attribution_page(
    model: HookedLLaVA,
    sae: Autoencoder,
    inputs: InputsLike,
    answer: AnswerLike | None = None,
    baseline: AnswerLike | None = None,
    *,
    method: AttributionMethod = "gradient",
    n_features: int = 6,
    n_entries: int = 20,
    max_new_tokens: int = 20,
    on_step: Callable[[str], None] | None = None,
    **options: Any,
) -> FeaturePage:
    """Attribute an answer to features, and put the largest, where they are in the image, and their sums on one page.

    Args:
        model: the model.
        sae: the autoencoder.
        inputs: one prompt, anything `model.as_inputs` takes.
        answer: as for `feature_attribution`.
        baseline: as for `feature_attribution`.
        method: as for `feature_attribution`.
        n_features: how many features are drawn and listed.
        n_entries: how many features at tokens are listed.
        max_new_tokens: length of the answer at most.
        on_step: called with the name of each part of the work (`ATTRIBUTION_STEPS`) as it begins.
        options: further ones of `feature_attribution`.

    Raises `InputError` as `feature_attribution`.

    >>> from hooked_llava.sae.files import load_sae
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> page = attribution_page(model, load_sae("tiny-shapes"), model.prepare("Who made the star?"), "Clara")
    >>> page.answer, sorted(page.results)
    ('Clara', ['attribution', 'pooled'])
    """
    prompt = model.as_inputs(inputs).single("attribution_page")
    with steps_reported(ATTRIBUTION_STEPS, on_step, "attributing") as begin:
        begin("attributing")
        found = feature_attribution(model, sae, prompt, answer, baseline, method=method, **options)
        by_feature = pooled(found, "sum")
        begin("answering")
        said, n_forward = answered(model, prompt, max_new_tokens)
        begin("drawing")
        shown = _attributed(model, prompt, found, by_feature, n_features, n_entries)
        cost = (
            f"attribution: {found.n_forward} forward and {found.n_backward} backward passes; answer: {n_forward} tokens"
        )
        footer, results = run_footer(model, prompt, cost), {"attribution": found, "pooled": by_feature}
        said_of = {"question": question_text(prompt), "answer": said}
        return make_page(FeaturePage, "attribution", shown, footer, results, **said_of)


def _attributed(
    model: HookedLLaVA, prompt: Inputs, found: xr.Dataset, by_feature: xr.Dataset, n_features: int, n_entries: int
) -> dict[str, Any]:
    """The template's variables."""
    overlays = [feature_overlays(prompt, found, features=n_features, image=i, title="") for i in range(prompt.n_images)]
    of_entry = ("sae_feature", "label", "activation", "attribution")
    return {
        **about_model(model),
        "about": found.attrs,
        "meaning": ATTRIBUTION_METHODS[found.method],
        "images": prompt.images or (),
        "overlays": overlays,
        "features": _rows(by_feature.isel(sae_feature=slice(n_features)), ("sae_feature", "image", "text")),
        "entries": _rows(found.isel(entry=slice(n_entries)), of_entry),
        "is_sure": is_sure(found),
    }


def is_sure(attribution: xr.Dataset) -> bool:
    """Whether the model is so sure of the answer that no feature moves its log-probability, and another must be compared."""
    largest = float(np.abs(attribution["attribution"].values).max(initial=0.0))
    return "baseline" not in attribution.attrs and largest < _NOTICED


def steering_page(
    model: HookedLLaVA,
    inputs: InputsLike,
    direction: DirectionLike,
    strengths: Iterable[SupportsFloat],
    *,
    max_new_tokens: int = 20,
    on_step: Callable[[str], None] | None = None,
    **options: Any,
) -> FeaturePage:
    """Steer at several strengths, and put the answers beside those of the controls on one page.

    Args:
        model: the model.
        inputs: one prompt, anything `model.as_inputs` takes.
        direction: a vector, or {feature: value}, as for `steer`.
        strengths: as for `steering_sweep`.
        max_new_tokens: length of the answer without steering at most.
        on_step: called with the name of each part of the work (`STEERING_STEPS`) as it begins.
        options: further ones of `steering_sweep`.

    Raises `InputError` as `steering_sweep`, and for several prompts.

    >>> from hooked_llava.sae.files import load_sae
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> page = steering_page(model, model.prepare("Who made the star?"), {7: 1.0}, [0, 5], sae=load_sae("tiny-shapes"))
    >>> page.results["sweep"].first_token.sel(steered_by="steered", strength=0).item()
    'Clara'
    """
    prompt = model.as_inputs(inputs).single("steering_page")
    with steps_reported(STEERING_STEPS, on_step, "steering") as begin:
        begin("steering")
        sweep = steering_sweep(model, prompt, direction, strengths, **options)
        begin("answering")
        said, _ = answered(model, prompt, max_new_tokens)
        begin("drawing")
        shown = {
            **about_model(model),
            "about": sweep.attrs,
            "features": dict(direction) if isinstance(direction, dict) else {},
            "images": prompt.images or (),
            "curves": dose_response(sweep, title=""),
            "controls": {name: CONTROLS[name] for name in sweep.steered_by.values.tolist() if name != STEERED},
            "ways": [name.replace("_", " ") for name in sweep.steered_by.values.tolist()],
            "rows": answers_by_strength(sweep),
        }
        cost = f"{sweep.runs} steered runs for {sweep.work:.2f} forward passes besides {sweep.n_forward} kept"
        footer, said_of = run_footer(model, prompt, cost), {"question": question_text(prompt), "answer": said}
        return make_page(FeaturePage, "steering", shown, footer, {"sweep": sweep}, **said_of)


def answers_by_strength(sweep: xr.Dataset) -> dict[float, list[tuple[str, float]]]:
    """For each strength what is said first under each way of steering, and the log-probability of the answer.

    >>> dims = ("steered_by", "strength")
    >>> sweep = xr.Dataset({"first_token": (dims, [["Red"]]), "log_probability": (dims, [[-0.5]])}, {"strength": [2.0]})
    >>> answers_by_strength(sweep)
    {2.0: [('Red', -0.5)]}
    """
    rows = {}
    for strength in sweep.strength.values.tolist():
        one = sweep.sel(strength=strength)
        rows[strength] = list(zip(one.first_token.values.tolist(), one.log_probability.values.tolist(), strict=True))
    return rows


def _rows(found: xr.Dataset, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Some columns of a dataset of one dimension, as rows."""
    columns = [found[name].values.tolist() for name in names]
    return [dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)]
