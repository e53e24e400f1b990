"""`hooked-llava trace`: where the answer to a constraint comes back when one output is restored."""

from __future__ import annotations

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
    check_writable,
    clear_errors,
    examples,
    needs_figures,
    out,
    prepare,
    say_where,
    shown_steps,
    split_arguments,
)

if TYPE_CHECKING:
    from hooked_llava.experiments.corruptions import Corruption
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs

EPILOG = examples(
    'trace one-shape "Who made this shape?" --constraint "this shape" --replace "the ring"',
    'trace "Who made the star?" --constraint "the star" --window 3 -o trace.html',
)


class Way(StrEnum):
    """What the constraint's embeddings are corrupted by where no words replace it."""

    noise = "noise"
    mean = "mean"


def trace(
    first: First = None,
    second: Second = None,
    constraint: Annotated[
        list[str] | None,
        typer.Option(
            "--constraint", "-c", metavar="WORDS", help="Words of the question that are corrupted; may be repeated."
        ),
    ] = None,
    replace: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORDS", help="Replace the constraint by these, of as many tokens; once for all, or for each."
        ),
    ] = None,
    repeat: Annotated[
        bool, typer.Option("--repeat", help="Write the first token of --replace at each of the constraint's tokens.")
    ] = False,
    corruption: Annotated[Way, typer.Option(help="Without --replace: noise, or the mean embedding.")] = Way.noise,
    window: Annotated[int, typer.Option(min=1, metavar="N", help="Layers that are restored together.")] = 1,
    output: Output = Path("trace.html"),
    model: Model = EMBEDDED_MODEL,
    no_image: NoImage = False,
    template: TemplateName = "default",
    max_new_tokens: MaxNewTokens = 20,
    device: Device = "auto",
    dtype: DTypeOption = None,
) -> None:
    """Corrupt words of the question, restore one clean output at a time, and write a page of where the answer returns."""
    from hooked_llava.errors import InputError

    with clear_errors():
        image, question = split_arguments(first, second, no_image)
        if not constraint:
            raise InputError('There is no constraint; name words of the question: --constraint "this shape".')
        new = replace or []
        if repeat and not new:
            raise InputError("--repeat has nothing to repeat; give words with --replace.")
        if new and len(new) not in (1, len(constraint)):
            raise InputError(
                f"--replace is given {len(new)} times and --constraint {len(constraint)} times; give --replace once for all "
                "constraints, or once for each."
            )
        check_writable(output)
        loaded, inputs = prepare(model, image, question, template, device, dtype)
        page = _trace(loaded, inputs, constraint, _corruption(new, repeat, corruption), window, max_new_tokens)
        path = page.save(output)
        _show(question, page)
        say_where(path)


def _corruption(words: list[str], repeat: bool, way: Way) -> Corruption:
    from hooked_llava.experiments.corruptions import MeanEmbedding, Noise, Replace

    if words:
        return Replace(words if len(words) > 1 else words[0], repeat=repeat)
    return Noise() if way is Way.noise else MeanEmbedding()


def _trace(
    model: HookedLLaVA,
    inputs: Inputs,
    constraint: list[str],
    corruption: Corruption,
    window: int,
    max_new_tokens: int,
) -> Any:
    with needs_figures():
        from hooked_llava.viz.pages.trace import STEPS, trace_page
    with shown_steps(len(STEPS)) as on_step:
        return trace_page(
            model,
            inputs,
            constraint,
            corruption=corruption,
            window=window,
            max_new_tokens=max_new_tokens,
            on_step=on_step,
        )


def _show(question: str, page: Any) -> None:
    """The runs, and the best cell of each kind."""
    from rich.markup import escape
    from rich.table import Table

    from hooked_llava.analysis.causal_trace import best_cells, was_lowered
    from hooked_llava.prompt.token_text import visible_token

    found = page.results["trace"]
    to = out()
    to.print(f"[dim]{escape(question)}[/dim]", soft_wrap=True)
    to.print(f"[bold]{escape(page.answer) or '(nothing)'}[/bold]\n", soft_wrap=True)
    said = escape(found.corrupted_answer.strip() or repr(found.corrupted_answer))
    to.print(
        f"P({escape(found.answer)}) is {float(found.p_clean):.3f}; {escape(found.corruption)}, it is "
        f"{float(found.p_corrupted):.3f}, and the model says {said}.",
        soft_wrap=True,
    )
    if not was_lowered(found):
        to.print("[bold]The corruption does not lower the answer[/bold]: there is nothing to restore.", soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, justify in (("restored", "left"), ("best layer", "right"), ("at", "left"), ("probability", "right")):
        table.add_column(name, justify=justify)
    for cell in best_cells(found):
        tied = f", and {int(cell.n_tied)} other{'' if cell.n_tied == 1 else 's'} as much" if cell.n_tied else ""
        place = f"{visible_token(cell.label.values)} ({cell.role.values}){tied}"
        table.add_row(str(cell.kind.values), str(int(cell.layer)), escape(place), f"{float(cell.restored):.3f}")
    to.print(table)
    to.print()
