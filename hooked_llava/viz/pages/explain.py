"""One page that shows how a model arrived at its answer: everything in one HTML file, which needs no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import xarray as xr

from hooked_llava.analysis.answer_without import answer_without
from hooked_llava.analysis.head_ablation import ablate_heads, heads_by_layer
from hooked_llava.analysis.head_scores import head_scores, layer_scores, top_heads
from hooked_llava.analysis.image_attention import image_attention
from hooked_llava.analysis.information_storage import information_storage
from hooked_llava.analysis.logit_attribution import logit_attribution
from hooked_llava.analysis.logit_lens import logit_lens
from hooked_llava.analysis.maps.answer_maps import answer_maps
from hooked_llava.analysis.neuron_scores import neuron_scores
from hooked_llava.analysis.next_tokens import next_tokens
from hooked_llava.analysis.patch_importance import patch_importance
from hooked_llava.checks import one_of
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.options.patch_maps import PATCH_MAPS
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.prompt.question import question_text
from hooked_llava.readout.answer_cache import cache_answer
from hooked_llava.readout.answer_tokens import appendable, single_token
from hooked_llava.readout.vocabulary import decode_text
from hooked_llava.viz.pages.explain_context import explanation
from hooked_llava.viz.pages.explain_summary import summary_of
from hooked_llava.viz.pages.page import Page, make_page, run_footer, steps_reported
from hooked_llava.viz.pages.parts import answer_text, answered_tokens

STEPS = (
    *("answering", "next tokens", "logit lens", "layers", "heads", "stored words"),
    *("attention to the image", "patches", "occlusion", "removals", "drawing"),
)
"""The parts of the work, as progress is reported; those about images are left out where there is none."""
OCCLUDED_UNASKED = 256
"""Occlusion runs the model once for about each patch: with more patches than this it is left out unless asked for."""
_WINDOWS = 4  # occluded squares side by side in an image: without a single patch a model seldom misses anything
_LENS_ANSWERS = 4
_STRIP = 24  # tokens of the answer that have a map each
_NEURONS, _STORED = 10, 20  # neurons of each layer; positions where words are read


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What is measured, as `explain` takes it."""

    answer: str | int | None
    baseline: str | int | None
    k: int
    patches: str
    occlusion: bool | None


@dataclass(frozen=True, kw_only=True)
class Report(Page):
    """How a model came to its answer: the page, and the results it shows.

    `report.save("report.html")` writes it; in a notebook it shows itself. The labelled arrays in `report.results` are
    next_tokens, lens, components, heads, head_scores, layer_scores, neurons, storage (if there is a rival), without,
    without_layers, and with an image attention, patches, occlusion, and answer_maps (if the answer has several tokens).

    Attributes:
        summary (tuple[str, ...]): What was found, in sentences: how sure the answer is, what writes
            it, and what changes it when removed.
    """

    summary: tuple[str, ...]


def explain(
    model: HookedLLaVA,
    inputs: InputsLike,
    *,
    answer: str | int | None = None,
    baseline: str | int | None = None,
    max_new_tokens: int = 20,
    k: int = 5,
    n_heads: int = 8,
    patches: str = "log_increase",
    occlusion: bool | None = None,
    on_step: Callable[[str], None] | None = None,
) -> Report:
    """Ask the model, look inside while it answers, and put everything on one page.

    Args:
        model: the model.
        inputs: one prompt, anything `model.as_inputs` takes; those of `model.prepare` also show images as they were.
        answer: the token whose logit is taken apart, an id or a word that is one token after the prompt; the model's own
            first token by default.
        baseline: a token whose logit is subtracted, to see why one answer and not the other.
        max_new_tokens: length of the answer at most.
        k: how many words the tables show.
        n_heads: how many heads' attention is drawn.
        patches: the method of the patch map, see `patch_importance`.
        occlusion: whether occlusion is drawn beside it, which runs the model once for about each patch; by default up to
            `OCCLUDED_UNASKED` patches. What is taken away are squares of a quarter of the image's side, of images of several
            grids a quarter of the shortest grid's.
        on_step: called with the name of each part of the work (`STEPS`) as it begins; by default a progress bar
            shows if it takes longer than two seconds.

    Raises `InputError` for several prompts, for a word that is not one token, and for an unknown method.

    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> explain(model, model.prepare("Who made the star?"), max_new_tokens=1).html.startswith("<!doctype html>")
    True
    """
    prompt = model.as_inputs(inputs).single("explain")
    one_of(patches, PATCH_MAPS, "patches")
    k = min(k, model.cfg.d_vocab)
    options = _Options(answer=answer, baseline=baseline, k=k, patches=patches, occlusion=occlusion)
    started = perf_counter()
    with steps_reported(STEPS, on_step, "explaining") as begin:
        begin("answering")
        tokens = answered_tokens(model, prompt, max_new_tokens)
        said, n_forward = answer_text(model, tokens), tokens.shape[1]
        results = _results(model, prompt, options, appendable(model, tokens[0].tolist()), begin)
        begin("drawing")
        n_forward += sum(float(result.attrs["n_forward"]) for result in results.values())
        footer = run_footer(model, prompt, f"{n_forward:.0f} forward passes, {perf_counter() - started:.1f} s")
        shown = explanation(model, prompt, results, n_heads)
        words = {"question": question_text(prompt), "answer": said, "summary": summary_of(results)}
        return make_page(Report, "explain", shown, footer, results, **words)


