"""`hooked-llava trace`: where the answer to a constraint comes back when one output is restored."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hooked_llava.cli.common import check_writable, prepare, split_arguments
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
    at_least,
)
from hooked_llava.cli.terminal import (
    clear_errors,
    examples,
    needs_figures,
    new_table,
    out,
    said,
    say_where,
    show_table,
    shown_steps,
)
from hooked_llava.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

    from hooked_llava.experiments.corruptions import Corruption
    from hooked_llava.viz import TracePage

EPILOG = examples(
    'trace one-shape "Who made this shape?" --constraint "this shape" --replace "the ring"',
    'trace "Who made the star?" --constraint "the star" --window 3 -o trace.html',
)


class Way(StrEnum):
    """What the constraint's embeddings are corrupted by where no words replace it."""

    noise = "noise"
    mean = "mean"


Constraints = Annotated[
    list[str] | None,
    typer.Option(
        "--constraint", "-c", metavar="WORDS", help="Words of the question that are corrupted; may be repeated."
    ),
]
Replacements = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WORDS", help="Replace the constraint by these, of as many tokens; once for all, or for each."
    ),
]
Repeat = Annotated[
    bool, typer.Option("--repeat", help="Write the first token of --replace at each of the constraint's tokens.")
]
WayOption = Annotated[Way, typer.Option(help="Without --replace: noise, or the mean embedding.")]
Window = Annotated[int, typer.Option(parser=at_least(1), metavar="N", help="Layers that are restored together.")]


def trace(
    first: First = None,
    second: Second = None,
    constraint: Constraints = None,
    replace: Replacements = None,
    repeat: Repeat = False,
    corruption: WayOption = Way.noise,
    window: Window = 1,
    output: Output = Path("trace.html"),
    model: Model = EMBEDDED_MODEL,
    no_image: NoImage = False,
    template: TemplateName = "default",
    max_new_tokens: MaxNewTokens = 20,
    device: Device = "auto",
    dtype: DTypeOption = None,
) -> None:
    """Corrupt words of the question, restore one clean output at a time, and write a page of where the answer returns."""
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
        with needs_figures():
            from hooked_llava.viz.pages.trace import STEPS, trace_page
        with shown_steps(len(STEPS)) as on_step:
            page = trace_page(
                loaded,
                inputs,
                constraint,
                corruption=_corruption(new, repeat, corruption),
                window=window,
                max_new_tokens=max_new_tokens,
                on_step=on_step,
            )
        path = page.save(output)
        _show(question, page)
        say_where(path)


def _corruption(words: list[str], repeat: bool, way: Way) -> Corruption:
    from hooked_llava.experiments.corruptions import MeanEmbedding, Noise, Replace

    if words:
        return Replace(words if len(words) > 1 else words[0], repeat=repeat)
    return Noise() if way is Way.noise else MeanEmbedding()


def _show(question: str, page: TracePage) -> None:
    """All runs: the clean one, the corrupted one, and of the restored ones the best of each kind, and of each layer."""
    from rich.markup import escape

    from hooked_llava.analysis.causal_trace import best_cells, was_lowered
    from hooked_llava.prompt.token_text import visible_token

    found = page.results["trace"]
    said(question, page.answer)
    other = escape(found.corrupted_answer.strip() or repr(found.corrupted_answer))
    out().print(
        f"P({escape(found.answer)}) is {float(found.p_clean):.3f}; {escape(found.corruption)}, it is "
        f"{float(found.p_corrupted):.3f}, and the model says {other}.",
        soft_wrap=True,
    )
    if not was_lowered(found):
        out().print(
            "[bold]The corruption does not lower the answer[/bold]: there is nothing to restore.", soft_wrap=True
        )
    table = new_table(["restored", "best layer", "at", "probability"], right=["best layer", "probability"])
    for cell in best_cells(found):
        tied = f", and {int(cell.n_tied)} other{'' if cell.n_tied == 1 else 's'} as much" if cell.n_tied else ""
        place = f"{visible_token(cell.label.values)} ({cell.role.values}){tied}"
        table.add_row(str(cell.kind.values), str(int(cell.layer)), escape(place), f"{float(cell.restored):.3f}")
    show_table(table)
    _show_layers(found)


def _show_layers(trace: xr.Dataset) -> None:
    """The restored runs: of each layer and kind the best position."""
    from rich.markup import escape

    from hooked_llava.analysis.causal_trace import best_cells
    from hooked_llava.prompt.token_text import visible_token

    kinds, rows = trace.kind.values.tolist(), {layer: [] for layer in trace.layer.values.tolist()}
    for cell in best_cells(trace, by_layer=True):
        rows[int(cell.layer)].append(f"{float(cell.restored):.3f} {visible_token(cell.label.values)}")
    out().print(
        f"{trace.attrs['runs']} runs with one output restored; of each layer the best position:", soft_wrap=True
    )
    table = new_table(["layer", *kinds], right=["layer"])
    for layer, texts in rows.items():
        table.add_row(str(layer), *map(escape, texts))
    show_table(table)
