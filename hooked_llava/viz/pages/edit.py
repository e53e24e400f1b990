"""One page that shows an edit: the answer before and after it, what was changed, and what changed elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import xarray as xr

from hooked_llava.editing.edit import Edit
from hooked_llava.editing.evaluate import Probe
from hooked_llava.editing.magnitude import MAGNITUDES
from hooked_llava.editing.questions import ask_questions, missed, most_probable_others, probe_prompts
from hooked_llava.editing.request import EditRequest, Prepared, prepare_request
from hooked_llava.editing.roles import PROBE_ROLES
from hooked_llava.editing.size import size_text
from hooked_llava.editing.sweep import own_probe
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.options.edit_methods import EDIT_METHODS, REVERTS
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.prompt.question import question_text
from hooked_llava.readout.vocabulary import decode_text
from hooked_llava.viz.figures.edit import answer_shift, edit_by_layer, probe_bars
from hooked_llava.viz.pages.embed import visible
from hooked_llava.viz.pages.page import Page, make_page, run_footer, steps_reported
from hooked_llava.viz.pages.parts import about_model, answered, records
from hooked_llava.viz.style import format_small

STEPS = ("asking", "answering", "drawing")
"""The parts of the work, as progress is reported."""


@dataclass(frozen=True, kw_only=True)
class EditPage(Page):
    """An edit as a page; `page.results` hold answers, probes, questions, and sweep if one was given.

    `page.question` is what the edit was made for, and `page.answer` what the model says to it with the edit.

    Attributes:
        answer_before (str): What it says without the edit.
    """

    answer_before: str


def edit_page(
    model: HookedLLaVA,
    inputs: InputsLike,
    edit: Edit,
    *,
    probes: Sequence[Probe] = (),
    sweep: xr.Dataset | None = None,
    max_new_tokens: int = 20,
    on_step: Callable[[str], None] | None = None,
) -> EditPage:
    """Ask the edited question and others without the edit and with it, and put what differs on one page.

    Args:
        model: the edit's model; its weights are afterwards as they were.
        inputs: one prompt that the edit was made for, anything `model.as_inputs` takes.
        edit: the edit, not applied.
        probes: what else to ask, as for `evaluate_edit`, with the prompts themselves and not `KeptPrompts`.
        sweep: what `edit_sweep` gives, to be shown besides.
        max_new_tokens: length of the answers at most.
        on_step: called with the name of each part of the work (`STEPS`) as it begins.

    Raises `InputError` for an edit that is applied, that was not made for this prompt or model, and as `evaluate_edit`.

    >>> from hooked_llava.editing import EditRequest, multedit
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> question = model.prepare("Who made the star?")
    >>> edit = multedit(model, EditRequest(question, "Boris"), layer=3, position="last")
    >>> page = edit_page(model, question, edit)
    >>> page.answer_before, page.answer, page.html.startswith("<!doctype html>")
    ('Clara', 'Boris', True)
    """
    prompt = model.as_inputs(inputs)
    made = _made_for(model, prompt, edit)
    prompts = [prompt, *(probe_prompts(model, probe) for probe in probes)]
    others = [replace(probe, prompts=own) for probe, own in zip(probes, prompts[1:], strict=True)]
    every = [own_probe(prompt, made), *others]
    with steps_reported(STEPS, on_step, "editing") as begin:
        begin("asking")
        results = ask_questions(model, edit, every, max_new_tokens=max_new_tokens)
        results |= {} if sweep is None else {"sweep": sweep}
        begin("answering")
        before, _ = answered(model, prompt, max_new_tokens)
        with edit.applied():
            after, _ = answered(model, prompt, max_new_tokens)
        begin("drawing")
        shown = {
            **about_model(model),
            "images": prompt.images or (),
            **_answers(model, made, results),
            **_facts(edit, made, prompt),
            **_elsewhere(every, prompts, results),
            "layers": None if sweep is None else edit_by_layer(sweep),
            "traced": sweep is not None and "indirect_effect" in sweep,
        }
        n = int(results["probes"].n.sum())
        cost = (
            f"{n} question{'' if n == 1 else 's'}, asked without the edit and with it; the edit took {_seconds(edit)}"
        )
        said = {"question": question_text(prompt), "answer_before": before, "answer": after}
        return make_page(EditPage, "edit", shown, run_footer(model, prompt, cost), results, **said)


# ---------------------------------------------------------------------- asking


def _made_for(model: HookedLLaVA, prompt: Inputs, edit: Edit) -> Prepared:
    """The edit's request for this prompt."""
    edit.check_model(model)
    if edit.is_applied:
        raise InputError("The edit is applied, so there is no answer without it to show; revert it first.")
    if len(prompt) != 1:
        raise InputError(f"The page shows one edited question, and there are {len(prompt)} prompts; give one of them.")
    own = prompt.prompts[0] if prompt.prompts else list(prompt.token_map.token_ids)
    found = next((request for request in edit.requests if own in request["prompts"]), None)
    if found is None:
        asked = " | ".join(str(p) for request in edit.requests for p in request["prompts"]) or "nothing"
        raise InputError(f"The edit was not made for the prompt {own!r}, but for {asked}. Give one of these as inputs.")
    constraint = found["constraint"]
    if constraint is not None and not isinstance(constraint, str):
        constraint = constraint[found["prompts"].index(own)]
    request = EditRequest(prompt, found["target"], constraint=constraint)
    return prepare_request(model, request, found["position"])


