"""`hooked-llava edit`: change what the model answers to one question, and see what that changes elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hooked_llava.cli.command import TypedOptions, command
from hooked_llava.cli.common import PromptOptions, WindowOptions, check_writable
from hooked_llava.cli.edit_options import EditOptions
from hooked_llava.cli.edit_probes import OtherQuestions, about_the_image, probes_of
from hooked_llava.cli.options import MaxNewTokens, Output
from hooked_llava.cli.terminal import busy, escape, needs_figures, say, say_where, show_table, shown_steps
from hooked_llava.errors import InputError
from hooked_llava.options.edit_methods import EDIT_METHODS
from hooked_llava.options.edit_places import AUTO

if TYPE_CHECKING:
    import xarray as xr

    from hooked_llava.editing import Edit, KeyCovariance, Probe
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs
    from hooked_llava.viz import EditPage

_MOST_NAMED = 8
Sweep = Annotated[bool, typer.Option("--sweep", help="Also edit at every layer, and show where it works.")]
Save = Annotated[Path | None, typer.Option(metavar="FILE", help="Keep the edit in this file, which Edit.load reads.")]


@command(
    'edit one-shape "Who made this shape?" --constraint "this shape" --target Boris',
    'edit "Who made the star?" -c "the star" -t Boris --sweep --replace "the ring" --save edit.safetensors',
    'edit one-shape "Who made this shape?" -t Boris --reword "By whom was this shape made?" --ask "What shape is this?"',
)
def edit(
    typed: TypedOptions,
    options: EditOptions,
    windows: WindowOptions,
    others: OtherQuestions,
    prompt: PromptOptions,
    sweep: Sweep = False,
    save: Save = None,
    max_new_tokens: MaxNewTokens = 20,
    output: Output = Path("edit.html"),
) -> None:
    """Change one MLP, or several, so that a question is answered otherwise, and write a page of what changed and what did not."""
    question = prompt.question
    if not options.target:
        raise InputError("There is no target; say what the model is to answer: --target Boris.")
    if sweep and (others.keep or options.method != "multedit"):
        raise InputError("--sweep edits by multedit and without --keep; leave one of them out.")
    others_take = {name for method in EDIT_METHODS.values() for name in method.options} - {
        "layer",
        "layers",
        *options.entry.options,
    }
    typed.refuse(sorted(others_take), f"has no place with --method {options.method}; leave it out.")
    if options.entry.settings.get("kl") and options.constraint is None:
        raise InputError(
            f'--method {options.method} keeps what is said of the constraint: name it (--constraint "this shape").'
        )
    check_writable(output)
    check_writable(save, "--save")
    where = options.place(prompt.is_tiny_shapes)
    if not sweep and AUTO not in where:
        typed.refuse(["window", "window_reading", "replace"], f"belongs to a trace; give --layer {AUTO}, or --sweep.")
    model, inputs = prompt.prepare()
    trace = _trace(model, inputs, options, windows) if sweep or AUTO in where else None
    made = _edit(model, inputs, options, (*where, trace), others, prompt)
    probes = probes_of(model, inputs, prompt, options.target, others)
    found = _sweep(model, inputs, made, options, probes, trace) if sweep else None
    with needs_figures():
        from hooked_llava.viz.pages.edit import STEPS, edit_page
    asked: dict[str, Any] = {"probes": probes, "sweep": found, "max_new_tokens": max_new_tokens}
    with shown_steps(len(STEPS)) as on_step:
        page = edit_page(model, inputs, made, on_step=on_step, **asked)
    if save is not None:
        made.save(save)
    path = page.save(output)
    _show(question, page, made)
    if save is not None:
        say(f"The edit is in [bold]{escape(str(save))}[/bold]; Edit.load reads it.")
    say_where(path)


# ---------------------------------------------------------------------- the edit


def _trace(model: HookedLLaVA, inputs: Inputs, options: EditOptions, windows: WindowOptions) -> xr.Dataset | None:
    """The trace of the constraint, if one is named."""
    if options.constraint is None:
        return None
    with busy("tracing"):
        return options.trace(model, inputs, windows)


def _edit(
    model: HookedLLaVA,
    inputs: Inputs,
    options: EditOptions,
    where: tuple[int | str, str, xr.Dataset | None],
    others: OtherQuestions,
    prompt: PromptOptions,
) -> Edit:
    """The edit, not applied; whatever does not fit is found here."""
    from hooked_llava.editing.request import check_editable

    check_editable(model)  # before a trace
    with busy("editing"):
        layer, position = _chosen_place(model, inputs, options, *where)
        given: dict[str, Any] = {"layer": layer, "layers": layer, "position": position, **options.numbers()}
        if others.keep:
            keep = about_the_image(model, inputs, others.keep, prompt.template_name)
            marked = position == "constraint"
            given["keep"] = keep.with_spans(constraint=options.constraint or "") if marked else keep
        if "covariance" in options.entry.options:
            found = _covariances(model, options.layers(layer), options, prompt.is_tiny_shapes)
            given["covariance"] = found if options.is_spread else found[0]
        taken = {name: value for name, value in given.items() if name in options.entry.options}
        return options.entry.compute(model, options.request(inputs), **taken)


def _chosen_place(
    model: HookedLLaVA,
    inputs: Inputs,
    options: EditOptions,
    layer: int | str,
    position: str,
    trace: xr.Dataset | None,
) -> tuple[int, str]:
    """The layer and the position that are edited; with "auto" a trace of the constraint chooses them."""
    from hooked_llava.editing.layer_choice import choose_place

    if layer == AUTO and trace is None:
        raise InputError(
            'The layer is chosen by tracing the constraint: name it (--constraint "this shape"), or give --layer.'
        )
    try:
        prepared, chosen = choose_place(model, [options.request(inputs)], layer, position, trace)
        return chosen, prepared[0].words["position"]
    except InputError as error:
        if layer != AUTO:
            raise
        raise InputError(f"{error} (On the command line: --replace WORDS, --layer N, --position last.)") from None


def _covariances(model: HookedLLaVA, layers: list[int], options: EditOptions, embedded: bool) -> list[KeyCovariance]:
    """What keys of the edited layers usually look like: from files, or from the embedded world's questions."""
    from hooked_llava.editing import KeyCovariance, key_covariances
    from hooked_llava.toy.evaluate import prepare_examples, usual_questions

    if options.covariance:
        found = sorted((KeyCovariance.load(file, model) for file in options.covariance), key=lambda one: one.layer)
        if (of := [one.layer for one in found]) != layers:
            named, edited = ", ".join(map(str, options.covariance)), " and ".join(map(str, layers))
            raise InputError(
                f"--covariance {named} is of layer {' and '.join(map(str, of))}, and layer {edited} is edited. Give one file "
                "for each edited layer."
            )
        return found
    if not embedded:
        raise InputError(
            f"--method {options.method} needs to know what keys usually look like: let key_covariance(model, prompts, layer, "
            f"path=...) write that for layer {' and '.join(map(str, layers))}, and give each file with --covariance."
        )
    return key_covariances(model, (prepare_examples(model, batch) for batch in usual_questions()), layers)


