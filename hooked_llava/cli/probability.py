"""`hooked-llava probability`: at which layer the answer appears, for one question or a table of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hooked_llava.cli.command import TypedOptions, as_arguments, command
from hooked_llava.cli.common import PromptOptions, check_writable
from hooked_llava.cli.options import MaxNewTokens, Output
from hooked_llava.cli.tables import OptionalTable
from hooked_llava.cli.terminal import escape, needs_figures, say, say_where, show_table, shown_steps

if TYPE_CHECKING:
    import xarray as xr

    from hooked_llava.viz import ProbabilityPage

Answer = Annotated[str | None, typer.Option(metavar="WORD", help="Follow this word. Default: the model's own answer.")]
FalseOption = Annotated[str | None, typer.Option(metavar="WORD", help="Follow this one beside it.")]


@dataclass(frozen=True, kw_only=True)
class ProbabilityOptions:
    """Which words of one question are followed."""

    answer: Answer = None
    false_option: FalseOption = None


@command(
    'probability demo "What color is the star?"',
    'probability demo "Is the star red or blue?" --answer blue --false-option red',
    "probability --dataset tiny-shapes --limit 20",
    "probability --dataset GQA_FOLDER --images GQA_IMAGES --results probability.safetensors -m llava-hf/llava-1.5-7b-hf "
    "--template vicuna-v1",
)
def probability(
    typed: TypedOptions,
    words: ProbabilityOptions,
    table: OptionalTable,
    prompt: PromptOptions,
    max_new_tokens: MaxNewTokens = 20,
    output: Output = Path("probability.html"),
) -> None:
    """Follow the answer's probability through the layers, in lower case and capitalised, and write a page of the curves."""
    check_writable(output)
    if table.given(typed, prompt, "max_new_tokens", "answer", "false_option"):
        page = _table_page(table, prompt)
    else:
        page = _prompt_page(prompt, words, max_new_tokens)
    if page is not None:
        path = page.save(output)
        _show(page)
        say_where(path)


def _prompt_page(prompt: PromptOptions, words: ProbabilityOptions, max_new_tokens: int) -> ProbabilityPage:
    model, inputs = prompt.prepare()
    with needs_figures():
        from hooked_llava.viz.pages.probability import STEPS, probability_page
    with shown_steps(len(STEPS)) as on_step:
        how = as_arguments(words)
        return probability_page(model, inputs, max_new_tokens=max_new_tokens, on_step=on_step, **how)


def _table_page(table: OptionalTable, prompt: PromptOptions) -> ProbabilityPage | None:
    """The page of a table; of several processes, all of which have the result, the first one's alone."""
    rows, tail = table.questions()
    model = prompt.load()
    with needs_figures():
        from hooked_llava.viz.pages.probability import probability_study_page
    from hooked_llava.analysis import probability_study
    from hooked_llava.machine.processes import is_first_process

    result = probability_study(model, rows, **table.study_options(prompt), **tail)
    return probability_study_page(result) if is_first_process() else None


def _show(page: ProbabilityPage) -> None:
    """The answer, and the curves in numbers, in both readings; of a table those of all kinds together."""
    found = page.results["summary"].isel({"kind": -1}, missing_dims="ignore")
    say(f"[dim]{escape(page.question)}[/dim]")
    if page.answer:
        say(f"[bold]{escape(page.answer)}[/bold]")
    say()
    rows = [
        [form, *(text for norm in ("none", "final") for text in _numbers(found.sel(norm=norm, form=form)))]
        for form in found.form.values.tolist()
        if bool(found.peak.sel(form=form).notnull().any())
    ]
    columns = ["raw: at most", "raw: in layer", "final norm: at most", "final norm: in layer"]
    show_table(["first token", *columns], rows, right=columns)
    for norm, reading in (("none", "raw"), ("final", "with the final norm")):
        at = float(found.overtakes.sel(norm=norm))
        if at == at:
            say(f"Read {reading}, the capitalised form is above the other from layer {at:.0f} on.")


def _numbers(summary: xr.Dataset) -> tuple[str, str]:
    return f"{float(summary.peak):.3f}", f"{float(summary.peak_layer):.0f}"
