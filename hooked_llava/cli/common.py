"""What the commands share: options, loading the model, the answer on the terminal, and errors in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hooked_llava.errors import HookedLLaVAError, InputError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs

EMBEDDED_MODEL = "tiny-shapes"
EXIT_ERROR = 2
"""Exit status when something that was given does not fit."""


def examples(*commands: str) -> str:
    """What stands below a command's options; an empty line is a line break there."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  hooked-llava {command}" for command in commands)])


class DType(StrEnum):
    """How the weights are held."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


# Two optional arguments, told apart by how many are given: a picture may be left out, a question may not.
First = Annotated[
    str | None,
    typer.Argument(
        metavar="IMAGE", help="A picture: a file, or the name of a bundled one. Left out for questions without."
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
NoImage = Annotated[bool, typer.Option("--no-image", help="Ask without a picture; then only the question is given.")]
TemplateName = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Conversation template: default (the model's own), chat (the processor's), or llava-1.5, vicuna-v1 and the "
        "others of hooked_llava.prompt.templates; none: the question is the whole prompt, <image> included.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Length of the answer at most.")]
Device = Annotated[
    str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ...; auto takes an accelerator if there is one.")
]
DTypeOption = Annotated[
    DType | None, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16. Default: as the checkpoint says.")
]
Top = Annotated[int, typer.Option(min=1, metavar="N", help="How many of the most probable tokens to show.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the page.")]


def split_arguments(first: str | None, second: str | None, no_image: bool) -> tuple[str | None, str]:
    """The picture, if any, and the question."""
    if first is None:
        raise InputError("There is no question; give one in quotes, after a picture if it is about one.")
    if second is None:
        if not no_image and (_is_bundled(first) or Path(first).is_file()):
            raise InputError(f"There is a picture, {first!r}, and no question; give one after it, in quotes.")
        return None, first
    if no_image:
        raise InputError(
            f"--no-image leaves only a question, and {first!r} stands before it; give the question alone, in quotes."
        )
    return first, second


def prepare(
    name: str, image: str | None, question: str, template: str, device: str, dtype: DType | None
) -> tuple[HookedLLaVA, Inputs]:
    """The model, and the question as it takes it; what is wrong with the picture is said before the model is loaded."""
    picture = None if image is None else open_picture(image)
    model = load_model(name, device, dtype)
    return model, model.prepare(question, picture, template=template_name(template))


def template_name(template: str) -> str | None:
    """The option as `prepare` takes it."""
    return None if template == "none" else template


def open_picture(image: str) -> Image:
    """A file, or a bundled picture by its name; raises `InputError` for anything else."""
    from hooked_llava.prompt.images import load_picture

    return load_picture(_picture_path(image))


def _picture_path(image: str) -> str:
    """A file, or where a bundled picture is; a file comes before a bundled picture of its name."""
    if Path(image).is_file():
        return image
    from hooked_llava.toy.pictures import NAMES, picture_path

    if _is_bundled(image):
        return str(picture_path(Path(image).stem))
    raise InputError(
        f"There is no picture {image!r}: neither a file, nor a bundled picture ({', '.join(NAMES)})."
        f"{did_you_mean(image, NAMES)}"
    )


def _is_bundled(image: str) -> bool:
    from hooked_llava.toy.pictures import NAMES

    return image in NAMES or image in {f"{name}.png" for name in NAMES}


def load_model(name: str, device: str, dtype: DType | None) -> HookedLLaVA:
    """The model, while a spinner turns."""
    with busy(f"loading {name}"):
        import torch

        from hooked_llava.model.llava import HookedLLaVA

        _quiet()
        kind = None if dtype is None else getattr(torch, dtype.value)
        return HookedLLaVA.from_pretrained(name, device=_device(device), dtype=kind)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}); "
            "expected cpu, cuda, cuda:1, ... or auto."
        ) from None
    return name


def _quiet() -> None:
    """Our own progress is shown; the bars of the libraries below would be a second one."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def check_writable(path: Path) -> None:
    """Said before the work is done, not after."""
    if path.is_dir() or not path.expanduser().parent.is_dir():
        problem = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise InputError(f"--output {path} {problem}; expected a file name in an existing folder.")


def likely_tokens(model: HookedLLaVA, inputs: Inputs, top: int) -> Any:
    """The most probable first tokens of the answer."""
    from hooked_llava.analysis import next_tokens

    return next_tokens(model, inputs, k=min(top, model.cfg.d_vocab))


def show_answer(question: str, answer: str, tokens: Any) -> None:
    """Question, answer and a table of first tokens, on the terminal."""
    from rich.markup import escape
    from rich.table import Table

    from hooked_llava.prompt.token_text import visible_token

    one = tokens.isel(prompt=0)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("first token")
    table.add_column("probability", justify="right")
    table.add_column("")
    for token, probability in zip(one["token"].values, one["probability"].values.tolist(), strict=True):
        bar = "█" * round(24 * probability) or "▏"
        table.add_row(escape(visible_token(token)), f"{probability:.3f}", f"[cyan]{bar}[/cyan]")
    to = out()
    to.print(f"[dim]{escape(question)}[/dim]", soft_wrap=True)
    to.print(f"[bold]{escape(answer) or '(nothing)'}[/bold]\n", soft_wrap=True)
    to.print(table)
    to.print()


@contextmanager
def shown_steps(n: int) -> Iterator[Callable[[str], None]]:
    """A bar over the n parts of making a page; what it yields is called with the name of each part as it begins."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err(), transient=True) as progress:
        task = progress.add_task("starting", total=n, completed=-1)
        yield lambda step: progress.update(task, description=step, advance=1)


@contextmanager
def needs_figures() -> Iterator[None]:
    """A spinner while what draws is imported; matplotlib is an extra, and its absence an `InputError`."""
    with busy("preparing to draw"):
        try:
            yield
        except ImportError as error:
            raise InputError(f"The page cannot be drawn. {error}") from error


def say_where(page: Path) -> None:
    """The last line of every command that writes a page."""
    out().print(f"The page is in [bold]{page}[/bold]; open it in a browser.", soft_wrap=True)


def out() -> Console:
    """What was asked for."""
    from rich.console import Console

    return Console(highlight=False)


def err() -> Console:
    """Progress and errors."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A spinner that says what is being done, on a terminal, for as long as it takes."""
    with err().status(f"{what} …"):
        yield


@contextmanager
def clear_errors() -> Iterator[None]:
    """What the library refuses becomes one line and exit status 2; anything else is a bug and keeps its traceback."""
    try:
        yield
    except HookedLLaVAError as error:
        from rich.text import Text

        err().print(Text.assemble(("Error: ", "bold red"), str(error)), soft_wrap=True)
        raise typer.Exit(EXIT_ERROR) from None
