"""`hooked-llava knockout`: which edges an answer travels along, for one question or a table of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hooked_llava.cli.command import TypedOptions, as_arguments, command
from hooked_llava.cli.common import PromptOptions, check_writable
from hooked_llava.cli.options import MaxNewTokens, Output, at_least
from hooked_llava.cli.tables import OptionalTable
from hooked_llava.cli.terminal import escape, needs_figures, say, say_where, show_table, shown_steps
from hooked_llava.errors import InputError
from hooked_llava.options.knockout_metrics import KNOCKOUT_METRICS, OF_THE_ANSWER

if TYPE_CHECKING:
    from hooked_llava.viz import KnockoutPage

Metric = StrEnum("Metric", OF_THE_ANSWER)
EdgeNames = Annotated[
    list[str] | None,
    typer.Option(
        "--edge",
        metavar="EDGE",
        help='Change this edge, such as "image->last"; may be repeated. Default: the paper\'s.',
    ),
]
Window = Annotated[
    int | None, at_least(1, help="Layers in which an edge is changed together. Default: the paper's share, 9 of 40.")
]
MetricOption = Annotated[
    Metric,
    typer.Option(
        help="What is compared. "
        + "; ".join(f"{name}: {KNOCKOUT_METRICS[name].meaning}" for name in OF_THE_ANSWER)
        + "."
    ),
]
Factor = Annotated[
    float,
    typer.Option(
        metavar="NUMBER",
        help="What the attention along an edge is multiplied by, the rest of each row growing or shrinking so that it still sums "
        "to 1: 0 blocks the edge, 0.3 weakens it, 2 strengthens it.",
    ),
]
Boxes = Annotated[
    list[str] | None,
    typer.Option("--box", metavar="X0,Y0,X1,Y1", help="Where the object is, in the image's pixels; may be repeated."),
]


@dataclass(frozen=True, kw_only=True)
class KnockoutOptions:
    """Arguments of `attention_knockout`."""

    edges: EdgeNames = None
    window: Window = None
    metric: MetricOption = Metric.relative_change
    factor: Factor = 0.0


@command(
    'knockout demo "What color is the star?" --box 20,40,36,55',
    'knockout demo "What color is the star?" --edge "image->question|rest|last" --window 2',
    'knockout demo "What color is the star?" --factor 0.3',
    "knockout --dataset tiny-shapes --limit 20 -o flow.html",
    "knockout --dataset GQA_FOLDER --images GQA_IMAGES --results flow.safetensors -m llava-hf/llava-1.5-7b-hf "
    "--template vicuna-v1",
)
def knockout(
    typed: TypedOptions,
    options: KnockoutOptions,
    table: OptionalTable,
    prompt: PromptOptions,
    boxes: Boxes = None,
    max_new_tokens: MaxNewTokens = 20,
    output: Output = Path("knockout.html"),
) -> None:
    """Block or weight attention between parts of the prompt, window by window, and write a page of what that does to the answer.

    Several processes share a table: torchrun --nproc-per-node 4 -m hooked_llava knockout --dataset ...

    The paper's prompts are those of LLaVA-1.5's older template: --template vicuna-v1. A position whose every key is blocked
    attends to nothing; in the paper's released code it attends to all of them equally.
    """
    check_writable(output)
    if table.given(typed, prompt, "max_new_tokens"):
        typed.refuse(["boxes"], "belongs to one question; a table has the boxes of its objects.")
        page = _table_page(table, prompt, options)
    else:
        page = _prompt_page(prompt, options, boxes or [], max_new_tokens)
    if page is not None:
        path = page.save(output)
        _show(page)
        say_where(path)


def _prompt_page(
    prompt: PromptOptions, options: KnockoutOptions, boxes: list[str], max_new_tokens: int
) -> KnockoutPage:
    drawn = [_box(text) for text in boxes]
    model, inputs = prompt.prepare()
    inputs = inputs.with_boxes(object=drawn) if drawn else inputs
    with needs_figures():
        from hooked_llava.viz.pages.knockout import STEPS, knockout_page
    with shown_steps(len(STEPS)) as on_step:
        return knockout_page(model, inputs, max_new_tokens=max_new_tokens, on_step=on_step, **as_arguments(options))


def _table_page(table: OptionalTable, prompt: PromptOptions, options: KnockoutOptions) -> KnockoutPage | None:
    """The page of a table; of several processes, all of which have the result, the first one's alone."""
    rows, tail = table.questions()
    model = prompt.load()
    with needs_figures():
        from hooked_llava.viz.pages.knockout import study_page
    from hooked_llava.analysis import flow_study
    from hooked_llava.machine.processes import is_first_process

    how: dict[str, Any] = as_arguments(options) | tail
    if options.edges is None:
        del how["edges"]
    result = flow_study(model, rows, **table.study_options(prompt), **how)
    return study_page(result) if is_first_process() else None


def _box(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 4:
        raise InputError(f"--box {text} is no box; expected four numbers, X0,Y0,X1,Y1, in the image's pixels.")
    return numbers


def _show(page: KnockoutPage) -> None:
    """The answer, and for each edge what blocking or weighting it does."""
    from hooked_llava.experiments.edges import edge_change

    # Of all kinds together, and the means.
    of_all = {"kind": -1, "statistic": 0}
    found, summary = (page.results[name].isel(of_all, missing_dims="ignore") for name in ("knockout", "summary"))
    say(f"[dim]{escape(page.question)}[/dim]")
    if page.answer:
        say(f"[bold]{escape(page.answer)}[/bold]")
    say()
    percent = str(found.effect.attrs.get("units", "")).startswith("%")
    rows = []
    for name in found.edge.values.tolist():
        total, depth = (float(x.sel(edge=name)) for x in (found.total_effect, summary.depth))
        layer = float(summary.peak_layer.sel(edge=name))
        at = f"layer {layer:.0f}" if summary.half_width.sel(edge=name) > 0 else ""
        rows.append([escape(name), *(_shown(value, percent=percent) for value in (total, depth)), at])
    numbers = ("in all layers", "deepest window", "at")
    show_table([edge_change(found.attrs.get("factor", 0.0)), *numbers], rows, right=numbers)


def _shown(value: float, *, percent: bool) -> str:
    """A change with its sign; a dash for an edge that no question has."""
    if value != value:
        return "–"
    return f"{value:+z.1f} %" if percent else f"{value:+z.3f}"  # z: no -0.0