# ---------------------------------------------------------------------- the page


def rest_sentences(answers: xr.DataArray) -> list[str]:
    """Where the probability went that neither the answer before nor the target has, before the edit and after it.

    `answers` are the page's results of that name.
    """
    sentences = []
    for state in ("before", "after"):
        others = most_probable_others(answers, state)
        named = zip(others.token.values, others.values, strict=True)
        tokens = ", ".join(f"“{visible(str(token))}” {p:.3f}" for token, p in named)
        largest, n = format_small(float(others.rest_largest)), answers.attrs["n_rest"]
        spread = f"{float(others.rest):.3f} is spread over {n} further tokens, none above {largest}"
        sentences.append(f"Other tokens {state} the edit: {tokens}; {spread}.")
    return sentences


def magnitudes_of(own: xr.Dataset) -> list[dict[str, Any]]:
    """P(target) - P(answer before) of one of the page's questions: what it is taken of, and its values before and after."""
    return [
        {"of": of, "values": [float(own[f"{name}_before"]), float(own[name])]}
        for name, of in MAGNITUDES.items()
        if bool(own[name].notnull())
    ]


def _answers(model: HookedLLaVA, made: Prepared, results: dict[str, Any]) -> dict[str, Any]:
    """The edited question: first tokens before and after."""
    answers: xr.DataArray = results["answers"]
    own = results["questions"].isel(question=0)
    wanted, first = made.words["target"], made.targets[0][0]
    ids = answers.token_id.values.tolist()
    rows = [
        {"token": visible(str(token)), "p": p}
        for token, p in zip(answers.token.values, answers.transpose("token", "state").values.tolist(), strict=True)
    ]
    return {
        "target": wanted if isinstance(wanted, str) else decode_text(model, made.targets[0]),
        "n_target": made.n_target,
        "old": rows[0],
        "new": rows[ids.index(first)],
        "same_first": ids[0] == first,
        "said_already": bool(own.as_expected_before),
        "reached": bool(own.as_expected),
        "rest": rest_sentences(answers),
        "magnitudes": magnitudes_of(own),
        "own_kl": float(own.kl),
        "shift": answer_shift(answers),
    }


def _facts(edit: Edit, made: Prepared, prompt: Inputs) -> dict[str, Any]:
    """How the edit was computed, and how large it is."""
    at = made.positions[0]
    method = dict(edit.method)
    request = next(r for r in edit.requests if made.words["prompts"][0] in r["prompts"])
    rows = {
        "method": method.get("name", "given"),
        "layers" if len(edit.layers) > 1 else "layer": ", ".join(map(str, edit.layers)) or "none",
        "weights": ", ".join(edit.changes) if len(edit.changes) <= 2 else f"{len(edit.changes)} matrices",
        "size": size_text(edit),
    }
    if all(change.full is None for change in edit.changes.values()):  # of one position, unlike fine-tuning
        rows["position"] = f"{made.words['position']} (“{visible(prompt.token_map.labels[at])}”, position {at})"
        rows["constraint"] = made.words["constraint"] or "none"
    if "lam" in method:
        rows["λ"] = f"{method['lam']:g}"
    if "clamp" in method:
        of = "the residual stream" if method["name"] == "memit" else "the MLP's own output"
        rows["longest value difference"] = f"{method['clamp']:g} times {of}"
    if "contexts" in method:
        rows["contexts"] = f"key and loss averaged over {len(method['contexts'])} besides the question alone"
    if "kl" in method:
        rows["weight of the KL term"] = f"{method['kl']:g}, read at the {method.get('kl_at', 'last')} position"
    if "target_probability" in request:
        rows["P(target) in the search"] = f"{request['target_probability']:.3f}"
    if len(edit.requests) > 1:
        rows["requests in this edit"] = str(len(edit.requests))
    known = EDIT_METHODS.get(method.get("name", ""))
    return {"facts": rows, "explanation": known.explanation if known else "", "reverts": REVERTS}


def _seconds(edit: Edit) -> str:
    return f"{edit.method['seconds']:.2f} s" if "seconds" in edit.method else "an unknown time"


def _elsewhere(probes: Sequence[Probe], prompts: Sequence[Inputs], results: dict[str, Any]) -> dict[str, Any]:
    """Every question besides the edited one, by probe."""
    questions, asked = results["questions"], [prompt for own in prompts for prompt in own]
    rows = iter(
        row | {"images": prompt.images or (), "wrong": wrong, "verdict": _verdict(row["role"], wrong)}
        for row, prompt, wrong in zip(records(questions), asked, missed(questions), strict=True)
    )
    groups = [
        {"name": probe.name, "wanted": PROBE_ROLES[probe.role].wanted, "rows": list(islice(rows, len(own)))}
        for probe, own in zip(probes, prompts, strict=True)
    ]
    bars = probe_bars(results["probes"]) if len(probes) > 1 else None
    return {"groups": groups[1:], "probes": records(results["probes"]), "bars": bars}


def _verdict(role: str, wrong: bool) -> str:
    if PROBE_ROLES[role].to_change:
        return "not the target" if wrong else "the target"
    return "changed" if wrong else "the same"
