"""`hooked-llava edit`: change what the model answers to one question, and see what that changes elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hooked_llava.cli.common import (
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
    busy,
    check_writable,
    clear_errors,
    err,
    examples,
    needs_figures,
    out,
    prepare,
    say_where,
    shown_steps,
    split_arguments,
)
from hooked_llava.cli.edit_probes import Others, about_the_picture, probes_of, world_questions
from hooked_llava.errors import InputError

if TYPE_CHECKING:
    from hooked_llava.editing import Edit, EditRequest, KeyCovariance, Probe
    from hooked_llava.editing.request import Prepared
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs

EPILOG = examples(
    'edit one-shape "Who made this shape?" --constraint "this shape" --target Boris',
    'edit "Who made the star?" -c "the star" -t Boris --sweep --replace "the ring" --save edit.safetensors',
    'edit one-shape "Who made this shape?" -t Boris --reword "By whom was this shape made?" --ask "What shape is this?"',
)
# Where edits of the embedded world's facts take best, see benchmarks/editing.py.
_EMBEDDED_LAYER, _EMBEDDED_POSITION = 3, "last"
_MOST_NAMED = 8


class Method(StrEnum):
    """How the update is computed."""

    multedit = "multedit"
    rome = "rome"


def _option(*names: str, metavar: str | None = None, help: str) -> Any:  # noqa: A002 (typer's name)
    return typer.Option(*names, metavar=metavar, help=help)


Target = Annotated[str | None, _option("--target", "-t", metavar="WORDS", help="What the model is to answer.")]
ConstraintWords = Annotated[
    str | None, _option("--constraint", "-c", metavar="WORDS", help="Words of the question that the fact is about.")
]
Layer = Annotated[
    str | None,
    _option(
        metavar="N|auto",
        help="The layer whose MLP is edited; auto: where a causal trace of the constraint finds that the MLP's output at "
        f"the edited position restores most. Default: auto; in the embedded models, at position last, {_EMBEDDED_LAYER}, "
        "where edits carry over best to other pictures and words, and change hardly anything else.",
    ),
]
Position = Annotated[
    str | None,
    _option(
        metavar="WHERE",
        help="constraint: the constraint's last token, as in the paper; or a span, such as last or question, whose last "
        f"token it is; auto: the constraint or the last position, where the trace's MLPs restore more. Default: auto; in the "
        f"embedded models {_EMBEDDED_POSITION}, since hardly any edit at the constraint reaches the answer there.",
    ),
]
MethodOption = Annotated[
    Method, _option(help="multedit, or rome, which also takes into account what keys usually look like (--covariance).")
]
Lambda = Annotated[
    float | None, _option(metavar="X", help="Weight of the update's size against its fit. Default: 0.01; 0 for rome.")
]
Clamp = Annotated[
    float,
    _option(
        metavar="X",
        help="Longest change of the MLP's output, in lengths of that output. The paper's released 1e-4 changes nothing.",
    ),
]
Covariance = Annotated[
    Path | None,
    _option(
        metavar="FILE",
        help="For rome: the file that key_covariance wrote for this layer. The embedded models do without: their own "
        "questions are taken.",
    ),
]
ReplaceBy = Annotated[
    str | None,
    _option("--replace", metavar="WORDS", help="The trace replaces the constraint by these, of as many tokens."),
]
Keep = Annotated[
    list[str] | None,
    _option(metavar="QUESTION", help="Compute the update so that it leaves this question alone; may be repeated."),
]
Reword = Annotated[
    list[str] | None,
    _option(metavar="QUESTION", help="The same in other words, to be answered by the target too; may be repeated."),
]
Ask = Annotated[
    list[str] | None,
    _option(
        metavar="QUESTION",
        help="Another question about the picture, whose answer is to stay; may be repeated. Default: in the embedded "
        "models other pictures, words, shapes, relations and colours, if the question is one of their facts.",
    ),
]
AskText = Annotated[
    list[str] | None, _option(metavar="QUESTION", help="The same without the picture; may be repeated.")
]
Sweep = Annotated[bool, typer.Option("--sweep", help="Also edit at every layer, and show where it works.")]
Save = Annotated[Path | None, _option(metavar="FILE", help="Keep the edit in this file, which Edit.load reads.")]


@dataclass(frozen=True)
class _Plan:
    """What is to be edited, where, and how."""

    target: str
    constraint: str | None
    layer: int | str
    position: str
    method: Method
    covariance: Path | None
    replace: str | None
    options: dict[str, Any]
    """Of `multedit` and `rome`."""
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
        if target is None:
            raise InputError("There is no target; say what the model is to answer: --target Boris.")
        if sweep and (keep or method is Method.rome):
            raise InputError("--sweep edits by multedit and without --keep; leave one of them out.")
        check_writable(output)
        _check_save(save)
        embedded = model in EMBEDDED
        where = position or (_EMBEDDED_POSITION if embedded else "auto")
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
        return _EMBEDDED_LAYER if embedded and position == _EMBEDDED_POSITION else "auto"
    if given == "auto":
        return given
    try:
        return int(given)
    except ValueError:
        raise InputError(f"--layer {given} is no layer; expected a number, or auto.") from None


def _check_save(path: Path | None) -> None:
    """Said before the work is done, not after."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        problem = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise InputError(f"--save {path} {problem}; expected a file name in an existing folder.")


