"""`hooked-llava explain`: a page that shows how an answer came about."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

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
    Top,
)
from hooked_llava.cli.terminal import (
    clear_errors,
    examples,
    needs_figures,
    say_sentences,
    say_where,
    show_answer,
    shown_steps,
)
from hooked_llava.options.patch_maps import PATCH_MAPS

EPILOG = examples(
    'explain demo "What color is the star?" -o report.html',
    'explain demo "What color is the star?" --versus White',
    'explain demo "What color is the star?" --patches relevancy',
)


PatchMethod = StrEnum("PatchMethod", list(PATCH_MAPS))
Answer = Annotated[
    str | None,
    typer.Option(metavar="TOKEN", help="Explain the logit of this token. Default: the model's own first token."),
]
Versus = Annotated[
    str | None,
    typer.Option(metavar="TOKEN", help="Explain why the answer and not this token: the difference of their logits."),
]
Patches = Annotated[
    PatchMethod, typer.Option(metavar="METHOD", help=f"How the patch map is made: {', '.join(PatchMethod)}.")
]
WithOcclusion = Annotated[
    bool | None,
    typer.Option(
        "--occlusion/--no-occlusion",
        help="Draw occlusion beside the patch map. It runs the model about once for each patch. Default: up to 256 patches.",
    ),
]


def explain(
    first: First = None,
    second: Second = None,
    output: Output = Path("report.html"),
    model: Model = EMBEDDED_MODEL,
    no_image: NoImage = False,
    answer: Answer = None,
    versus: Versus = None,
    patches: Patches = PatchMethod("log_increase"),
    occlusion: WithOcclusion = None,
    template: TemplateName = "default",
    max_new_tokens: MaxNewTokens = 20,
    top: Top = 5,
    device: Device = "auto",
    dtype: DTypeOption = None,
) -> None:
    """Print the answer, and write a page that shows how the model came to it: one HTML file that needs no network."""
    with clear_errors():
        image, question = split_arguments(first, second, no_image)
        check_writable(output)
        loaded, inputs = prepare(model, image, question, template, device, dtype)
        with needs_figures():
            from hooked_llava.viz.pages.explain import STEPS
            from hooked_llava.viz.pages.explain import explain as explained
        with shown_steps(len(STEPS)) as on_step:
            report = explained(
                loaded,
                inputs,
                answer=answer,
                baseline=versus,
                max_new_tokens=max_new_tokens,
                k=top,
                patches=patches.value,
                occlusion=occlusion,
                on_step=on_step,
            )
        path = report.save(output)
        show_answer(question, report.answer, report.results["next_tokens"])
        say_sentences(report.summary)
        say_where(path)
