"""One page that shows how a model arrived at its answer: everything in one HTML file, which needs no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, get_args

import xarray as xr

from hooked_llava.analysis.head_scores import head_scores
from hooked_llava.analysis.image_attention import image_attention
from hooked_llava.analysis.logit_attribution import logit_attribution
from hooked_llava.analysis.logit_lens import logit_lens
from hooked_llava.analysis.next_tokens import next_tokens
from hooked_llava.analysis.patch_importance import Method, patch_importance
from hooked_llava.checks import one_of
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.readout.answer_tokens import single_token
from hooked_llava.viz.pages.explain_context import Page, build_page
from hooked_llava.viz.pages.page import HtmlPage, answer_text, fill_template, provenance, steps_reported

STEPS = (
    *("answering", "next tokens", "logit lens", "layers", "heads"),
    *("attention to the picture", "patches", "occlusion", "drawing"),
)
"""The parts of the work, as progress is reported; those about pictures are left out where there is none."""
OCCLUDED_UNASKED = 256
"""Occlusion runs the model once for about each patch: with more patches than this it is left out unless asked for."""
_WINDOWS = 4  # occluded squares side by side in a picture: without a single patch a model seldom misses anything
_LENS_ANSWERS = 4


@dataclass(frozen=True, kw_only=True)
class _Wishes:
    """What a page is to show."""

    answer: str | int | None
    baseline: str | int | None
    max_new_tokens: int
    k: int
    n_heads: int
    patches: Method
    occlusion: bool | None


@dataclass(frozen=True, kw_only=True)
class Report(HtmlPage):
    """How a model came to its answer: the page, and the results it shows.

    `report.save("report.html")` writes it; in a notebook it shows itself. The labelled arrays in `report.results` are
    next_tokens, lens, components, heads, head_scores, and with a picture attention, patches and occlusion.
    """

    question: str
    """What was asked."""
    answer: str
    """What the model said, greedily decoded."""


def explain(
    model: HookedLLaVA,
    inputs: Any,
    *,
    answer: str | int | None = None,
    baseline: str | int | None = None,
    max_new_tokens: int = 20,
    k: int = 5,
    n_heads: int = 8,
    patches: Method = "log_increase",
    occlusion: bool | None = None,
    on_step: Callable[[str], None] | None = None,
) -> Report:
    """Ask the model, look inside while it answers, and put everything on one page.

    Args:
        model: the model.
        inputs: one prompt, anything `model.as_inputs` takes; those of `model.prepare` also show pictures as they were.
        answer: the token whose logit is taken apart, an id or a word that is one token after the prompt; the model's own
            first token by default.
        baseline: a token whose logit is subtracted, to see why one answer and not the other.
        max_new_tokens: length of the answer at most.
        k: how many words the tables show.
        n_heads: how many heads' attention is drawn.
        patches: the method of the patch map, see `patch_importance`.
        occlusion: whether occlusion is drawn beside it, which runs the model once for about each patch; by default up to
            `OCCLUDED_UNASKED` patches. What is taken away are squares of a quarter of the picture's side.
        on_step: called with the name of each part of the work (`STEPS`) as it begins; by default a progress bar
            shows if it takes longer than two seconds.

    Raises `InputError` for several prompts, for a word that is not one token, and for an unknown method.

    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> explain(model, model.prepare("Who made the star?"), max_new_tokens=1).html.startswith("<!doctype html>")
    True
    """
    prompt = model.as_inputs(inputs)
    if len(prompt) != 1:
        raise InputError(
            f"explain takes one prompt, got {len(prompt)}; call it once for each: inputs[0], inputs[1], ..."
        )
    one_of(patches, get_args(Method), "patches")
    wishes = _Wishes(
        answer=answer,
        baseline=baseline,
        max_new_tokens=max_new_tokens,
        k=min(k, model.cfg.d_vocab),
        n_heads=n_heads,
        patches=patches,
        occlusion=occlusion,
    )
    with steps_reported(STEPS, on_step, "explaining") as report_step:
        return _explain(model, prompt, wishes, report_step)


def _explain(model: HookedLLaVA, prompt: Inputs, wishes: _Wishes, on_step: Callable[[str], None]) -> Report:
    started = perf_counter()
    on_step("answering")
    tokens = model.generate(prompt, max_new_tokens=wishes.max_new_tokens, return_type="tokens")
    text = answer_text(model, tokens)
    results = _results(model, prompt, wishes, on_step)
    on_step("drawing")
    n_forward = tokens.shape[1] + sum(float(result.attrs["n_forward"]) for result in results.values())
    page = Page(
        model=model,
        inputs=prompt,
        answer=text,
        results=results,
        n_heads=wishes.n_heads,
        provenance=provenance(model, prompt, f"{n_forward:.0f} forward passes, {perf_counter() - started:.1f} s"),
    )
    context = build_page(page)
    html = fill_template("report.html.jinja", context)
    return Report(question=context["question"], answer=text, html=html, results=results)


def _results(
    model: HookedLLaVA, prompt: Inputs, wishes: _Wishes, on_step: Callable[[str], None]
) -> dict[str, xr.DataArray | xr.Dataset]:
    """Everything that is measured."""
    results: dict[str, xr.DataArray | xr.Dataset] = {}
    on_step("next tokens")
    results["next_tokens"] = next_tokens(model, prompt, k=wishes.k)
    likely = results["next_tokens"]["token_id"].values[0].tolist()
    answer, baseline = wishes.answer, wishes.baseline
    scored = likely[0] if answer is None else single_token(model, prompt.token_map, answer)
    followed = [scored, *(token for token in likely if token != scored)][:_LENS_ANSWERS]
    on_step("logit lens")
    results["lens"] = logit_lens(model, prompt, answers=followed, k=wishes.k)
    on_step("layers")
    results["components"] = logit_attribution(model, prompt, scored, baseline, by="component")
    on_step("heads")
    results["heads"] = logit_attribution(model, prompt, scored, baseline, by="head")
    results["head_scores"] = head_scores(model, prompt, scored)
    if prompt.n_images:
        on_step("attention to the picture")
        results["attention"] = image_attention(model, prompt)
        results |= _patch_maps(model, prompt, scored, wishes, on_step)
    return results


def _patch_maps(
    model: HookedLLaVA, prompt: Inputs, scored: int, wishes: _Wishes, on_step: Callable[[str], None]
) -> dict[str, xr.DataArray]:
    """The chosen patch map, and occlusion beside it unless that is it already or would take too long unasked."""
    on_step("patches")
    window = {"window": max(1, model.config.vision.grid // _WINDOWS)}
    options = window if wishes.patches in ("occlusion", "token_ablation") else {}
    maps = {"patches": patch_importance(model, prompt, scored, method=wishes.patches, **options)}
    n_patches = prompt.n_images * model.config.vision.n_patches
    wanted = n_patches <= OCCLUDED_UNASKED if wishes.occlusion is None else wishes.occlusion
    if wanted and wishes.patches != "occlusion":
        on_step("occlusion")
        maps["occlusion"] = patch_importance(model, prompt, scored, method="occlusion", **window)
    return maps