def _results(
    model: HookedLLaVA, prompt: Inputs, options: _Options, said: list[int], begin: Callable[[str], None]
) -> dict[str, xr.DataArray | xr.Dataset]:
    """Everything that is measured."""
    results: dict[str, xr.DataArray | xr.Dataset] = {}
    begin("next tokens")
    results["next_tokens"] = next_tokens(model, prompt, k=options.k)
    likely = results["next_tokens"]["token_id"].values[0].tolist()
    answer, baseline = options.answer, options.baseline
    scored = likely[0] if answer is None else single_token(model, prompt.token_map, answer)
    followed = [scored, *(token for token in likely if token != scored)][:_LENS_ANSWERS]
    begin("logit lens")
    results["lens"] = logit_lens(model, prompt, answers=followed, k=options.k)
    begin("layers")
    results["components"] = logit_attribution(model, prompt, scored, baseline, by="component")
    begin("heads")
    results["heads"] = logit_attribution(model, prompt, scored, baseline, by="head")
    cache = cache_answer(model, prompt, scored, parts=("z", "attn_out", "mlp_out", "post"))
    results["head_scores"] = scores = head_scores(model, cache).assign_attrs(n_forward=1)  # the run that they share
    results["layer_scores"] = layer_scores(model, cache)
    results["neurons"] = neuron_scores(model, cache, top=_NEURONS)
    begin("stored words")
    if (rival := _rival(model, prompt, baseline, scored, likely)) is not None:
        where = "image" if prompt.n_images else None
        results["storage"] = information_storage(model, prompt, scored, rival, positions=where, top=_STORED)
    maps: dict[str, xr.DataArray] = {}
    if prompt.n_images:
        begin("attention to the image")
        results["attention"] = image_attention(model, prompt)
        maps = _patch_maps(model, prompt, scored, options, begin)
        results |= maps
        if len(said) > 1:
            results["answer_maps"] = _answer_maps(model, prompt, said, options.patches)
    begin("removals")
    ranked = top_heads(scores, scores.size)
    results["without_layers"] = ablate_heads(model, prompt, heads_by_layer(model), scored, replace="zero")
    results["without"] = answer_without(model, prompt, scored, heads=ranked, patches=maps.get("patches"))
    return results


def _answer_maps(model: HookedLLaVA, prompt: Inputs, said: list[int], method: str) -> xr.DataArray:
    """A map of each of the answer's first tokens, by the chosen method unless it takes a run for every patch."""
    method = "log_increase" if PATCH_MAPS[method].one_prompt else method
    return answer_maps(model, prompt, said[:_STRIP], method=method)


def _rival(
    model: HookedLLaVA, prompt: Inputs, baseline: str | int | None, scored: int, likely: list[int]
) -> int | None:
    """The word that the answer is compared with: the baseline, or the most probable one that is not the same word."""
    if baseline is not None:
        return single_token(model, prompt.token_map, baseline)
    own, *others = (decode_text(model, [token]).strip().lower() for token in (scored, *likely))
    return next((token for token, word in zip(likely, others, strict=True) if word != own), None)


def _patch_maps(
    model: HookedLLaVA, prompt: Inputs, scored: int, options: _Options, begin: Callable[[str], None]
) -> dict[str, xr.DataArray]:
    """The chosen patch map, and occlusion beside it unless that is it already or would take too long unasked."""
    begin("patches")
    sides = [min(grid.shape) for layout in prompt.layouts for grid in layout.grids if min(grid.shape)]
    window: dict[str, Any] = {"window": max(1, min(sides) // _WINDOWS)}
    own = window if "window" in PATCH_MAPS[options.patches].options else {}
    maps = {"patches": patch_importance(model, prompt, scored, method=options.patches, **own)}
    n_patches = sum(layout.n_cells for layout in prompt.layouts)
    wanted = n_patches <= OCCLUDED_UNASKED if options.occlusion is None else options.occlusion
    if wanted and options.patches != "occlusion":
        begin("occlusion")
        maps["occlusion"] = patch_importance(model, prompt, scored, method="occlusion", **window)
    return maps
