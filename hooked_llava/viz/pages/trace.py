"""One page that shows a causal trace: the three runs, where the answer comes back, and what attention carries there."""

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
from hooked_llava.prompt.question import question_text
from hooked_llava.viz.figures.overlay import patch_overlays
from hooked_llava.viz.figures.trace import contribution_maps, role_curves, trace_maps
from hooked_llava.viz.pages.explain_context import figure_uri, picture_uri, visible
from hooked_llava.viz.pages.page import HtmlPage, answer_text, fill_template, provenance, steps_reported
from hooked_llava.viz.style import Plot

STEPS = ("answering", "tracing", "messages", "drawing")
"""The parts of the work, as progress is reported."""


@dataclass(frozen=True, kw_only=True)
class TracePage(HtmlPage):
    """A causal trace as a page; `page.results` hold trace, roles, contribution and next_tokens."""

    question: str
    """What was asked."""
    answer: str
    """What the model said."""


def trace_page(
    model: HookedLLaVA,
    inputs: Any,
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
        tokens = model.generate(prompt, max_new_tokens=max_new_tokens, return_type="tokens")
        answer = answer_text(model, tokens)
        begin("messages")
        contribution = attention_contribution(model, prompt, constraint)
        results = {"trace": trace, "roles": by_role(trace), "contribution": contribution}
        results["next_tokens"] = next_tokens(model, prompt, k=min(5, model.cfg.d_vocab))
        begin("drawing")
        context = _context(model, prompt, answer, results)
        cost = (
            f"{trace.runs} restored runs for {trace.work:.2f} forward passes besides {trace.n_forward} kept, "
            f"{trace.seconds:.1f} s"
        )
        html = fill_template("trace.html.jinja", context | {"provenance": provenance(model, prompt, cost)})
    return TracePage(question=context["question"], answer=answer, html=html, results=results)


def _context(model: HookedLLaVA, prompt: Any, answer: str, results: dict[str, Any]) -> dict[str, Any]:
    trace: xr.Dataset = results["trace"]
    contribution: xr.Dataset = results["contribution"]
    pictures = []
    for i in range(prompt.n_images if prompt.images is not None else 0):
        layers = contribution.image_to_constraint.isel(image=i)
        figure = patch_overlays(prompt, layers, image=i, columns=4 if model.cfg.n_layers <= 16 else 8, title="")
        pictures.append({"thumbnail": picture_uri(prompt.images[i]), "messages": _uri(figure)})
    return {
        "question": question_text(prompt),
        "answer": answer,
        "model_name": model.cfg.model_name or "the model",
        "trace": trace.attrs,
        "lowered": was_lowered(trace),
        "p_clean": f"{float(trace.p_clean):.3f}",
        "p_corrupted": f"{float(trace.p_corrupted):.3f}",
        "lowered_by": f"{float(trace.lowered_by):.0%}",
        "constraint": " and ".join(f"“{words}”" for words in trace.constraint),
        "layers": _window(trace),
        "best": _best(trace),
        "map": _uri(trace_maps(trace, note=False)),
        "curves": _uri(role_curves(results["roles"], title="")),
        "to_last": _uri(contribution_maps(contribution)),
        "pictures": pictures,
        "n_heads": model.cfg.n_heads,
    }


def _best(trace: xr.Dataset) -> list[dict[str, Any]]:
    """For each kind the cell that restores most."""
    names = {"mlp": "MLP", "attn": "attention", "resid": "stream"}
    return [
        {
            "kind": names[str(cell.kind.values)],
            "layer": int(cell.layer),
            "token": visible(cell.label.values),
            "role": str(cell.role.values),
            "restored": f"{float(cell.restored):.3f}",
            "effect": f"{float(cell.indirect_effect):+.3f}",
            "tied": int(cell.n_tied),
        }
        for cell in best_cells(trace)
    ]


def _window(trace: xr.Dataset) -> str:
    width = int(trace.window)
    if width == 1:
        return "one layer at a time"
    if trace.window_reading == "released":
        return f"{2 * width + 1} layers at a time (window {width} as the released code counts)"
    return f"{width} layers at a time"


def _uri(figure: Any) -> str:
    assert isinstance(figure, Plot)
    return figure_uri(figure)
