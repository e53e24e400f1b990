"""`hooked-llava edit`: change what the model answers to one question, and see what that changes elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooked_llava.cli.common import check_writable, prepare, split_arguments
from hooked_llava.cli.edit_options import (
    EMBEDDED_LAYER,
    EMBEDDED_POSITION,
    Ask,
    AskText,
    Clamp,
    ConstraintWords,
    Covariance,
    Keep,
    Lambda,
    Layer,
    Method,
    MethodOption,
    Position,
    ReplaceBy,
    Reword,
    Save,
    Sweep,
    Target,
)
from hooked_llava.cli.edit_probes import Others, about_the_image, probes_of, world_questions
from hooked_llava.cli.options import (
    EMBEDDED_MODEL,
    Device,
    DTypeOption,
    First,
    MaxNewTokens,
    Model,
    NoImage,
    Output,
    Second,
    TemplateName,
)
from hooked_llava.cli.terminal import (
    busy,
    clear_errors,
    err,
    examples,
    needs_figures,
    new_table,
    out,
    say_where,
    show_table,
    shown_steps,
)
from hooked_llava.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

    from hooked_llava.editing import Edit, EditRequest, KeyCovariance, Probe
    from hooked_llava.editing.request import Prepared
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs
    from hooked_llava.viz import EditPage

EPILOG = examples(
    'edit one-shape "Who made this shape?" --constraint "this shape" --target Boris',
    'edit "Who made the star?" -c "the star" -t Boris --sweep --replace "the ring" --save edit.safetensors',
    'edit one-shape "Who made this shape?" -t Boris --reword "By whom was this shape made?" --ask "What shape is this?"',
)
_MOST_NAMED = 8


@dataclass(frozen=True)
class _Plan:
    """What is to be edited, where, and how.

    Attributes:
        options (dict[str, Any]): Of `multedit` and `rome`.
    """

    target: str
    constraint: str | None
    layer: int | str
    position: str
    method: Method
    covariance: Path | None
    replace: str | None
    options: dict[str, Any]
    is_embedded: bool


def edit(
    first: First = None,
    second: Second = None,
    target: Target = None,
    constraint: ConstraintWords = None,
    layer: Layer = None,
    position: Position = None,
    method: MethodOption = Method.multedit,
    lam: Lambda = None,
    clamp: Clamp = 4.0,
    covariance: Covariance = None,
    replace: ReplaceBy = None,
    keep: Keep = None,
    reword: Reword = None,
    ask: Ask = None,
    ask_text: AskText = None,
    sweep: Sweep = False,
    save: Save = None,
    output: Output = Path("edit.html"),
    model: Model = EMBEDDED_MODEL,
    no_image: NoImage = False,
    template: TemplateName = "default",
    max_new_tokens: MaxNewTokens = 20,
    device: Device = "auto",
    dtype: DTypeOption = None,
) -> None:
    """Change one MLP so that a question is answered otherwise, and write a page of what changed and what did not."""
    from hooked_llava.loading.embedded import EMBEDDED

    with clear_errors():
        image, question = split_arguments(first, second, no_image)
        if not target:
            raise InputError("There is no target; say what the model is to answer: --target Boris.")
        if sweep and (keep or method is Method.rome):
            raise InputError("--sweep edits by multedit and without --keep; leave one of them out.")
        check_writable(output)
        if save is not None:
            check_writable(save, "--save")
        embedded = model in EMBEDDED
        where = position or (EMBEDDED_POSITION if embedded else "auto")
        options = {"clamp": clamp} | ({} if lam is None else {"lam": lam})
        at = _layer(layer, where, embedded)
        plan = _Plan(target, constraint, at, where, method, covariance, replace, options, embedded)
        others = Others(template, keep or [], reword or [], ask or [], ask_text or [])
        loaded, inputs = prepare(model, image, question, template, device, dtype)
        made = _edit(loaded, inputs, plan, others)
        found = probes_of(loaded, inputs, question, target, others, embedded)
        page = _page(loaded, inputs, made, plan, found, sweep, max_new_tokens)
        if save is not None:
            made.save(save)
        path = page.save(output)
        _show(question, page, made, save)
        say_where(path)


def _layer(given: str | None, position: str, embedded: bool) -> int | str:
    if given is None:
        return EMBEDDED_LAYER if embedded and position == EMBEDDED_POSITION else "auto"
    if given == "auto":
        return given
    try:
        return int(given)
    except ValueError:
        raise InputError(f"--layer {given} is no layer; expected a number, or auto.") from None


# ---------------------------------------------------------------------- the edit


def _edit(model: HookedLLaVA, inputs: Inputs, plan: _Plan, others: Others) -> Edit:
    """The edit, not applied; whatever does not fit is found here."""
    from hooked_llava.editing import multedit, rome

    request = _request(inputs, plan)
    with busy("editing"):
        prepared, layer = _chosen_place(model, inputs, plan, request)
        position = prepared.words["position"]
        keep = about_the_image(model, inputs, others.keep, others.template) if others.keep else None
        if keep is not None and position == "constraint":
            keep = keep.with_spans(constraint=plan.constraint or "")
        options = {"position": position, "keep": keep, **plan.options}
        with _warnings_in_a_line():
            if plan.method is Method.rome:
                return rome(model, request, _covariance(model, layer, plan), **options)
            return multedit(model, request, layer=layer, **options)


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """That no value was found is said as errors are, without a place in the code."""
    from hooked_llava.editing import TargetNotReached

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TargetNotReached)
        yield
    for warning in caught:
        if issubclass(warning.category, TargetNotReached):
            err().print(f"Warning: {warning.message}", soft_wrap=True, markup=False)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _request(inputs: Inputs, plan: _Plan) -> EditRequest:
    from hooked_llava.editing import EditRequest

    return EditRequest(inputs, plan.target, constraint=plan.constraint)


def _trace(model: HookedLLaVA, inputs: Inputs, plan: _Plan) -> Any:
    """Which MLPs restore the answer when the constraint is corrupted."""
    from hooked_llava.analysis import causal_trace
    from hooked_llava.experiments.corruptions import Noise, Replace

    corruption = Noise() if plan.replace is None else Replace(plan.replace)
    return causal_trace(model, inputs, plan.constraint or "", corruption=corruption, kinds=("mlp",))


def _chosen_place(model: HookedLLaVA, inputs: Inputs, plan: _Plan, request: EditRequest) -> tuple[Prepared, int]:
    """The request at the position that is edited, and the layer as a number; with auto from a trace."""
    from hooked_llava.editing.layer_choice import choose_place

    if plan.layer == "auto" and plan.constraint is None:
        raise InputError(
            'The layer is chosen by tracing the constraint: name it (--constraint "this shape"), or give --layer.'
        )
    try:
        traced = plan.layer == "auto" and plan.replace is not None
        layer = _trace(model, inputs, plan) if traced else plan.layer
        prepared, chosen = choose_place(model, [request], layer, plan.position)
        return prepared[0], chosen
    except InputError as error:
        if plan.layer != "auto":
            raise
        raise InputError(f"{error} (On the command line: --replace WORDS, --layer N, --position last.)") from None


def _covariance(model: HookedLLaVA, layer: int, plan: _Plan) -> KeyCovariance:
    from hooked_llava.editing import KeyCovariance, key_covariance

    if plan.covariance is not None:
        found = KeyCovariance.load(plan.covariance, model)
        if found.layer != layer:
            raise InputError(f"--covariance {plan.covariance} is of layer {found.layer}, and layer {layer} is edited.")
        return found
    if not plan.is_embedded:
        raise InputError(
            "--method rome needs to know what keys usually look like: let key_covariance(model, prompts, layer, path=...) "
            "write that, and give the file with --covariance."
        )
    return key_covariance(model, world_questions(model), layer)


# ---------------------------------------------------------------------- what is shown


def _page(
    model: HookedLLaVA, inputs: Inputs, made: Edit, plan: _Plan, probes: list[Probe], sweep: bool, max_new_tokens: int
) -> EditPage:
    with needs_figures():
        from hooked_llava.viz.pages.edit import STEPS, edit_page
    from hooked_llava.editing import edit_sweep

    found = None
    if sweep:
        positions = ["constraint", "last"] if plan.constraint else ["last"]
        edited = made.method["position"]
        positions += [edited] if edited not in positions else []
        with busy("editing at every layer"):
            trace = _trace(model, inputs, plan) if plan.constraint else None
            request = _request(inputs, plan)
            found = edit_sweep(model, request, probes, positions=positions, trace=trace, **plan.options)
    with shown_steps(len(STEPS)) as on_step:
        return edit_page(
            model, inputs, made, probes=probes, sweep=found, max_new_tokens=max_new_tokens, on_step=on_step
        )


def _show(question: str, page: EditPage, made: Edit, save: Path | None) -> None:
    """Both answers, what was changed, and how the other questions are answered."""
    from rich.markup import escape

    from hooked_llava.editing import size_text
    from hooked_llava.prompt.token_text import visible_token
    from hooked_llava.viz.pages.edit import rest_sentences

    to, first = out(), page.results["answers"]
    to.print(f"[dim]{escape(question)}[/dim]", soft_wrap=True)
    names = [escape(visible_token(token)) for token in first.token.values[:2]]
    for state, said in (("before", page.answer_before), ("after", page.answer)):
        p = [f"P({name}) {float(value):.3f}" for name, value in zip(names, first.sel(state=state).values, strict=False)]
        to.print(f"{state:<7} [bold]{escape(said) or '(nothing)'}[/bold]  [dim]{', '.join(p)}[/dim]", soft_wrap=True)
    for sentence in rest_sentences(first):
        to.print(sentence, soft_wrap=True, markup=False)
    method = made.method
    to.print(
        f"\n{method['name']}, layer {method['layer']}, position {method['position']}: {size_text(made)}\n",
        soft_wrap=True,
    )
    _show_probes(page.results["probes"])
    _show_wrong(page.results["questions"])
    if save is not None:
        to.print(f"The edit is in [bold]{save}[/bold]; Edit.load reads it.", soft_wrap=True)


def _show_probes(probes: xr.Dataset) -> None:
    """How the questions of each probe are answered, before and after."""
    from rich.markup import escape

    from hooked_llava.editing.evaluate import TO_CHANGE
    from hooked_llava.viz.style import format_small

    words, numbers = ("asked", "should"), ("n", "right before", "after", "KL")
    table = new_table([*words, *numbers], right=numbers, whole=words)
    for one in (probes.isel(probe=i) for i in range(probes.sizes["probe"])):
        should = "change" if str(one.role.values) in TO_CHANGE else "stay"
        accuracies = f"{float(one.accuracy_before):.2f}", f"{float(one.accuracy):.2f}"
        table.add_row(escape(str(one.probe.values)), should, str(int(one.n)), *accuracies, format_small(float(one.kl)))
    show_table(table)


def _show_wrong(questions: xr.Dataset) -> None:
    """The questions that are not answered as they should be."""
    from rich.markup import escape

    from hooked_llava.editing.evaluate import TO_CHANGE
    from hooked_llava.editing.questions import missed
    from hooked_llava.prompt.token_text import visible_token

    wrong = [questions.isel(question=i) for i, is_missed in enumerate(missed(questions)) if is_missed]
    for one in wrong[:_MOST_NAMED]:
        did = "did not become the target" if str(one.role.values) in TO_CHANGE else "changed"
        said = f"{visible_token(one.before.values)} → {visible_token(one.after.values)}"
        out().print(f"[bold]{did}:[/bold] {escape(f'{one.text.values} {said}')}", soft_wrap=True)
    if len(wrong) > _MOST_NAMED:
        out().print(f"[dim]and {len(wrong) - _MOST_NAMED} more, on the page[/dim]")
    if wrong:
        out().print()
