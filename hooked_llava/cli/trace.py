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
    from hooked_llava.input_batch import Inputs
    from hooked_llava.model import HookedLLaVA

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
        typer.Option(metavar="WORDS", help="Replace the constraint by these, of as many tokens; one for each."),
    ] = None,
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
        check_writable(output)
        loaded, inputs = prepare(model, image, question, template, device, dtype)
        page = _trace(loaded, inputs, constraint, replace or [], corruption, window, max_new_tokens)
        path = page.save(output)
        _show(question, page)
        say_where(path)


def _trace(
    model: HookedLLaVA,
    inputs: Inputs,
    constraint: list[str],
    replace: list[str],
    way: Way,
    window: int,
    max_new_tokens: int,
) -> Any:
    from hooked_llava.interventions.corruptions import MeanEmbedding, Noise, Replace

    with needs_figures():
        from hooked_llava.viz.trace_page import STEPS, trace_page
    embedded = Noise() if way is Way.noise else MeanEmbedding()
    corruption = Replace(replace) if replace else embedded
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
    if float(found.lowered_by) < 0.1:
        to.print("[bold]The corruption does not lower the answer[/bold]: there is nothing to restore.", soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, justify in (("restored", "left"), ("best layer", "right"), ("at", "left"), ("probability", "right")):
        table.add_column(name, justify=justify)
    for kind in found.kind.values.tolist():
        one = found.sel(kind=kind)
        layer, position = divmod(int(one.restored.values.argmax()), one.sizes["position"])
        cell = one.isel(layer=layer, position=position)
        place = f"{str(cell.label.values).strip()} ({cell.role.values})"
        table.add_row(kind, str(int(cell.layer)), escape(place), f"{float(cell.restored):.3f}")
    to.print(table)
    to.print()
