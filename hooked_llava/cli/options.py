"""Options and arguments that several commands have, one declaration each."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hooked_llava.options.window_readings import WINDOW_READINGS

EMBEDDED_MODEL = "tiny-shapes"


class DType(StrEnum):
    """How the weights are held."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def at_least(least: int, *names: str, **look: Any) -> Any:
    """An option that takes a whole number, `least` or more; `names` and `look` are as for `typer.Option`."""

    def read(given: str | int) -> int:
        try:
            number = int(given)
        except ValueError:
            number = least - 1
        if number < least:
            raise typer.BadParameter(f"{given} was given; expected a whole number, {least} or more.")
        return number

    return typer.Option(*names, parser=read, metavar="N", **look)


# Two optional arguments, told apart by how many are given: an image may be left out, a question may not.
First = Annotated[
    str | None,
    typer.Argument(
        metavar="IMAGE", help="An image: a file, or the name of a bundled one. Left out for questions without."
    ),
]
Second = Annotated[str | None, typer.Argument(metavar="QUESTION", help="What is asked, in quotes.")]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="An embedded model, a folder in Hugging Face format, or a name on the hub.",
    ),
]
NoImage = Annotated[bool, typer.Option("--no-image", help="Ask without an image; then only the question is given.")]
TemplateName = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Conversation template: default (the model's own), chat (the processor's), or llava-1.5, vicuna-v1 and the "
        "others of hooked_llava.prompt.templates; none: the question is the whole prompt, <image> included.",
    ),
]
MaxNewTokens = Annotated[int, at_least(1, help="Length of the answer in tokens, at most.")]
Device = Annotated[
    str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ...; auto takes an accelerator if there is one.")
]
DTypeOption = Annotated[
    DType | None, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16. Default: as the checkpoint says.")
]
WindowReading = StrEnum("WindowReading", list(WINDOW_READINGS))
TraceWindow = Annotated[int, at_least(1, help="Width of the window of layers that a causal trace restores together.")]
TraceWindowReading = Annotated[
    WindowReading,
    typer.Option(
        help="What the width counts. "
        + "; ".join(f"{name}: {one.meaning}" for name, one in WINDOW_READINGS.items())
        + "."
    ),
]
Top = Annotated[int, at_least(1, "--top", help="How many of the most probable tokens to show.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the page.")]
