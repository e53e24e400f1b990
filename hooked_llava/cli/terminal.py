"""What commands say on the terminal: answers, tables, progress, and warnings and errors in a line each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hooked_llava.errors import HookedLLaVAError, HookedLLaVAWarning, InputError

if TYPE_CHECKING:
    import xarray as xr

EXIT_ERROR = 2
"""Exit status when something that was given does not fit."""


def examples(*commands: str) -> str:
    """What is printed below a command's options; an empty line is a line break there."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  hooked-llava {command}" for command in commands)])


def say(text: str = "") -> None:
    """A line of what was asked for, with rich's markup; not wrapped, so that it can be copied."""
    out().print(text, soft_wrap=True)


def say_answer(question: str, answer: str) -> None:
    """The question, and the answer below it."""
    say(f"[dim]{escape(question)}[/dim]")
    say(f"[bold]{escape(answer) or '(nothing)'}[/bold]\n")


def show_answer(question: str, answer: str, tokens: xr.Dataset) -> None:
    """Question, answer and a table of first tokens."""
    from hooked_llava.prompt.token_text import visible_token

    say_answer(question, answer)
    one = tokens.isel(prompt=0)
    rows = []
    for token, probability in zip(one["token"].values, one["probability"].values.tolist(), strict=True):
        bar = "█" * round(24 * probability) or "▏"
        rows.append([escape(visible_token(token)), f"{probability:.3f}", f"[cyan]{bar}[/cyan]"])
    show_table(["first token", "probability", ""], rows, right=["probability"])


def show_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[str] = (),
    whole: Collection[str] = (),
) -> None:
    """A table without borders, and an empty line; columns of numbers are `right`, words of `whole` ones are not wrapped."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name in whole)
    for row in rows:
        table.add_row(*row)
    out().print(table)
    say()


def say_sentences(sentences: Sequence[str]) -> None:
    """What was found, a sentence each, and an empty line."""
    for sentence in sentences:
        say(escape(f"- {sentence}"))
    say()


def say_where(page: Path) -> None:
    """The last line of every command that writes a page."""
    say(f"The page is in [bold]{escape(str(page))}[/bold]; open it in a browser.")


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


def out() -> Console:
    """What was asked for."""
    return Console(highlight=False)


def err() -> Console:
    """Progress, warnings and errors."""
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
        with clear_warnings():
            yield
    except HookedLLaVAError as error:
        _say_line("Error", "bold red", str(error))
        raise typer.Exit(EXIT_ERROR) from None


@contextmanager
def clear_warnings() -> Iterator[None]:
    """What the library warns of is said at the end, a line each and once, without a place in the code."""
    said: dict[str, None] = {}
    with warnings.catch_warnings():
        others = warnings.showwarning
        warnings.simplefilter("always", HookedLLaVAWarning)

        def show(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
            if issubclass(category, HookedLLaVAWarning):
                said[str(message)] = None
            else:
                others(message, category, *where, **more)  # type: ignore[arg-type]

        warnings.showwarning = show
        try:
            yield
        finally:
            for message in said:
                _say_line("Warning", "bold yellow", message)


def _say_line(kind: str, style: str, message: str) -> None:
    err().print(Text.assemble((f"{kind}: ", style), message), soft_wrap=True)