# ---------------------------------------------------------------------- the edit


def _edit(model: HookedLLaVA, inputs: Inputs, plan: _Plan, others: Others) -> Edit:
    """The edit, not applied; whatever does not fit is found here."""
    from hooked_llava.editing import multedit, rome

    request = _request(inputs, plan)
    with busy("editing"):
        prepared, layer = _chosen_place(model, inputs, plan, request)
        position = prepared.words["position"]
        keep = about_the_picture(model, inputs, others.keep, others.template) if others.keep else None
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
) -> Any:
    with needs_figures():
        from hooked_llava.viz.pages.edit import STEPS, edit_page
    found = None
    if sweep:
        positions = ["constraint", "last"] if plan.constraint else ["last"]
        edited = made.method["position"]
        positions += [edited] if edited not in positions else []
        from hooked_llava.editing import edit_sweep

        with busy("editing at every layer"):
            trace = _trace(model, inputs, plan) if plan.constraint else None
            request = _request(inputs, plan)
            found = edit_sweep(model, request, probes, positions=positions, trace=trace, **plan.options)
    with shown_steps(len(STEPS)) as on_step:
        return edit_page(
            model, inputs, made, probes=probes, sweep=found, max_new_tokens=max_new_tokens, on_step=on_step
        )


def _show(question: str, page: Any, made: Edit, save: Path | None) -> None:
    """Both answers, what was changed, and how the other questions are answered."""
    from rich.markup import escape
    from rich.table import Table

    from hooked_llava.editing import size_text
    from hooked_llava.editing.evaluate import TO_CHANGE
    from hooked_llava.prompt.token_text import visible_token
    from hooked_llava.viz.figures.edit import small

    to, first, probes = out(), page.results["answers"], page.results["probes"]
    to.print(f"[dim]{escape(question)}[/dim]", soft_wrap=True)
    names = [escape(visible_token(token)) for token in first.token.values[:2]]
    for state, said in (("before", page.answer_before), ("after", page.answer)):
        p = [f"P({name}) {float(value):.3f}" for name, value in zip(names, first.sel(state=state).values, strict=False)]
        to.print(f"{state:<7} [bold]{escape(said) or '(nothing)'}[/bold]  [dim]{', '.join(p)}[/dim]", soft_wrap=True)
    method = made.method
    to.print(
        f"\n{method['name']}, layer {method['layer']}, position {method['position']}: {size_text(made)}\n",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("asked", no_wrap=True)
    table.add_column("should", no_wrap=True)
    for name in ("n", "right before", "after", "KL"):
        table.add_column(name, justify="right")
    for one in (probes.isel(probe=i) for i in range(probes.sizes["probe"])):
        numbers = f"{float(one.accuracy_before):.2f}", f"{float(one.accuracy):.2f}", small(float(one.kl))
        should = "change" if str(one.role.values) in TO_CHANGE else "stay"
        table.add_row(escape(str(one.probe.values)), should, str(int(one.n)), *numbers)
    to.print(table)
    to.print()
    _show_wrong(page.results["questions"])
    if save is not None:
        to.print(f"The edit is in [bold]{save}[/bold]; Edit.load reads it.", soft_wrap=True)


def _show_wrong(questions: Any) -> None:
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
