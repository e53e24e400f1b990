"""A table of questions in the place of one: which, how much of it, and how it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from hooked_llava.cli.command import TypedOptions
from hooked_llava.cli.common import ModelOptions, PromptOptions
from hooked_llava.cli.options import at_least
from hooked_llava.cli.terminal import escape, say
from hooked_llava.errors import InputError

if TYPE_CHECKING:
    from hooked_llava.datasets import StudyRow

OWN_TABLE = "tiny-shapes"
"""The name under which the embedded world's own table is asked for."""
_DEFAULT_LIMIT = 50


def table_option(files: str, instead: str = " instead of one question") -> Any:
    """The option that names a table; `files` says which released ones it reads, `instead` what it takes the place of."""
    help_ = f"A table{instead}: one of the released {files} files, the folder they are in, or {OWN_TABLE}."
    return typer.Option(metavar="TABLE", help=help_)


TableName = Annotated[str | None, table_option("GQA or POPE")]
ImageFolder = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where the table's images are.")]
Limit = Annotated[int | None, at_least(1, help="Questions of each kind. Default: all; of tiny-shapes 50.")]
Every = Annotated[bool, typer.Option("--all", help="Also measure questions that are answered wrongly.")]
Results = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Keep the table's result in this file; an interrupted run goes on from it."),
]
BatchSize = Annotated[int, at_least(1, help="Questions of a table at once.")]


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """A table of questions, and how it is asked.

    Attributes:
        takes (ClassVar[tuple[str, ...]]): The formats that the command reads, by their names in `TABLE_FORMATS`.
        needs (ClassVar[str]): Why it takes no others, as a sentence.
    """

    takes: ClassVar[tuple[str, ...]] = ("GQA", "POPE")
    needs: ClassVar[str] = "Its questions have no answers to compare with"

    dataset: TableName = None
    images: ImageFolder = None
    limit: Limit = None
    results: Results = None
    batch_size: BatchSize = 8

    @property
    def is_own(self) -> bool:
        """Whether it is the embedded world's own table; a file of its name comes before it."""
        return self.dataset == OWN_TABLE and not Path(OWN_TABLE).exists()

    def own_rows(self, n: int) -> list[StudyRow]:
        """So many questions of each kind of the embedded world's own table."""
        from hooked_llava.toy.gqa_tables import gqa_rows

        return gqa_rows(n)

    def check_rows(self, rows: Sequence[StudyRow]) -> None:
        """Raise `InputError` for rows that the command cannot do with."""

    def questions(self) -> tuple[list[StudyRow], dict[str, str]]:
        """The table's questions, and what `datasets.study` must know of it: the instruction that follows each.

        What reading it has to say is said, of several processes by one. Raises `InputError` for a table that the command does not
        take, and for images that are not where they should be.
        """
        from hooked_llava.datasets.formats import table_format
        from hooked_llava.machine.processes import is_first_process

        table, images = str(self.dataset), self.images
        if self.is_own:
            if images is not None:
                raise InputError(f"--images belongs to a table that names its images; {OWN_TABLE} draws its own.")
            return self.own_rows(self.limit or _DEFAULT_LIMIT), {}
        known = table_format(table, self.takes, needs=self.needs, own=OWN_TABLE)
        if images is None:
            raise InputError(f"The table {table!r} names its images; say where they are with --images FOLDER.")
        if not images.is_dir():
            raise InputError(
                f"--images {images}: there is no such folder; give the one that the table's images are in."
            )
        rows, note = known.read(table, self.limit)
        self.check_rows(rows)
        if note and is_first_process():
            say(f"[dim]{escape(note)}[/dim]")
        return rows, {"tail": known.tail}

    def study_options(self, model: ModelOptions) -> dict[str, Any]:
        """Arguments of `datasets.study`."""
        return {
            "images": self.images,
            "out": self.results,
            "batch_size": self.batch_size,
            "template": model.template_name,
        }


@dataclass(frozen=True, kw_only=True)
class OptionalTable(TableOptions):
    """A table in the place of one question, of which as a rule only what is answered correctly is measured."""

    every: Every = False

    def given(self, typed: TypedOptions, prompt: PromptOptions, *of_one_question: str) -> bool:
        """Whether a table is asked for; raises `InputError` for options that belong to one question, or to a table alone."""
        if self.dataset is None:
            of_tables = [field.name for field in fields(self)]
            typed.refuse(of_tables, "belongs to a table of questions; give one with --dataset.")
            return False
        if prompt.first is not None:
            raise InputError(
                f"--dataset {self.dataset} brings its own questions; leave {prompt.first!r} out, or --dataset."
            )
        typed.refuse(["no_image", *of_one_question], "belongs to one question; leave it out, or --dataset.")
        return True

    def study_options(self, model: ModelOptions) -> dict[str, Any]:
        """Arguments of `datasets.study`."""
        return super().study_options(model) | {"only_correct": not self.every}
