"""The command `hooked-llava`: ask a model about a picture, explain its answer, and check it against Hugging Face.

Everything heavy is imported inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hooked_llava.errors import HookedLLaVAError, InputError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from hooked_llava.input_batch import Inputs
    from hooked_llava.model import HookedLLaVA

EMBEDDED_MODEL = "tiny-shapes"
_LARGE = 'ask cat.jpg "What is this?" -m llava-hf/llava-1.5-7b-hf --dtype bfloat16'
EXIT_ERROR = 2
"""Exit status when something that was given does not fit."""
EXIT_DIFFERENT = 1
"""Exit status of `verify` when the two models differ."""


def _examples(*commands: str) -> str:
    """What stands below a command's options; an empty line is a line break there."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  hooked-llava {command}" for command in commands)])


app = typer.Typer(
    name="hooked-llava",
    help="Ask a LLaVA model about a picture, and see how it came to its answer.",
    epilog=_examples('ask demo "What color is the star?"', 'explain demo "What color is the star?" -o report.html')
    + "\n\nBundled pictures: demo, one-shape, two-shapes, five-shapes. The model tiny-shapes comes with the package, "
    "so all of this runs offline.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
        help="Conversation template: default (the model's own), chat, llava-1.5, vicuna-v1, plain; none: the question "
        "is the whole prompt, <image> included.",
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


@app.command(epilog=_examples('ask demo "What color is the star?"', 'ask "Who made the star?"', _LARGE))
def ask(
    first: First = None,
    second: Second = None,
    model: Model = EMBEDDED_MODEL,
    no_image: NoImage = False,
    template: TemplateName = "default",
    max_new_tokens: MaxNewTokens = 20,
    top: Top = 5,
    device: Device = "auto",
    dtype: DTypeOption = None,
) -> None:
    """Print the model's answer, and the most probable tokens it could have begun with."""
    with _clear_errors():
        image, question = _split(first, second, no_image)
        loaded, inputs = _prepare(model, image, question, template, device, dtype)
        with _busy("answering"):
            answer = loaded.generate(inputs, max_new_tokens=max_new_tokens)
            tokens = _next_tokens(loaded, inputs, top)
        _show_answer(question, answer, tokens)


@app.command(
    epilog=_examples(
        'explain demo "What color is the star?" -o report.html', 'explain demo "What color is the star?" --versus White'
    )
)
def explain(
    first: First = None,
    second: Second = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the page.")] = Path(
        "report.html"
    ),
    model: Model = EMBEDDED_MODEL,
    no_image: NoImage = False,
    answer: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="Explain the logit of this token. Default: the model's own first token."),
    ] = None,
    versus: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN", help="Explain why the answer and not this token: the difference of their logits."
        ),
    ] = None,
    template: TemplateName = "default",
    max_new_tokens: MaxNewTokens = 20,
    top: Top = 5,
    device: Device = "auto",
    dtype: DTypeOption = None,
) -> None:
    """Print the answer, and write a page that shows how the model came to it: one HTML file that needs no network."""
    with _clear_errors():
        image, question = _split(first, second, no_image)
        _check_writable(output)
        loaded, inputs = _prepare(model, image, question, template, device, dtype)
        report = _explain(loaded, inputs, answer=answer, baseline=versus, max_new_tokens=max_new_tokens, k=top)
        path = report.save(output)
        _show_answer(question, report.answer, report.results["next_tokens"])
        _out().print(f"The page is in [bold]{path}[/bold]; open it in a browser.", soft_wrap=True)


@app.command(epilog=_examples("verify tiny-shapes", "verify llava-hf/llava-1.5-7b-hf --dtype bfloat16"))
def verify(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="An embedded model, a folder, or a name on the hub.")
    ] = EMBEDDED_MODEL,
    device: Device = "auto",
    dtype: DTypeOption = None,
) -> None:
    """Run the same prompt through Hugging Face's own class and through ours, and compare every layer.

    The exit status is 0 if all activations are the same, 1 if any differs.
    """
    with _clear_errors():
        loaded = _load(model, device, dtype)
        with _busy("comparing with Hugging Face"):
            table = _verify(loaded, model)
        _show_parity(table)
    if not table.ok:
        raise typer.Exit(EXIT_DIFFERENT)


def _split(first: str | None, second: str | None, no_image: bool) -> tuple[str | None, str]:
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


