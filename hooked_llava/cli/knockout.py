"""`hooked-llava knockout`: which edges an answer travels along, for one question or a table of them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hooked_llava.cli.common import check_writable, load_model, prepare, split_arguments, template_name
from hooked_llava.cli.options import (
    EMBEDDED_MODEL,
    Device,
    DTypeOption,
    First,
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
    say_where,
    show_table,
    shown_steps,
)
from hooked_llava.errors import InputError
from hooked_llava.options.knockout_metrics import KNOCKOUT_METRICS, OF_THE_ANSWER

if TYPE_CHECKING:
    from hooked_llava.datasets import StudyRow
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs
    from hooked_llava.viz import KnockoutPage

EPILOG = examples(
    'knockout demo "What color is the star?" --box 20,40,36,55',
    'knockout demo "What color is the star?" --edge "image->question|rest|last" --window 2',
    "knockout --dataset tiny-shapes --limit 20 -o flow.html",
    "knockout --dataset GQA_FOLDER --images GQA_IMAGES --results flow.safetensors -m llava-hf/llava-1.5-7b-hf "
    "--template vicuna-v1",
)
Window = Annotated[
    int | None,
    typer.Option(
        parser=at_least(1), metavar="N", help="Layers that are blocked together. Default: the paper's share, 9 of 40."
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(parser=at_least(1), metavar="N", help="Questions of each kind. Default: all; of tiny-shapes 50."),
]


Metric = StrEnum("Metric", OF_THE_ANSWER)
TableName = Annotated[
    str | None,
    typer.Option(
        metavar="TABLE",
        help="A table instead of one question: one of the released GQA files, the folder they are in, or tiny-shapes.",
    ),
]
MetricOption = Annotated[
    Metric,
    typer.Option(
        help="What is compared. "
        + "; ".join(f"{name}: {KNOCKOUT_METRICS[name].meaning}" for name in OF_THE_ANSWER)
        + "."
    ),
]
# None where they are not given, so that one that does nothing can be refused.
BatchSize = Annotated[
    int | None, typer.Option(parser=at_least(1), metavar="N", help="Questions of a table at once. Default: 8.")
]
Length = Annotated[
    int | None, typer.Option(parser=at_least(1), metavar="N", help="Length of the answer at most. Default: 20.")
]
_OWN_TABLE = "tiny-shapes"
_DEFAULT_LIMIT = 50


Boxes = Annotated[
    list[str] | None,
    typer.Option(metavar="X0,Y0,X1,Y1", help="Where the object is, in the image's pixels; may be repeated."),
]
EdgeNames = Annotated[
    list[str] | None,
    typer.Option(
        metavar="EDGE", help='Block this edge, such as "image->last"; may be repeated. Default: the paper\'s.'
    ),
]
ImageFolder = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where the table's images are.")]
Every = Annotated[bool, typer.Option("--all", help="Also measure questions that are answered wrongly.")]
Results = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Keep the table's result in this file; an interrupted run goes on from it."),
]


def knockout(
    first: First = None,
    second: Second = None,
    box: Boxes = None,
    edge: EdgeNames = None,
    window: Window = None,
    metric: MetricOption = Metric("relative_change"),
    dataset: TableName = None,
    images: ImageFolder = None,
    limit: Limit = None,
    every: Every = False,
    results: Results = None,
    batch_size: BatchSize = None,
    output: Output = Path("knockout.html"),
    model: Model = EMBEDDED_MODEL,
    no_image: NoImage = False,
    template: TemplateName = "default",
    max_new_tokens: Length = None,
    device: Device = "auto",
    dtype: DTypeOption = None,
) -> None:
    """Block attention between parts of the prompt, window by window, and write a page of what that does to the answer.

    The paper's prompts are those of LLaVA-1.5's older template: --template vicuna-v1. A position whose every key is blocked
    attends to nothing; in the paper's released code it attends to all of them equally.
    """
    with clear_errors():
        check_writable(output)
        how: dict[str, Any] = {"metric": metric.value}
        if dataset is not None:
            _refuse_arguments(dataset, first, box, no_image=no_image or None, max_new_tokens=max_new_tokens)
            rows, tail = _rows(dataset, images, limit)
            loaded = load_model(model, device, dtype)
            how |= {"images": images, "out": results, "only_correct": not every, "batch_size": batch_size or 8, **tail}
            page = _study(loaded, rows, edge, window, how | {"template": template_name(template)})
        else:
            _refuse_table_options(images=images, limit=limit, results=results, all=every or None, batch_size=batch_size)
            boxes = [_box(text) for text in box or ()]
            image, question = split_arguments(first, second, no_image)
            loaded, inputs = prepare(model, image, question, template, device, dtype)
            inputs = inputs.with_boxes(object=boxes) if boxes else inputs
            page = _one(loaded, inputs, edge, window, how | {"max_new_tokens": max_new_tokens or 20})
        path = page.save(output)
        _show(page)
        say_where(path)


def _refuse_arguments(dataset: str, first: str | None, box: list[str] | None, **given: Any) -> None:
    if first is not None:
        raise InputError(f"--dataset {dataset} brings its own questions; leave {first!r} out, or --dataset.")
    if box:
        raise InputError("--box belongs to one question; a table has the boxes of its objects.")
    if named := _options(given):
        raise InputError(f"{named[0]} belongs to one question; leave it out, or --dataset.")


def _rows(dataset: str, images: Path | None, limit: int | None) -> tuple[list[StudyRow], dict[str, str]]:
    """The table's questions, and the instruction that follows each."""
    if dataset == _OWN_TABLE and not Path(dataset).exists():
        from hooked_llava.toy.gqa_tables import gqa_rows

        if images is not None:
            raise InputError("--images belongs to a table that names its images; tiny-shapes draws its own.")
        return gqa_rows(limit or _DEFAULT_LIMIT), {}
    from hooked_llava.datasets import GQA_TAIL, read_gqa

    rows = read_gqa(dataset, limit=limit)
    if images is None:
        raise InputError(f"The table {dataset!r} names its images; say where they are with --images FOLDER.")
    if not images.is_dir():
        raise InputError(f"--images {images}: there is no such folder; give the one that the table's images are in.")
    return rows, {"tail": GQA_TAIL}