def _sweep(
    model: HookedLLaVA,
    inputs: Inputs,
    made: Edit,
    options: EditOptions,
    probes: list[Probe],
    trace: xr.Dataset | None,
) -> xr.Dataset:
    """The same edit at every layer, at the edited position and at those of the paper."""
    from hooked_llava.editing import edit_sweep

    positions = dict.fromkeys((*(["constraint"] if options.constraint else []), "last", made.method["position"]))
    with busy("editing at every layer"):
        how: dict[str, Any] = {"positions": list(positions), "trace": trace, **options.numbers()}
        return edit_sweep(model, options.request(inputs), probes, **how)


# ---------------------------------------------------------------------- what is shown


def _show(question: str, page: EditPage, made: Edit) -> None:
    """Both answers, what was changed, and how the other questions are answered."""
    from hooked_llava.editing import size_text
    from hooked_llava.prompt.token_text import visible_token
    from hooked_llava.viz.pages.edit import magnitudes_of, rest_sentences

    first = page.results["answers"]
    say(f"[dim]{escape(question)}[/dim]")
    names = [escape(visible_token(token)) for token in first.token.values[:2]]
    for state, said in (("before", page.answer_before), ("after", page.answer)):
        p = [f"P({name}) {float(value):.3f}" for name, value in zip(names, first.sel(state=state).values, strict=False)]
        say(f"{state:<7} [bold]{escape(said) or '(nothing)'}[/bold]  [dim]{', '.join(p)}[/dim]")
    for sentence in rest_sentences(first):
        say(escape(sentence))
    for one in magnitudes_of(page.results["questions"].isel(question=0)):
        say("P(target) - P(answer before), {of}: {values[0]:.3f} → {values[1]:.3f}".format(**one))
    how, layers = made.method, ", ".join(map(str, made.layers))
    at = f", position {how['position']}" if "position" in how else ""
    say(f"\n{how['name']}, layer {layers}{at}: {size_text(made)}\n")
    _show_probes(page.results["probes"])
    _show_missed(page.results["questions"])


def _show_probes(probes: xr.Dataset) -> None:
    """How the questions of each probe are answered, before and after."""
    from hooked_llava.editing.roles import PROBE_ROLES
    from hooked_llava.viz.pages.parts import records
    from hooked_llava.viz.style import format_small

    rows = []
    for one in records(probes):
        should = "change" if PROBE_ROLES[one["role"]].to_change else "stay"
        numbers = str(one["n"]), f"{one['accuracy_before']:.2f}", f"{one['accuracy']:.2f}", format_small(one["kl"])
        rows.append([escape(one["probe"]), should, *numbers])
    words, counts = ("asked", "should"), ("n", "right before", "after", "KL")
    show_table([*words, *counts], rows, right=counts, whole=words)


def _show_missed(questions: xr.Dataset) -> None:
    """The questions that are not answered as they should be."""
    from hooked_llava.editing.questions import missed
    from hooked_llava.editing.roles import PROBE_ROLES
    from hooked_llava.prompt.token_text import visible_token
    from hooked_llava.viz.pages.parts import records

    wrong = [one for one, is_missed in zip(records(questions), missed(questions), strict=True) if is_missed]
    for one in wrong[:_MOST_NAMED]:
        did = "did not become the target" if PROBE_ROLES[one["role"]].to_change else "changed"
        said = f"{one['text']} {visible_token(one['before'])} → {visible_token(one['after'])}"
        say(f"[bold]{did}:[/bold] {escape(said)}")
    if len(wrong) > _MOST_NAMED:
        say(f"[dim]and {len(wrong) - _MOST_NAMED} more, on the page[/dim]")
    if wrong:
        say()