def _prepare(
    name: str, image: str | None, question: str, template: str, device: str, dtype: DType | None
) -> tuple[HookedLLaVA, Inputs]:
    """The model, and the question as it takes it; what is wrong with the picture is said before the model is loaded."""
    from hooked_llava.pictures import load_picture

    picture = None if image is None else load_picture(_picture_path(image))
    model = _load(name, device, dtype)
    return model, model.prepare(question, picture, template=None if template == "none" else template)


def _picture_path(image: str) -> str:
    """A file, or where a bundled picture is; a file comes before a bundled picture of its name."""
    if Path(image).is_file():
        return image
    from hooked_llava.toy.pictures import SEEDS, picture_path

    if _is_bundled(image):
        return str(picture_path(Path(image).stem))
    raise InputError(
        f"There is no picture {image!r}: neither a file, nor a bundled picture ({', '.join(SEEDS)})."
        f"{did_you_mean(image, SEEDS)}"
    )


def _is_bundled(image: str) -> bool:
    from hooked_llava.toy.pictures import SEEDS

    return image in SEEDS or image in {f"{name}.png" for name in SEEDS}


def _load(name: str, device: str, dtype: DType | None) -> HookedLLaVA:
    with _busy(f"loading {name}"):
        import torch

        from hooked_llava.model import HookedLLaVA

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


def _next_tokens(model: HookedLLaVA, inputs: Inputs, top: int) -> Any:
    from hooked_llava.analysis import next_tokens

    return next_tokens(model, inputs, k=min(top, model.cfg.d_vocab))


def _explain(model: HookedLLaVA, inputs: Inputs, **options: Any) -> Any:
    """The report, with a bar that says which part of the work is being done."""
    with _busy("preparing to draw"):
        try:
            from hooked_llava.viz.report import STEPS
            from hooked_llava.viz.report import explain as make_report
        except ImportError as error:  # matplotlib is an extra
            raise InputError(f"The page cannot be drawn. {error}") from error
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_err(), transient=True) as progress:
        task = progress.add_task("starting", total=len(STEPS), completed=-1)
        return make_report(model, inputs, **options, on_step=lambda s: progress.update(task, description=s, advance=1))


def _verify(model: HookedLLaVA, name: str) -> Any:
    from transformers import LlavaForConditionalGeneration

    from hooked_llava.loading import resolve
    from hooked_llava.verify import verify as compare

    hf_model = LlavaForConditionalGeneration.from_pretrained(resolve(name), dtype=model.cfg.dtype)
    return compare(model, hf_model.eval().to(model.cfg.device))


def _check_writable(path: Path) -> None:
    """Said before the work is done, not after."""
    if path.is_dir() or not path.expanduser().parent.is_dir():
        problem = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise InputError(f"--output {path} {problem}; expected a file name in an existing folder.")


def _show_answer(question: str, answer: str, tokens: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    one = tokens.isel(prompt=0)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("first token")
    table.add_column("probability", justify="right")
    table.add_column("")
    for token, probability in zip(one["token"].values, one["probability"].values.tolist(), strict=True):
        bar = "█" * round(24 * probability) or "▏"
        table.add_row(escape(_visible(str(token))), f"{probability:.3f}", f"[cyan]{bar}[/cyan]")
    out = _out()
    out.print(f"[dim]{escape(question)}[/dim]", soft_wrap=True)
    out.print(f"[bold]{escape(answer) or '(nothing)'}[/bold]\n", soft_wrap=True)
    out.print(table)
    out.print()


def _visible(token: str) -> str:
    """A token as it can stand in a table: blanks and line breaks in quotes."""
    bare = token.strip(" ")
    return bare if bare.isprintable() and bare else repr(token)


def _show_parity(table: Any) -> None:
    from rich.text import Text

    _out().print(Text(str(table)), soft_wrap=True)


def _out() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _err() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@contextmanager
def _busy(what: str) -> Iterator[None]:
    """A spinner that says what is being done, on a terminal, for as long as it takes."""
    with _err().status(f"{what} …"):
        yield


@contextmanager
def _clear_errors() -> Iterator[None]:
    """What the library refuses becomes one line and exit status 2; anything else is a bug and keeps its traceback."""
    try:
        yield
    except HookedLLaVAError as error:
        from rich.text import Text

        _err().print(Text.assemble(("Error: ", "bold red"), str(error)), soft_wrap=True)
        raise typer.Exit(EXIT_ERROR) from None


if __name__ == "__main__":
    app()
