"""`hooked-llava patch`: a page that shows where the difference between two images' answers is carried."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hooked_llava.cli.command import as_arguments, command
from hooked_llava.cli.common import ModelOptions, check_writable, open_image
from hooked_llava.cli.options import MaxNewTokens, Output, at_least
from hooked_llava.cli.terminal import escape, needs_figures, say, say_where, shown_steps
from hooked_llava.options.directions import DIRECTIONS

if TYPE_CHECKING:
    from hooked_llava.viz import PatchingReport

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
    typer.Option(
        "--versus", metavar="TOKEN", help="Minus that of this one. Default: the answer to the corrupted image."
    ),
]
MaxRuns = Annotated[
    int, at_least(0, help="Patches are measured one by one up to so many runs; beyond that they are estimated.")
]


@dataclass(frozen=True, kw_only=True)
class PatchOptions:
    """Arguments of `viz.patching_report`."""

    direction: WayOption = Way.denoise
    answer: Answer = None
    baseline: Versus = None
    max_runs: MaxRuns = 2000
    max_new_tokens: MaxNewTokens = 20


@command(
    'patch demo demo-blue-star "What color is the star?" -o patching.html',
    'patch demo five-shapes "What color is the star?" --direction noise',
)
def patch(
    clean_image: CleanImage,
    corrupted_image: CorruptedImage,
    question: Question,
    options: PatchOptions,
    asked: ModelOptions,
    output: Output = Path("patching.html"),
) -> None:
    """Print the answers to two images, and write a page that shows which activations carry the difference.

    Every layer, token, head and patch of one run is put into the other run by itself.
    """
    check_writable(output)
    images = [open_image(image) for image in (clean_image, corrupted_image)]
    model = asked.load()
    pair = [model.prepare(question, image, template=asked.template_name) for image in images]
    with needs_figures():
        from hooked_llava.viz.pages.patching import STEPS, patching_report
    with shown_steps(len(STEPS)) as on_step:
        report = patching_report(model, *pair, on_step=on_step, **as_arguments(options))
    path = report.save(output)
    _show_answers(question, report)
    say_where(path)


def _show_answers(question: str, report: PatchingReport) -> None:
    metric = report.results["heads"].attrs
    lines = [("clean", report.answer, metric["clean"]), ("corrupted", report.corrupted_answer, metric["corrupted"])]
    say(f"[dim]{escape(question)}[/dim]")
    for name, said, value in lines:
        say(f"{name:<9}  [bold]{escape(said) or '(nothing)'}[/bold]  [dim]{value:+.2f}[/dim]")
    say("[dim]The number: the logit of the first answer's token minus that of the second's.[/dim]\n")
