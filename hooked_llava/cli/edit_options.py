"""The options of `hooked-llava edit` alone."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

# Where edits of the embedded world's facts take best, see benchmarks/editing.py.
EMBEDDED_LAYER, EMBEDDED_POSITION = 3, "last"


class Method(StrEnum):
    """How the update is computed."""

    multedit = "multedit"
    rome = "rome"


Target = Annotated[str | None, typer.Option("--target", "-t", metavar="WORDS", help="What the model is to answer.")]
ConstraintWords = Annotated[
    str | None,
    typer.Option("--constraint", "-c", metavar="WORDS", help="Words of the question that the fact is about."),
]
Layer = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        help="The layer whose MLP is edited; auto: where a causal trace of the constraint finds that the MLP's output at "
        f"the edited position restores most. Default: auto; in the embedded models, at position last, {EMBEDDED_LAYER}, "
        "where edits carry over best to other images and words, and change hardly anything else.",
    ),
]
Position = Annotated[
    str | None,
    typer.Option(
        metavar="WHERE",
        help="constraint: the constraint's last token, as in the paper; or a span, such as last or question, whose last "
        f"token it is; auto: the constraint or the last position, where the trace's MLPs restore more. Default: auto; in the "
        f"embedded models {EMBEDDED_POSITION}, since hardly any edit at the constraint reaches the answer there.",
    ),
]
MethodOption = Annotated[
    Method,
    typer.Option(help="multedit, or rome, which also takes into account what keys usually look like (--covariance)."),
]
Lambda = Annotated[
    float | None,
    typer.Option(metavar="X", help="Weight of the update's size against its fit. Default: 0.01; 0 for rome."),
]
Clamp = Annotated[
    float,
    typer.Option(
        metavar="X",
        help="Longest change of the MLP's output, in lengths of that output. The paper's released 1e-4 changes nothing.",
    ),
]
Covariance = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="For rome: the file that key_covariance wrote for this layer. The embedded models do without: their own "
        "questions are taken.",
    ),
]
ReplaceBy = Annotated[
    str | None,
    typer.Option("--replace", metavar="WORDS", help="The trace replaces the constraint by these, of as many tokens."),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(metavar="QUESTION", help="Compute the update so that it leaves this question alone; may be repeated."),
]
Reword = Annotated[
    list[str] | None,
    typer.Option(
        metavar="QUESTION", help="The same in other words, to be answered by the target too; may be repeated."
    ),
]
Ask = Annotated[
    list[str] | None,
    typer.Option(
        metavar="QUESTION",
        help="Another question about the image, whose answer is to stay; may be repeated. Default: in the embedded "
        "models other images, words, shapes, relations and colors, if the question is one of their facts.",
    ),
]
AskText = Annotated[
    list[str] | None, typer.Option(metavar="QUESTION", help="The same without the image; may be repeated.")
]
Sweep = Annotated[bool, typer.Option("--sweep", help="Also edit at every layer, and show where it works.")]
Save = Annotated[Path | None, typer.Option(metavar="FILE", help="Keep the edit in this file, which Edit.load reads.")]
