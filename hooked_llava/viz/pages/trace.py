"""One page that shows a causal trace: the three runs, where the answer comes back, and what attention heads write there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import xarray as xr

from hooked_llava.analysis.attention_contribution import attention_contribution
from hooked_llava.analysis.causal_trace import best_cells, by_role, causal_trace, was_lowered
from hooked_llava.analysis.next_tokens import next_tokens
from hooked_llava.experiments.corruptions import Constraint, Corruption, Noise
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.options.trace_kinds import TRACE_KINDS
from hooked_llava.options.window_readings import shown_window
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.prompt.question import question_text
from hooked_llava.viz.figures.overlay import EACH, patch_overlays
from hooked_llava.viz.figures.trace import contribution_maps, role_curves, trace_maps
from hooked_llava.viz.pages.embed import visible
from hooked_llava.viz.pages.page import Page, make_page, run_footer, steps_reported
from hooked_llava.viz.pages.parts import about_model, answered, panel_columns

STEPS = ("answering", "tracing", "contributions", "drawing")
"""The parts of the work, as progress is reported."""
_OF_A_CELL = ("kind", "layer", "label", "role", "restored", "indirect_effect", "n_tied")


@dataclass(frozen=True, kw_only=True)
class TracePage(Page):
    """A causal trace as a page; `page.results` hold trace, roles, contribution and next_tokens."""


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
