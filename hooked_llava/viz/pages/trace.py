"""One page that shows a causal trace: the three runs, where the answer comes back, and what attention heads write there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import xarray as xr

from hooked_llava.analysis.attention_contribution import attention_contribution
from hooked_llava.analysis.causal_trace import best_cells, by_role, causal_trace, was_lowered
from hooked_llava.analysis.next_tokens import next_tokens
from hooked_llava.analysis.studies.trace import best_effects, trace_means
from hooked_llava.errors import InputError
from hooked_llava.experiments.corruptions import Constraint, Corruption, Noise
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.options.trace_kinds import TRACE_KINDS
from hooked_llava.options.window_readings import shown_window
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.prompt.question import question_text
from hooked_llava.results.provenance import forward_passes
from hooked_llava.viz.figures.knockout import kinds_in_order
from hooked_llava.viz.figures.overlay import EACH, patch_overlays
from hooked_llava.viz.figures.trace import contribution_maps, role_curves, trace_maps
from hooked_llava.viz.kinds import check_dataset, described
from hooked_llava.viz.pages.embed import visible
from hooked_llava.viz.pages.page import Page, make_page, run_footer, steps_reported
from hooked_llava.viz.pages.parts import about_model, answered, panel_columns, rounded
from hooked_llava.viz.pages.studies import question_counts, study_footer, study_heading

STEPS = ("answering", "tracing", "contributions", "drawing")
"""The parts of the work, as progress is reported."""
_OF_A_CELL = ("kind", "layer", "label", "role", "restored", "indirect_effect", "n_tied")


@dataclass(frozen=True, kw_only=True)
class TracePage(Page):
    """A causal trace as a page; `page.results` hold trace, roles, contribution and next_tokens.

    Of a table of questions they hold means and best; `page.question` says how many there are, and `page.answer` is empty.
    """


def trace_page(
    model: HookedLLaVA,
    inputs: InputsLike,
    constraint: Constraint | Sequence[Constraint],
    *,
    corruption: Corruption = Noise(),  # noqa: B008 (it is frozen)
    max_new_tokens: int = 20,
    on_step: Callable[[str], None] | None = None,
    **options: Any,
) -> TracePage:
    """Ask, corrupt the constraint, restore outputs one by one, and put it all on one page.

    Args:
        model: the model.
        inputs: one prompt, anything `model.as_inputs` takes.
        constraint: as for `causal_trace`.
        corruption: as for `causal_trace`.
        max_new_tokens: length of the answer at most.
        on_step: called with the name of each part of the work (`STEPS`) as it begins.
        options: further ones of `causal_trace`.

    Raises `InputError` and `SpanError` as `causal_trace`.

    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> page = trace_page(model, model.prepare("Who made the star?"), "the star", corruption="the ring")
    >>> page.answer, page.html.startswith("<!doctype html>")
    ('Clara', True)
    """
    prompt = model.as_inputs(inputs)
    with steps_reported(STEPS, on_step, "tracing") as begin:
        begin("tracing")  # first, since it finds whatever does not fit
        trace = causal_trace(model, prompt, constraint, corruption=corruption, **options)
        begin("answering")
        answer, _ = answered(model, prompt, max_new_tokens)
        begin("contributions")
        contribution = attention_contribution(model, prompt, constraint)
        results = {"trace": trace, "roles": by_role(trace), "contribution": contribution}
        results["next_tokens"] = next_tokens(model, prompt, k=min(5, model.cfg.d_vocab))
        begin("drawing")
        cost = (
            f"{trace.runs} restored runs for {trace.work:.2f} forward passes besides {trace.n_forward} kept, "
            f"{trace.seconds:.1f} s"
        )
        shown, footer = _shown(model, prompt, results), run_footer(model, prompt, cost)
        return make_page(TracePage, "trace", shown, footer, results, question=question_text(prompt), answer=answer)


def trace_study_page(result: xr.Dataset, *, title: str | None = None, n_boot: int = 1000) -> TracePage:
    """A page of a finished study, averaged by kind of question.

    Args:
        result: what `trace_study` gives, or `results.load` read back.
        title: the page's heading; by default how many questions there are.
        n_boot: samples of the bootstrap.

    Raises `InputError` for another result.

    >>> from hooked_llava.analysis import trace_study
    >>> from hooked_llava.datasets import StudyRow
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> row = StudyRow(id="1", question="Who made the star?", answer="Clara", constraint="the star")
    >>> trace_study_page(trace_study(model, [row], corruption="the ring"), n_boot=10).question
    'Causal traces of 1 question'
    """
    check_dataset(result, ("indirect_effect", "lowered_by"), "trace_study_page", "trace_study")
    if not {"question", "output"} <= set(result.dims):
        raise InputError(
            f"trace_study_page shows effects by question, output, layer and role; got {described(result)}. Make it with "
            "trace_study; of one prompt trace_page makes a page."
        )
    means = trace_means(result, n_boot=n_boot)
    results, first = {"means": means, "best": best_effects(means)}, means.sel(kind=kinds_in_order(means)[0])
    shown = {
        "kicker": f"Where answers come back in {result.attrs.get('model') or 'the model'}",
        "counts": question_counts(result, means),
        "trace": result.attrs,
        "layers": shown_window(int(result.window), result.window_reading),
        "least": f"{100 * means.min_drop:g} %",
        "lowered": [_lowered(means.sel(kind=kind)) for kind in kinds_in_order(means)],
        "curves": role_curves(means, title="") if int(means.n_lowered.max()) else None,
        "outputs": [TRACE_KINDS[output].title for output in means.output.values.tolist()],
        "best": [_best(results["best"].sel(kind=kind)) for kind in kinds_in_order(means)],
        "effects": _effects(first),
        "layer_names": [str(layer) for layer in means.layer.values.tolist()],
        "n_counted": dict(zip(means.role.values.tolist(), first.n_counted.values.tolist(), strict=True)),
    }
    cost = f"{result.runs} restored runs for {forward_passes(result.attrs):.1f} forward passes"
    heading = title or study_heading(result, "Causal traces of")
    footer = study_footer(result, means, cost, "one question")
    return make_page(TracePage, "trace_study", shown, footer, results, question=heading, answer="")


def _lowered(means: xr.Dataset) -> dict[str, Any]:
    """Of one kind of question how often, and how far, the corruption lowers the answer."""
    share = {end: f"{float(means.lowered.sel(statistic=end)):.0%}" for end in ("mean", "low", "high")}
    p = {name: f"{float(means[name].sel(statistic='mean')):.2f}" for name in ("p_clean", "p_corrupted")}
    counts = {"kind": str(means.kind.values), "n": int(means.n), "n_lowered": int(means.n_lowered)}
    return {**counts, **p, "share": share["mean"], "interval": f"{share['low']} to {share['high']}"}


def _best(best: xr.Dataset) -> dict[str, Any]:
    """Of one kind of question the cell of each output that restores most."""
    cells = [best.sel(output=output) for output in best.output.values.tolist()]
    return {"kind": str(best.kind.values), "cells": [{**_cell(cell), "at": _place(cell)} for cell in cells]}


def _place(cell: xr.Dataset) -> str:
    return f"layer {int(cell.layer)}, {cell.role.item()}" if bool(cell.indirect_effect.notnull().any()) else ""


def _effects(means: xr.Dataset) -> dict[str, dict[str, list[dict[str, str]]]]:
    """All effects of one kind of question: for each output by role what each layer restores."""
    return {
        TRACE_KINDS[output].title: {
            role: [_cell(means.sel(output=output, role=role, layer=layer)) for layer in means.layer.values.tolist()]
            for role in means.role.values.tolist()
        }
        for output in means.output.values.tolist()
    }


def _cell(means: xr.Dataset) -> dict[str, str]:
    """A mean effect with its interval, as far as it has them, and how deep it is colored."""
    mean, low, high = (float(means.indirect_effect.sel(statistic=end)) for end in ("mean", "low", "high"))
    shown = {"mean": "–" if math.isnan(mean) else rounded(mean, 2), "deep": f"{100 * min(1.0, max(0.0, mean)):.0f}"}
    return shown | {"interval": "" if math.isnan(low) else f"{rounded(low, 2)} to {rounded(high, 2)}"}


def _shown(model: HookedLLaVA, prompt: Inputs, results: dict[str, xr.Dataset]) -> dict[str, Any]:
    """The template's variables."""
    trace, contribution = results["trace"], results["contribution"]
    images, columns = prompt.images or (), panel_columns(model.cfg.n_layers)
    return {
        **about_model(model),
        "trace": trace.attrs,
        "lowered": was_lowered(trace),
        **{name: float(trace[name]) for name in ("p_clean", "p_corrupted", "lowered_by")},
        "constraint": " and ".join(f"“{words}”" for words in trace.constraint),
        "layers": shown_window(int(trace.window), trace.window_reading),
        "kinds": TRACE_KINDS,
        "best": [{name: cell[name].item() for name in _OF_A_CELL} for cell in best_cells(trace)],
        "tokens": [visible(str(label)) for label in trace.label.values],
        "restored": _restored(trace),
        "map": trace_maps(trace, note=False),
        "curves": role_curves(results["roles"], title=""),
        "to_last": contribution_maps(contribution),
        "images": images,
        "from_image": [
            patch_overlays(
                prompt, contribution.image_to_constraint.isel(image=i), image=i, grid=EACH, columns=columns, title=""
            )
            for i in range(len(images))
        ],
    }


def _restored(trace: xr.Dataset) -> dict[str, dict[int, list[float]]]:
    """Every restored run: for each kind by layer what each token's output restores."""
    values = trace.restored.transpose("kind", "layer", "position").values.tolist()
    layers = trace.layer.values.tolist()
    return {
        f"{TRACE_KINDS[kind].title} restored": dict(zip(layers, of_kind, strict=True))
        for kind, of_kind in zip(trace.kind.values.tolist(), values, strict=True)
    }
