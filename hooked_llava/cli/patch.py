"""`hooked-llava patch`: a page that shows where the difference between two images' answers is carried."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from hooked_llava.cli.common import check_writable, load_model, open_image, template_name
from hooked_llava.cli.options import (
    EMBEDDED_MODEL,
    Device,
    DTypeOption,
    MaxNewTokens,
    Model,
    Output,
    TemplateName,
    at_least,
)
from hooked_llava.cli.terminal import clear_errors, examples, needs_figures, out, say_where, shown_steps
from hooked_llava.options.directions import DIRECTIONS, Direction

if TYPE_CHECKING:
    from hooked_llava.viz import PatchingReport

EPILOG = examples(
    'patch demo demo-blue-star "What color is the star?" -o patching.html',
    'patch demo five-shapes "What color is the star?" --direction noise',
)


Way = StrEnum("Way", list(DIRECTIONS))
CleanImage = Annotated[
    str, typer.Argument(metavar="CLEAN_IMAGE", help="An image: a file, or the name of a bundled one.")
]
CorruptedImage = Annotated[
    str, typer.Argument(metavar="CORRUPTED_IMAGE", help="Another, about which the answer is another.")
]
Question = Annotated[str, typer.Argument(metavar="QUESTION", help="What is asked about both, in quotes.")]
WayOption = Annotated[Way, typer.Option(help=" ".join(f"{name}: {way.meaning}" for name, way in DIRECTIONS.items()))]
Answer = Annotated[
    str | None,
    typer.Option(metavar="TOKEN", help="Follow the logit of this token. Default: the answer to the clean image."),
]
Versus = Annotated[
    str | None,
    typer.Option(metavar="TOKEN", help="Minus that of this one. Default: the answer to the corrupted image."),
]
MaxRuns = Annotated[
    int,
    typer.Option(
        parser=at_least(0),
        metavar="N",
        help="Patches are measured one by one up to so many runs; beyond that they are estimated.",
    ),
]


def patch(
    clean_image: CleanImage,
    corrupted_image: CorruptedImage,
    question: Question,
    output: Output = Path("patching.html"),
    model: Model = EMBEDDED_MODEL,
    direction: WayOption = Way("denoise"),
    answer: Answer = None,
    versus: Versus = None,
    max_runs: MaxRuns = 2000,
    template: TemplateName = "default",
    max_new_tokens: MaxNewTokens = 20,
    device: Device = "auto",
    dtype: DTypeOption = None,
) -> None:
    """Print the answers to two images, and write a page that shows which activations carry the difference.

    Every layer, token, head and patch of one run is put into the other run by itself.
    """
    with clear_errors():
        check_writable(output)
        images = [open_image(image) for image in (clean_image, corrupted_image)]
        loaded = load_model(model, device, dtype)
        pair = [loaded.prepare(question, image, template=template_name(template)) for image in images]
        with needs_figures():
            from hooked_llava.viz.pages.patching import STEPS, patching_report
        with shown_steps(len(STEPS)) as on_step:
            report = patching_report(
                loaded,
                *pair,
                answer=answer,
                baseline=versus,
                direction=cast("Direction", direction.value),
                max_runs=max_runs,
                max_new_tokens=max_new_tokens,
                on_step=on_step,
            )
        path = report.save(output)
        _show_answers(question, report)
        say_where(path)


def _show_answers(question: str, report: PatchingReport) -> None:
    from rich.markup import escape

    metric = report.results["heads"].attrs
    lines = [("clean", report.answer, metric["clean"]), ("corrupted", report.corrupted_answer, metric["corrupted"])]
    out().print(f"[dim]{escape(question)}[/dim]", soft_wrap=True)
    for name, said, value in lines:
        shown = escape(said) or "(nothing)"
        out().print(f"{name:<9}  [bold]{shown}[/bold]  [dim]{value:+.2f}[/dim]", soft_wrap=True)
    out().print("[dim]The number: the logit of the first answer's token minus that of the second's.[/dim]\n")
