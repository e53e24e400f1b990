"""What commands say on the terminal: answers, tables, progress, and errors in one line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hooked_llava.errors import HookedLLaVAError, InputError

if TYPE_CHECKING:
    import xarray as xr
    from rich.console import Console
    from rich.table import Table

EXIT_ERROR = 2
"""Exit status when something that was given does not fit."""


def examples(*commands: str) -> str:
    """What stands below a command's options; an empty line is a line break there."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  hooked-llava {command}" for command in commands)])


def said(question: str, answer: str) -> None:
    """The question, and the answer below it."""
    from rich.markup import escape

    out().print(f"[dim]{escape(question)}[/dim]", soft_wrap=True)
    out().print(f"[bold]{escape(answer) or '(nothing)'}[/bold]\n", soft_wrap=True)


def show_answer(question: str, answer: str, tokens: xr.Dataset) -> None:
    """Question, answer and a table of first tokens."""
    from rich.markup import escape

    from hooked_llava.prompt.token_text import visible_token

    said(question, answer)
    one = tokens.isel(prompt=0)
    table = new_table(["first token", "probability", ""], right=["probability"])
    for token, probability in zip(one["token"].values, one["probability"].values.tolist(), strict=True):
        bar = "█" * round(24 * probability) or "▏"
        table.add_row(escape(visible_token(token)), f"{probability:.3f}", f"[cyan]{bar}[/cyan]")
    show_table(table)


def new_table(columns: Sequence[str], *, right: Collection[str] = (), whole: Collection[str] = ()) -> Table:
    """A table without borders; columns of numbers are `right`, words of `whole` ones are not wrapped."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name in whole)
    return table


def show_table(table: Table) -> None:
    """The table, and an empty line."""
    out().print(table)
    out().print()


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


def say_sentences(sentences: Sequence[str]) -> None:
    """What was found, a sentence each, and an empty line."""
    for sentence in sentences:
        out().print(f"- {sentence}", soft_wrap=True, markup=False)
    out().print()


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