def _refuse_table_options(**given: Any) -> None:
    if named := _options(given):
        raise InputError(f"{named[0]} belongs to a table of questions; give one with --dataset.")


def _options(given: dict[str, Any]) -> list[str]:
    """Those that were given, as they are typed."""
    return [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]


def _box(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 4:
        raise InputError(f"--box {text} is no box; expected four numbers, X0,Y0,X1,Y1, in the image's pixels.")
    return numbers


def _one(
    model: HookedLLaVA, inputs: Inputs, edges: list[str] | None, window: int | None, settings: dict[str, Any]
) -> KnockoutPage:
    with needs_figures():
        from hooked_llava.viz.pages.knockout import STEPS, knockout_page
    with shown_steps(len(STEPS)) as on_step:
        return knockout_page(model, inputs, edges, window, on_step=on_step, **settings)


def _study(
    model: HookedLLaVA, rows: list[StudyRow], edges: list[str] | None, window: int | None, settings: dict[str, Any]
) -> KnockoutPage:
    with needs_figures():
        from hooked_llava.viz.pages.knockout import study_page
    from hooked_llava.analysis import flow_study

    chosen: dict[str, Any] = {} if edges is None else {"edges": edges}
    return study_page(flow_study(model, rows, window=window, **chosen, **settings))


def _show(page: KnockoutPage) -> None:
    """The answer, and for each edge what blocking it does."""
    from rich.markup import escape

    found, summary = page.results["knockout"], page.results["summary"]
    if "kind" in found.dims:
        every = {"kind": found.kind.values[-1]}  # all kinds together
        found, summary = found.sel(every), summary.sel(every)
    if "statistic" in found.dims:
        found = found.sel(statistic="mean")
    out().print(f"[dim]{escape(page.question)}[/dim]", soft_wrap=True)
    if page.answer:
        out().print(f"[bold]{escape(page.answer)}[/bold]", soft_wrap=True)
    out().print()
    numbers = ("in all layers", "deepest window", "at")
    table = new_table(["blocked", *numbers], right=numbers)
    percent = str(found.effect.attrs.get("units", "")).startswith("%")
    for name in found.edge.values.tolist():
        total, depth = (float(x.sel(edge=name)) for x in (found.total_effect, summary.depth))
        layer = float(summary.peak_layer.sel(edge=name))
        at = f"layer {layer:.0f}" if summary.half_width.sel(edge=name) > 0 else ""
        table.add_row(escape(name), *(_shown(value, percent=percent) for value in (total, depth)), at)
    show_table(table)


def _shown(value: float, *, percent: bool) -> str:
    """A change with its sign; a dash for an edge that no question has."""
    if value != value:
        return "–"
    return f"{round(value, 1) + 0.0:+.1f} %" if percent else f"{round(value, 3) + 0.0:+.3f}"  # no -0.0
